"""Meshes, placement of expert and other leaves, batches over devices, the initial state; errors."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from core import tree
from core.mesh import make_mesh, replicate, shard_batch, shardings
from core.state import init_state


@pytest.mark.parametrize("expert", [1, 2, 8])
def test_make_mesh_splits_devices_into_data_and_expert(expert):
    mesh = make_mesh(expert)
    assert dict(mesh.shape) == {"data": 8 // expert, "expert": expert}
    assert len(set(mesh.devices.flat)) == 8


@pytest.mark.parametrize("expert", [0, -1, 3, 16])
def test_make_mesh_rejects_what_does_not_divide(expert):
    with pytest.raises(ValueError, match=f"mesh.expert={expert} does not divide the 8 devices"):
        make_mesh(expert)


def test_experts_are_not_split_over_hosts(monkeypatch):
    """Each host brings other images; the devices of an expert group have to see the same ones."""

    class Device:
        def __init__(self, host):
            self.process_index = host

    class FourDevices:
        devices = np.array([Device(i // 2) for i in range(4)])

    monkeypatch.setattr(jax, "make_mesh", lambda shape, *_, **__: FourDevices.devices.reshape(shape).view(Grid))
    four = list(FourDevices.devices)
    make_mesh(2, four)
    with pytest.raises(ValueError, match=r"mesh\.expert=4 splits experts over hosts"):
        make_mesh(4, four)


class Grid(np.ndarray):
    """As much of a mesh as is looked at."""

    @property
    def devices(self):
        return np.asarray(self)


def test_expert_leaves_of_parameters_and_optimizer_are_split_and_nothing_else(toy):
    mesh = make_mesh(2)
    state = init_state(toy.init_fn, jax.random.key(0), toy.tx, mesh)
    leaves = tree.paths(state)
    split = {path for path, leaf in leaves.items() if leaf.sharding.spec == P("expert")}
    # Parameters, their average, and Adam's two moments.
    assert len(split) == 4
    assert split == {path for path in leaves if path.endswith("experts/w1")}
    for path, leaf in leaves.items():
        shapes = {shard.data.shape for shard in leaf.addressable_shards}
        assert shapes == {(1, 4, 3) if path in split else leaf.shape}
        assert len(leaf.addressable_shards) == 8
    assert jax.tree.leaves(shardings(jax.eval_shape(lambda: state), mesh)) == [
        leaf.sharding for leaf in leaves.values()
    ]


def test_initial_state_is_the_same_on_any_mesh(toy):
    states = [
        init_state(toy.init_fn, jax.random.key(0), toy.tx, mesh)
        for mesh in (make_mesh(devices=jax.devices()[:1]), make_mesh(2))
    ]
    first, second = (jax.device_get(state) for state in states)
    jax.tree.map(np.testing.assert_array_equal, first, second)
    jax.tree.map(np.testing.assert_array_equal, first.params, first.ema_params)
    assert int(first.step) == 0


def test_batches_are_split_over_data_and_whole_over_expert():
    mesh = make_mesh(2)
    image = np.arange(8 * 3, dtype=np.uint8).reshape(8, 3)
    out = shard_batch({"image": image}, mesh)["image"]
    np.testing.assert_array_equal(out, image)
    assert out.dtype == np.uint8
    for i, row in enumerate(mesh.devices):
        for device in row:
            (shard,) = [s.data for s in out.addressable_shards if s.device == device]
            np.testing.assert_array_equal(shard, image[2 * i : 2 * i + 2])
    with pytest.raises(ValueError, match="batch of 6 rows does not divide by 4 data shards"):
        shard_batch({"image": image[:6]}, mesh)


def test_replicate_copies_to_every_device():
    out = replicate({"x": np.arange(3)}, make_mesh(2))["x"]
    assert [shard.data.tolist() for shard in out.addressable_shards] == [[0, 1, 2]] * 8
