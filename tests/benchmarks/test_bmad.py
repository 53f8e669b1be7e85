"""Synthetic BMAD trees are read as the sets they copy; the rehearsal notices what is wrong; costs against tracing."""

import csv
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from benchmarks import bmad_cost
from benchmarks.bmad_layouts import LAYOUTS, picture, plan_files, write_tree
from benchmarks.bmad_rehearsal import (
    RehearsalError,
    check_prepare,
    check_report,
    expected_counts,
    expected_metrics,
    run_stage,
)
from configs.mtl_moe import bmad as recipe
from input_pipeline.bmad import BMAD, index_bmad
from input_pipeline.prepare import format_report, prepare
from mtl_moe.system import build_system


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", BMAD)
def test_trees_are_read_as_the_sets_they_copy(tmp_path, name, layout):
    files = plan_files(name, layout, scale=0.002)
    for other in LAYOUTS[layout].values():  # the sets stand side by side
        (tmp_path / other.folder).mkdir(parents=True)
    for path in (path for file in files for path in (file.image, file.mask) if path):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    index = index_bmad(name, tmp_path)
    found = {str(e.image.relative_to(tmp_path)): e for examples in index.splits.values() for e in examples}
    assert found.keys() == {file.image for file in files}
    for file in files:
        example = found[file.image]
        mask = file.mask if file.abnormal else None
        assert (example.label, example.mask) == (int(file.abnormal), tmp_path / mask if mask else None)
    assert len(index.splits["test"]) == sum(file.split == "test" for file in files)


@pytest.mark.parametrize("name", BMAD)
def test_counts_are_the_published_ones(name):
    counts = expected_counts(plan_files(name))
    for split in ("train", "valid", "test"):
        assert (counts[split, "normal"], counts[split, "abnormal"]) == getattr(BMAD[name], split)
    num_images = sum(count for (_, kind), count in counts.items() if kind != "masks")
    assert len({file.image for file in plan_files(name)}) == num_images
    assert counts["test", "masks"] == (BMAD[name].test[1] if BMAD[name].has_masks else 0)


def test_pictures_have_native_size_and_mode(tmp_path):
    assert sum(expected_counts(plan_files("rsna"))["test", k] for k in ("normal", "abnormal")) == 17_194
    shapes = {"brain": (240, 240, 4), "resc": (512, 1024), "camelyon16": (256, 256, 3), "rsna": (1024, 1024)}
    for name, shape in shapes.items():
        assert picture(name, 0, True)[0].shape == shape
    image, mask = picture("liver", 3, True)
    assert set(np.unique(mask)) == {0, 1}
    assert image[mask > 0].mean() > image[mask == 0].mean() + 50
    assert not picture("liver", 3, False)[1].any()
    files, num_bytes = write_tree(tmp_path, "brain", scale=0.0)
    (file,) = (f for f in files if f.mask and f.split == "valid" and f.image.endswith("03700_60.png"))
    with Image.open(tmp_path / file.image) as stored, Image.open(tmp_path / file.mask) as its_mask:
        assert (stored.mode, stored.size, its_mask.mode, its_mask.size) == ("RGBA", (240, 240), "L", (240, 240))
    assert num_bytes == sum(path.stat().st_size for path in tmp_path.rglob("*.png"))


def test_prepare_of_a_copy_is_checked(tmp_path):
    files, _ = write_tree(tmp_path, "camelyon16", scale=0.0)
    config = recipe.get_config("camelyon16,preset=tiny")
    config.data.root = str(tmp_path)
    printed = format_report(prepare(config.data, tmp_path / "cache.npz"))
    check_prepare(printed, "camelyon16", files, whole=False)
    for wrong in (
        printed.replace("60 normal", "59 normal").replace("54 normal", "53 normal"),
        printed.replace("duplicate images: 0", "duplicate images: 1"),
        printed.replace("256x256", "255x256"),
    ):
        with pytest.raises(RehearsalError, match="prepare of camelyon16"):
            check_prepare(wrong, "camelyon16", files, whole=False)


def test_report_of_a_copy_is_checked(tmp_path):
    files = plan_files("liver", scale=0.0)
    folder, test = LAYOUTS["released"]["liver"].folder, [f.image for f in files if f.split == "test"]

    def write(metrics, images):
        report = {"metrics": dict.fromkeys(metrics, 0.5), "provenance": {"counts": {"all": len(files)}}}
        (tmp_path / "report.json").write_text(json.dumps(report))
        (tmp_path / "report.html").touch()
        with (tmp_path / "predictions.csv").open("w", newline="") as table:
            writer = csv.writer(table)
            writer.writerows([("name", "score"), *((image.removeprefix(folder + "/"), 1.0) for image in images)])
        return check_report(tmp_path, "liver", files, folder)

    keys = expected_metrics("liver")
    assert "test/liver/floor/untrained/aupro" in keys
    assert write(keys, test)["metrics"].keys() == set(keys)
    for metrics, images in ((keys[1:], test), (keys, test[1:]), (keys, [*test, test[0]])):
        with pytest.raises(RehearsalError, match="evaluation of liver"):
            write(metrics, images)


def test_a_command_that_fails_is_reported(tmp_path):
    with pytest.raises(RehearsalError, match="unexpected arguments"):
        run_stage(["nonsense"], tmp_path / "log.txt")


def small_system(**model):
    config = recipe.get_config("camelyon16,preset=tiny")
    config.data.image_size = 32
    config.tasks.names = ("masked", "synthetic", "jigsaw", "transform", "cluster")
    config.model.update(width=32, num_heads=2, num_dense_layers=1, num_moe_layers=1, mlp_dim=64, expert_dim=16, **model)
    return build_system(config)


def test_flops_of_products():
    x, y, w = (jnp.zeros(shape) for shape in ((6, 4), (2, 4, 5), (2, 6, 4)))
    assert bmad_cost.product_flops(lambda a, b: a @ b[0], x, y) == 2 * 6 * 4 * 5
    assert bmad_cost.product_flops(jax.jit(lambda a, b: a @ b), w, y) == 2 * 2 * 6 * 4 * 5
    ragged = lambda a, b: jax.lax.ragged_dot(a, b, jnp.array([2, 4])).sum()  # noqa: E731
    assert bmad_cost.product_flops(ragged, x, y) == 2 * 6 * 4 * 5
    assert bmad_cost.product_flops(jax.grad(ragged, argnums=(0, 1)), x, y) == 3 * 2 * 6 * 4 * 5
    looped = lambda a: jax.lax.fori_loop(0, 3, lambda i, z: z @ z, a)  # noqa: E731
    assert bmad_cost.product_flops(looped, x[:4]) == 3 * 2 * 4 * 4 * 4
    with pytest.raises(ValueError, match="outside of while loops"):
        bmad_cost.product_flops(lambda a: jax.lax.while_loop(lambda z: z[0, 0] < 1, lambda z: z @ z, a), x[:4])


def test_flops_of_the_detector_by_hand():
    system = small_system()
    tokens, width, views = 16, 32, {"masked": 2, "synthetic": 1, "jigsaw": 1, "transform": 8, "cluster": 2}
    attention = 4 * tokens * width**2 + 2 * tokens**2 * width
    trunk = tokens * 8 * 8 * 4 * width + attention + 2 * tokens * width * 64
    experts = 2 * (attention + 2 * tokens * width * 16 * 3)
    detail = tokens * (width + 8 * 8 * 4) * 2 * width
    heads = {"masked": detail + tokens * 2 * width * 64 * 3, "synthetic": detail + tokens * 2 * width * 64 * 4}
    heads |= {"jigsaw": tokens * width * 16, "transform": tokens * width * 8, "cluster": tokens * width * 32}
    forward = sum(trunk + experts + head for head in heads.values())
    # Routers, experts' biases as products, clusters' distances and SSIM are not in the sums by hand.
    assert 1 <= bmad_cost.train_flops(system) / (2 * (3 * forward + trunk)) < 1.06
    # The trunk sees 11 different views and the teacher's: clean, clean without position, two masks, seven symmetries.
    scored = sum(views[name] * (experts + head) for name, head in heads.items()) + (11 + 1) * trunk
    assert 1 <= bmad_cost.score_flops(system) / (2 * scored) < 1.1  # smoothing of maps besides


def test_flops_of_the_optimizer_by_hand():
    def newton_schulz(rows: int, columns: int) -> int:
        small, large = sorted((rows, columns))
        return 5 * 2 * (2 * small**2 * large + small**3)

    attention = 4 * newton_schulz(32, 32)
    trunk = attention + 2 * newton_schulz(32, 64)
    experts = 2 * (attention + 2 * newton_schulz(32, 16) * (6 + 1))
    details = 2 * newton_schulz(32 + 8 * 8 * 4, 2 * 32)
    system = small_system()
    assert bmad_cost.optimizer_flops(system) == trunk + experts + details
    system.config.optim.kind = "adamw"
    assert bmad_cost.optimizer_flops(system) == 0


def test_memory_of_the_backward_pass_grows_with_the_batch():
    system = small_system()
    one, two, three = (bmad_cost.kept_bytes(system, batch) for batch in (1, 2, 3))
    assert three - two == two - one > 0


def test_sizes_by_hand():
    found = bmad_cost.sizes("brain", recipe.get_config("brain,preset=base"))
    assert found["images"] == 11_298
    assert found["raw_gb"] == pytest.approx(240 * 240 * (4 * 11_298 + 3_119) / 1e9)
    assert found["decoded_gb"] == pytest.approx(224 * 224 * (11_298 + 3_798) / 1e9)
