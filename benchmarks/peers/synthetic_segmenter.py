"""A U-Net that segments painted defects, after DRAEM (Zavrtanik et al., arXiv 2108.07610) and NSA (Schlueter et al.,
arXiv 2109.15222): half of the images stay clean, the others get one.

Shape: thresholded Perlin noise inside the foreground (DRAEM). Content: another normal image, shifted and with its
contrast changed, blended in (NSA takes patches of other normals; DRAEM textures of another data set, which a detector
from scratch on these images has not). Focal loss. The map is the predicted probability. DRAEM's reconstructing first
network is left out.
"""

import math

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.peers.training import Budget, fit, foreground, score_in_batches
from benchmarks.peers.unet import UNet

CLEAN_SHARE = 0.5
CELLS = (2, 4, 8)  # of the Perlin noise along a side, one for each batch
AREA = (0.01, 0.15)  # share of the image that the noise is cut at
MAX_TRANSPARENCY = 0.8  # DRAEM's
SMALLEST_CHANGE = 0.02  # in grey value: less is no defect
FOCUS = 2.0  # exponent of the focal loss


def perlin(batch: int, size: int, cells: int, generator: torch.Generator, device: torch.device) -> torch.Tensor:
    """Gradient noise [batch, size, size] of cells x cells lattice cells, in about [-1, 1] (Perlin 1985)."""
    angle = 2 * math.pi * torch.rand((batch, cells + 1, cells + 1), generator=generator, device=device)
    gradient = torch.stack([angle.cos(), angle.sin()], -1)
    place = (torch.arange(size, device=device) + 0.5) * cells / size
    cell = place.long()
    offset = place - cell
    fade = offset**3 * (offset * (6 * offset - 15) + 10)
    rows = []
    for down in (0, 1):
        corners = []
        for right in (0, 1):
            g = gradient[:, cell + down][:, :, cell + right]
            corners.append(g[..., 0] * (offset - down)[None, :, None] + g[..., 1] * (offset - right)[None, None, :])
        rows.append(torch.lerp(corners[0], corners[1], fade[None, None, :]))
    return torch.lerp(rows[0], rows[1], fade[None, :, None]) * math.sqrt(2)


def paint(x: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Images [B, C, H, W] -> (with a defect each or clean, defect bool [B, 1, H, W])."""
    options = dict(generator=generator, device=x.device)

    def uniform(low: float, high: float) -> torch.Tensor:
        return low + (high - low) * torch.rand((len(x), 1, 1, 1), **options)

    cells = CELLS[int(torch.randint(len(CELLS), (1,), **options))]
    noise = perlin(len(x), x.shape[-1], cells, generator, x.device)[:, None]
    share = uniform(*AREA)
    ranked = noise.flatten(1).sort(1, descending=True).values
    cut = ranked.gather(1, (share[:, 0, 0] * ranked.shape[1]).long())[:, :, None, None]
    where = (noise > cut) & foreground(x) & (uniform(0, 1) >= CLEAN_SHARE)
    shift = torch.randint(x.shape[-1], (2,), **options).tolist()
    content = torch.roll(x.roll(1, 0), shift, (-2, -1))
    content = (content * uniform(0.5, 1.5) + uniform(-0.25, 0.25)).clamp(0, 1)
    painted = torch.where(where, torch.lerp(content, x, uniform(0, MAX_TRANSPARENCY)), x)
    return painted, where & ((painted - x).abs().amax(1, keepdim=True) >= SMALLEST_CHANGE)


def build(width: int = 32, channels: int = 1, size: int = 64, seed: int = 0) -> nn.Module:
    """The network; 1.6 million parameters by default. `size` is not needed: the network is convolutional."""
    torch.manual_seed(seed)
    return UNet(width, channels, 1).to(memory_format=torch.channels_last)


def loss(model: nn.Module, x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Focal loss (Lin et al., arXiv 1708.02002) of the segmentation of painted x [B, C, H, W]."""
    painted, defect = paint(x, generator)
    log_likelihood = -F.binary_cross_entropy_with_logits(model(painted), defect.float(), reduction="none")
    return (-((1 - log_likelihood.exp()) ** FOCUS) * log_likelihood).mean()


def train(images: np.ndarray, budget: Budget, seed: int) -> tuple[nn.Module, int]:
    """(model, number of updates) from normal images uint8 [N, H, W, C]."""
    model = build(channels=images.shape[-1], seed=seed)
    return model, fit(model, images, loss, budget, seed)


def score(model: nn.Module, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Image scores [N] and maps [N, H, W] of uint8 images [N, H, W, C]."""
    return score_in_batches(model, images, lambda model, x: model(x).sigmoid()[:, 0])
