"""Training state: everything that a resumed run needs, as one pytree."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from core.mesh import shardings


@flax.struct.dataclass
class TrainState:
    """State between two steps.

    Attributes:
      step: number of updates done, int32 scalar.
      params: trained parameters.
      ema_params: their exponential moving average, what is evaluated.
      opt_state: the optimizer's.
      extra: what the loss function keeps beside parameters (running means, pseudo-label centres, a frozen teacher).
    """

    step: jax.Array
    params: Any
    ema_params: Any
    opt_state: Any
    extra: Any


def init_state(init_fn: Any, key: jax.Array, tx: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Builds the state already placed on the mesh: shapes first, then one compiled initialisation.

    Args:
      init_fn: key -> (params, extra).
    """

    def build(key: jax.Array) -> TrainState:
        params, extra = init_fn(key)
        ema = jax.tree.map(jnp.copy, params)
        return TrainState(jnp.zeros((), jnp.int32), params, ema, tx.init(params), extra)

    abstract = jax.eval_shape(build, key)
    return jax.jit(build, out_shardings=shardings(abstract, mesh))(key)
