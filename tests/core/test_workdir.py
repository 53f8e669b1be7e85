"""The config of a work directory: what may differ, and what one of an earlier version lacks."""

import json

import pytest
from ml_collections import ConfigDict

from core.workdir import check_config, read_config, save_config


def make_config() -> ConfigDict:
    return ConfigDict(
        {
            "system": "mtl_moe",
            "data": {"window": (), "groups": "auto", "tile_size": 0, "root": "a"},
            "train": {"num_steps": 4, "sampling": "images"},
            "optim": {"kind": "adamw"},
        }
    )


def test_equal_and_free_fields_pass_and_others_are_named(tmp_path):
    config = make_config()
    check_config(config, tmp_path, ())  # nothing there yet
    save_config(config, tmp_path)
    check_config(config, tmp_path, ())
    config.data.root = "b"
    check_config(config, tmp_path, ("data.root",))
    with pytest.raises(ValueError, match=r'data\.root: there "a", now "b"'):
        check_config(config, tmp_path, ("train.",))


def test_updates_may_be_added_and_not_taken_back(tmp_path):
    config = make_config()
    save_config(config, tmp_path)
    config.train.num_steps = 5
    check_config(config, tmp_path, ("train.num_steps",))
    config.train.num_steps = 3
    with pytest.raises(ValueError, match=r"train\.num_steps: there 4, now 3"):
        check_config(config, tmp_path, ("train.num_steps",))


def test_fields_of_later_versions_stand_for_what_was_done_before_them(tmp_path):
    """A work directory of before DICOM windows and Muon: their neutral values are what it was trained with."""
    config = make_config()
    save_config(config, tmp_path)
    old = json.loads((tmp_path / "config.json").read_text())
    del old["data"]["window"], old["optim"]["kind"]
    (tmp_path / "config.json").write_text(json.dumps(old))
    check_config(config, tmp_path, ())
    assert read_config(tmp_path) == config.to_dict()  # tuples too; no section that was not there
    config.data.window = (40.0, 400.0)
    with pytest.raises(ValueError, match=r"data.window: there \[\], now \[40.0, 400.0\]"):
        check_config(config, tmp_path, ())


def test_a_config_made_without_a_later_section_is_its_own(tmp_path):
    config = ConfigDict({"system": "vit_distill", "table": {"probe": {"kind": "knn"}}})
    save_config(config, tmp_path)
    check_config(config, tmp_path, ())


def test_a_later_field_of_the_other_system_is_not_added(tmp_path):
    config = ConfigDict({"system": "vit_distill", "data": {"groups": "auto"}, "teacher": {"overrides": {}}})
    save_config(config, tmp_path)
    config.teacher.overrides.position_resize = None
    assert read_config(tmp_path) == config.to_dict()
