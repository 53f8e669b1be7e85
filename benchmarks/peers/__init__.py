"""What measurements beside PyTorch need of it, and detectors to compare with, one file each.

`denoising_unet`, `masked_autoencoder` and `synthetic_segmenter` learn from the same normal images as `mtl_moe`, from
scratch. Each file has `build(...) -> model`, `loss(model, images, generator)`, `train(images, budget, seed) -> (model,
updates)` and `score(model, images) -> (image scores [N], maps [N, H, W])`, higher is odder. They import torch at module
level: import them where they are used.
"""

from types import ModuleType

DETECTORS = ("denoising_unet", "masked_autoencoder", "synthetic_segmenter")


def import_timm() -> tuple[ModuleType, ModuleType]:
    """(torch, timm). timm imports torchvision, whose build may not fit a CPU torch; the operators that it then misses
    are declared: vision transformers never call them."""
    import torch

    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        for operator in ("nms", "qnms"):
            torch.library.define(f"torchvision::{operator}", "(Tensor dets, Tensor scores, float threshold) -> Tensor")
    except ImportError:
        pass
    import timm

    return torch, timm
