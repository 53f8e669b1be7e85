"""What the peers share: images as tensors, training within a budget, and how a map becomes an image score.

Axes: N or B images, H W C image. Tensors are [B, C, H, W], channels last in memory.
"""

import dataclasses
import math
import time
from collections.abc import Callable

import numpy as np
import torch
from scipy import ndimage
from torch import nn
from torch.nn import functional as F

# The same as of our detector (mtl_moe/scoring.py): the mean of a smoothed map's top 5 % inside the body.
SMOOTHING = 4.0 / 224
TOP_SHARE = 0.05
WARM_UP = 0.05  # share of the budget over which the learning rate rises
BATCH = 64  # images scored at once

LossFn = Callable[[nn.Module, torch.Tensor, torch.Generator], torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Budget:
    """How long to train: wall-clock seconds, or a number of updates."""

    seconds: float | None = None
    updates: int | None = None

    def __post_init__(self):
        if (self.seconds is None) == (self.updates is None):
            raise ValueError(f"budget: expected either seconds or updates, found {self}")

    def share(self, seconds: float, updates: int) -> float:
        """Share that is spent; 1 and more: stop."""
        return seconds / self.seconds if self.updates is None else updates / self.updates


def to_tensor(images: np.ndarray, device: torch.device | str = "cpu") -> torch.Tensor:
    """uint8 [B, H, W, C] -> float32 [B, C, H, W] in [0, 1]."""
    x = torch.from_numpy(np.ascontiguousarray(images)).to(device).permute(0, 3, 1, 2).float() / 255
    return x.contiguous(memory_format=torch.channels_last)


def foreground(x: torch.Tensor) -> torch.Tensor:
    """Where the patient is, bool [B, 1, H, W]: as `mtl_moe.tasks.base.body_mask`."""
    size = max(3, x.shape[-1] // 16 | 1)
    padded = F.pad(x.mean(1, keepdim=True), (size // 2,) * 4, mode="replicate")
    bright = F.avg_pool2d(padded, size, stride=1) > 0.05
    body = _between(bright, 2) & _between(bright, 3)
    enough = body.float().mean((1, 2, 3), keepdim=True) > 0.005
    return body | ~enough


def _between(where: torch.Tensor, axis: int) -> torch.Tensor:
    """What has such pixels, or is one, on both sides along `axis`."""
    before = where.cumsum(axis) > 0
    after = where.flip(axis).cumsum(axis).flip(axis) > 0
    return before & after


def make_step(
    model: nn.Module, images: np.ndarray, loss_fn: LossFn, seed: int, batch_size: int, learning_rate: float
) -> Callable[[float], torch.Tensor]:
    """Function (share of the budget spent) -> loss, one AdamW update on `batch_size` random images.

    The rate rises over the first WARM_UP of the budget and falls to 0 by a cosine; gradients are clipped at norm 1.

    Args:
      images: uint8 [N, H, W, C], normal images.
    """
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=1e-4)
    generator, rng = torch.Generator(device).manual_seed(seed), np.random.default_rng(seed)
    model.train()

    def step(share: float) -> torch.Tensor:
        rate = min(share / WARM_UP, 1.0) * (1 + math.cos(math.pi * min(share, 1.0))) / 2
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * max(rate, 1e-3)
        x = to_tensor(images[rng.integers(0, len(images), batch_size)], device)
        loss = loss_fn(model, x, generator)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.detach()

    return step


def fit(
    model: nn.Module,
    images: np.ndarray,
    loss_fn: LossFn,
    budget: Budget,
    seed: int,
    *,
    batch_size: int = 16,
    learning_rate: float = 1e-3,
) -> int:
    """Trains until the budget is spent; the number of updates.

    Raises:
      ValueError: if the loss is not finite at the end.
    """
    step, start, done, loss = (
        make_step(model, images, loss_fn, seed, batch_size, learning_rate),
        time.perf_counter(),
        0,
        0,
    )
    while (share := budget.share(time.perf_counter() - start, done)) < 1:
        loss, done = step(share), done + 1
    if not math.isfinite(float(loss)):
        raise ValueError(f"the loss is {float(loss)} after {done} updates: expected a finite one")
    model.eval()
    return done


def score_in_batches(
    model: nn.Module, images: np.ndarray, map_fn: Callable[[nn.Module, torch.Tensor], torch.Tensor]
) -> tuple[np.ndarray, np.ndarray]:
    """Image scores [N] and maps float32 [N, H, W] of uint8 images [N, H, W, C] by `map_fn(model, [B, C, H, W])`."""
    device, scores, maps = next(model.parameters()).device, [], []
    model.eval()
    with torch.inference_mode():
        for start in range(0, len(images), BATCH):
            x = to_tensor(images[start : start + BATCH], device)
            maps.append(map_fn(model, x).float().cpu().numpy())
            scores.append(image_scores(maps[-1], foreground(x)[:, 0].cpu().numpy()))
    return np.concatenate(scores), np.concatenate(maps)


def image_scores(maps: np.ndarray, body: np.ndarray) -> np.ndarray:
    """Mean of the top 5 % of each smoothed map inside its body; maps [N, H, W], body bool [N, H, W] -> [N]."""
    sigma = SMOOTHING * maps.shape[-1]
    smooth = ndimage.gaussian_filter(maps, (0, sigma, sigma))
    ranked = [np.sort(m[b])[::-1] for m, b in zip(smooth, body, strict=True)]
    return np.array([values[: math.ceil(TOP_SHARE * len(values))].mean() for values in ranked])


def median_filter(maps: torch.Tensor, size: int) -> torch.Tensor:
    """Median over size x size windows (odd size, edges reflected): [B, H, W] -> the same."""
    padded = F.pad(maps[:, None], (size // 2,) * 4, mode="reflect")
    windows = padded.unfold(2, size, 1).unfold(3, size, 1)
    return windows.reshape(*maps.shape, -1).median(-1).values
