"""Records of measurements."""

import json

from benchmarks.record import write_record
from core.provenance import git_revision


def test_a_record_names_the_revision(tmp_path):
    write_record("speed", "python -m benchmarks.speed", [{"rate": 1.0}], ("numpy",), tmp_path, failed=[])
    record = json.loads((tmp_path / "speed.json").read_text())
    assert record["revision"] == git_revision()
    assert record["rows"] == [{"rate": 1.0}]
    assert record["failed"] == []
