"""What measurements beside PyTorch need of it."""

from types import ModuleType


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
