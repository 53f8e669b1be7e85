"""A shallower copy of a detector as pure functions: the blocks it keeps, what trains of them, and the loss.

Axes: B images, R = B * views rows, N tokens, D width, H W C image, T tasks. One block in `reduction` is kept of the
trunk and of the expert blocks, each with its router and all its experts; neck, heads and embeddings stay whole. After
WeCoLoRA (Grigore et al., arXiv 2404.09326): weights are copied, low-rank updates learn on unlabelled images to make up
for the blocks left out; norms, biases and experts, which these do not cover, learn beside them. What the tokens are
compared on is ours: the views of the proxy tasks, told their task, and tokens after the layer norm that every head
begins with.

`weights` are {"params": the network's} and, with tasks that read pseudo-labels, {"teacher": the frozen encoder's}: that
encoder is a trunk of the same depth and is made shallower likewise.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from core import tree
from core.low_rank import init_low_rank, merge
from mtl_moe.losses import make_corrupt_fn
from mtl_moe.model import Detector, ModelConfig, expert_blocks, trunk_tokens
from mtl_moe.system import System
from mtl_moe.tasks.base import to_float
from mtl_moe.tiling import random_tiles

# Kernels that get low-rank updates, and how many of their axes are inputs.
TARGETS: Mapping[str, int] = {
    r".*/attn/(query|key|value)/kernel": 1,
    r".*/attn/out/kernel": 2,
    r".*/mlp/(shared/)?fc[12]/kernel": 1,
}
# What trains beside them, as it is: the blocks' norms, biases, experts, routers and embeddings, but no head.
DIRECT = r"(params/(trunk|expert_\d+|neck_\d+)|teacher)/.*"
VIEWS = 2  # of an image for each task in an update


def kept_blocks(config: ModelConfig, reduction: int) -> dict[str, tuple[int, ...]]:
    """Which blocks stay, the first of every `reduction`: {"block": of the trunk, "expert": of the expert blocks}.

    Raises:
      ValueError: unless the reduction is in [2, the larger number of blocks].
    """
    counts = {"block": config.num_dense_layers, "expert": config.num_moe_layers}
    if not 2 <= reduction <= max(counts.values()):
        raise ValueError(
            f"reduction: expected 2 to {max(counts.values())} for a detector of {counts['block']} trunk and "
            f"{counts['expert']} expert blocks (one block in so many is kept), found {reduction}"
        )
    return {name: tuple(range(0, count, reduction)) for name, count in counts.items()}


def weights_of(params: Any, extra: Any) -> dict[str, Any]:
    """The weights of a trained detector, from what its checkpoint holds."""
    return {"params": params} | ({"teacher": extra["teacher"]["trunk"]} if "teacher" in extra else {})


def copy_blocks(weights: Mapping[str, Any], kept: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """The kept blocks, renumbered from 0, and everything that is not a trunk or expert block; arrays are not copied."""
    params = _renumbered(weights["params"], "expert", kept["expert"])
    small = {"params": params | {"trunk": _renumbered(params["trunk"], "block", kept["block"])}}
    if "teacher" in weights:
        small["teacher"] = _renumbered(weights["teacher"], "block", kept["block"])
    return small


def _renumbered(params: Mapping[str, Any], prefix: str, kept: Sequence[int]) -> dict[str, Any]:
    rest = {name: value for name, value in params.items() if not name.startswith(f"{prefix}_")}
    return rest | {f"{prefix}_{new:02d}": params[f"{prefix}_{old:02d}"] for new, old in enumerate(kept)}


def init_updates(key: jax.Array, base: Mapping[str, Any], rank: int) -> dict[str, Any]:
    """What trains of the copied weights `base` (`copy_blocks`): with nothing learned yet `updated` gives the copy.

    Low-rank factors of TARGETS, and as "difference" a zero for every number of DIRECT that these do not cover; without
    it a fifth more of the tokens' error stays (docs/results_detector.md).

    Raises:
      ValueError: for a rank that a kernel does not allow.
    """
    difference: dict[str, Any] = {}
    for path, leaf in tree.paths(base).items():
        if re.fullmatch(DIRECT, path) and not any(re.fullmatch(target, path) for target in TARGETS):
            *parents, name = path.split("/")
            node = difference
            for parent in parents:
                node = node.setdefault(parent, {})
            node[name] = jnp.zeros(leaf.shape)
    return {"low_rank": init_low_rank(key, base, TARGETS, rank), "difference": difference}


def updated(base: Mapping[str, Any], updates: Mapping[str, Any]) -> dict[str, Any]:
    """The copied weights with `init_updates`' trained updates: the small detector's."""
    return _added(merge(base, updates["low_rank"]), updates["difference"])


def _added(weights: Any, difference: Any) -> Any:
    if not isinstance(difference, Mapping):
        return weights + difference
    return dict(weights) | {name: _added(weights[name], part) for name, part in difference.items()}


def make_tokens_fn(model: Detector) -> Callable[[Any, Mapping[str, jax.Array]], jax.Array]:
    """Function (params, inputs as the model's) -> what its heads read: standardised tokens, float32 [R, N, D].

    Each token has zero mean and unit variance. Rows are ordered image by image, an image's views in the order of tasks,
    as in `Detector`.
    """
    blocks = expert_blocks(model.config)
    last = blocks[-1] if blocks else "trunk"

    def tokens(params: Any, inputs: Mapping[str, jax.Array]) -> jax.Array:
        _, state = model.apply(
            {"params": params},
            inputs,
            train=False,
            capture_intermediates=lambda module, method: module.name == last and method == "__call__",
            mutable=["intermediates"],
        )
        (found,) = state["intermediates"][last]["__call__"]
        found = found[0] if blocks else found  # a block gives (tokens, router statistics)
        return jax.nn.standardize(found.astype(jnp.float32), axis=-1, epsilon=1e-6)

    return tokens


def make_distill_loss_fn(full: System, small: System) -> Callable[..., Any]:
    """Loss for `core.step`: (updates, extra, batch, key, step, trained, base) -> (loss, (metrics, extra)).

    `trained` is the full detector's {"params", "extra"}, `base` the copied weights that `updates` change; neither
    trains. `batch` holds uint8 `image` [B, H, W, C]. For each task the networks see one view corrupted as in training
    and one of those it is scored on, drawn at random. Metrics: loss/<task>, and loss/teacher where there is one.
    """
    tasks, corrupt = full.tasks, make_corrupt_fn(full.model, full.config, full.tasks)
    full_tokens, small_tokens = make_tokens_fn(full.model), make_tokens_fn(small.model)
    full_trunk, small_trunk = _make_trunk_fn(full.model), _make_trunk_fn(small.model)

    def loss_fn(updates: Any, extra: Any, batch: Any, key: jax.Array, step: jax.Array, trained: Any, base: Any) -> Any:
        images = to_float(random_tiles(jax.random.fold_in(key, 3), batch["image"], full.model.image_size))
        key_augment, key_tasks, key_views = jax.random.split(key, 3)
        corrupted, _ = corrupt(trained["extra"], images, key_augment, key_tasks)
        inputs = {}
        for task, task_key in zip(tasks, jax.random.split(key_views, len(tasks)), strict=True):
            views = task.views(images)
            drawn = views[jax.random.randint(task_key, (), 0, views.shape[0])]
            inputs[task.name] = jnp.stack([corrupted[task.name][0], drawn])

        weights = updated(base, updates)
        error = jnp.abs(small_tokens(weights["params"], inputs) - full_tokens(trained["params"], inputs)).mean((1, 2))
        by_task = error.reshape(images.shape[0], len(tasks), VIEWS).mean((0, 2))
        metrics = {f"loss/{task.name}": value for task, value in zip(tasks, by_task, strict=True)}
        loss = by_task.mean()
        if "teacher" in base:
            wanted = full_trunk(trained["extra"]["teacher"]["trunk"], images)
            metrics["loss/teacher"] = jnp.abs(small_trunk(weights["teacher"], images) - wanted).mean()
            loss += metrics["loss/teacher"]
        return loss, (metrics, extra)

    return loss_fn


def make_error_fn(full: System, small: System) -> Callable[[Any, Any, jax.Array], jax.Array]:
    """Compiled (full params, small params, uint8 images [B, H, W, C]) -> token error [B], mean over scored views; of
    images seen in tiles on one random tile of each."""
    full_tokens, small_tokens = make_tokens_fn(full.model), make_tokens_fn(small.model)

    def error(full_params: Any, small_params: Any, images: jax.Array) -> jax.Array:
        seen = to_float(random_tiles(jax.random.key(0), images, full.model.image_size))
        inputs = {task.name: task.views(seen) for task in full.tasks}
        difference = jnp.abs(small_tokens(small_params, inputs) - full_tokens(full_params, inputs))
        return difference.reshape(images.shape[0], -1).mean(1)

    return jax.jit(error)


def _make_trunk_fn(model: Detector) -> Callable[[Any, jax.Array], jax.Array]:
    return lambda trunk, images: trunk_tokens(model.config, trunk, images, model.dtype)
