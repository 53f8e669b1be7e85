"""Distillation as pure functions: what a config and a teacher fix, the views, the targets, the loss and the update.

Axes: B batch, H W C image, S stored image side, N tokens, D width, V views.
An update is three compiled calls: augment the images (once, for teacher and student alike), run the teacher (outside
the gradient, never in the optimiser), update what trains. `trainable` is a tree of adapters for method "lora" and all
weights of the copy for "full" and "scratch".
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from core import tree
from core.dense import DTYPES, named_dtype, rounded_kernels
from core.mesh import make_mesh, replicate
from core.state import TrainState, abstract_state, init_state
from core.step import make_train_step_fn
from core.vit import VisionTransformer, VitConfig, VitOutput, init_params
from vit_distill.augment import fixed_view, random_resized_crop
from vit_distill.forward import make_forward, micro_batches
from vit_distill.lora import LoraConfig, attach, build_lora_config, init_adapters, merge
from vit_distill.losses import LossConfig, distill_loss, student_targets, teacher_targets
from vit_distill.student import METHODS
from vit_distill.teacher import Teacher
from vit_distill.weight_copy import aligned_targets, calibrated_blocks, choose_blocks, copy_blocks


@dataclasses.dataclass(frozen=True)
class Distiller:
    """What a config and a teacher fix before the first update.

    Attributes:
      config: the ConfigDict of configs/common.py `distiller`.
      blocks: teacher blocks that the student copies.
      choice: how calibrated blocks were found (rows for the report), empty otherwise.
      student_config, base: architecture and start weights of the student.
      lora: None unless method is "lora".
      pairs: for each student block the teacher block whose output it is compared with.
    """

    config: Any
    teacher: Teacher
    blocks: tuple[int, ...]
    choice: tuple[Mapping[str, Any], ...]
    student_config: VitConfig
    base: Any
    lora: LoraConfig | None
    loss: LossConfig
    pairs: tuple[int, ...]
    mesh: Mesh

    @property
    def student(self) -> VisionTransformer:
        return VisionTransformer(self.student_config, dtype=DTYPES[self.config.train.dtype])

    def init_trainable(self, key: jax.Array) -> Any:
        """What trains, at its start: fresh adapters, or the weights of the copy."""
        return init_adapters(key, self.base, self.lora) if self.lora else jax.tree.map(jnp.asarray, self.base)

    def merged(self, trainable: Any) -> Any:
        """The student's weights with what was trained.

        What no loss reaches is the teacher's: the head and attention pooling, which weight decay alone has changed in
        `trainable`, and with the target before it the final norm, which a student from scratch has as it was drawn.
        """
        if self.lora:
            return merge(self.base, trainable, self.lora)
        unreached = ("head", "pool", "norm") if self.loss.target == "pre_norm" else ("head", "pool")
        return dict(trainable) | {name: self.teacher.params[name] for name in unreached if name in self.base}


def build_distiller(
    config: Any, teacher: Teacher, images: np.ndarray | None = None, blocks: tuple[int, ...] | None = None
) -> Distiller:
    """Chooses and copies blocks.

    Args:
      images: uint8 [n, S, S, C] few-shot images resized to teacher.preprocessing.resize_size; needed for
        student.blocks="calibrated" alone.
      blocks: teacher blocks already chosen (by an earlier run), instead of config.student.blocks.

    Raises:
      ValueError: for an unknown method, or blocks, ranks or losses that do not fit the teacher.
    """
    method = config.student.method
    if method not in METHODS:
        raise ValueError(f"student.method: expected one of {METHODS}, found {method!r}")
    for field in ("teacher", "train"):
        named_dtype(config[field].dtype, f"{field}.dtype")
    depth, choice = teacher.config.depth, ()
    if blocks is None and config.student.blocks == "calibrated":
        if images is None:
            raise ValueError('student.blocks="calibrated" needs images to choose by')
        inputs = teacher.preprocessing.evaluate(jnp.asarray(images))
        blocks, rows = calibrated_blocks(
            teacher.config, teacher.params, inputs, config.student.reduction, config.calibration.criterion
        )
        choice = tuple(rows)
    if blocks is None:
        blocks = choose_blocks(depth, config.student.reduction, config.student.blocks)
    student_config, base = copy_blocks(teacher.config, teacher.params, blocks)
    if method == "scratch":
        base = init_params(student_config, jax.random.fold_in(jax.random.key(config.seed), 1))
    return Distiller(
        config=config,
        teacher=teacher,
        blocks=tuple(blocks),
        choice=choice,
        student_config=student_config,
        base=base,
        lora=build_lora_config(config.lora) if method == "lora" else None,
        loss=LossConfig(**config.loss),
        pairs=aligned_targets(tuple(blocks), depth),
        mesh=make_mesh(),
    )


def base_fingerprint(distiller: Distiller) -> np.ndarray:
    """sha256 of the start weights as uint8 [32]: goes into every checkpoint, so that adapters know their base.

    For method "scratch" it is that of the teacher, blocks and seed: what the seed draws differs between devices.
    """
    if distiller.config.student.method == "scratch":
        drawn_by = [distiller.teacher.report.sha256, list(distiller.blocks), int(distiller.config.seed)]
        return np.frombuffer(hashlib.sha256(json.dumps(drawn_by).encode()).digest(), np.uint8)
    return start_fingerprint(distiller)


def start_fingerprint(distiller: Distiller) -> np.ndarray:
    """sha256 of the start weights themselves, uint8 [32]."""
    return np.frombuffer(bytes.fromhex(tree.fingerprint(distiller.base)), np.uint8)


def build_state(distiller: Distiller, tx: optax.GradientTransformation, trainable: Any = None) -> TrainState:
    """Training state at step 0.

    Args:
      trainable: start values, from a warm start for example; by default `init_trainable` of the config's seed.
    """
    given = distiller.base if trainable is None else trainable
    key, given = jax.random.key(distiller.config.seed), replicate(given, distiller.mesh)
    return init_state(_make_init_fn(distiller, trainable is not None), key, tx, distiller.mesh, given)


def restore_target(distiller: Distiller, tx: optax.GradientTransformation) -> TrainState:
    """Shapes and placement of `build_state`'s result: what a checkpoint is restored into."""
    key = jax.random.key(distiller.config.seed)
    return abstract_state(_make_init_fn(distiller), key, tx, distiller.mesh, distiller.base)


def _make_init_fn(distiller: Distiller, started: bool = False) -> Callable[[jax.Array, Any], tuple[Any, Any]]:
    """(key, base, or what trains if it is `started`) -> (what trains, extra)."""
    extra = {"base": base_fingerprint(distiller)}

    def init_fn(key: jax.Array, given: Any) -> tuple[Any, Any]:
        trainable = given if started else dataclasses.replace(distiller, base=given).init_trainable(key)
        return trainable, jax.tree.map(jnp.asarray, extra)

    return init_fn


def make_views_fn(distiller: Distiller) -> Callable[[Mapping[str, jax.Array], jax.Array, jax.Array], jax.Array]:
    """Compiled (batch, run key, step) -> normalised views [B, H, W, C].

    The batch holds image uint8 [B, S, S, C] and, with cached views, index and view int32 [B]: then the crop is a
    function of (seed, index, view), whenever it is drawn.
    """
    config, preprocessing = distiller.config, distiller.teacher.preprocessing
    options = dict(
        size=preprocessing.image_size,
        scale=(config.augment.scale_min, 1.0),
        flip=config.augment.flip,
        interpolation=preprocessing.interpolation,
    )

    def views(batch: Mapping[str, jax.Array], key: jax.Array, step: jax.Array) -> jax.Array:
        if "view" in batch:
            crops = fixed_view(config.seed, batch["index"], batch["view"], batch["image"], **options)
        else:
            crops = random_resized_crop(jax.random.fold_in(key, step), batch["image"], **options)
        return preprocessing.normalise(crops)

    return jax.jit(views)


def make_targets_fn(distiller: Distiller) -> Callable[[Any, jax.Array], tuple[jax.Array, ...]]:
    """Compiled (teacher parameters, views [B, H, W, C]) -> the teacher's tokens to reproduce, float32 [B, N, D]s."""
    config, own = distiller.teacher.config, distiller.config
    dtype, parts = DTYPES[own.teacher.dtype], own.train.accumulation

    def targets(params: Any, views: jax.Array) -> tuple[jax.Array, ...]:
        def read(output: VitOutput) -> tuple[jax.Array, ...]:
            found = teacher_targets(config, params, output, distiller.loss, distiller.pairs)
            return tuple(target.astype(jnp.float32) for target in found)

        return make_forward(config, dtype, read, distiller.mesh.size, parts)(params, views)

    return jax.jit(targets)


def make_loss_fn(distiller: Distiller) -> Callable[..., tuple[jax.Array, tuple[dict[str, jax.Array], Any]]]:
    """loss_fn(trainable, extra, {views, targets}, key, step, base) for core.step."""
    config, model = distiller.student_config, distiller.student

    def loss_fn(trainable, extra, batch, key, step, base):
        params = attach(base, trainable, distiller.lora) if distiller.lora else trainable
        output = model.apply({"params": params}, batch["views"])
        found = student_targets(config, params, output, distiller.loss)
        loss, metrics = distill_loss(found, batch["targets"], distiller.loss, config)
        return loss, (metrics, extra)

    return loss_fn


def frozen_params(distiller: Distiller) -> tuple[Any, Any]:
    """(student's base, teacher) as an update reads them: kernels rounded once to the dtype of their products.

    Whichever an update does not read is {}: the base without adapters, the teacher with cached views.
    """
    config, base, teacher = distiller.config, {}, {}
    if distiller.lora:
        # A DoRA kernel is a sum with the base's: it wants all digits.
        dtype = jnp.float32 if distiller.lora.dora else DTYPES[config.train.dtype]
        base = rounded_kernels(distiller.base, dtype)
    if not config.train.cached_views:
        teacher = rounded_kernels(distiller.teacher.params, DTYPES[config.teacher.dtype])
    return base, teacher


def trace_update(distiller: Distiller, tx: optax.GradientTransformation) -> None:
    """One update of shapes alone: what does not fit is an error before anything is computed or written.

    Raises:
      ValueError: for ranks, losses, augmentation or images that do not fit the student.
    """
    config, side = distiller.config, distiller.teacher.preprocessing.resize_size
    image = jax.ShapeDtypeStruct((config.train.batch_size, side, side, config.data.channels), jnp.uint8)
    key, step = jax.eval_shape(lambda: jax.random.key(0)), jax.ShapeDtypeStruct((), jnp.int32)
    views = jax.eval_shape(make_views_fn(distiller), {"image": image}, key, step)
    targets = jax.eval_shape(make_targets_fn(distiller), distiller.teacher.params, views)
    trainable = jax.eval_shape(distiller.init_trainable, key)
    state = TrainState(step, trainable, trainable, jax.eval_shape(tx.init, trainable), {})
    update = make_update_fn(distiller, tx)
    jax.eval_shape(update, state, {"views": views, "targets": targets}, key, distiller.base)


def make_update_fn(distiller: Distiller, tx: optax.GradientTransformation) -> Callable[..., Any]:
    """Compiled (state, {views, targets}, run key, base) -> (state, metrics).

    The loss is a mean over images, so that micro-batches, asked for or for a CPU's caches, change nothing but rounding.
    """
    train = distiller.config.train
    accumulation = micro_batches(
        distiller.student_config, train.batch_size, distiller.mesh.size, asked=train.accumulation
    )
    return make_train_step_fn(make_loss_fn(distiller), tx, ema_decay=train.ema_decay, accumulation=accumulation)


def make_step_fn(
    distiller: Distiller, tx: optax.GradientTransformation
) -> Callable[[TrainState, Mapping[str, jax.Array], jax.Array], tuple[TrainState, dict[str, jax.Array]]]:
    """One update, (state, batch, run key) -> (state, metrics), for core.loop.

    The batch holds image uint8 [B, S, S, C]; with cached views also index, view and target_00, target_01...
    (two digits, as they are ordered by name): [B, N, D].
    """
    config = distiller.config
    update = make_update_fn(distiller, tx)
    views_fn, targets_fn = make_views_fn(distiller), make_targets_fn(distiller)
    base, teacher = (replicate(params, distiller.mesh) for params in frozen_params(distiller))
    # An argument, not a constant: the runs of a table that differ in their rate share one compiled program.
    learning_rate = np.float32(config.optim.learning_rate)

    def step(state: TrainState, batch: Mapping[str, jax.Array], key: jax.Array) -> Any:
        views = views_fn(batch, key, state.step)
        if config.train.cached_views:
            targets = tuple(batch[name] for name in sorted(n for n in batch if n.startswith("target_")))
        else:
            targets = targets_fn(teacher, views)
        return update(state, {"views": views, "targets": targets}, key, base, learning_rate=learning_rate)

    return step
