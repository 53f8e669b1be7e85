"""metrics.jsonl and TensorBoard: records, resuming, half-written and damaged files."""

import json

import pytest

from core.logs import MetricLogger, all_finite, progress_bar, read_history


def _write(workdir, steps, start=0):
    with MetricLogger(workdir, start) as logger:
        for step in steps:
            logger.log(step, {"loss": 0.5 * step})


def _steps(workdir):
    return [record["step"] for record in read_history(workdir)]


def test_records_are_json_lines_readable_while_training(tmp_path):
    with MetricLogger(tmp_path / "new" / "folder") as logger:
        logger.log(1, {"loss": 0.25, "task/masked": 1e-9})
        lines = (tmp_path / "new" / "folder" / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line) for line in lines] == [{"step": 1, "loss": 0.25, "task/masked": 1e-9}]


def test_resuming_drops_what_the_resumed_run_does_again(tmp_path):
    _write(tmp_path, [2, 4, 6])
    straight = (tmp_path / "metrics.jsonl").read_bytes()
    _write(tmp_path, [6], start=4)
    assert (tmp_path / "metrics.jsonl").read_bytes() == straight
    _write(tmp_path, [1])
    assert _steps(tmp_path) == [1]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_tensorboard_gets_the_same_numbers(tmp_path):
    """On by default in every training; they are in the event file once the logger is closed."""
    tensorflow = pytest.importorskip("tensorflow")
    pytest.importorskip("clu")
    with MetricLogger(tmp_path, tensorboard=True) as logger:
        logger.log(3, {"loss": 0.25, "loss/masked": 0.5})
    (path,) = (tmp_path / "tensorboard").iterdir()
    found = {
        (event.step, value.tag): float(tensorflow.make_ndarray(value.tensor))
        for event in tensorflow.compat.v1.train.summary_iterator(str(path))
        for value in event.summary.value
    }
    assert found == {(3, "loss"): 0.25, (3, "loss/masked"): 0.5}
    assert _steps(tmp_path) == [3]


@pytest.mark.parametrize("length", [1, 9, 20])
def test_a_half_written_last_line_is_left_out(tmp_path, length):
    """What a killed run leaves, whatever the byte it stopped at."""
    _write(tmp_path, [2, 4])
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + json.dumps({"step": 6, "loss": 3.0})[:length])
    assert _steps(tmp_path) == [2, 4]
    _write(tmp_path, [6], start=4)
    assert _steps(tmp_path) == [2, 4, 6]


def test_a_damaged_line_in_the_middle_is_an_error_that_names_it(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 2}\n{"st\n{"step": 6}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl: line 2 is not JSON"):
        read_history(tmp_path)
    with pytest.raises(ValueError, match=r"metrics\.jsonl: line 2 is not JSON"):
        MetricLogger(tmp_path, start_step=6)
    assert path.read_text().count("\n") == 3  # nothing was thrown away


def test_no_file_is_an_empty_history(tmp_path):
    assert read_history(tmp_path) == []
    _write(tmp_path, [8], start=7)  # a resumed run whose file was removed
    assert _steps(tmp_path) == [8]


def test_all_finite():
    assert all_finite({"a": 0.0, "b": -1e30})
    assert all_finite({})
    for value in (float("nan"), float("inf"), float("-inf")):
        assert not all_finite({"a": 0.0, "b": value})


def test_progress_counts_images_from_where_the_run_resumes(capsys):
    with progress_bar(10, initial=4, scale=16, description="train") as bar:
        for _ in range(6):
            bar.update()
        assert bar.n == bar.total == 10
    text = capsys.readouterr().err
    assert "train" in text
    assert "160/160" in text
