"""What training, evaluation and prediction all build first from a config: tasks, network, mesh."""

import dataclasses
import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from core.dense import DTYPES, named_dtype
from core.mesh import make_mesh, replicate
from core.state import TrainState, abstract_state, init_state
from input_pipeline.dataset import Dataset
from mtl_moe.losses import init_extra
from mtl_moe.model import Detector, build_geometry, build_model_config
from mtl_moe.tasks import Task, build_tasks
from mtl_moe.teacher import fit_patch_centers, init_teacher, needs_teacher


@dataclasses.dataclass(frozen=True)
class System:
    """Tasks, network and mesh of a config."""

    config: Any
    tasks: tuple[Task, ...]
    model: Detector
    mesh: Mesh

    @property
    def num_clusters(self) -> int:
        return self.config.tasks.cluster.num_clusters

    def dummy_inputs(self) -> dict[str, jax.Array]:
        """One all-zero view for each task, enough to initialise the network."""
        size, channels = self.model.image_size, self.config.data.channels
        return {task.name: jnp.zeros((1, 1, size, size, channels + 1)) for task in self.tasks}

    def init_params(self, key: jax.Array) -> Any:
        """Fresh parameters."""
        return self.model.init(key, self.dummy_inputs(), train=False)["params"]

    def init_fn(self, patch_centers: Any) -> Any:
        """Function key -> (params, extra) for `core.state.init_state`; `patch_centers` [M, Q] or None."""

        def init(key: jax.Array) -> tuple[Any, Any]:
            params = self.init_params(key)
            extra = init_extra(len(self.tasks))
            if needs_teacher(self.tasks):
                extra["teacher"] = init_teacher(params["trunk"], patch_centers, self.config.model.width)
            return params, extra

        return init

    def patch_centers(self, dataset: Dataset) -> Any:
        """Centres of the training normals' patches, or None where no task needs them."""
        if not needs_teacher(self.tasks):
            return None
        images = sample_images(dataset, self.config.seed)
        return fit_patch_centers(images, self.config.model.patch_size, self.num_clusters, self.config.seed)

    def abstract_state(self, tx: Any) -> TrainState:
        """Shapes and shardings of the training state, without data."""
        patch = self.config.model.patch_size**2 * self.config.data.channels
        centers = jnp.zeros((self.num_clusters, patch)) if needs_teacher(self.tasks) else None
        return abstract_state(self.init_fn(centers), jax.random.key(0), tx, self.mesh)

    def init_state(self, tx: Any, dataset: Dataset) -> TrainState:
        """The placed state before the first update, a function of `config.seed`."""
        centers = self.patch_centers(dataset)
        return init_state(self.init_fn(centers), jax.random.key(self.config.seed), tx, self.mesh)

    def place(self, values: Any) -> Any:
        """Copies host values to all devices."""
        return replicate(values, self.mesh)


def build_system(config: Any) -> System:
    """Builds everything but the data.

    Raises:
      ValueError: for any field that does not fit (unknown task, mlp kind, dtype; sizes that do not divide).
    """
    for field in ("train", "score"):
        named_dtype(config[field].dtype, f"{field}.dtype")
    mesh, model = make_mesh(config.mesh.expert), config.model
    if model.mlp == "moe" and model.num_experts % config.mesh.expert:
        raise ValueError(f"mesh.expert={config.mesh.expert} does not divide the {model.num_experts} experts")
    geometry = build_geometry(config)
    tasks = build_tasks(config.tasks, geometry)
    if model.mlp == "moe" and model.router == "fixed" and model.num_experts != len(tasks):
        logging.warning(
            "model.router='fixed': %d tasks, %d experts: task number t has expert t %% %d, and %s; "
            "model.num_experts=%d would give each task its own",
            *(len(tasks), model.num_experts, model.num_experts),
            "some share one" if model.num_experts < len(tasks) else "the rest are never used",
            len(tasks),
        )
    model = Detector(
        config=build_model_config(config.model),
        tasks=tasks,
        image_size=geometry.image_size,
        dtype=DTYPES[config.train.dtype],
        mesh=mesh if mesh.size > 1 else None,
    )
    return System(config=config, tasks=tasks, model=model, mesh=mesh)


def sample_images(dataset: Dataset, seed: int, count: int = 256) -> Any:
    """Up to `count` training images uint8 [n, H, W, C], a fixed random choice, the same on every host."""
    split = dataset.splits["train"]
    rows = np.random.default_rng(seed).permutation(len(split))[:count]
    return split.images(np.sort(rows))
