"""Pseudo-labels: k-means, the nearest centre, no gradient, one refresh.

Axes: B images, h w token grid, D width, Q pixels of a patch, M clusters.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_moe.model import Trunk, build_model_config, trunk_tokens
from mtl_moe.tasks import TASKS, Geometry
from mtl_moe.teacher import fit_patch_centers, init_teacher, make_refresh_fn, make_teacher, needs_teacher

SIZE, PATCH, CLUSTERS = 16, 8, 3
LEVELS = (0, 120, 250)


@pytest.fixture(scope="module")
def model_config(tiny_config):
    config = tiny_config()
    config.model.patch_size = PATCH
    return dataclasses.replace(build_model_config(config.model), width=8)


@pytest.fixture(scope="module")
def images():
    """uint8 [12, H, W, 1] of patches of three grey levels with a little noise, and the level of each [12, h, w]."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, CLUSTERS, (12, 2, 2))
    grey = np.array(LEVELS)[labels].repeat(PATCH, 1).repeat(PATCH, 2)[..., None]
    return (grey + rng.integers(0, 5, grey.shape)).astype(np.uint8), labels


@pytest.fixture(scope="module")
def trunks(model_config):
    """Parameters of two different encoders."""
    init = jax.jit(lambda key: Trunk(model_config).init(key, jnp.zeros((1, SIZE, SIZE, 2)), jnp.ones(1))["params"])
    return [jax.device_get(init(jax.random.key(i))) for i in range(2)]


@pytest.fixture(scope="module")
def state(model_config, images, trunks):
    centers = fit_patch_centers(images[0], PATCH, CLUSTERS, seed=0)
    return init_teacher(trunks[0], centers, model_config.width)


@pytest.fixture(scope="module")
def teach(model_config):
    return jax.jit(lambda state, images: make_teacher(model_config, state, images, jnp.float32))


def partition(labels):
    """Which patches share a label, whatever it is called: boolean [P, P]."""
    labels = np.asarray(labels).ravel()
    return labels[:, None] == labels[None]


def test_which_tasks_need_it():
    geometry = Geometry(32, 8, 1, 16)
    needing = [name for name, task in TASKS.items() if needs_teacher([task(geometry)])]
    assert needing == ["cluster", "self_distill"]


def test_k_means_finds_planted_patches_and_is_deterministic(images):
    first, again = (fit_patch_centers(images[0], PATCH, CLUSTERS, seed=3) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert first.shape == (CLUSTERS, PATCH * PATCH)
    assert first.dtype == np.float32
    np.testing.assert_allclose(np.sort(first.mean(1)), [(level + 2) / 255 for level in LEVELS], atol=0.004)


def test_more_clusters_than_different_patches_gives_finite_centres():
    centers = fit_patch_centers(np.zeros((4, SIZE, SIZE, 1), np.uint8), PATCH, CLUSTERS, seed=0)
    assert np.isfinite(centers).all()


def test_before_the_refresh_labels_are_of_raw_patches(state, images, teach):
    pixels, labels = images
    found = teach(state, pixels / np.float32(255))
    assert found.clusters.shape == labels.shape
    np.testing.assert_array_equal(partition(found.clusters), partition(labels))
    tokens = np.asarray(found.tokens)
    np.testing.assert_allclose(tokens.mean(-1), 0, atol=1e-5)
    np.testing.assert_allclose(tokens.var(-1), 1, atol=1e-3)


def test_no_gradient_flows_into_targets(state, images, model_config):
    floats = jnp.asarray(images[0][:2] / np.float32(255))

    def of_target(trunk):
        return make_teacher(model_config, state | {"trunk": trunk}, floats, jnp.float32).tokens[..., 0].sum()

    def of_tokens(trunk):
        return trunk_tokens(model_config, trunk, floats)[..., 0].sum()

    def norm(tree):
        return float(sum(jnp.abs(leaf).sum() for leaf in jax.tree.leaves(tree)))

    assert norm(jax.jit(jax.grad(of_target))(state["trunk"])) == 0
    assert norm(jax.jit(jax.grad(of_tokens))(state["trunk"])) > 0


def test_refresh_copies_the_averaged_encoder_and_clusters_its_tokens(state, images, trunks, model_config, teach):
    pixels = images[0]
    refresh = make_refresh_fn(model_config, pixels, CLUSTERS, seed=0)
    new, again = (refresh({"trunk": trunks[1]}, jax.device_get(state)) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, new, again)
    assert jax.tree.structure(new) == jax.tree.structure(state)
    assert jax.tree.map(jnp.shape, new) == jax.tree.map(jnp.shape, state)
    assert not state["refreshed"]
    assert new["refreshed"]
    jax.tree.map(np.testing.assert_array_equal, new["trunk"], trunks[1])
    np.testing.assert_array_equal(new["patch_centers"], state["patch_centers"])

    found = teach(new, pixels / np.float32(255))
    tokens = np.asarray(trunk_tokens(model_config, trunks[1], jnp.asarray(pixels / np.float32(255))))
    np.testing.assert_allclose(found.tokens, tokens, atol=1e-5)
    distance = np.square(tokens[..., None, :] - np.asarray(new["token_centers"])).sum(-1)
    np.testing.assert_array_equal(found.clusters, distance.argmin(-1))
    # The centres are means of their own tokens: k-means has converged on them.
    for cluster in np.unique(found.clusters):
        members = tokens[np.asarray(found.clusters) == cluster]
        np.testing.assert_allclose(members.mean(0), new["token_centers"][cluster], atol=1e-3)
