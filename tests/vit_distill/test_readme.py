"""The README's Python example, run as it stands."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from core.tree import paths
from core.vit import VisionTransformer, VitConfig
from vit_distill.formats.timm import write_timm_folder
from vit_distill.preprocessing import Preprocessing
from vit_distill.teacher import load_teacher

README = Path(__file__).parents[2] / "README.md"
CONFIG = VitConfig(depth=4, width=16, num_heads=2, mlp_dim=32, patch_size=4, image_size=8)


def test_the_example_writes_a_student_that_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    code = re.search(r"```python\n(.*?)```", README.read_text(), re.DOTALL)[1]
    assert "config.data.root" in code
    # The one thing that a test cannot wait for.
    code = code.replace("distiller = build_distiller", "config.train.update(num_steps=2, batch_size=8)\n"
                        "config.lora.rank = 4\ndistiller = build_distiller")  # fmt: skip
    params = VisionTransformer(CONFIG).init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]
    monkeypatch.chdir(tmp_path)
    write_timm_folder(Path("teacher"), CONFIG, params, Preprocessing(8, (0.5,) * 3, (0.25,) * 3))
    (tmp_path / "images").mkdir()
    for i in range(6):
        pixels = np.random.default_rng(i).integers(0, 256, (9, 12, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{i}.png")
    names: dict = {}
    exec(code, names)
    pixels = np.zeros((8, 8, 8, 3), np.uint8)
    assert names["features"](pixels).shape == (8, CONFIG.width)
    student = load_teacher("student")
    assert student.config.depth == 2
    written = paths(names["student"].params)
    for path, leaf in paths(student.params).items():
        np.testing.assert_array_equal(leaf, written[path])
