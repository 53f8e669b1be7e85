"""Masked autoencoder (He et al., arXiv 2111.06377) as an anomaly detector: what its context does not predict is odd.

The encoder sees a random quarter of the patches, the decoder fills in the rest; squared error of the pixels of hidden
patches. The map is the absolute error of each pixel where it was hidden, averaged over fixed random partitions of the
patches into four visible sets: every patch is hidden three times a partition. Masks are the same for all images, so an
image's score does not depend on the others. The decoder is as wide as the encoder; pixels are not normalised by patch.
"""

import numpy as np
import torch
from torch import nn

from benchmarks.peers.training import Budget, fit, score_in_batches

VISIBLE = 4  # one patch in so many is visible
PARTITIONS = 4  # at test


class MaskedAutoencoder(nn.Module):
    """Patches and which are visible -> all patches. Axes: N patches, V visible ones, Q pixels of a patch, D width."""

    def __init__(self, width: int, channels: int, size: int, patch: int = 8, depth: int = 6, decoder_depth: int = 2):
        super().__init__()
        self.patch, self.count = patch, (size // patch) ** 2
        pixels = patch * patch * channels

        def blocks(number: int) -> nn.Sequential:
            make = nn.TransformerEncoderLayer
            options = dict(dropout=0.0, activation="gelu", batch_first=True, norm_first=True)
            return nn.Sequential(*(make(width, width // 32, 4 * width, **options) for _ in range(number)))

        def position() -> nn.Parameter:
            return nn.Parameter(0.02 * torch.randn(1, self.count, width))

        self.embed, self.position = nn.Linear(pixels, width), position()
        self.encoder, self.norm = blocks(depth), nn.LayerNorm(width)
        self.bridge, self.decoder_position = nn.Linear(width, width), position()
        self.hidden = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.decoder, self.head = blocks(decoder_depth), nn.Sequential(nn.LayerNorm(width), nn.Linear(width, pixels))

    def forward(self, patches: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
        """Patches [B, N, Q] and indices [B, V] -> patches [B, N, Q]; hidden pixels are never read."""
        width = self.position.shape[-1]
        rows = visible[..., None]
        seen = patches.gather(1, rows.expand(-1, -1, patches.shape[-1]))
        tokens = self.embed(seen) + self.position.expand(len(patches), -1, -1).gather(1, rows.expand(-1, -1, width))
        tokens = self.bridge(self.norm(self.encoder(tokens)))
        full = self.hidden.expand(len(patches), self.count, -1).scatter(1, rows.expand(-1, -1, width), tokens)
        return self.head(self.decoder(full + self.decoder_position))


def build(width: int = 128, channels: int = 1, size: int = 64, seed: int = 0) -> nn.Module:
    """The network; 1.6 million parameters by default."""
    torch.manual_seed(seed)
    return MaskedAutoencoder(width, channels, size)


def patchify(x: torch.Tensor, patch: int) -> torch.Tensor:
    """[B, C, H, W] -> [B, N, Q], rows of patches one after the other."""
    b, c, h, w = x.shape
    cut = x.reshape(b, c, h // patch, patch, w // patch, patch).permute(0, 2, 4, 3, 5, 1)
    return cut.reshape(b, -1, patch * patch * c)


def _hidden(count: int, visible: torch.Tensor) -> torch.Tensor:
    """Indices [B, V] -> float [B, N, 1], 1 where hidden."""
    return torch.ones(len(visible), count, device=visible.device).scatter(1, visible, 0.0)[..., None]


def loss(model: nn.Module, x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Squared error of the hidden pixels of x [B, C, H, W]."""
    patches = patchify(x, model.patch)
    order = torch.rand(patches.shape[:2], generator=generator, device=x.device).argsort(1)
    visible = order[:, : model.count // VISIBLE]
    hidden = _hidden(model.count, visible)
    error = (model(patches, visible) - patches).square().mean(-1, keepdim=True)
    return (error * hidden).sum() / hidden.sum()


def train(images: np.ndarray, budget: Budget, seed: int) -> tuple[nn.Module, int]:
    """(model, number of updates) from normal images uint8 [N, H, W, C], H = W a multiple of 16."""
    model = build(channels=images.shape[-1], size=images.shape[1], seed=seed)
    return model, fit(model, images, loss, budget, seed, batch_size=64)


def score(model: nn.Module, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Image scores [N] and maps [N, H, W] of uint8 images [N, H, W, C]."""
    return score_in_batches(model, images, _maps)


def _maps(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    patches, generator, total = patchify(x, model.patch), torch.Generator().manual_seed(0), 0.0
    for _ in range(PARTITIONS):
        for visible in torch.randperm(model.count, generator=generator).to(x.device).chunk(VISIBLE):
            rows = visible[None].expand(len(x), -1)
            total = total + (model(patches, rows) - patches).abs() * _hidden(model.count, rows)
    error = total / (PARTITIONS * (VISIBLE - 1))
    side, patch = x.shape[-1] // model.patch, model.patch
    cells = error.reshape(len(x), side, side, patch, patch, -1).mean(-1)
    return cells.permute(0, 1, 3, 2, 4).reshape(len(x), side * patch, side * patch)
