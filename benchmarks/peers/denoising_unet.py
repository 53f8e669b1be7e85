"""Denoising U-Net after Kascenas et al. 2022 (MIDL, "Denoising Autoencoders for Unsupervised Anomaly Detection in Brain
MRI"; code AntanasKascenas/DenoisingAE), written anew.

Training removes coarse noise: 16 x 16 normal values of deviation 0.2, enlarged bilinearly, rolled at random, added
inside the foreground; squared error there. The map is the absolute difference between an image and its restoration
inside the eroded foreground, median filtered. Theirs: 128 pixels, four modalities, Adam with AMSGrad, 67,200 updates.
"""

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.peers.training import Budget, fit, foreground, median_filter, score_in_batches
from benchmarks.peers.unet import UNet

NOISE_CELLS, NOISE_STD = 16, 0.2
FILTER = 5 / 128  # side of the median filter and of the erosion as a share of the image's


def build(width: int = 32, channels: int = 1, size: int = 64, seed: int = 0) -> nn.Module:
    """The network; 1.6 million parameters by default. `size` is not needed: the network is convolutional."""
    torch.manual_seed(seed)
    return UNet(width, channels, channels).to(memory_format=torch.channels_last)


def loss(model: nn.Module, x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Squared error of the restoration inside the foreground of x [B, C, H, W]."""
    body = foreground(x)
    cells = torch.randn((*x.shape[:2], NOISE_CELLS, NOISE_CELLS), generator=generator, device=x.device) * NOISE_STD
    noise = F.interpolate(cells, size=x.shape[-2:], mode="bilinear", align_corners=True)
    shift = torch.randint(x.shape[-1], (2,), generator=generator, device=x.device).tolist()
    noise = torch.roll(noise, shift, (-2, -1))
    return ((model(x + noise * body) - x).square() * body).mean()


def train(images: np.ndarray, budget: Budget, seed: int) -> tuple[nn.Module, int]:
    """(model, number of updates) from normal images uint8 [N, H, W, C]."""
    model = build(channels=images.shape[-1], seed=seed)
    return model, fit(model, images, loss, budget, seed)


def score(model: nn.Module, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Image scores [N] and maps [N, H, W] of uint8 images [N, H, W, C]."""
    return score_in_batches(model, images, _maps)


def _maps(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    size = max(3, round(FILTER * x.shape[-1]) | 1)
    inside = F.avg_pool2d(foreground(x).float(), size, stride=1, padding=size // 2) > 0.95
    return median_filter(((model(x) - x).abs() * inside).mean(1), size)
