"""A detector made shallower: what is kept, what it costs, how near its scores are, and what the command says.

Axes: B images, V views, N tokens, D width.
"""

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict
from PIL import Image

from benchmarks.bmad_cost import product_flops
from configs import workdir as saved
from core import tree
from core.checkpoint import Checkpointer
from core.optim import build_optimizer
from core.workdir import save_config
from input_pipeline.dataset import load_dataset
from mtl_moe import run
from mtl_moe.cost import score_macs
from mtl_moe.infer import Trained, restore
from mtl_moe.model import build_geometry, build_model_config, trunk_tokens
from mtl_moe.scoring import make_score_fn
from mtl_moe.shrink import copy_blocks, init_updates, kept_blocks, make_tokens_fn, updated, weights_of
from mtl_moe.system import build_system
from mtl_moe.training_data import FILE, bind_training_data


def deep_config(make: Callable[[], ConfigDict]) -> ConfigDict:
    """Two trunk and two expert blocks; a task of pixels and one of tokens, with pseudo-labels."""
    config = make()
    config.model.update(num_dense_layers=2, num_moe_layers=2)
    config.tasks.names = ("masked", "cluster")
    config.compress.update(rank=8, num_steps=40, learning_rate=1e-2, save_every=20)
    return config


@pytest.mark.parametrize(("reduction", "trunk", "expert"), [(2, (0, 2, 4), (0, 2)), (3, (0, 3), (0,)), (5, (0,), (0,))])
def test_the_first_of_every_so_many_blocks_is_kept(tiny_config, reduction, trunk, expert):
    config = tiny_config()
    config.model.update(num_dense_layers=5, num_moe_layers=3)
    assert kept_blocks(build_model_config(config.model), reduction) == {"block": trunk, "expert": expert}


@pytest.mark.parametrize("reduction", [1, 6])
def test_a_reduction_that_keeps_all_or_nothing_is_refused(tiny_config, reduction):
    config = tiny_config()
    config.model.num_dense_layers = 5
    with pytest.raises(ValueError, match=f"expected 2 to 5 for a detector of 5 trunk and 1 expert .*found {reduction}"):
        kept_blocks(build_model_config(config.model), reduction)


def test_kept_blocks_are_renumbered_and_the_rest_stays():
    trunk = {"block_00": "t0", "block_01": "t1", "block_02": "t2", "embed": "e"}
    params = {"trunk": trunk, "expert_00": "x0", "expert_01": "x1", "neck_00": "n0", "head_masked": "h"}
    small = copy_blocks({"params": params, "teacher": trunk}, {"block": (0, 2), "expert": (1,)})
    shallow = {"block_00": "t0", "block_01": "t2", "embed": "e"}
    assert small == {
        "params": {"trunk": shallow, "expert_00": "x1", "neck_00": "n0", "head_masked": "h"}, "teacher": shallow
    }  # fmt: skip


@pytest.mark.parametrize("num_neck_layers", [0, 1])
def test_tokens_are_what_the_heads_read(tiny_config, num_neck_layers):
    """A head's layer norm and matrix on them, by hand, give the model's own output for every view of every image."""
    config = tiny_config()
    config.tasks.names = ("masked", "transform")
    config.model.num_neck_layers = num_neck_layers
    system = build_system(config)
    model = system.model.clone(mesh=None)
    params = jax.jit(system.init_params)(jax.random.key(0))
    images = jax.random.uniform(jax.random.key(1), (3, 32, 32, 1))
    inputs = {task.name: task.views(images) for task in system.tasks}
    outputs, _ = jax.jit(lambda params: model.apply({"params": params}, inputs, train=False))(params)
    tokens = jax.jit(make_tokens_fn(model))(params, inputs)
    tokens = tokens.reshape(3, 10, 16, 16)[:, 2:]  # [B, V of transform, N, D]: the first two views are masked's
    norm, head = params["norm_transform"], params["head_transform"]
    read = tokens * norm["scale"][None, None, None] + norm["bias"][None, None, None]
    logits = jnp.einsum("bvnd,dk->vbnk", read, head["kernel"]) + head["bias"][None, None, None]
    np.testing.assert_allclose(logits.reshape(8, 3, 4, 4, -1), outputs["transform"], rtol=1e-4, atol=1e-5)


def test_multiply_adds_are_those_traced(tiny_config):
    """Exactly, for the dense control; the mixture has the same and a router for each expert block."""
    config = deep_config(tiny_config)
    config.model.mlp = "dense_active"
    system, geometry = build_system(config), build_geometry(config)
    params = jax.eval_shape(system.init_params, jax.random.key(0))
    image = jnp.zeros((1, 32, 32, 1))
    views = {task.name: task.views(image) for task in system.tasks}
    model = system.model.clone(mesh=None)
    apply = lambda params: model.apply({"params": params}, views, train=False, shared_views=True)[0]  # noqa: E731
    teacher = lambda trunk: trunk_tokens(system.model.config, trunk, image)  # noqa: E731
    expected = (product_flops(apply, params) + product_flops(teacher, params["trunk"])) // 2
    dense = score_macs(system.model.config, system.tasks, geometry)
    assert dense == expected
    mixture = dataclasses.replace(system.model.config, mlp="moe")
    num_views, num_blocks, num_experts = 2 + 2, 2 + 1, 2
    assert score_macs(mixture, system.tasks, geometry) - dense == num_views * num_blocks * 16 * 16 * num_experts


class Compressed(NamedTuple):
    """A detector's work directory, that of the smaller one made from it, and what the command printed."""

    config: ConfigDict
    workdir: Path
    output: Path
    printed: str


@pytest.fixture(scope="module")
def compressed(make_run, tiny_config, tmp_path_factory) -> Compressed:
    config = deep_config(tiny_config)
    made = make_run(config)
    workdir = made.workdir
    bind_training_data(made.dataset, workdir)
    save_config(config, workdir)
    output = tmp_path_factory.mktemp("small") / "w"
    with pytest.MonkeyPatch.context() as patch:
        lines = []
        patch.setattr("builtins.print", lambda *parts, **_: lines.append(" ".join(map(str, parts))))
        run.compress(config, workdir, str(output), 2)
    return Compressed(config, workdir, output, "\n".join(lines))


def facts_of(output: Path) -> dict[str, Any]:
    return json.loads((output / "compress.json").read_text())


def test_the_output_is_an_ordinary_work_directory(compressed):
    names = {path.name for path in compressed.output.iterdir()}
    assert names == {
        "checkpoints", "metrics.jsonl", "calibration.npz", "predictions.csv", "patients.csv", "report.json",
        "report.html", "config.json", "compress.json", "distillation", "training_data.json",
    }  # fmt: skip
    config = saved.get_config(str(compressed.output))
    assert (config.model.num_dense_layers, config.model.num_moe_layers, config.model.num_neck_layers) == (1, 1, 1)
    assert "speedup" in compressed.printed
    small = build_system(config)
    tx = build_optimizer(config.optim, config.train.num_steps)
    checkpointer = Checkpointer(compressed.output)
    state = checkpointer.restore_train(small.abstract_state(tx))  # training can go on from here
    checkpointer.close()
    assert int(state.step) == 3
    counts = optax.tree.get_all_with_path(state.opt_state, "count")
    assert {int(count) for _, count in counts} == {3}  # where the schedule goes on


def test_the_report_says_what_it_was_made_from(compressed):
    report = json.loads((compressed.output / "report.json").read_text())
    facts = report["provenance"]["compress"]
    assert facts == facts_of(compressed.output)
    assert facts["source"] == compressed.workdir.name
    assert (facts["source_step"], facts["reduction"], facts["rank"], facts["num_steps"]) == (3, 2, 8, 40)
    assert facts["blocks"] == {"trunk": [0], "expert": [0]}
    assert len(facts["source_sha256"]) == 64
    for name in ("num_params", "gflops_per_image"):
        assert facts[name]["small"] < facts[name]["full"]
    assert facts["num_params"]["small"] == report["provenance"]["num_params"]
    assert facts["speedup"] == pytest.approx(facts["ms_per_image"]["full"] / facts["ms_per_image"]["small"])
    assert "test/phantom/image_auroc" in report["metrics"]
    assert "source_sha256" in (compressed.output / "report.html").read_text()


def restored(compressed: Compressed) -> tuple[Any, Trained, Any, Trained]:
    full, small = build_system(compressed.config), build_system(saved.get_config(str(compressed.output)))
    return full, restore(full, compressed.workdir), small, restore(small, compressed.output)


def test_blocks_learn_and_heads_are_the_full_detectors(compressed):
    _, full, _, small = restored(compressed)
    same, trained = jax.tree.map(np.array_equal, full.params["expert_00"], small.params["expert_00"]), small.params
    assert not any(jax.tree.leaves((same["norm1"], same["mlp"]["experts"]["b2"], same["mlp"]["router"]["kernel"])))
    assert not same["attn"]["query"]["kernel"]
    assert not same["mlp"]["shared"]["fc1"]["kernel"]
    for name in (name for name in trained if name.startswith(("head_", "norm_", "detail_", "task_"))):
        jax.tree.map(np.testing.assert_array_equal, trained[name], full.params[name])
    teachers = [state.extra["teacher"]["trunk"] for state in (full, small)]
    for path in ("block_00/mlp/fc1/kernel", "block_00/mlp/fc1/bias", "pos_embedding"):
        assert not np.array_equal(*(tree.paths(trunk)[path] for trunk in teachers))


def test_updates_begin_at_the_copy_and_cover_every_number_of_the_blocks_once(compressed):
    _, full, _, _ = restored(compressed)
    base = copy_blocks(weights_of(full.params, full.extra), {"block": (0,), "expert": (0,)})
    updates = init_updates(jax.random.key(0), base, 4)
    jax.tree.map(np.testing.assert_array_equal, updated(base, updates), base)
    factors, difference = tree.paths(updates["low_rank"]), tree.paths(updates["difference"])
    covered = [path.removesuffix("/a") + "/kernel" for path in factors if path.endswith("/a")] + list(difference)
    heads = re.compile("params/(head|norm|detail|task)_.*")
    assert sorted(covered) == sorted(path for path in tree.paths(base) if not heads.fullmatch(path))
    ones = updates | {"difference": jax.tree.map(jnp.ones_like, updates["difference"])}
    changed = tree.paths(jax.tree.map(lambda new, old: new - old, updated(base, ones), base))
    for path, value in changed.items():
        np.testing.assert_allclose(value, float(path in difference), atol=1e-6)


def test_distilled_tokens_and_scores_are_nearer_than_copied_ones(compressed):
    error = facts_of(compressed.output)["token_error"]
    assert 0 < error["distilled"] < 0.7 * error["copied"]
    losses = [json.loads(line) for line in (compressed.output / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1]["loss/teacher"] < losses[0]["loss/teacher"]

    full_system, full, small_system, small = restored(compressed)
    copied = copy_blocks(weights_of(full.params, full.extra), kept_blocks(full_system.model.config, 2))
    extra = full.extra | {"teacher": full.extra["teacher"] | {"trunk": copied["teacher"]}}
    images = load_dataset(compressed.config.data).splits["calibration"].images(np.arange(8) % 6)
    wanted, score_fn = make_score_fn(full_system)(full.params, full.extra, images), make_score_fn(small_system)
    for name in ("raw", "maps"):
        away = [
            np.abs(score_fn(params, state, images)[name] - wanted[name]).reshape(8, 2, -1).mean((0, 2))  # by evidence
            for params, state in ((copied["params"], extra), (small.params, small.extra))
        ]
        assert np.all(away[1] < 0.7 * away[0])


def test_evaluate_and_predict_work_on_it(compressed, tmp_path):
    config = saved.get_config(str(compressed.output))
    before = json.loads((compressed.output / "report.json").read_text())
    run.evaluate(config, compressed.output)
    after = json.loads((compressed.output / "report.json").read_text())
    assert after["metrics"] == pytest.approx(before["metrics"])
    assert after["provenance"]["compress"] == before["provenance"]["compress"]
    (tmp_path / "images").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 32), np.uint8)
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / "images" / f"{i}.png")
    run.predict(config, compressed.output, str(tmp_path / "images"), str(tmp_path / "scores"))
    assert len((tmp_path / "scores" / "predictions.csv").read_text().splitlines()) == 3


def test_a_second_run_is_finished_and_an_interrupted_one_goes_on(compressed, tmp_path, capsys):
    config = compressed.config.copy_and_resolve_references()
    config.compress.save_every = 7  # changes nothing that is trained
    run.compress(config, compressed.workdir, str(compressed.output), 2)
    assert "is finished" in capsys.readouterr().out

    copy = tmp_path / "w"
    shutil.copytree(compressed.output, copy)
    shutil.rmtree(copy / "checkpoints")
    early = ("source", "source_sha256", "source_step", "blocks", "reduction", "rank", "num_steps", "kind",
             "learning_rate", "save_every")  # fmt: skip
    facts = facts_of(copy)
    (copy / "compress.json").write_text(json.dumps({name: facts[name] for name in early}))
    run.compress(config, compressed.workdir, str(copy), 2)
    assert "resuming after step 40" in capsys.readouterr().out
    assert facts_of(copy)["token_error"] == pytest.approx(facts["token_error"])
    small = build_system(saved.get_config(str(copy)))
    params = [restore(small, folder).params for folder in (copy, compressed.output)]
    jax.tree.map(np.testing.assert_array_equal, *params)


def test_what_cannot_be_compressed_is_refused(compressed, tmp_path):
    def refuse(message: str, output: Path | str = tmp_path / "w", reduction: int = 2, **fields: Any) -> None:
        config = compressed.config.copy_and_resolve_references()
        config.update(fields)
        with pytest.raises(ValueError, match=message):
            run.compress(config, compressed.workdir, str(output), reduction)
        assert not (tmp_path / "w").exists()

    refuse("--output", "")
    refuse("--output", compressed.workdir)
    refuse("reduction: expected 2 to 2", reduction=3)
    refuse("num_seeds=3: .*seed_0", num_seeds=3)
    refuse("rank: there 8, now 4", compressed.output, compress={"rank": 4})
    refuse("rank of .*: expected 1 to 16 .*found 17", compress={"rank": 17})
    refuse("num_steps must be at least 1, found 0", compress={"num_steps": 0})
    refuse("expected learning_rate, .*found -1.0", compress={"learning_rate": -1.0})
    other = tmp_path / "other"
    other.mkdir()
    save_config(compressed.config, other)
    refuse("is the work directory of another run", other)
    facts = (compressed.workdir / FILE).read_text()
    (compressed.workdir / FILE).write_text(facts.replace('"names_hash": "', '"names_hash": "0'))
    refuse("learned from other images .24 images of phantom. .*compress it with the very images")
    (compressed.workdir / FILE).write_text(facts)
    with pytest.raises(ValueError, match="no work directory of a trained detector"):
        run.compress(compressed.config, tmp_path / "nowhere", str(tmp_path / "w"), 2)
    assert not (tmp_path / "nowhere").exists()


def test_a_detector_trained_before_the_section_existed_can_be_compressed(compressed, tmp_path):
    fields = json.loads((compressed.workdir / "config.json").read_text())
    del fields["compress"]
    (tmp_path / "config.json").write_text(json.dumps(fields))
    config = saved.get_config(str(tmp_path))
    assert config.compress.num_steps == 1200
    run.check_config(config, tmp_path, run.FREE_FIELDS)
