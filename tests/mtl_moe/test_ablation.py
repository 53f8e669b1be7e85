"""The ablation: its rows, what a cell measures, means and choice of the table, and a small one end to end."""

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from configs import common
from configs.mtl_moe import ablation as config_file
from core.bootstrap import bootstrap_difference
from core.loop import NonFiniteLossError
from core.metrics import auroc_between
from core.workdir import check_config
from mtl_moe import ablation, ablation_cell, run
from mtl_moe.ablation import FREE_FIELDS, run_ablation
from mtl_moe.ablation_cell import FUSED, Stored, joined, load_trained, measure, read_stored, uncorrected
from mtl_moe.ablation_report import choice_in_words, markdown
from mtl_moe.ablation_rows import Row, build_rows, cell_config, known_rows
from mtl_moe.ablation_summary import Outcome, choose, summarise, write_summary
from mtl_moe.calibration import evidence_names, fused_names
from mtl_moe.calibration_fit import fit_calibration
from mtl_moe.infer import Scored
from mtl_moe.painted import KINDS, sources
from mtl_moe.system import build_system
from mtl_moe.tasks import build_tasks

TASKS = ("masked", "synthetic")


@pytest.fixture
def config(tiny_config) -> Any:
    """The ablation of the smallest detector, two tasks."""
    found = tiny_config()
    found.tasks.names = TASKS
    found.tasks.synthetic.families = ("blob",)  # each compiles into every training
    found.command = "ablation"
    found.ablation = dict(rows=("top_1",), num_seeds=1, painted_images=5)
    found.train.num_steps = 2
    return found


def rows_of(config: Any) -> dict[str, Row]:
    return known_rows(config, build_system(config).tasks)


# Rows.


def test_the_default_config_has_every_row_of_the_plan():
    config = config_file.get_config()
    rows = build_rows(config, build_system(config).tasks)
    assert next(iter(rows)) == "base"
    expected = {
        "dense_active", "dense_params", "router_per_task", "router_fixed", "no_shared_expert", "top_1", "experts_1",
        "experts_2", "experts_4", "experts_8", "width_half", "width_double", "depth_double", "image_96", "image_128",
        "image_224", "steps_half", "steps_double", "augment_none", "augment_light_all", "adamw", "fusion_robust_z",
        "fusion_max", "fusion_mean", "no_texture_fit", "ensemble", "without_evidence_synthetic",
        "without_evidence_synthetic_clean", "without_texture",
    }  # fmt: skip
    for task in config.tasks.names:
        expected |= {f"only_{task}", f"single_{task}", f"without_{task}", f"retrained_without_{task}"}
    assert expected <= set(rows)
    assert not {"router_shared", "shared_expert", "top_2", "image_64", "muon", "fusion_tail"} & set(rows), (
        "equal to the base"
    )
    assert set(rows_of(config)) == set(rows)


def test_rows_with_fewer_tasks_see_as_many_task_views(config):
    config.tasks.names = ("masked", "denoise", "synthetic")
    config.train.num_steps = 10
    for name, row in rows_of(config).items():
        if name.startswith(("only_", "retrained_without_")):
            one = cell_config(config, row, 0)
            assert one.train.num_steps * len(one.tasks.names) == 30
            others = {"masked", "denoise", "synthetic"} - {name.removeprefix("retrained_without_")}
            assert set(one.tasks.names) == ({name.removeprefix("only_")} if name.startswith("only_") else others)


def test_a_cell_is_an_ordinary_detector_that_differs_in_its_row_alone(config):
    rows = rows_of(config)
    one = cell_config(config, rows["router_fixed"], seed=2)
    assert (one.model.router, one.model.top_k, one.model.num_experts, one.seed) == ("fixed", 1, 2, 2)
    assert cell_config(config, rows["experts_1"], 0).model.top_k == 1
    expected = config.to_dict()
    del expected["command"], expected["ablation"]
    assert cell_config(config, rows["base"], 0).to_dict() == expected
    assert {key for key, value in one.to_dict().items() if value != expected[key]} == {"model", "seed"}
    assert config.model.router == "shared"


def test_an_ensemble_brings_its_parts(config):
    config.ablation.rows = ("ensemble",)
    rows = build_rows(config, build_system(config).tasks)
    assert list(rows) == ["base", "single_masked", "single_synthetic", "ensemble"]
    for task in TASKS:
        one = cell_config(config, rows[f"single_{task}"], 0)
        assert (one.tasks.names, one.train.num_steps) == ((task,), config.train.num_steps)


def test_patterns_choose_rows_and_unknown_names_are_told(config):
    config.ablation.rows = ("dense_*", "without_masked")
    assert list(build_rows(config, build_system(config).tasks)) == [
        "base", "dense_active", "dense_params", "without_masked"
    ]  # fmt: skip
    for rows, message in (
        (("top_1", "top_3"), r"no row is called \['top_3'\]; expected some of base, .*top_1"),
        ((), "no row"),
    ):
        config.ablation.rows = rows
        with pytest.raises(ValueError, match=message):
            build_rows(config, build_system(config).tasks)
    config.ablation.update(rows=("top_1",), num_seeds=0)
    with pytest.raises(ValueError, match=r"ablation\.num_seeds"):
        build_rows(config, build_system(config).tasks)


def test_rows_that_cannot_run_are_named_before_anything_is_run(config, tmp_path):
    config.ablation.rows = ("image_64",)
    config.data.cache = "decoded.npz"
    with pytest.raises(ValueError, match=r"image_64 needs images of 64 pixels.*cache"):
        run_ablation(config, tmp_path / "run")
    config.ablation.rows = ("top_2",)
    config.model.update(num_experts=1, top_k=1)
    with pytest.raises(ValueError, match=r"row top_2 \(two experts a token\) cannot be built: .*top_k"):
        run_ablation(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("preset", sorted(common.PRESETS))
def test_the_default_rows_can_be_built_with_every_preset(preset):
    """Images of other sides get a jigsaw that divides their token grid. Experts are checked without tracing here."""
    config = config_file.get_config(preset)
    for name, row in build_rows(config, build_system(cell_config(config, Row("base", {}), 0)).tasks).items():
        if row.trained:
            one = cell_config(config, row, 0)
            build_system(one)
            assert name.startswith("image_") or one.tasks.jigsaw.tiles == config.tasks.jigsaw.tiles


def test_differences_need_resamples(config, tmp_path):
    config.score.bootstrap = 0
    with pytest.raises(ValueError, match=r"score\.bootstrap=0: .*at least 1 resample"):
        run_ablation(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_ablation_of_before_a_section_was_there_goes_on(config, tmp_path):
    old = json.loads(json.dumps(config.to_dict()))
    del old["slices"], old["compress"], old["data"]["window"], old["optim"]["kind"]
    (tmp_path / "config.json").write_text(json.dumps(old))
    check_config(config, tmp_path, FREE_FIELDS)


def test_an_ablation_is_no_single_detector(config, tmp_path):
    with pytest.raises(ValueError, match="an ablation is many detectors"):
        run.evaluate(config, tmp_path)
    with pytest.raises(ValueError, match="an ablation is many detectors"):
        run.predict(config, tmp_path, "images", "")
    config.command = "magic"
    with pytest.raises(ValueError, match="command: expected 'ablation' or none, found 'magic'"):
        run.train_and_evaluate(config, tmp_path)


# What a cell measures.


def make_stored(
    quality: float, seed: int = 0, names: str = "t", painted: float = 1.0, tasks: tuple[str, ...] = TASKS
) -> tuple[Stored, Any]:
    """Scores of the tasks' evidences (three) on 40 normals and 40 test images, half of these abnormal, both two to a
    patient; and their calibration."""
    tasks = make_tasks(tasks)
    width = len(evidence_names(tasks))
    rng = np.random.default_rng(seed)
    labels = np.repeat([0, 1], 20)
    textures = np.random.default_rng((seed, 1))  # of the images, whatever the tasks

    def scored(shift: np.ndarray) -> Scored:
        found = textures.normal(size=len(shift)).astype(np.float32)
        return Scored(rng.normal(size=(len(shift), width)) + shift[:, None] + found[:, None], found)

    kinds = np.concatenate([np.full(10, painted * (kind != "clean")) for kind in KINDS])
    parts = {"calibration": scored(np.zeros(40)), "painted": scored(kinds), "test": scored(quality * labels)}
    normals = parts["calibration"]
    maps, pairs = np.zeros((1, width, 2, 2)), np.array([f"p{i // 2}" for i in range(40)])
    calibration = fit_calibration(tasks, "tail", normals.raw, normals.texture, pairs, maps, np.ones((1, 2, 2)))
    ids = np.array([f"{names}{i}" for i in range(40)])
    return Stored(ids, pairs, labels, pairs, parts), calibration


def make_tasks(names: tuple[str, ...] = TASKS) -> Any:
    config = config_file.get_config()
    config.tasks.names = names
    return build_tasks(config.tasks, build_system(config).tasks[0].geometry)


def fit_without(stored: Stored, fusion: str, row: int) -> Any:
    """The calibration by the normals that are not in the fold of `row`: of 40 normals each fold has two."""
    normals, fold = stored.scored["calibration"], [row // 2 * 2, row // 2 * 2 + 1]
    others = (np.delete(part, fold, 0) for part in (normals.raw, normals.texture, stored.normal_groups))
    return fit_calibration(make_tasks(), fusion, *others)


def test_scores_survive_the_disk_and_are_measured_as_by_hand(tmp_path):
    stored, calibration = make_stored(1.0)
    stored.save(tmp_path / "scores.npz")
    # What an evaluation by hand left there, fused in another way, is not read.
    dataclasses.replace(calibration, fusion="max").save(tmp_path / "calibration.npz", 7)
    read, loaded = load_trained(tmp_path, make_tasks(), "tail")
    for field in ("names", "kinds", "fusion", "slope", "reference", "tail", "fused"):
        np.testing.assert_array_equal(getattr(loaded, field), getattr(calibration, field))
    found = measure(read, loaded)
    test = stored.scored["test"]
    corrected = calibration.corrected(test.raw, test.texture)
    np.testing.assert_array_equal(found.scores, calibration.fuse(corrected))
    assert found.test["image_auroc"] == pytest.approx(roc_auc_score(stored.labels, found.scores))
    names = fused_names(make_tasks())
    assert found.evidences[names[1]] == pytest.approx(roc_auc_score(stored.labels, corrected[:, 1]))
    # Clean and painted rows are scored by the fit without the normal they were made of.
    painted = stored.scored["painted"]
    fits = [fit_without(stored, "tail", row) for row in np.linspace(0, 39, 10).round().astype(int)] * len(KINDS)
    rows = np.concatenate([fit.corrected(painted.raw[[i]], painted.texture[[i]]) for i, fit in enumerate(fits)])
    fused = np.concatenate([fit.fuse(rows[[i]]) for i, fit in enumerate(fits)])
    for name, column in ((FUSED, fused), (names[2], rows[:, 2])):
        clean, *others = np.split(column, len(KINDS))
        for family, scores in zip(KINDS[1:], others, strict=True):
            expected = roc_auc_score(np.repeat([0, 1], 10), np.concatenate([clean, scores]))
            assert found.painted[name][family] == pytest.approx(expected)

    less = measure(read, loaded, leave_out=names[:1])
    np.testing.assert_array_equal(less.scores, calibration.fuse(corrected, leave_out=names[:1]))
    assert set(less.evidences) == set(names[1:])
    assert set(less.painted) == {FUSED, *names[1:]}


@pytest.mark.parametrize(("fusion", "leave_out"), [("tail", ()), ("tail", (0, 3)), ("max", ()), ("robust_z", (1,))])
def test_calibration_normals_are_compared_as_new_images_are(fusion, leave_out):
    """Each by a fit that it is not part of, in every variant that is read from the same scores."""
    stored, calibration = make_stored(0.0)
    calibration = dataclasses.replace(calibration, fusion=fusion)
    names = [calibration.names[i] for i in leave_out]
    normals, fused = stored.scored["calibration"], []
    for start in range(0, 40, 2):
        others, fold = fit_without(stored, fusion, start), slice(start, start + 2)
        fused.append(others.fuse(others.corrected(normals.raw[fold], normals.texture[fold]), names))
    found = measure(stored, calibration, names)
    for name, label in (("normal_vs_calibration", 0), ("abnormal_vs_calibration", 1)):
        wanted = auroc_between(np.concatenate(fused), found.scores[stored.labels == label])
        assert found.test[name] == pytest.approx(wanted, abs=1e-12)


def test_scores_of_an_earlier_version_are_refused(tmp_path):
    np.savez(tmp_path / "scores.npz", names=["a"], groups=["a"], labels=[0])
    with pytest.raises(ValueError, match=r"without normal_groups.*start the ablation anew"):
        load_trained(tmp_path, make_tasks(), "tail")


def test_defects_that_do_nothing_are_not_noticed():
    """Normals painted with nothing but other noise are as odd as they were, on average over seeds."""
    found = []
    for seed in range(40):
        stored, _ = make_stored(0.0, seed)
        rng = np.random.default_rng((seed, 2))
        texture = rng.normal(size=20 * len(KINDS))
        raw = rng.normal(size=(len(texture), 3)) + texture[:, None]
        clean = Scored(raw[:20], texture[:20])
        scored = {**stored.scored, "calibration": clean, "painted": Scored(raw, texture)}
        stored = dataclasses.replace(stored, scored=scored, normal_groups=np.arange(20))
        measured = measure(stored, fit_calibration(make_tasks(), "tail", clean.raw, clean.texture, np.arange(20)))
        found.append(np.mean([*measured.painted[FUSED].values()]))
    assert np.mean(found) == pytest.approx(0.5, abs=0.03), "0.55 by a fit that the clean rows are part of"


def test_uncorrected_scores_keep_their_texture():
    stored, calibration = make_stored(1.0)
    plain = uncorrected(stored, calibration)
    assert np.abs(calibration.slope).max() > 0.5
    assert plain.names == calibration.names
    raw = stored.scored["test"].raw
    np.testing.assert_array_equal(plain.corrected(raw, stored.scored["test"].texture)[:, :-1], raw)
    np.testing.assert_array_equal(plain.reference[:, :-1], np.sort(stored.scored["calibration"].raw, axis=0))
    np.testing.assert_array_equal(plain.reference[:, -1], calibration.reference[:, -1])
    better, worse = (measure(stored, used).test["image_auroc"] for used in (calibration, plain))
    assert better > worse, "texture is half of these scores' noise"


def test_cells_of_different_tasks_are_fused_as_one_detector():
    cells = [make_stored(1.0, tasks=(name,)) for name in TASKS]
    stored, calibration = joined(cells)
    u = []
    for one, own in cells:
        test = one.scored["test"]
        u.append(own.tail_scores(own.corrected(test.raw, test.texture)))
    (masked, texture), (synthetic, clean, again) = (scores.T for scores in u)
    np.testing.assert_array_equal(texture, again)
    found = measure(stored, calibration)
    # Two errors of restored images, one segmentation, and the texture once.
    np.testing.assert_allclose(found.scores, ((masked + clean) / 2 + synthetic + texture) / 3, rtol=1e-12)
    assert list(calibration.names) == fused_names(make_tasks())
    assert calibration.evidences == make_stored(1.0)[1].evidences
    assert len(calibration.fused) == 40


def test_an_ensemble_is_read_from_its_cells_and_costs_what_they_cost(config, tmp_path, monkeypatch):
    stored = {}

    def run_cell(one: Any, load: Any, folder: Any) -> dict[str, Any]:
        folder.mkdir(parents=True)
        stored[one.tasks.names], calibration = make_stored(1.0, tasks=one.tasks.names)
        stored[one.tasks.names].save(folder / "scores.npz")
        calibration.save(folder / "calibration.npz", 2)
        sizes = {"num_params": 10, "gflops": 0.5, "num_tasks": len(one.tasks.names)}
        return sizes | dict(seed=0, num_steps=2, step=2, pixels={"aupro": 0.5}, train_seconds=1.0,
                            score_images_per_second=1.0)  # fmt: skip

    monkeypatch.setattr(ablation, "run_cell", run_cell)
    monkeypatch.setattr(ablation, "painted_normals", lambda normals, most: None)
    config.ablation.rows = ("ensemble",)
    *_, masked, synthetic, ensemble = run_ablation(config, tmp_path / "run")
    assert ensemble["row"] == "ensemble"
    assert (ensemble["num_params"], ensemble["gflops"]) == (20, 1.0)
    assert ensemble["aupro"] is ensemble["train_seconds"] is None
    assert ensemble["evidences"] == masked["evidences"] | synthetic["evidences"]
    assert len(ensemble["evidences"]) == 4
    assert ensemble["difference"] is not None

    def diverged(one: Any, load: Any, folder: Any) -> dict[str, Any]:
        good = run_cell(one, load, folder)
        return good | {"error": "step 1: loss not finite"} if one.tasks.names == ("masked",) else good

    monkeypatch.setattr(ablation, "run_cell", diverged)
    *_, synthetic, ensemble = run_ablation(config, tmp_path / "other")
    assert (synthetic["error"], ensemble["error"]) == (None, "step 1: loss not finite")


# The table.


def outcome(row: str, seed: int, quality: float, painted: float = 1.0, **fields: Any) -> Outcome:
    stored, calibration = make_stored(quality, seed, painted=painted)
    facts = dict(
        seed=seed, num_params=1_000_000, gflops=0.5, num_steps=10, num_tasks=2, step=10, train_seconds=60.0,
        score_images_per_second=30.0, pixels={"pixel_auroc": 0.9, "aupro": 0.8},
    )  # fmt: skip
    return Outcome(row, facts | fields, measure(stored, calibration), stored)


ROWS = {
    "base": Row("<base>", {}),
    "good": Row("good", {"a": 1}),
    "bad": Row("bad", fusion="max"),
    "new": Row("new", {}),
}
OUTCOMES = [
    outcome(row, seed, quality, painted)
    for seed in (0, 1)
    for row, quality, painted in (("base", 1.0, 1.0), ("good", 3.0, 3.0), ("bad", 0.0, 0.2))
]


def test_means_differences_and_ranks():
    base, good, bad = table = summarise(ROWS, OUTCOMES, num_resamples=200)
    assert [entry["row"] for entry in table] == ["base", "good", "bad"], "a row without outcomes is left out"
    members = [o.measured for o in OUTCOMES if o.row == "good"]
    aurocs = [m.test["image_auroc"] for m in members]
    assert good["image_auroc"] == pytest.approx(np.mean(aurocs))
    assert good["image_auroc_std"] == pytest.approx(np.std(aurocs, ddof=1))
    assert good["painted_unseen"] == pytest.approx(np.mean([m.criteria["unseen"] for m in members]))
    assert good["painted"][FUSED]["mass"] == pytest.approx(np.mean([m.painted[FUSED]["mass"] for m in members]))
    assert good["difference"] == pytest.approx(good["image_auroc"] - base["image_auroc"])
    low, high = good["interval"]
    assert 0 < low < good["difference"] < high
    assert bad["interval"][1] < 0
    assert base["difference"] is None
    assert [entry["rank_test"] for entry in table] == [2, 1, 3]
    assert [entry["rank_painted"] for entry in table] == [2, 1, 3]
    assert [entry["trained"] for entry in table] == [True, True, False]


def test_the_interval_averages_runs_on_the_same_resamples():
    a, b = (np.stack([o.measured.scores for o in OUTCOMES if o.row == row]) for row in ("good", "base"))
    stored = OUTCOMES[0].stored
    both = bootstrap_difference("auroc", a, b, stored.labels, stored.groups, 200)
    assert list(both) == summarise(ROWS, OUTCOMES, 200)[1]["interval"]
    twice = bootstrap_difference("auroc", a[[0, 0]], b[0], stored.labels, stored.groups, 200)
    assert twice == bootstrap_difference("auroc", a[0], b[0], stored.labels, stored.groups, 200)
    assert twice != both


def test_differences_on_one_patient_have_no_interval(config, tmp_path):
    outcomes = [
        dataclasses.replace(o, stored=dataclasses.replace(o.stored, groups=np.full(len(o.stored.groups), "patient")))
        for o in OUTCOMES
    ]
    _, good, _ = write_summary(config, {"data": "x"}, ROWS, outcomes, tmp_path)
    assert good["difference"] > 0
    assert good["interval"] is None


def test_seeds_that_only_one_of_the_two_has_are_not_compared():
    some = [o for o in OUTCOMES if o.row == "base" or o.facts["seed"] == 0]
    base, good, _ = summarise(ROWS, some, num_resamples=50)
    first = {o.row: o.measured.test["image_auroc"] for o in OUTCOMES if o.facts["seed"] == 0}
    assert (base["n"], good["n"]) == (2, 1)
    assert good["difference"] == pytest.approx(first["good"] - first["base"])
    assert good["image_auroc_std"] is good["difference_std"] is None


def test_scores_of_other_images_are_not_compared():
    stored, calibration = make_stored(1.0, names="other")
    other = dataclasses.replace(OUTCOMES[1], measured=measure(stored, calibration), stored=stored)
    with pytest.raises(ValueError, match="row good, seed 0 was scored on other test images"):
        summarise(ROWS, [OUTCOMES[0], other], num_resamples=10)


def test_the_choice_is_made_on_painted_normals_and_set_beside_the_test_split():
    choice = choose(summarise(ROWS, OUTCOMES, 50), OUTCOMES, 50)
    assert (choice["chosen"], choice["best_on_test"], choice["same"]) == ("good", "good", True)
    assert choice["spearman"] == pytest.approx(1.0)
    assert "would have been the same" in choice_in_words(choice)
    turned = [outcome("base", 0, 3.0, 0.2), outcome("good", 0, 0.0, 3.0), outcome("bad", 0, 1.0, 1.0)]
    choice = choose(summarise(ROWS, turned, 50), turned, 50)
    assert (choice["chosen"], choice["best_on_test"], choice["same"]) == ("good", "base", False)
    assert choice["spearman"] == pytest.approx(-1.0)
    assert choice["difference"] < choice["interval"][1] < 0
    assert "a worse choice" in choice_in_words(choice)
    assert choose(summarise(ROWS, turned[:2], 50), turned[:2], 50)["spearman"] is None, "two rows have no correlation"
    assert choose(summarise(ROWS, turned[:1], 50), turned[:1], 50) is None


def test_a_row_that_does_not_train_is_said_so():
    facts = {"seed": 0, "num_params": 10, "gflops": 0.1, "num_steps": 3, "error": "step 3: loss not finite"}
    outcomes = [OUTCOMES[0], Outcome("good", facts)]
    table = summarise(ROWS, outcomes, 20)
    assert (table[1]["n"], table[1]["image_auroc"], table[1]["rank_test"]) == (0, None, None)
    text = markdown("A", {"data": "x"}, table, choose(table, outcomes, 20))
    assert "does not train" in text
    assert "good: step 3: loss not finite" in text


# The whole.


def test_end_to_end_and_finished_cells_are_not_run_again(config, tmp_path, monkeypatch):
    workdir = tmp_path / "run"
    config.ablation.rows = ("top_1", "without_masked", "no_texture_fit")
    table = run_ablation(config, workdir)
    assert [entry["row"] for entry in table] == ["base", "top_1", "no_texture_fit", "without_masked"]
    assert sorted(path.name for path in (workdir / "cells").iterdir()) == ["base_seed0", "top_1_seed0"]
    stored = json.loads((workdir / "table.json").read_text())
    assert [entry["image_auroc"] for entry in stored["rows"]] == [entry["image_auroc"] for entry in table]
    assert table[0]["pixel_auroc"] is not None
    assert table[3]["pixel_auroc"] is None, "maps are those of all tasks"
    assert table[1]["gflops"] < table[0]["gflops"]
    text = (workdir / "table.md").read_text()
    assert all(f"| {entry['row']} |" in text for entry in table)
    page = (workdir / "report.html").read_text()
    assert "<script src" not in page
    assert "top_1" in page
    assert (workdir / "table.png").stat().st_size > 10_000
    cell = workdir / "cells" / "base_seed0"
    scored = read_stored(cell / "scores.npz").scored
    assert scored["painted"].raw.shape == (5 * len(KINDS), 3)
    assert len(scored["calibration"].raw) == 6
    normals = scored["calibration"].texture[sources(6, 5)]  # the clean rows' images, found again without being stored
    np.testing.assert_allclose(scored["painted"].texture[:5], normals, rtol=1e-6)
    assert len(np.unique(normals)) == 5
    check_config(cell_config(config, Row("base", {}), 0), cell, ())

    def fail(*args: Any) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(ablation_cell, "train", fail)
    monkeypatch.setattr(ablation, "painted_normals", lambda normals, most: None)
    config.mesh.expert, config.train.log_every = 2, 3  # not what a cell learned
    again = run_ablation(config, workdir)
    assert [entry["interval"] for entry in again] == [entry["interval"] for entry in table]
    config.train.batch_size = 16
    with pytest.raises(ValueError, match="another config"):
        run_ablation(config, workdir)


def test_a_training_that_diverges_ends_its_cell_only(config, tmp_path, monkeypatch):
    def diverge(*args: Any) -> None:
        raise NonFiniteLossError("step 1: loss not finite")

    monkeypatch.setattr(ablation_cell, "train", diverge)
    one = cell_config(config, Row("base", {}), 0)
    facts = ablation_cell.run_cell(one, lambda config: (None, None), tmp_path / "cell")
    assert facts["error"] == "step 1: loss not finite"
    assert json.loads((tmp_path / "cell" / "cell.json").read_text()) == facts
