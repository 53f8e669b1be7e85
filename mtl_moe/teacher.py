"""Pseudo-labels: the frozen averaged encoder and the k-means clusters of the training normals.

Axes: B images, h w token grid, D width, Q pixels of a patch, M clusters. The teacher's state lives in the training
state's `extra`, so it is saved with every checkpoint. Until the refresh it is the first encoder (random features) and
clusters of raw patches; at `train.refresh_step` the averaged encoder is copied once and its tokens are clustered.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from scipy.cluster.vq import kmeans2

from core.transformer import patchify
from mtl_moe.model import ModelConfig, trunk_tokens
from mtl_moe.tasks import Task, Teacher
from mtl_moe.tasks.base import to_float

MAX_PATCHES = 20_000  # for k-means: some hundreds of patches a cluster are plenty


def needs_teacher(tasks: Sequence[Task]) -> bool:
    """Whether any task reads pseudo-labels."""
    return any(task.needs_teacher for task in tasks)


def init_teacher(trunk_params: Any, patch_centers: np.ndarray, width: int) -> dict[str, Any]:
    """State before the refresh. `patch_centers`: float32 [M, Q] cluster centres of raw patches."""
    return {
        "trunk": jax.tree.map(jnp.copy, trunk_params),
        "patch_centers": jnp.asarray(patch_centers),
        "token_centers": jnp.zeros((patch_centers.shape[0], width)),
        "refreshed": jnp.zeros((), jnp.bool_),
    }


def make_teacher(config: ModelConfig, state: Any, images: jax.Array, dtype: Any) -> Teacher:
    """Targets for clean float images [B, H, W, C]; no gradient flows into them."""
    tokens = trunk_tokens(config, state["trunk"], images, dtype)
    patches = patchify(images, config.patch_size).reshape(*tokens.shape[:3], -1)
    by_token, by_patch = _nearest(tokens, state["token_centers"]), _nearest(patches, state["patch_centers"])
    clusters = jnp.where(state["refreshed"], by_token, by_patch)
    return jax.lax.stop_gradient(Teacher(tokens=tokens, clusters=clusters))


def fit_patch_centers(images: np.ndarray, patch_size: int, num_clusters: int, seed: int) -> np.ndarray:
    """k-means centres [M, Q] of the patches of uint8 images [B, H, W, C]."""
    patches = np.asarray(patchify(to_float(jnp.asarray(images)), patch_size))
    return _k_means(patches.reshape(-1, patches.shape[-1]), num_clusters, seed)


def make_refresh_fn(config: ModelConfig, images: np.ndarray, num_clusters: int, seed: int) -> Callable[[Any, Any], Any]:
    """Function (averaged params, teacher state) -> teacher state with the averaged trunk and clusters of its tokens.

    Args:
      images: uint8 [B, H, W, C] training normals, the same on every host.
    """
    tokens_of = jax.jit(lambda trunk, x: trunk_tokens(config, trunk, to_float(x)))

    def refresh(ema_params: Any, state: Any) -> Any:
        trunk = jax.device_get(ema_params["trunk"])
        tokens = np.concatenate([np.asarray(tokens_of(trunk, images[i : i + 64])) for i in range(0, len(images), 64)])
        centers = _k_means(tokens.reshape(-1, config.width), num_clusters, seed)
        if jax.process_count() > 1:  # each host had its own device's tokens, which may be rounded otherwise
            centers = np.asarray(multihost_utils.broadcast_one_to_all(centers))
        return state | {"trunk": trunk, "token_centers": centers, "refreshed": np.ones((), np.bool_)}

    return refresh


def _nearest(points: jax.Array, centers: jax.Array) -> jax.Array:
    """Index of the nearest centre: [B, h, w, Q] and [M, Q] -> int32 [B, h, w]."""
    flat = points.reshape(-1, points.shape[-1])
    distance = jnp.square(centers).sum(-1)[None] - 2 * flat @ centers.T
    return jnp.argmin(distance, axis=-1).reshape(points.shape[:3]).astype(jnp.int32)


def _k_means(points: np.ndarray, num_clusters: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    points = points[rng.choice(len(points), min(len(points), MAX_PATCHES), replace=False)]
    # A cluster that loses all its points keeps its place; black patches are all alike, so this is no news to the user.
    with np.errstate(invalid="ignore"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="One of the clusters is empty")
        centers, _ = kmeans2(points.astype(np.float64), num_clusters, iter=20, minit="++", rng=rng, missing="warn")
    return centers.astype(np.float32)
