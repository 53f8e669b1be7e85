"""Resizing of position embeddings against torch, the way each tool calls it."""

import numpy as np
import pytest
from peers import peer

from vit_distill.positions import resize_matrix, resize_positions

POSITIONS = np.random.RandomState(0).standard_normal((1, 1 + 49, 4)).astype(np.float32)


@pytest.mark.parametrize("grid", [4, 5, 10, 16])
@pytest.mark.parametrize("variant", ["timm", "bicubic", "dinov2"])
def test_equals_torch(variant: str, grid: int) -> None:
    torch = peer("torch")
    patches = torch.from_numpy(POSITIONS[:, 1:].reshape(1, 7, 7, 4)).permute(0, 3, 1, 2)
    options = {
        "timm": {"size": (grid, grid), "antialias": True},
        "bicubic": {"size": (grid, grid)},
        "dinov2": {"scale_factor": ((grid + 0.1) / 7, (grid + 0.1) / 7)},
    }[variant]
    expected = torch.nn.functional.interpolate(patches, mode="bicubic", **options).permute(0, 2, 3, 1)
    found = resize_positions(POSITIONS, 1, grid, variant)
    np.testing.assert_allclose(found[:, 1:], expected.reshape(1, grid * grid, 4), rtol=1e-5, atol=2e-6)
    np.testing.assert_array_equal(found[:, 0], POSITIONS[:, 0])


def test_equals_timm() -> None:
    peer("timm")
    from timm.layers import resample_abs_pos_embed

    expected = resample_abs_pos_embed(peer("torch").from_numpy(POSITIONS), [11, 11])
    np.testing.assert_allclose(resize_positions(POSITIONS, 1, 11), expected, rtol=1e-5, atol=2e-6)


def test_by_hand() -> None:
    # Two values to four, a = -0.75: the first output stands at -0.25 of the input grid, x = 0.25, 0.75 and 1.25 away.
    near, far = 1.25 * 0.25**3 - 2.25 * 0.25**2 + 1, 1.25 * 0.75**3 - 2.25 * 0.75**2 + 1
    outer = -0.75 * (1.25**3 - 5 * 1.25**2 + 8 * 1.25 - 4)
    row = resize_matrix(2, 4, "bicubic")[0]
    np.testing.assert_allclose(row, [1 - outer, outer], atol=1e-12)
    np.testing.assert_allclose(near + far + outer - 0.75 * (1.75**3 - 5 * 1.75**2 + 8 * 1.75 - 4), 1, atol=1e-12)
    np.testing.assert_allclose(resize_matrix(5, 3, "timm").sum(1), np.ones(3))


def test_same_grid_and_errors() -> None:
    assert resize_positions(POSITIONS, 1, 7) is POSITIONS
    with pytest.raises(ValueError, match=r"expected 0 \+ G\*G tokens"):
        resize_positions(POSITIONS, 0, 5)
    with pytest.raises(ValueError, match="position_resize: expected one of"):
        resize_positions(POSITIONS, 1, 5, "nearest")
