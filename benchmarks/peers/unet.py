"""A plain U-Net: the network of `denoising_unet` and `synthetic_segmenter`.

As in Kascenas et al. 2022 (their code: AntanasKascenas/DenoisingAE): four levels, weight-standardised 3x3 convolutions
with reflected edges, SiLU then group norm, average pooling, transposed 2x2 convolutions upwards. Narrower than theirs,
so that it has as many parameters as the detector it is compared with.
"""

import torch
from torch import nn
from torch.nn import functional as F

GROUPS = 8


class StandardisedConv(nn.Conv2d):
    """Convolution whose kernels have zero mean and unit variance for each output (Qiao et al., arXiv 1903.10520)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        variance, mean = torch.var_mean(self.weight, (1, 2, 3), keepdim=True, correction=0)
        fan_in = self.weight[0].numel()
        weight = (self.weight - mean) / torch.sqrt(variance * fan_in + 1e-5)
        return self._conv_forward(x, weight, self.bias)


def _double(inputs: int, outputs: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for channels in (inputs, outputs):
        layers.append(StandardisedConv(channels, outputs, 3, padding=1, padding_mode="reflect"))
        layers += [nn.SiLU(), nn.GroupNorm(GROUPS, outputs)]
    return nn.Sequential(*layers)


class UNet(nn.Module):
    """Images [B, C, H, W] -> [B, outputs, H, W]; sides are multiples of 8. Widths w, 2w, 4w, 6w for width w."""

    def __init__(self, width: int, channels: int, outputs: int):
        super().__init__()
        widths = [width, 2 * width, 4 * width, 6 * width]
        self.down = nn.ModuleList(_double(a, b) for a, b in zip([channels, *widths[:-1]], widths, strict=True))
        pairs = list(zip(widths[:0:-1], widths[-2::-1], strict=True))
        self.up = nn.ModuleList(nn.ConvTranspose2d(a, b, 2, stride=2) for a, b in pairs)
        self.join = nn.ModuleList(_double(2 * b, b) for _, b in pairs)
        self.last = nn.Conv2d(width, outputs, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """See the class."""
        skips = []
        for i, block in enumerate(self.down):
            x = block(F.avg_pool2d(x, 2) if i else x)
            skips.append(x)
        for up, join, skip in zip(self.up, self.join, skips[-2::-1], strict=True):
            x = join(torch.cat([up(x), skip], 1))
        return self.last(x)
