"""Probes of frozen patch tokens: a small head names the class of every pixel.

Axes: N images, B batch, P patch tokens (a square grid), D width, M mask side, F pixel classes. Tokens are standardised
per channel over the training set; a head gives each token logits, which are resized to the mask bilinearly. As for
image probes (probe.py), `valid` chooses the learning rate and `test` is scored once.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from core.logs import progress_bar
from core.optim import build_optimizer
from vit_distill.probe import choose, mean_over_seeds

HEADS = ("linear", "mlp")
IGNORED = 255  # mask value of pixels without a label


class Segmented(NamedTuple):
    """Patch tokens float32 [N, P, D] and masks uint8 [N, M, M] of class ids; a plain pair serves as well."""

    tokens: np.ndarray
    masks: np.ndarray


@dataclasses.dataclass(frozen=True)
class SegmentOptions:
    """How heads are trained: AdamW, linear warm-up, cosine to 0; the learning rates are tried in turn."""

    num_steps: int
    warmup_steps: int
    batch_size: int
    hidden_dim: int
    weight_decay: float
    learning_rates: tuple[float, ...]


class TokenHead(nn.Module):
    """Standardised tokens [B, P, D] -> logits [B, M, M, F] by one dense layer on every token, or two with GELU.

    Attributes:
      hidden_dim: width between the two layers; 0 for one layer.
      mask_size: M.
    """

    num_classes: int
    hidden_dim: int
    mask_size: int

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        batch, patches, width = tokens.shape
        grid = math.isqrt(patches)
        if grid**2 != patches:
            raise ValueError(f"expected the patch tokens of a square image, found {patches}")
        x = tokens.reshape(-1, width)
        if self.hidden_dim:
            x = jax.nn.gelu(nn.Dense(self.hidden_dim, name="hidden")(x))
        x = nn.Dense(self.num_classes, name="logits")(x).reshape(batch, grid, grid, self.num_classes)
        return jax.image.resize(x, (batch, self.mask_size, self.mask_size, self.num_classes), "bilinear")


def segment_probe(
    train: Segmented,
    valid: Segmented,
    test: Segmented,
    head: str = "linear",
    *,
    options: SegmentOptions,
    classes: Sequence[str] = (),
    seeds: Sequence[int] = (0,),
) -> dict[str, float]:
    """Trains a head on `train`, chooses its learning rate on `valid` (first seed), scores `test` once a seed.

    Args:
      head: "linear" or "mlp" (two layers).
      classes: names of the F pixel classes; without them ids are counted from the masks.
      seeds: of initial weights and order.

    Returns:
      Flat: the metrics of `iou_metrics` on test (`mean_over_seeds`); "pixels/<class>", the classes' shares of the
      labelled pixels of test, 0 for a class that is not in it; "learning_rate", "valid_miou", "at_grid_edge",
      "num_seeds" as in `probe`.

    Raises:
      ValueError: for another head, sets that do not fit together, a mask value that is no class.
    """
    if head not in HEADS:
        raise ValueError(f"segmentation head: expected one of {HEADS}, found {head!r}")
    train, valid, test = (Segmented(*map(np.asarray, pair)) for pair in (train, valid, test))
    num_classes = _check({"train": train, "valid": valid, "test": test}, classes)
    names = list(classes) or [str(i) for i in range(num_classes)]
    module = TokenHead(num_classes, options.hidden_dim if head == "mlp" else 0, train.masks.shape[1])
    mean, std = _statistics(train.tokens)

    def score(params: Any, found: Segmented) -> dict[str, float]:
        predicted = _predict(module, params, found.tokens, mean, std, options.batch_size)
        return iou_metrics(confusion_matrix(predicted, found.masks, num_classes), names)

    fit = functools.partial(_train, module, train, mean, std, options)
    on_grid = {rate: fit(rate, seeds[0]) for rate in options.learning_rates}
    on_valid = {rate: score(params, valid)["miou"] for rate, params in on_grid.items()}
    chosen, at_edge = choose(on_valid)
    runs = [on_grid[chosen], *(fit(chosen, seed) for seed in seeds[1:])]
    on_test = [score(params, test) for params in runs]
    occur = np.diag(confusion_matrix(test.masks, test.masks, num_classes))
    return mean_over_seeds(on_test) | {
        **{f"pixels/{name}": float(share) for name, share in zip(names, occur / occur.sum(), strict=True)},
        "learning_rate": float(chosen),
        "valid_miou": on_valid[chosen],
        "at_grid_edge": float(at_edge),
        "num_seeds": float(len(on_test)),
    }


def confusion_matrix(predicted: np.ndarray, masks: np.ndarray, num_classes: int) -> np.ndarray:
    """int64 [F, F], exact: pixels of class (row) that were called (column); IGNORED pixels are left out."""
    counts = np.zeros(num_classes**2, np.int64)
    for row in range(len(masks)):  # int64 of all images at once would be 30 bytes a pixel
        mask, called = masks[row : row + 1], predicted[row : row + 1]
        kept = mask != IGNORED
        pairs = mask[kept].astype(np.int64) * num_classes + called[kept].astype(np.int64)
        counts += np.bincount(pairs, minlength=num_classes**2)
    return counts.reshape(num_classes, num_classes)


def iou_metrics(confusion: np.ndarray, classes: Sequence[str]) -> dict[str, float]:
    """ "iou/<class>", "miou" (their mean), "miou_present" and "pixel_accuracy" of a confusion matrix [F, F].

    A class that neither occurs nor was called has no IoU: NaN, and left out of the mean. One that does not occur but
    was called has 0, for a single pixel already: "miou_present" is the mean over those that occur.
    """
    hits = np.diag(confusion)
    union = confusion.sum(0) + confusion.sum(1) - hits
    if not union.any():
        raise ValueError("no pixel has a label: IoU is not defined")
    iou = np.divide(hits, union, out=np.full(len(union), np.nan), where=union > 0)
    metrics = {"miou": float(np.nanmean(iou)), "miou_present": float(iou[confusion.sum(1) > 0].mean())}
    metrics["pixel_accuracy"] = float(hits.sum() / confusion.sum())
    return metrics | {f"iou/{name}": float(value) for name, value in zip(classes, iou, strict=True)}


def _check(sets: Mapping[str, Segmented], classes: Sequence[str]) -> int:
    """The number of classes; raises ValueError on sets that do not fit together."""
    patches, side = sets["train"].tokens.shape[1:], sets["train"].masks.shape[-1]
    found = 0
    for name, (tokens, masks) in sets.items():
        if len(tokens) == 0:
            raise ValueError(
                f"{name}: no images; a probe needs train, valid and test (data.valid_fraction makes valid)"
            )
        if tokens.shape[1:] != patches or masks.shape != (len(tokens), side, side):
            raise ValueError(
                f"{name}: expected tokens [N, {patches[0]}, {patches[1]}] and masks [N, {side}, {side}], "
                f"found {list(tokens.shape)} and {list(masks.shape)}"
            )
        labelled = masks[masks != IGNORED]
        if labelled.size == 0:
            raise ValueError(f"{name}: no pixel has a label (all are {IGNORED})")
        if classes and labelled.max() >= len(classes):
            raise ValueError(
                f"{name}: mask value {labelled.max()} is none of the {len(classes)} classes ({IGNORED} is ignored)"
            )
        found = max(found, int(labelled.max()) + 1)
    return len(classes) or found


def _statistics(tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation of each channel over images and patches, float32 [1, 1, D].

    Image by image: float64 copies of all tokens would be twice the tokens' size.
    """
    mean = sum(image.mean(0, dtype=np.float64) for image in tokens)[None] / len(tokens)
    std = np.sqrt(sum(np.square(image - mean).mean(0) for image in tokens) / len(tokens))[None, None]
    return mean[None].astype(np.float32), np.where(std > 0, std, 1.0).astype(np.float32)


def _optimizer(options: SegmentOptions) -> optax.GradientTransformation:
    """Of peak 1: AdamW's updates are proportional to the rate, so one compiled step serves the whole grid."""
    section = SimpleNamespace(
        kind="adamw",
        learning_rate=1.0,
        warmup_steps=options.warmup_steps,
        weight_decay=options.weight_decay,
        b2=0.999,
        clip_norm=1.0,
    )
    return build_optimizer(section, options.num_steps)


@functools.partial(jax.jit, static_argnames=("module", "options"), donate_argnames=("params", "state"))
def _update(
    module: TokenHead,
    options: SegmentOptions,
    params: Any,
    state: Any,
    tokens: jax.Array,
    mean: jax.Array,
    std: jax.Array,
    masks: jax.Array,
    rate: float,
) -> tuple[Any, Any]:
    """One update on tokens [B, P, D], standardised here, and masks uint8 [B, M, M]."""

    def loss_fn(params: Any) -> jax.Array:
        kept = masks != IGNORED
        logits = module.apply({"params": params}, (tokens - mean) / std)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.where(kept, masks, 0).astype(jnp.int32))
        return (losses * kept).sum() / jnp.maximum(kept.sum(), 1)

    updates, state = _optimizer(options).update(jax.grad(loss_fn)(params), state, params)
    return optax.apply_updates(params, jax.tree.map(lambda update: rate * update, updates)), state


def _train(
    module: TokenHead,
    data: Segmented,
    mean: np.ndarray,
    std: np.ndarray,
    options: SegmentOptions,
    rate: float,
    seed: int,
) -> Any:
    """Trained parameters of the head; epochs follow each other without dropping images."""
    total = options.num_steps * options.batch_size
    rng = np.random.default_rng(seed)
    epochs = [rng.permutation(len(data.tokens)) for _ in range(-(-total // len(data.tokens)))]
    order = np.concatenate(epochs)[:total].reshape(options.num_steps, options.batch_size)
    params = module.init(jax.random.key(seed), jnp.zeros((1, *data.tokens.shape[1:])))["params"]
    state = _optimizer(options).init(params)
    with progress_bar(options.num_steps, scale=options.batch_size, description=f"head, rate {rate:g}") as bar:
        for rows in order:
            batch = data.tokens[rows], mean, std, data.masks[rows]
            params, state = _update(module, options, params, state, *batch, rate)
            bar.update()
    return params


@functools.partial(jax.jit, static_argnames=("module",))
def _classes(module: TokenHead, params: Any, tokens: jax.Array, mean: jax.Array, std: jax.Array) -> jax.Array:
    """Tokens [B, P, D] -> class ids uint8 [B, M, M]."""
    return module.apply({"params": params}, (tokens - mean) / std).argmax(-1).astype(jnp.uint8)


def _predict(
    module: TokenHead, params: Any, tokens: np.ndarray, mean: np.ndarray, std: np.ndarray, batch_size: int
) -> np.ndarray:
    """Class ids uint8 [N, M, M]; the last batch is filled up with its last image, which is cut off."""
    found = []
    for start in range(0, len(tokens), batch_size):
        rows = np.minimum(np.arange(start, start + batch_size), len(tokens) - 1)
        found.append(np.asarray(_classes(module, params, tokens[rows], mean, std)))
    return np.concatenate(found)[: len(tokens)]
