"""The peers: what they share against other implementations, what each must not see, and that each learns."""

import warnings

import numpy as np
import pytest
from scipy import ndimage

from mtl_moe.tasks.base import body_mask

with warnings.catch_warnings():  # torch's at import are not ours
    warnings.simplefilter("ignore")
    torch = pytest.importorskip("torch")

from benchmarks.peers import denoising_unet, masked_autoencoder, synthetic_segmenter
from benchmarks.peers.training import Budget, foreground, image_scores, make_step, median_filter, to_tensor
from benchmarks.peers.unet import StandardisedConv

PEERS = (denoising_unet, masked_autoencoder, synthetic_segmenter)
SIZE = 32


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    """Bright discs of several sizes on black, with some texture: uint8 [12, 32, 32, 1]."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:SIZE, :SIZE] - SIZE / 2
    discs = np.stack([(y**2 + x**2 < radius**2) for radius in rng.uniform(9, 14, 12)])
    texture = ndimage.gaussian_filter(rng.normal(0, 60, discs.shape), (0, 2, 2))
    return np.clip(discs * (120 + texture), 0, 255).astype(np.uint8)[..., None]


def test_median_filter_is_scipys():
    maps = np.random.default_rng(0).random((2, 9, 9)).astype(np.float32)
    expected = np.stack([ndimage.median_filter(m, 3, mode="mirror") for m in maps])
    np.testing.assert_array_equal(median_filter(torch.from_numpy(maps), 3).numpy(), expected)


def test_foreground_is_the_detectors_body(images: np.ndarray):
    dark = np.zeros_like(images[:1])
    for batch in (images, dark, np.random.default_rng(1).integers(0, 40, images.shape, np.uint8)):
        expected = np.asarray(body_mask(batch.astype(np.float32) / 255))[..., 0] > 0
        np.testing.assert_array_equal(foreground(to_tensor(batch))[:, 0].numpy(), expected)


def test_image_scores_are_the_top_of_the_body():
    maps, body = np.zeros((2, 20, 20), np.float32), np.zeros((2, 20, 20), bool)
    maps[0, 2:12, 2:12], body[:, :10, :10] = 4.0, True
    maps[1, 14:, 14:] = 9.0  # outside
    np.testing.assert_allclose(image_scores(maps, body), [4.0, 0.0], atol=0.05)


def test_budget_is_one_of_two():
    assert Budget(seconds=10).share(5, 99) == 0.5
    assert Budget(updates=4).share(99, 4) == 1.0
    for arguments in ({}, {"seconds": 1, "updates": 1}):
        with pytest.raises(ValueError, match="either seconds or updates"):
            Budget(**arguments)


def test_the_learning_rate_rises_then_falls(images: np.ndarray):
    torch.manual_seed(0)
    model, seen = torch.nn.Linear(1, 1), []

    def loss(model: torch.nn.Module, x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return model(x.mean((1, 2, 3))[:, None]).square().mean()

    step = make_step(model, images, loss, 0, 2, 1e-2)
    for share in (0.0, 0.05, 0.5, 1.0):
        before = model.weight.detach().clone()
        step(share)
        seen.append(float((model.weight.detach() - before).abs().max()))
    # AdamW moves by about the rate: nearly none, all, half, nearly none.
    assert seen[0] < 1e-4
    assert seen[1] > 1.3 * seen[2] > 0
    assert seen[3] < 1e-4


def test_kernels_are_standardised():
    torch.manual_seed(0)
    conv, x = StandardisedConv(2, 3, 3, padding=1), torch.randn(1, 2, 6, 6)
    with torch.no_grad():
        before = conv(x)
        conv.weight.mul_(3.0).add_(0.5)
        torch.testing.assert_close(conv(x), before, rtol=1e-3, atol=1e-3)


def test_the_autoencoder_reads_visible_patches_only():
    model = masked_autoencoder.build(width=32, size=SIZE)
    patches, visible = torch.rand(2, model.count, 64), torch.tensor([[0, 3, 5, 9], [1, 2, 3, 4]])
    changed = patches.clone()
    changed[0, 1], changed[1, 0] = 0.0, 1.0
    with torch.no_grad():
        torch.testing.assert_close(model(changed, visible), model(patches, visible))
        changed[0, 3] = 0.0
        assert not torch.allclose(model(changed, visible)[0], model(patches, visible)[0])


def test_patchify_cuts_rows_of_patches():
    x = torch.arange(64.0).reshape(1, 1, 8, 8)
    patches = masked_autoencoder.patchify(x, 4)
    assert patches[0, 1, :4].tolist() == [4, 5, 6, 7]
    assert patches[0, 2, 0] == 32


def test_a_map_of_the_autoencoder_lies_where_the_error_is(images: np.ndarray):
    model = masked_autoencoder.build(width=32, size=SIZE)
    with torch.no_grad():  # predicts grey 0 everywhere: the error is the image
        model.head[1].weight.zero_(), model.head[1].bias.zero_()
    _, maps = masked_autoencoder.score(model, images)
    np.testing.assert_allclose(maps, images[..., 0] / 255, atol=1e-6)


def test_perlin_noise_is_smooth_and_bounded():
    noise = synthetic_segmenter.perlin(8, 64, 4, torch.Generator().manual_seed(0), torch.device("cpu"))
    assert noise.shape == (8, 64, 64)
    assert 0.3 < noise.abs().max() <= 1.0
    assert noise.diff(dim=1).abs().max() < 0.33
    assert noise.diff(dim=2).abs().max() < 0.33
    # Zero at the lattice: the four pixels around an inner lattice point cancel to first order.
    corner = noise[:, 15:17, 15:17].mean((1, 2))
    assert corner.abs().max() < 0.02


def test_painted_defects_are_where_the_image_changed(images: np.ndarray):
    x = to_tensor(np.concatenate([images] * 4))
    painted, defect = synthetic_segmenter.paint(x, torch.Generator().manual_seed(1))
    change = (painted - x).abs()
    assert (change[defect] >= synthetic_segmenter.SMALLEST_CHANGE).all()
    assert (change[~defect] < synthetic_segmenter.SMALLEST_CHANGE).all()
    assert not (defect & ~foreground(x)).any()
    share = defect.float().mean((1, 2, 3))
    assert 0 < share.max() <= synthetic_segmenter.AREA[1] + 0.01
    assert 0.2 < (share == 0).float().mean() < 0.8


@pytest.mark.parametrize("module", PEERS, ids=lambda module: module.__name__.split(".")[-1])
def test_a_peer_learns_and_scores_each_image_by_itself(module, images: np.ndarray):
    model = module.build(width=32 if module is masked_autoencoder else 8, size=SIZE)
    step = make_step(model, images, module.loss, 0, 8, 3e-3)
    losses = [float(step(0.3)) for _ in range(24)]
    assert np.mean(losses[-4:]) < 0.8 * np.mean(losses[:4])
    scores, maps = module.score(model, images)
    assert (scores.shape, maps.shape) == ((12,), images.shape[:3])
    assert np.isfinite(scores).all()
    alone, its_map = module.score(model, images[3:4])
    np.testing.assert_allclose(alone[0], scores[3], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(its_map[0], maps[3], atol=1e-5)


@pytest.mark.parametrize("module", PEERS, ids=lambda module: module.__name__.split(".")[-1])
def test_a_peer_is_as_large_as_the_tiny_detector(module):
    with torch.device("meta"):
        assert sum(p.numel() for p in module.build().parameters()) == pytest.approx(1.6e6, rel=0.1)


def test_training_counts_its_updates(images: np.ndarray):
    model, updates = denoising_unet.train(images[:4], Budget(updates=1), 0)
    assert updates == 1
    assert not model.training
