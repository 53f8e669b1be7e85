"""Device mesh and placement: batches over `data`, expert weights over `expert`, everything else replicated.

The mesh is always an argument, never ambient. Axis types are Auto: the compiler propagates shardings (Linen modules
cannot be partitioned with JAX's default Explicit axes).
"""

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from core import tree

# Leaves whose leading axis is the experts' axis.
EXPERT_PATTERN = r".*/experts/.*"


def make_mesh(expert: int = 1, devices: list[jax.Device] | None = None) -> Mesh:
    """Mesh [devices/expert, expert] with axes ("data", "expert").

    Raises:
      ValueError: if the number of devices is not a multiple of `expert`, or experts would be split over hosts, each of
        which brings other images.
    """
    devices = jax.devices() if devices is None else devices
    if expert < 1 or len(devices) % expert:
        raise ValueError(f"mesh.expert={expert} does not divide the {len(devices)} devices found: choose a divisor")
    shape = (len(devices) // expert, expert)
    mesh = jax.make_mesh(shape, ("data", "expert"), axis_types=(AxisType.Auto,) * 2, devices=devices)
    if any(len({device.process_index for device in row}) > 1 for row in mesh.devices):
        raise ValueError(f"mesh.expert={expert} splits experts over hosts: choose a divisor of a host's devices")
    return mesh


def check_one_host(what: str) -> None:
    """ValueError where JAX spans several hosts, all of which would write the same files; `what` names the command."""
    if (count := jax.process_count()) > 1:
        raise ValueError(
            f"{what} runs on one host, and JAX found {count}: start it on one, without --distributed; on a host of a "
            "TPU slice with JAX_PLATFORMS=cpu before it"
        )


def shardings(abstract: Any, mesh: Mesh) -> Any:
    """Tree of `NamedSharding` for a tree of parameters or optimizer state (arrays or ShapeDtypeStructs)."""
    is_expert = tree.mask(abstract, EXPERT_PATTERN)
    return jax.tree.map(lambda leaf, split: NamedSharding(mesh, P("expert") if split else P()), abstract, is_expert)


def shard_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Puts this host's part of a batch [B_local, ...] on the devices, split over the `data` axis.

    Raises:
      ValueError: if the batch does not divide by the number of data shards of this host.
    """
    shards = max(mesh.shape["data"] // jax.process_count(), 1)
    size = next(iter(batch.values())).shape[0]
    if size % shards:
        raise ValueError(f"batch of {size} rows does not divide by {shards} data shards: change the batch size")
    sharding = NamedSharding(mesh, P("data"))
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)


def replicate(values: Any, mesh: Mesh) -> Any:
    """Copies a tree of host arrays to every device."""
    return jax.device_put(values, NamedSharding(mesh, P()))


def check_batch_size(batch_size: int, accumulation: int, mesh: Mesh) -> None:
    """Raises ValueError unless a batch divides over the devices that split it and over its micro-batches."""
    shards = mesh.shape["data"]
    if min(batch_size, accumulation) < 1:
        raise ValueError(
            f"train.batch_size and train.accumulation must be at least 1, found {batch_size} and {accumulation}"
        )
    if batch_size % (shards * accumulation):
        raise ValueError(
            f"train.batch_size={batch_size} does not divide by the {shards} devices that split the batch "
            f"times train.accumulation={accumulation}: choose a multiple of {shards * accumulation}"
        )
