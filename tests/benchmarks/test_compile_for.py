"""Programs for machines that are not there: lowered here for the test's eight devices, on the paths of a TPU."""

import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks import compile_for
from core.mesh import make_mesh


def test_an_update_is_lowered_for_the_devices_given_on_the_paths_of_their_backend():
    with compile_for.on("tpu", jax.devices()):
        lowered = compile_for.detector_update("tiny", 16, 1, expert=2)
    text = lowered.as_text()
    assert "mhlo.num_partitions = 8" in text
    assert "ragged_dot" in lowered.as_text(dialect="stablehlo", debug_info=True)  # not the CPU's loop over tiles
    assert "xbf16" in text  # nor its float32 activations
    assert jax.default_backend() == "cpu"


@pytest.mark.parametrize("which", ["targets", "update"])
def test_distillation_is_lowered(which):
    with compile_for.on("tpu", jax.devices()):
        lowered = compile_for.distill_program(which, "vit_tiny_patch16_224", 8)
    found = jax.tree.leaves(lowered.out_info)
    assert which == "update" or [leaf.shape for leaf in found] == [(8, 197, 192)]
    assert "mhlo.num_partitions = 8" in lowered.as_text()


def test_scoring_on_several_devices_exchanges_no_images():
    """All views of an image stay on its device. XLA's CPU backend alone gathers for top_k; TPU and GPU do not."""
    text = compile_for.detector_scores("tiny", 16).compile().as_text()
    lines = text.splitlines()
    gathers = [line.split(" = ")[0].strip() for line in lines if " all-gather(" in line or " all-to-all(" in line]
    assert gathers
    for name in gathers:
        readers = [line for line in lines if re.search(rf"{re.escape(name)}[,)]", line)]
        assert readers
        assert all('custom_call_target="TopK"' in line for line in readers), readers


def test_facts_are_those_of_the_compiled_program():
    mesh = make_mesh()
    x = jax.ShapeDtypeStruct((8, 2**18), jnp.float32, sharding=NamedSharding(mesh, P("data")))
    compiled = jax.jit(lambda x: x.sum(0)).lower(x).compile()
    found = compile_for.facts(compiled)
    assert found["gib"]["arguments"] == pytest.approx(2**20 / 2**30, abs=1e-3)  # of one device
    assert found["gib"]["sum"] >= found["gib"]["arguments"]
    assert found["exchanges"] == {"all-reduce": 1}


def test_what_needs_more_chips_is_left_out_and_rows_of_before_stay(tmp_path, monkeypatch, capsys):
    (tmp_path / "compile_h200.json").write_text('{"rows": [{"program": "detector_scores"}, {"program": "targets"}]}')
    monkeypatch.setattr(compile_for, "RESULTS", tmp_path)
    monkeypatch.setattr(compile_for.Target, "devices", lambda self: jax.devices()[:1])
    monkeypatch.setattr(compile_for, "compiled_row", lambda name: {"program": name})
    written = []
    monkeypatch.setattr(compile_for, "write_record", lambda name, command, rows, packages: written.append(rows))
    programs = "--programs=detector_scores,detector_update_experts_split"
    monkeypatch.setattr("sys.argv", ["compile_for", "--target=h200", programs])
    compile_for.main()
    assert written == [[{"program": "targets"}, {"program": "detector_scores"}]]
    monkeypatch.setattr("sys.argv", ["compile_for", "--target=h200", "--programs=other"])
    with pytest.raises(SystemExit):
        compile_for.main()
    assert "expected some of detector_update, " in capsys.readouterr().err
