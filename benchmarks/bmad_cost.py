"""What the detector costs on each BMAD set, computed from shapes and published counts, not measured.

  python -m benchmarks.bmad_cost [--preset=base]

Prints the tables of docs/bmad.md. Work: the matrix products, 2 FLOPs a multiply-add, of the traced gradient (forward
and backward of one view for each task, and the teacher's trunk), of the traced optimizer (once an update, all of it on
each device) and of the traced scoring of all views. Memory: what the backward pass keeps, from JAX's own residuals.
All traced as on a GPU, nothing is run.
"""

import argparse
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp

from configs.mtl_moe import bmad as recipe
from core.optim import build_optimizer
from core.tree import num_params
from input_pipeline.bmad import BMAD
from mtl_moe.losses import make_loss_fn
from mtl_moe.scoring import make_score_fn
from mtl_moe.system import System, build_system

# Dense peaks by the vendors' data sheets; the share of it that a training reaches is the guess that hours hang on.
PEAK_BF16 = {"H100/H200": 989e12, "8 x TPU v5e": 8 * 197e12}
PEAK_FLOAT32 = {"H100/H200": 494e12, "8 x TPU v5e": 8 * 197e12}  # of scoring, optimizer: TF32; bfloat16 passes
CHIPS = {"H100/H200": 1, "8 x TPU v5e": 8}
SHARES = (0.4, 0.1)


def product_flops(fn: Callable[..., Any], *args: Any) -> int:
    """FLOPs of all matrix products, ragged ones included, of `fn` traced on shapes.

    Raises:
      ValueError: for a product in a while loop, which runs nobody knows how often.
    """

    def count(jaxpr: Any, times: int | None) -> int:
        total = 0
        for eqn in jaxpr.eqns:
            name, inner = eqn.primitive.name, times
            if name in ("dot_general", "ragged_dot_general"):
                if times is None:
                    raise ValueError(f"expected products outside of while loops only, found {eqn}")
                total += 2 * times * _multiply_adds(eqn)
            if name == "while":
                inner = None
            elif name == "scan" and times is not None:
                inner = times * eqn.params["length"]
            total += sum(count(v.jaxpr, inner) for v in eqn.params.values() if hasattr(v, "jaxpr"))
        return total

    return count(jax.make_jaxpr(fn)(*args).jaxpr, 1)


def _multiply_adds(eqn: Any) -> int:
    """Left elements times free right elements: each row of a ragged product meets the matrix of one group only."""
    left, right = (variable.aval.shape for variable in eqn.invars[:2])
    numbers, groups = eqn.params.get("dimension_numbers"), ()
    if eqn.primitive.name == "ragged_dot_general":
        ragged = eqn.params["ragged_dot_dimension_numbers"]
        numbers, groups = ragged.dot_dimension_numbers, ragged.rhs_group_dimensions
    (_, contracted), (_, batched) = numbers
    bound = {*contracted, *batched, *groups}
    return math.prod(left) * math.prod(size for axis, size in enumerate(right) if axis not in bound)


def as_on_gpu(system: System) -> tuple[System, Any]:
    """The system on one device, experts' products without the padding of tiles, and the shapes of its state."""
    state = system.abstract_state(build_optimizer(system.config.optim, system.config.train.num_steps))
    return dataclasses.replace(system, model=system.model.clone(mesh=None, dispatch="ragged")), state


def on_gpu() -> Any:
    """While tracing: on a CPU activations are float32, and attention and experts are written otherwise."""
    return mock.patch.object(jax, "default_backend", return_value="gpu")


def image_shape(config: Any, batch: int) -> jax.ShapeDtypeStruct:
    """uint8 [B, H, W, C]."""
    side = config.data.image_size
    return jax.ShapeDtypeStruct((batch, side, side, config.data.channels), jnp.uint8)


def loss_of(system: System, state: Any) -> Callable[[Any, jax.Array], jax.Array]:
    """(params, uint8 images) -> training loss at step 0."""
    loss_fn = make_loss_fn(system.model, system.config, system.tasks)
    extra = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), state.extra)
    step = jnp.zeros((), jnp.int32)
    return lambda params, image: loss_fn(params, extra, {"image": image}, jax.random.key(0), step)[0]


def train_flops(system: System) -> int:
    """FLOPs of one training image."""
    system, state = as_on_gpu(system)
    with on_gpu():
        return product_flops(jax.grad(loss_of(system, state)), state.params, image_shape(system.config, 1))


def optimizer_flops(system: System) -> int:
    """FLOPs of one update beside the gradient's: Muon's products on the weights' shapes."""
    config = system.config
    tx = build_optimizer(config.optim, config.train.num_steps)
    state = as_on_gpu(system)[1]
    return product_flops(tx.update, state.params, state.opt_state, state.params)


def score_flops(system: System) -> int:
    """FLOPs of scoring one image once: every view of every task."""
    system, state = as_on_gpu(system)
    with on_gpu():
        return product_flops(make_score_fn(system), state.params, state.extra, image_shape(system.config, 1))


def kept_bytes(system: System, batch: int) -> int:
    """Bytes that the backward pass of one update on `batch` images keeps, before any fusion: an upper estimate."""
    system, state = as_on_gpu(system)
    loss = loss_of(system, state)

    def backward(params: Any, image: jax.Array) -> Any:
        return jax.vjp(lambda p: loss(p, image), params)[1]

    with on_gpu():
        kept = jax.eval_shape(backward, state.params, image_shape(system.config, batch))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(kept))


def memory_row(config: Any) -> dict[str, float]:
    """Parameters in millions; GB of the state with gradients; GB kept for the backward pass by a micro-batch image."""
    system = build_system(config)
    params = num_params(jax.eval_shape(system.init_params, jax.random.key(0)))
    # The parameters, their average, two moments, gradients; the teacher's trunk is below a parameter copy.
    state = 4 * params * (6 if any(task.needs_teacher for task in system.tasks) else 5)
    one, two = kept_bytes(system, 1), kept_bytes(system, 2)
    return {"params_m": params / 1e6, "state_gb": state / 1e9, "kept_gb_per_image": (two - one) / 1e9}


@functools.cache
def work(preset: str, channels: int) -> tuple[int, int, int]:
    """(train_flops, optimizer_flops, score_flops) of a preset."""
    system = build_system(recipe.get_config(f"{'brain' if channels == 1 else 'camelyon16'},preset={preset}"))
    return train_flops(system), optimizer_flops(system), score_flops(system)


def cost_row(name: str, preset: str) -> dict[str, Any]:
    """FLOPs, hours and sizes of one set."""
    config, expected = recipe.get_config(f"{name},preset={preset}"), BMAD[name]
    train, optimizer, score = work(preset, config.data.channels)
    images = config.train.num_steps * config.train.batch_size
    held_out = config.data.calibration_fraction * expected.train[0]
    row = {"train TFLOP/image": train / 1e12, "optimizer TFLOP/update": optimizer / 1e12}
    row["score TFLOP/image"] = score / 1e12
    row["epochs"] = images / (expected.train[0] - held_out)
    for device, peak in PEAK_BF16.items():
        seconds = train * images / peak + CHIPS[device] * optimizer * config.train.num_steps / PEAK_FLOAT32[device]
        row[f"train hours, {device}"] = tuple(seconds / share / 3600 for share in SHARES)
        # The trained and the untrained network, over the calibration and the test split.
        flops = 2 * score * (sum(expected.test) + held_out)
        row[f"score minutes, {device}"] = tuple(flops / (share * PEAK_FLOAT32[device]) / 60 for share in SHARES)
    return row | sizes(name, config)


def sizes(name: str, config: Any) -> dict[str, float]:
    """GB of a set: raw pixels at the native size (PNG files are smaller), decoded as training holds it."""
    expected, data = BMAD[name], config.data
    height, width = expected.native_size
    stored = {"brain": 4, "camelyon16": 3}.get(name, 1)  # bytes a pixel: RGBA, RGB, grey
    total = sum(sum(getattr(expected, split)) for split in ("train", "valid", "test"))
    masked = sum(expected.valid) + sum(expected.test) if expected.has_masks else 0
    abnormal = expected.valid[1] + expected.test[1] if expected.has_masks else 0
    raw = height * width * (total * stored + abnormal)
    decoded = total * data.image_size**2 * data.channels + masked * data.mask_size**2
    maps = 4 * sum(expected.test) * data.mask_size**2 if expected.has_masks else 0
    return {"images": total, "raw_gb": raw / 1e9, "decoded_gb": decoded / 1e9, "maps_gb": maps / 1e9}


def main() -> None:
    """Prints the tables in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="base", choices=("tiny", "small", "base"))
    preset = parser.parse_args().preset
    show = lambda value: " to ".join(f"{v:.2g}" for v in value) if isinstance(value, tuple) else f"{value:.4g}"  # noqa: E731
    memory = memory_row(recipe.get_config(f"brain,preset={preset}"))
    print(", ".join(f"{key} {show(value)}" for key, value in memory.items()))
    rows = {name: cost_row(name, preset) for name in BMAD}
    columns = list(rows["brain"])
    print("| set | " + " | ".join(columns) + " |\n|" + "---|" * (len(columns) + 1))
    for name, row in rows.items():
        print(f"| `{name}` | " + " | ".join(show(row[column]) for column in columns) + " |")


if __name__ == "__main__":
    main()
