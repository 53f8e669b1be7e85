"""What training refuses before it touches a folder, what it learned from, and pseudo-labels that come late."""

import json

import jax
import numpy as np
import pytest

from core.checkpoint import Checkpointer
from core.optim import build_optimizer
from core.workdir import check_config
from input_pipeline.dataset import load_dataset
from mtl_moe import run, training_data
from mtl_moe import train as training
from mtl_moe.run import FREE_FIELDS
from mtl_moe.system import build_system
from mtl_moe.train import train


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("model.top_k", 9, "top_k"),
        ("optim.warmup_steps", 0, "warmup_steps must be at least 1"),
        ("tasks.masked.augment", "lihgt", "lihgt"),
        ("train.batch_size", 6, "does not divide by the 8 devices"),
        ("train.accumulation", 0, "must be at least 1, found 8 and 0"),
        ("train.sampling", "group", "expected one of .*, found .group."),
    ],
)
def test_a_config_that_cannot_be_trained_leaves_no_folder(tiny_config, tmp_path, field, value, message):
    config = tiny_config()
    config.tasks.names = ("masked",)
    config.update_from_flattened_dict({field: value})
    with pytest.raises(ValueError, match=message):
        train(build_system(config), load_dataset(config.data), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_folder_in_which_nothing_was_learned_takes_another_config_and_other_images(
    tiny_config, tmp_path, monkeypatch
):
    """Out of memory in the first update: smaller images and micro-batches may have it."""
    config = tiny_config()
    config.tasks.names = ("masked",)
    config.model.num_neck_layers = 0

    def fail(*args, **kwargs):
        raise MemoryError

    monkeypatch.setattr(training, "train_loop", fail)
    for fields in ({"data.image_size": 40}, {"data.image_size": 32, "data.phantom.seed": 5, "train.batch_size": 16}):
        config.update_from_flattened_dict(fields)
        with pytest.raises(MemoryError):
            run.train_and_evaluate(config, tmp_path)
        assert json.loads((tmp_path / "config.json").read_text()) == json.loads(json.dumps(config.to_dict()))
        assert training_data.other_training_data(load_dataset(config.data), tmp_path) == ""
    (tmp_path / "checkpoints" / "1").mkdir(parents=True)
    config.train.accumulation = 2
    with pytest.raises(ValueError, match=r"another config.*\n.*train.accumulation: there 1, now 2"):
        run.train_and_evaluate(config, tmp_path)


@pytest.mark.parametrize("content", ['{"model_type": "vit"}', "no JSON", '{"system": "mtl_moe", "num_seeds": 3}'])
def test_another_folder_s_config_is_not_replaced(tiny_config, tmp_path, content):
    config = tiny_config()
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"config.json is of something else than the training of one detector"):
        train(build_system(config), load_dataset(config.data), tmp_path)
    assert [path.read_text() for path in tmp_path.iterdir()] == [content]


def test_checkpoints_are_closed_after_an_error_before_the_first_update(tiny_config, tmp_path, monkeypatch):
    config = tiny_config()
    config.tasks.names = ("masked",)
    config.model.num_neck_layers = 0
    closed = []

    class Watched(Checkpointer):
        def close(self):
            super().close()
            closed.append(self)

    def fail(*args, **kwargs):
        raise MemoryError

    monkeypatch.setattr(training, "Checkpointer", Watched)
    monkeypatch.setattr(training, "train_batches", fail)
    with pytest.raises(MemoryError):
        train(build_system(config), load_dataset(config.data), tmp_path)
    assert len(closed) == 1


def test_a_second_host_is_not_bound_by_what_the_first_will_remove(tiny_config, tmp_path, monkeypatch):
    """An aborted run's images, which the first host has not removed yet."""
    config = tiny_config()
    config.tasks.names = ("masked",)
    system, dataset = build_system(config), load_dataset(config.data)
    stale = {"dataset": "other", "num_images": 1, "names_hash": "", "mean_grey": []}
    (tmp_path / training_data.FILE).write_text(json.dumps(stale))

    def stop(*args):
        raise MemoryError

    monkeypatch.setattr(training, "save_config", stop)  # the next thing that is done
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with pytest.raises(MemoryError):
        train(system, dataset, tmp_path)
    (tmp_path / "checkpoints" / "1").mkdir(parents=True)
    with pytest.raises(ValueError, match="learned from other images"):
        train(system, dataset, tmp_path)


@pytest.fixture(scope="module")
def short_run(tiny_config, tmp_path_factory):
    """Two updates of a run whose pseudo-labels were to come after the second, its experts over two devices."""
    config = tiny_config()
    config.tasks.names = ("cluster",)
    config.train.num_steps = 2
    config.mesh.expert = 2
    workdir = tmp_path_factory.mktemp("short")
    train(build_system(config), load_dataset(config.data), workdir)
    return config, workdir


def test_pseudo_labels_come_when_a_short_run_goes_on(short_run):
    """At the end of the short run it is too early, for nothing would be learned from them; trained on, they are due.

    It goes on where experts are not divided over devices, and with other cadences.
    """
    config, workdir = short_run
    longer = config.copy_and_resolve_references()
    longer.mesh.expert = 1
    longer.train.update(num_steps=4, log_every=2, save_every=1)
    check_config(longer, workdir, FREE_FIELDS)
    system, dataset = build_system(longer), load_dataset(longer.data)
    refreshed = []
    for step in (2, 4):
        if step == 4:
            train(system, dataset, workdir)
        checkpointer = Checkpointer(workdir)
        state = system.abstract_state(build_optimizer(longer.optim, 4))
        _, extra, found = checkpointer.restore_model(state.ema_params, state.extra)
        checkpointer.close()
        assert found == step
        refreshed.append(bool(jax.device_get(extra["teacher"]["refreshed"])))
    assert refreshed == [False, True]


def test_a_folder_goes_on_with_its_own_images_only(short_run, tmp_path):
    config, workdir = short_run
    dataset = load_dataset(config.data)
    assert training_data.other_training_data(dataset, workdir) == ""
    facts = json.loads((workdir / training_data.FILE).read_text())
    assert facts["num_images"] == 24
    assert len(facts["mean_grey"]) == min(training_data.NUM_SAMPLES, len(dataset.splits["train"]))
    other = config.copy_and_resolve_references()
    other.data.phantom.seed = 5  # the same names, other pictures
    elsewhere = load_dataset(other.data)
    assert elsewhere.splits["train"].names == dataset.splits["train"].names
    assert training_data.other_training_data(elsewhere, workdir) == "24 images of phantom"
    before = (workdir / "config.json").read_bytes()
    with pytest.raises(ValueError, match=r"learned from other images.*use another --workdir"):
        train(build_system(other), elsewhere, workdir)
    assert (workdir / "config.json").read_bytes() == before
    renamed = load_dataset(config.data)
    split = renamed.splits["train"]
    split.names[:] = [f"x{name}" for name in split.names]
    assert training_data.other_training_data(renamed, workdir)
    assert np.isclose(facts["mean_grey"][0], dataset.splits["train"].images(np.array([0])).mean(), atol=0.01)
    (tmp_path / "config.json").write_text("{}")  # of before there was such a file: nothing is known, nor claimed
    training_data.bind_training_data(dataset, tmp_path)
    assert not (tmp_path / training_data.FILE).exists()
    assert training_data.other_training_data(elsewhere, tmp_path) == ""
