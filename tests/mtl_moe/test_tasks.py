"""Proxy tasks: what they do to an image, that a perfect answer costs nothing, and that a planted error is found there.

Axes: B images, V views, H W C image, h w token grid.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from scipy import ndimage

from mtl_moe.tasks import TASKS, Geometry, Teacher, base, build_tasks
from mtl_moe.tasks.synthetic import FAMILIES
from mtl_moe.tasks.transform import NUM_SYMMETRIES, apply_symmetry, undo_symmetry

BATCH, SIZE, PATCH, CHANNELS, WIDTH = 4, 32, 8, 1, 16
GRID = SIZE // PATCH
GEOMETRY = Geometry(SIZE, PATCH, CHANNELS, WIDTH)
OPTIONS = {"jigsaw": {"tiles": 2}, "cluster": {"num_clusters": 4}}
PIXEL_TASKS = ("masked", "denoise", "synthetic", "intensity")
CONFIDENT = 20.0  # logit of the right class: p(wrong) is then about 1e-8
KEY = 7


def make_task(name, **options):
    return TASKS[name](geometry=GEOMETRY, **OPTIONS.get(name, {}) | options)


@functools.cache
def compiled_corrupt(task):
    """`task.corrupt`, compiled: one operation at a time takes longer to compile."""
    return jax.jit(task.corrupt)


def corrupt(task, images, teacher=None, key=KEY):
    return compiled_corrupt(task)(jax.random.key(key), images, teacher)


def make_images(batch=BATCH, size=SIZE, dark_half=False):
    """Textured float images in [0.2, 0.8]; with `dark_half` the right half is empty surround."""
    noise = np.random.default_rng(0).normal(size=(batch, size, size, CHANNELS))
    smooth = ndimage.gaussian_filter(noise, (0, 2, 2, 0))
    images = np.clip(0.5 + 0.12 * smooth / smooth.std(), 0.2, 0.8).astype(np.float32)
    if dark_half:
        images[:, :, size // 2 :] = 0
    return jnp.asarray(images)


@pytest.fixture(scope="module")
def images():
    return make_images()


@pytest.fixture(scope="module")
def teacher():
    rng = np.random.default_rng(1)
    tokens = rng.normal(size=(BATCH, GRID, GRID, WIDTH)).astype(np.float32)
    clusters = rng.integers(0, 4, (BATCH, GRID, GRID)).astype(np.int32)
    return Teacher(tokens=jax.nn.standardize(jnp.asarray(tokens)), clusters=jnp.asarray(clusters))


def confident(labels, classes):
    """Logits that all but say `labels`: [...] -> [..., classes]."""
    return CONFIDENT * jax.nn.one_hot(jnp.asarray(labels), classes)


def tile_rows():
    """Number of the jigsaw tile each token lies in, [h, w], written by hand for 2 x 2 tiles of 2 x 2 tokens."""
    return np.array([[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3], [2, 2, 3, 3]])


def perfect_answer(name, images, target, teacher):
    """The output that solves a task's training example."""
    if name in ("masked", "denoise", "intensity"):
        return images
    if name == "synthetic":
        clean, defect = target
        return jnp.concatenate([CONFIDENT * (2 * defect - 1), clean], -1)
    if name == "jigsaw":
        return confident(np.asarray(target)[:, tile_rows()], 4)
    if name == "transform":
        return confident(np.broadcast_to(np.asarray(target)[:, None, None], (BATCH, GRID, GRID)), 8)
    if name == "cluster":
        return confident(teacher.clusters, 4)
    if name == "self_distill":
        return teacher.tokens
    raise NotImplementedError(f"say here what a perfect network answers to {name}")


@pytest.mark.parametrize("name", TASKS)
class TestEveryTask:
    def test_corrupt_is_a_function_of_key_and_images(self, name, images, teacher):
        task = make_task(name)
        first, again, other = (corrupt(task, images, teacher, key) for key in (KEY, KEY, KEY + 1))
        jax.tree.map(np.testing.assert_array_equal, first, again)
        assert not np.array_equal(first[0], other[0])

    def test_input_is_an_image_and_a_plane_of_hidden_pixels(self, name, images, teacher):
        view, _ = corrupt(make_task(name), images, teacher)
        assert view.shape == (BATCH, SIZE, SIZE, CHANNELS + 1)
        assert view.dtype == jnp.float32
        assert set(np.unique(view[..., -1])) <= {0.0, 1.0}
        if name != "denoise":  # noise is not clipped: the model would read off where it was
            assert 0 <= float(view[..., :-1].min()) <= float(view[..., :-1].max()) <= 1
        hidden = np.asarray(view[..., -1:]) == 1
        np.testing.assert_array_equal(np.asarray(view[..., :-1])[hidden], 0.5)

    def test_perfect_answer_costs_nothing_and_a_wrong_one_more(self, name, images, teacher):
        task = make_task(name)
        _, target = corrupt(task, images, teacher)
        perfect = perfect_answer(name, images, target, teacher)
        losses = task.loss(perfect, target)
        assert losses.shape == (BATCH,)
        # Float rounding of SSIM's and the cosine's small constants.
        np.testing.assert_allclose(losses, 0, atol=1e-4)
        wrong = 1 - perfect if name in PIXEL_TASKS else jnp.roll(perfect, 1, axis=-1)
        assert np.all(np.asarray(task.loss(wrong, target)) > 0.01)

    def test_views_are_fixed_and_head_says_the_output(self, name, images, teacher):
        task = make_task(name)
        views = task.views(images)
        assert views.shape[1:] == (BATCH, SIZE, SIZE, CHANNELS + 1)
        np.testing.assert_array_equal(views, task.views(images))
        assert len(task.view_names) == len(views)
        one = task.views(images[1:2])
        np.testing.assert_array_equal(views[:, 1:2], one, "a view depends on the other images of the batch")
        _, target = corrupt(task, images, teacher)
        shape = (SIZE, SIZE) if task.head.kind == "pixels" else (GRID, GRID)
        assert perfect_answer(name, images, target, teacher).shape == (BATCH, *shape, task.head.dim)

    def test_evidence_is_highest_where_an_error_is_planted(self, name, images, teacher):
        task = make_task(name)
        answers = perfect_views(task, images, teacher)
        clean = task.evidence(answers, images, teacher)
        planted = task.evidence(plant(task, answers, images), images, teacher)
        assert set(planted) == set(task.reductions)
        assert next(iter(planted)) == name
        for key, maps in planted.items():
            assert maps.shape == (BATCH, SIZE, SIZE)
            assert maps.dtype == jnp.float32
            # Smallest possible values: exp(-20) for logits, float rounding of a cosine or a difference.
            assert float(jnp.abs(clean[key]).max()) < 1e-4
            maps = np.asarray(maps)
            corner = maps[:, 2 : PATCH - 2, 2 : PATCH - 2].min(axis=(1, 2))  # inside the planted cell
            far = maps[:, SIZE // 2 + PATCH :, SIZE // 2 + PATCH :].max(axis=(1, 2))
            assert np.all(corner > 0.05)
            assert np.all(corner > 10 * far + 0.05)


def perfect_views(task, images, teacher):
    """Outputs [V, B, ...] that solve all views of a task."""
    name, views = task.name, task.views(images).shape[0]
    if name == "synthetic":
        answer = jnp.concatenate([jnp.full((*images.shape[:3], 1), -CONFIDENT), images], -1)
    elif name == "jigsaw":
        answer = jnp.broadcast_to(confident(tile_rows(), 4), (BATCH, GRID, GRID, 4))
    elif name == "transform":
        numbers = np.broadcast_to(np.arange(NUM_SYMMETRIES)[:, None, None, None], (NUM_SYMMETRIES, BATCH, GRID, GRID))
        return confident(numbers, NUM_SYMMETRIES)
    else:
        answer = perfect_answer(name, images, None, teacher)
    return jnp.broadcast_to(answer, (views, *answer.shape))


def plant(task, answers, images):
    """Spoils the answers for the top left of the image: a patch of pixels, a tile, or a token in every orientation."""
    answers = np.array(answers)
    if task.head.kind == "pixels":
        answers[:, :, :PATCH, :PATCH] += 0.4
        if task.name == "synthetic":
            answers[:, :, :PATCH, :PATCH, 0] = CONFIDENT
        return jnp.asarray(answers)
    side = 2 if task.name == "jigsaw" else 1  # tokens along the side of what is spoilt
    wrong = np.roll(answers, 1, axis=-1)
    for view in range(len(answers)):
        where = np.zeros((GRID, GRID), bool)
        where[:side, :side] = True
        if task.name == "transform":  # numpy's own turns, not the code's
            where = np.rot90(where[:, ::-1] if view >= 4 else where, view % 4)
        answers[view][:, where] = wrong[view][:, where]
    return jnp.asarray(answers)


def test_views_of_one_name_are_one_input(images):
    tasks = [make_task(name) for name in TASKS]
    named = [pair for task in tasks for pair in zip(task.view_names, task.views(images), strict=True)]
    inputs = dict(named)
    assert len(inputs) == len({np.asarray(view).tobytes() for view in inputs.values()}) < len(named)
    for name, view in named:
        np.testing.assert_array_equal(view, inputs[name])


def test_masked_tasks_hide_the_stated_share(images, teacher):
    for name, ratio in itertools.product(("masked", "cluster", "self_distill"), (0.25, 0.5)):
        view, _ = corrupt(make_task(name, ratio=ratio), images, teacher)
        cells = np.asarray(view[..., -1]).reshape(BATCH, GRID, PATCH, GRID, PATCH)
        np.testing.assert_array_equal(cells.min((2, 4)), cells.max((2, 4)), "part of a patch is hidden")
        np.testing.assert_array_equal(cells.mean((1, 2, 3, 4)), ratio)


def test_losses_read_hidden_cells_only(images, teacher):
    for name in ("masked", "cluster"):
        task = make_task(name)
        view, target = corrupt(task, images, teacher)
        perfect = perfect_answer(name, images, target, teacher)
        seen = np.asarray(view[..., -1:]) == 0
        seen = seen if name == "masked" else seen[:, ::PATCH, ::PATCH]
        spoilt = jnp.where(seen, jnp.roll(perfect, 1, -1) + 0.5, perfect)
        np.testing.assert_allclose(task.loss(spoilt, target), 0, atol=1e-4)
        assert np.all(np.asarray(task.loss(jnp.where(seen, perfect, jnp.roll(perfect, 1, -1) * 0.5), target)) > 0.01)


def test_two_masks_are_complementary_halves():
    masks = np.asarray(base.fixed_cells(GRID))
    assert masks.shape == (2, GRID, GRID)
    np.testing.assert_array_equal(masks[0], ~masks[1])
    assert masks[0].sum() == GRID * GRID // 2
    np.testing.assert_array_equal(masks, base.fixed_cells(GRID))


@pytest.mark.parametrize("extra", [(), (5,)])
def test_at_hidden_takes_each_cell_from_the_view_that_hid_it(images, extra):
    views = base.hidden_views(images, PATCH)
    hidden = np.asarray(views[..., -1])[:, 0, ::PATCH, ::PATCH]  # [2, h, w] read off the inputs themselves
    maps = np.random.default_rng(0).normal(size=(2, BATCH, GRID, GRID, *extra)).astype(np.float32)
    picked = np.asarray(base.at_hidden(jnp.asarray(maps)))
    for i, j in itertools.product(range(GRID), range(GRID)):
        view = 0 if hidden[0, i, j] else 1
        np.testing.assert_array_equal(picked[:, i, j], maps[view][:, i, j])


def test_masked_evidence_ignores_visible_pixels(images):
    task = make_task("masked")
    visible = 1 - np.asarray(task.views(images))[..., -1:]
    outputs = jnp.asarray(np.asarray(images)[None] + visible)  # wrong by 1 wherever the model saw the pixel
    np.testing.assert_allclose(task.evidence(outputs, images, None)["masked"], 0, atol=1e-6)


def test_local_gradient_of_a_ramp_and_of_an_edge():
    ramp = 0.003 * jnp.arange(64.0)[:, None] + 0.004 * jnp.arange(64.0)[None]
    images = jnp.stack([ramp, (jnp.arange(64) >= 32).astype(jnp.float32)[None] * jnp.ones((64, 1))])[..., None]
    slope = np.asarray(base.local_gradient(images))
    assert slope.shape == (2, 64, 64)
    np.testing.assert_allclose(slope[0, 2:61, 2:61], 0.005, rtol=1e-3)  # 3, 4, 5
    np.testing.assert_allclose(slope[1, 5], [0] * 29 + [0.2] * 5 + [0] * 30, atol=1e-6)  # one column of the five


def test_masked_error_has_the_same_units_at_every_size():
    """A smooth image of twice the pixels has half the gradient, and the same error counts as much."""
    maps = {}
    for size in (64, 128):
        line = jnp.arange(size) / size
        images = (0.5 + 0.3 * jnp.sin(9 * line)[:, None] * jnp.cos(7 * line)[None])[None, :, :, None]
        task = TASKS["masked"](geometry=Geometry(size, 8, 1, 16))
        maps[size] = np.asarray(task.evidence(jnp.stack([images + 0.1] * 2), images, None)["masked"])[0]
    # An error of grey values in units of grey values per pixel: twice at twice the pixels, everywhere alike.
    np.testing.assert_allclose(maps[128][1::2, 1::2], 2 * maps[64], rtol=0.1)


def test_masked_error_counts_less_where_the_image_has_edges():
    images = jnp.zeros((1, SIZE, SIZE, CHANNELS)).at[:, :, SIZE // 2 :: 2].set(0.5)  # right half: stripes
    task = make_task("masked")
    answers = jnp.broadcast_to(images + 0.1, (2, *images.shape))
    maps = np.asarray(task.evidence(answers, images, None)["masked"])[0]
    floor = 0.03 * 64 / SIZE
    np.testing.assert_allclose(maps[:, :10], 0.1 / floor, rtol=1e-4)
    np.testing.assert_allclose(maps[:, SIZE // 2 + 3 : -4], 0.1 / (0.5 + floor), rtol=1e-4)


def test_jigsaw_order_says_the_source_of_each_place(images):
    view, order = corrupt(make_task("jigsaw"), images)
    assert not np.array_equal(view[..., :1], images)
    restored, half = np.zeros_like(images), SIZE // 2
    for b, place in itertools.product(range(BATCH), range(4)):
        (i, j), (p, q) = divmod(place, 2), divmod(int(order[b, place]), 2)
        tile = view[b, i * half : (i + 1) * half, j * half : (j + 1) * half, :1]
        restored[b, p * half : (p + 1) * half, q * half : (q + 1) * half] = tile
    np.testing.assert_array_equal(restored, images)


def test_transform_has_eight_different_symmetries_with_inverses(images):
    seen = set()
    for index in range(NUM_SYMMETRIES):
        turned = apply_symmetry(images, index)
        seen.add(np.asarray(turned).tobytes())
        np.testing.assert_array_equal(undo_symmetry(turned, index), images)
        own = np.rot90(np.asarray(images)[:, :, ::-1] if index >= 4 else images, index % 4, axes=(1, 2))
        np.testing.assert_array_equal(turned, own)
    assert len(seen) == NUM_SYMMETRIES


@pytest.mark.parametrize("index", range(NUM_SYMMETRIES))
def test_a_token_of_a_turned_view_comes_back_to_its_place(index):
    task, place = make_task("transform"), (0, 1)  # off every axis of symmetry
    images = np.zeros((1, SIZE, SIZE, 1), np.float32)
    images[0, place[0] * PATCH : (place[0] + 1) * PATCH, place[1] * PATCH : (place[1] + 1) * PATCH] = 1
    view = np.asarray(task.views(jnp.asarray(images)))[index, 0, ..., 0]
    bright = view.reshape(GRID, PATCH, GRID, PATCH).mean((1, 3)) > 0.5  # where the patch is in this view
    answers = np.array(perfect_views(task, jnp.zeros((BATCH, SIZE, SIZE, 1)), None))[:, :1]
    answers[index][:, bright] = 0
    maps = np.asarray(task.evidence(jnp.asarray(answers), jnp.asarray(images), None)["transform"])[0]
    assert np.unravel_index(maps.reshape(GRID, PATCH, GRID, PATCH).sum((1, 3)).argmax(), (GRID, GRID)) == place


def test_transform_target_is_the_symmetry_applied(images):
    view, index = corrupt(make_task("transform"), images)
    for b in range(BATCH):
        np.testing.assert_array_equal(view[b : b + 1, ..., :1], apply_symmetry(images[b : b + 1], int(index[b])))


@pytest.mark.parametrize("family", FAMILIES)
def test_family_changes_a_blob_on_the_body_only(family):
    images = make_images(batch=8, size=64, dark_half=True)
    body = np.asarray(base.body_mask(images))
    geometry = Geometry(64, 8, 1, WIDTH)
    task = TASKS["synthetic"](
        geometry, families=(family,), clean_share=0.0, radius_min=0.09, radius_max=0.1, max_defects=1
    )
    view, (clean, defect) = corrupt(task, images)
    change, defect = np.abs(np.asarray(view[..., :1]) - images), np.asarray(defect)
    np.testing.assert_array_equal(clean, images)
    np.testing.assert_array_equal(change[body == 0], 0)
    assert np.all(change.max((1, 2, 3)) > 0.02), "an image was left as it is"
    # A blob of radius 0.1 covers 3 % of the image; soft edge, stretching and noise at most quadruple it.
    assert np.all((change > 0.01).mean((1, 2, 3)) < 0.13)
    assert set(np.unique(defect)) <= {0.0, 1.0}
    near = ndimage.maximum_filter(change, (1, 3, 3, 1))
    assert np.all(near[defect == 1] > 0.02), "called a defect where nothing changed"
    assert defect.sum() > 0


def test_share_of_clean_images_is_as_asked():
    images = make_images(batch=64)
    view, (_, defect) = corrupt(make_task("synthetic", families=("blob",), clean_share=0.5), images)
    changed = np.abs(np.asarray(view[..., :1]) - images).max((1, 2, 3)) > 1e-3
    assert not np.asarray(defect)[~changed].any()
    assert abs(changed.mean() - 0.5) < 0.25  # four standard deviations of a binomial of 64


@pytest.mark.parametrize("most", [1, 3])
def test_number_of_defects_is_from_one_to_the_stated(most):
    images = make_images(batch=32, size=128)
    task = TASKS["synthetic"](
        Geometry(128, PATCH, CHANNELS, WIDTH), families=("blob",), clean_share=0.0, radius_min=0.03, radius_max=0.031,
        max_defects=most,
    )  # fmt: skip
    _, (_, defect) = corrupt(task, images)
    counts = {ndimage.label(d[..., 0], np.ones((3, 3)))[1] for d in np.asarray(defect)}  # blobs this small rarely touch
    assert counts == set(range(1, most + 1))


def test_families_are_mixed_within_a_batch():
    images = make_images(batch=16)
    task = make_task("synthetic", families=("blob", "haze"), clean_share=0.0, max_defects=1)
    view, _ = corrupt(task, images)
    # "blob" shifts grey values by one number inside the mask, "haze" does not: both must occur.
    change = np.asarray(view[..., 0]) - np.asarray(images[..., 0])
    largest = np.sort(np.abs(change).reshape(16, -1), axis=1)[:, -8:]
    flat = np.ptp(largest, axis=1) < 0.02 * largest.max(axis=1)
    assert 0 < flat.sum() < 16


def test_denoise_adds_noise_on_the_body_only():
    images = make_images(dark_half=True)
    view, (target, body) = corrupt(make_task("denoise", cells=4), images)
    noise, body = np.asarray(view[..., :1] - images), np.asarray(body)
    np.testing.assert_array_equal(target, images)
    assert 0 < body.mean() < 1
    np.testing.assert_array_equal(noise[body == 0], 0)
    for b in range(BATCH):
        # Unit-variance noise over the whole image times 0.05 to 0.3; over half of it the spread varies.
        assert 0.02 < noise[b][body[b] == 1].std() < 0.5


def test_denoise_finds_nothing_outside_the_body():
    images = make_images(dark_half=True)
    task = make_task("denoise")
    maps = np.asarray(task.evidence((images + 0.3)[None], images, None)["denoise"])
    assert np.all(maps[:, :, SIZE // 2 + 3 :] == 0)
    np.testing.assert_allclose(maps[:, 4:-4, 4 : SIZE // 2 - 4], 0.3, atol=1e-5)


def test_intensity_keeps_the_order_and_the_ends_of_grey_values():
    ramp = jnp.linspace(0, 1, SIZE * SIZE).reshape(1, SIZE, SIZE, 1)
    view, target = corrupt(make_task("intensity"), jnp.tile(ramp, (BATCH, 1, 1, 1)))
    values = np.asarray(view[..., 0]).reshape(BATCH, -1)
    assert np.all(np.diff(values, axis=1) > 0)
    np.testing.assert_allclose(values[:, [0, -1]], [[0, 1]] * BATCH, atol=1e-6)
    np.testing.assert_array_equal(target[0], ramp[0])
    assert np.abs(values - np.asarray(ramp).reshape(1, -1)).max() > 0.05
    assert np.ptp(values[:, SIZE * SIZE // 2]) > 0.01, "the same curve for all images"


@pytest.mark.parametrize("num_knots", [1, 2, 4])
def test_intensity_curves_are_straight_between_knots(num_knots):
    """Equally spaced: with one piece the curve is the diagonal, with more it bends where they meet."""
    ramp = jnp.linspace(0, 1, SIZE * SIZE).reshape(1, SIZE, SIZE, 1)
    view, _ = corrupt(make_task("intensity", num_knots=num_knots), jnp.tile(ramp, (BATCH, 1, 1, 1)))
    bends = np.abs(np.diff(np.asarray(view[..., 0]).reshape(BATCH, -1), 2)) > 1e-5
    knots = np.arange(1, num_knots) * (SIZE * SIZE - 1) / num_knots
    near = np.abs(np.arange(1, SIZE * SIZE - 1)[:, None] - knots).min(1, initial=np.inf) <= 1
    assert not bends[:, ~near].any()
    assert np.all(bends.any(1) == (num_knots > 1))


def test_weights_of_the_second_part_of_a_loss(images, teacher):
    """masked: structural similarity of hidden patches, written out; synthetic: the L1 error of the restored image."""
    rng = np.random.default_rng(3)
    losses = {}
    for name, field, weight in (("masked", "ssim_weight", 0.3), ("synthetic", "clean_weight", 2.0)):
        task = make_task(name)
        _, target = corrupt(task, images)
        output = rng.normal(0.5, 0.2, (BATCH, SIZE, SIZE, task.head.dim)).astype(np.float32)
        without, with_it = (make_task(name, **{field: w}).loss(output, target) for w in (0.0, weight))
        losses[name] = (np.asarray(with_it) - np.asarray(without)) / weight, output, target

    found, output, (_, hidden) = losses["masked"]
    for n in range(BATCH):
        worse = []
        for i, j in np.argwhere(np.asarray(hidden[n]) > 0):
            cell = np.s_[PATCH * i : PATCH * (i + 1), PATCH * j : PATCH * (j + 1), 0]
            a, b = output[n][cell], np.asarray(images[n])[cell]
            cov = np.mean((a - a.mean()) * (b - b.mean()))
            light = (2 * a.mean() * b.mean() + 1e-4) / (a.mean() ** 2 + b.mean() ** 2 + 1e-4)
            worse.append(1 - light * (2 * cov + 9e-4) / (a.var() + b.var() + 9e-4))
        assert found[n] == pytest.approx(np.mean(worse), rel=1e-3)
    found, output, _ = losses["synthetic"]
    np.testing.assert_allclose(found, np.abs(output[..., 1:] - images).mean((1, 2, 3)), rtol=1e-4)


def test_cluster_targets_are_the_teachers_labels(images, teacher):
    _, (labels, _) = corrupt(make_task("cluster"), images, teacher)
    np.testing.assert_array_equal(labels, teacher.clusters)


def test_body_mask_covers_an_image_without_surround_whole():
    body = np.asarray(base.body_mask(make_images(dark_half=True)))
    assert np.all(body[:, :, : SIZE // 2 - 2] == 1)
    assert np.all(body[:, :, SIZE // 2 + 2 :] == 0)
    assert np.all(np.asarray(base.body_mask(jnp.zeros((1, SIZE, SIZE, 1)))) == 1)


def test_body_mask_holds_what_is_dark_within_and_keeps_to_a_small_organ():
    row, column = np.indices((64, 64)) - 32
    radius = np.hypot(row, column)
    ring = np.where((radius > 12) & (radius < 24), 0.5, 0.0)  # air or fluid within
    body = np.asarray(base.body_mask(jnp.asarray(ring, jnp.float32)[None, ..., None]))[0, ..., 0]
    assert np.all(body[radius < 22] == 1)
    assert np.all(body[radius > 28] == 0)
    small = np.asarray(base.body_mask(jnp.asarray(radius < 5, jnp.float32)[None, ..., None]))
    assert 0.01 < small.mean() < 0.06  # not everything: it is more than nothing


def test_box_filter_is_scipys():
    images = make_images()
    wanted = ndimage.uniform_filter(np.asarray(images), (0, 5, 5, 0), mode="nearest")
    np.testing.assert_allclose(base.box_filter(images, 5), wanted, atol=1e-6)


def tasks_config(names, **options):
    loss = {"weight": 1.0, "augment": "none"}
    return ConfigDict({"names": tuple(names), **{name: loss | options.get(name, {}) for name in names}})


def test_tasks_are_built_in_order_with_their_options():
    config = tasks_config(["jigsaw", "masked"], jigsaw={"tiles": 2})
    jigsaw, masked = build_tasks(config, GEOMETRY)
    assert (jigsaw.name, jigsaw.tiles, masked.name) == ("jigsaw", 2, "masked")


@pytest.mark.parametrize("names", [["masked", "puzzle"], ["masked", "masked"], []])
def test_unknown_repeated_or_no_task_is_an_error(names):
    with pytest.raises(ValueError, match=r"tasks.names: expected some of .*masked.*each once"):
        build_tasks(tasks_config(names), GEOMETRY)


def test_impossible_options_are_errors():
    with pytest.raises(ValueError, match=r"tasks.jigsaw.tiles=3 does not divide the token grid 4"):
        make_task("jigsaw", tiles=3)
    for families in (("blob", "warts"), ()):
        with pytest.raises(ValueError, match=r"tasks.synthetic.families: expected some of"):
            make_task("synthetic", families=families)
    for option in ("radius", "use_position", "name"):  # the last two are the task's own, and none of its options
        known = rf"tasks.masked: unknown options \['{option}'\], known: \['ratio', 'ssim_weight'\]"
        with pytest.raises(ValueError, match=known):
            build_tasks(tasks_config(["masked"], masked={option: 1}), GEOMETRY)


def test_a_task_without_defaults_is_told_where_they_stand():
    config = ConfigDict({"names": ("masked",)})
    with pytest.raises(ValueError, match=r"tasks.masked: expected weight and augment, .*common.py, masked=dict"):
        build_tasks(config, GEOMETRY)


@pytest.mark.parametrize("name", ["masked", "cluster", "self_distill"])
def test_another_share_of_hidden_patches_than_is_scored_is_warned_of(name, caplog):
    build_tasks(tasks_config([name, "denoise"], **{name: {"ratio": 0.5}}), GEOMETRY)
    assert not caplog.records
    (task,) = build_tasks(tasks_config([name], **{name: {"ratio": 0.75}}), GEOMETRY)
    assert f"tasks.{name}.ratio=0.75: images are always scored with 0.5 of their patches hidden" in caplog.text
    assert task.views(make_images())[..., -1].mean() == 0.5
