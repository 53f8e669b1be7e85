"""What an image costs in scoring and in training: multiply-adds of the matrix products, counted from sizes alone.

Norms, softmax, the router's choice, the corruptions and the reductions are left out. Axes: N tokens, D width, V views
of a task, E experts, T tasks.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from mtl_moe.model import ModelConfig, distinct_views
from mtl_moe.moe import active_hidden_dim, total_hidden_dim
from mtl_moe.tasks import Geometry, Task
from mtl_moe.teacher import needs_teacher


def score_macs(config: ModelConfig, tasks: Sequence[Task], geometry: Geometry, num_tiles: int = 1) -> int:
    """Multiply-adds of all inference views of one image of so many tiles, heads and pseudo-label teacher included."""
    image = jnp.zeros((1, geometry.image_size, geometry.image_size, geometry.channels))
    counts = [jax.eval_shape(task.views, image).shape[0] for task in tasks]
    return num_tiles * _views_macs(config, tasks, geometry, counts, len(distinct_views(tasks)[0]))


def train_macs(config: ModelConfig, tasks: Sequence[Task], geometry: Geometry) -> int:
    """Multiply-adds of one training image: a view a task forward and backward, pseudo-labels forward.

    The backward pass counts twice the forward. An expert block counts the experts that a token is sent to and the
    shared one, whatever a dispatch computes beyond that.
    """
    return _views_macs(config, tasks, geometry, [3] * len(tasks), 3 * len(tasks))


def _views_macs(
    config: ModelConfig, tasks: Sequence[Task], geometry: Geometry, counts: Sequence[int], trunks: int
) -> int:
    """Multiply-adds of `counts` forward passes of a view of each task, the trunk's being `trunks` in all, and of the
    pseudo-label teacher's one."""
    tokens, width = geometry.grid**2, config.width
    embed = tokens * geometry.patch_size**2 * (geometry.channels + 1) * width
    attention = 4 * tokens * width**2 + 2 * tokens**2 * width
    trunk = embed + config.num_dense_layers * (attention + 2 * tokens * width * config.mlp_dim)
    expert = attention + _expert_mlp_macs(config, tokens, len(tasks))
    view = (config.num_moe_layers + config.num_neck_layers) * expert
    total = sum(count * (view + _head_macs(task, geometry)) for count, task in zip(counts, tasks, strict=True))
    return total + trunk * (trunks + needs_teacher(tasks))


def _expert_mlp_macs(config: ModelConfig, tokens: int, num_tasks: int) -> int:
    if config.mlp == "dense_params":
        hidden = total_hidden_dim(config.expert_dim, config.num_experts, config.shared_expert)
    else:
        hidden = active_hidden_dim(config.expert_dim, config.top_k, config.shared_expert)
    routers = {"shared": 1, "per_task": num_tasks, "fixed": 0}[config.router] if config.mlp == "moe" else 0
    return tokens * config.width * (2 * hidden + routers * config.num_experts)


def _head_macs(task: Task, geometry: Geometry) -> int:
    tokens, width = geometry.grid**2, geometry.width
    if task.head.kind == "tokens":
        return tokens * width * task.head.dim
    pixels = geometry.patch_size**2
    detail = (width + pixels * (geometry.channels + 1)) * 2 * width
    return tokens * (detail + 2 * width * task.head.dim * pixels)
