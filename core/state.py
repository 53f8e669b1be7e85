"""Training state: everything that a resumed run needs, as one pytree."""

from collections.abc import Callable
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


def init_state(init_fn: Any, key: jax.Array, tx: optax.GradientTransformation, mesh: Mesh, *given: Any) -> TrainState:
    """Builds the state already placed on the mesh: shapes first, then one compiled initialisation.

    Args:
      init_fn: (key, *given) -> (params, extra).
      given: trees of weights that the parameters start from. What init_fn closes over instead becomes part of the
        compiled program.
    """
    placement = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(init_fn, key, tx, mesh, *given))
    return jax.jit(_make_build_fn(init_fn, tx), out_shardings=placement)(key, *given)


def abstract_state(
    init_fn: Any, key: jax.Array, tx: optax.GradientTransformation, mesh: Mesh, *given: Any
) -> TrainState:
    """Shapes, dtypes and shardings of `init_state`'s result as ShapeDtypeStructs; nothing is computed."""
    abstract = jax.eval_shape(_make_build_fn(init_fn, tx), key, *given)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        abstract,
        shardings(abstract, mesh),
    )


def _make_build_fn(init_fn: Any, tx: optax.GradientTransformation) -> Callable[..., TrainState]:
    def build(key: jax.Array, *given: Any) -> TrainState:
        params, extra = init_fn(key, *given)
        ema = jax.tree.map(jnp.copy, params)
        return TrainState(jnp.zeros((), jnp.int32), params, ema, tx.init(params), extra)

    return build
