"""torch, timm and transformers for parity tests: imported here only, skipped where they are absent or broken."""

import warnings
from types import ModuleType

import numpy as np
import pytest


def peer(name: str) -> ModuleType:
    """The module, or a skip. torch comes first, one thread, and its warnings at import are not ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch = pytest.importorskip("torch")
        torch.set_num_threads(1)
        _declare_vision_operators(torch)
        return pytest.importorskip(name)


def _declare_vision_operators(torch: ModuleType) -> None:
    """A torchvision built for CUDA cannot load beside a CPU torch and then fails at import for want of two operators
    that vision transformers never call; declared, it imports."""
    if hasattr(torch.ops.torchvision, "qnms"):
        return
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        for operator in ("nms", "qnms"):
            torch.library.define(f"torchvision::{operator}", "(Tensor dets, Tensor scores, float threshold) -> Tensor")
    except ImportError:
        return


def to_torch(images: np.ndarray):
    """[B, H, W, C] -> torch's [B, C, H, W]."""
    return peer("torch").from_numpy(np.ascontiguousarray(np.moveaxis(images, -1, 1)))
