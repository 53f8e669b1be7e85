"""The protocol of a proxy task, and what several tasks share.

Axes: B images, V views of an image at inference, H W C image, h w token grid, D width. Images are float32 in [0, 1].

A task is a frozen dataclass of pure functions. In training `corrupt` makes the model's input and the target, `loss`
compares. At inference `views` makes fixed inputs and `evidence` reads from the outputs how badly the task was solved:
a map where it has one, and how that map becomes an image score.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import flax.struct
import jax
import jax.numpy as jnp
from einops import rearrange, repeat

EPS = 1e-6
SCORED_RATIO = 0.5  # of the patches, hidden in each of the two views of `hidden_views`


class Head(NamedTuple):
    """What a task reads from the shared trunk.

    Attributes:
      kind: "pixels" gives [B, H, W, dim] (unpatchified), "tokens" gives [B, h, w, dim].
      dim: channels or classes.
    """

    kind: str
    dim: int


class Reduction(NamedTuple):
    """How the map of an evidence becomes an image score, and how that score counts.

    Attributes:
      how: "mean" over the body, for tasks that fail on an image as a whole. "top", for tasks that fail in places: log
        of the mean of the smoothed map's top 5 % inside the body, less its linear fit on the image's log mean gradient,
        because a smooth image is easy to reconstruct whatever it shows.
      kind: "error" of a restored image, "defect" found by segmentation, "label" given wrongly. Evidences of one kind
        rise and fall together on normal images: they are averaged before the kinds are.
    """

    how: str
    kind: str


class Geometry(NamedTuple):
    """Sizes fixed by the data and the model: side of what the network sees at a time (the image, or a tile of it),
    patch side, channels, encoder width."""

    image_size: int
    patch_size: int
    channels: int
    width: int

    @property
    def grid(self) -> int:
        """Tokens along a side."""
        return self.image_size // self.patch_size


@flax.struct.dataclass
class Teacher:
    """What pseudo-label tasks know about the clean images: fixed functions of them, outside the gradient.

    Attributes:
      tokens: [B, h, w, D] tokens of the frozen averaged encoder, each of zero mean and unit variance.
      clusters: int32 [B, h, w] k-means label of each patch.
    """

    tokens: jax.Array
    clusters: jax.Array


class Task(Protocol):
    """See the module's docstring. Inputs of the model are [.., H, W, C + 1]: the image and a plane of hidden pixels."""

    name: str
    head: Head
    use_position: bool  # whether the position embedding is added
    needs_teacher: bool  # whether `corrupt` and `evidence` read the Teacher
    view_names: Sequence[str]  # [V] of `views`: those of one name are the same input, in other tasks too

    @property
    def reductions(self) -> Mapping[str, Reduction]:
        """How each map of `evidence` becomes an image score, by name; the first is called as the task."""

    def corrupt(self, key: jax.Array, images: jax.Array, teacher: Teacher | None) -> tuple[jax.Array, Any]:
        """Images [B, H, W, C] -> (input [B, H, W, C + 1], target pytree)."""

    def loss(self, output: jax.Array, target: Any) -> jax.Array:
        """Head output and target -> loss [B]."""

    def views(self, images: jax.Array) -> jax.Array:
        """Images [B, H, W, C] -> inputs [V, B, H, W, C + 1]; V is fixed."""

    def evidence(self, outputs: jax.Array, images: jax.Array, teacher: Teacher | None) -> Mapping[str, jax.Array]:
        """Head outputs [V, B, ...] -> maps [B, H, W] float32, higher is odder, by the names of `reductions`."""


def to_float(images: jax.Array) -> jax.Array:
    """uint8 [0, 255] -> float32 [0, 1]."""
    return images.astype(jnp.float32) / 255.0


def with_plane(images: jax.Array, hidden: jax.Array | None = None) -> jax.Array:
    """Appends the plane of hidden pixels ([..., H, W, 1], 1 = hidden); hidden pixels of the image become 0.5."""
    if hidden is None:
        return jnp.concatenate([images, jnp.zeros_like(images[..., :1])], -1)
    return jnp.concatenate([images * (1 - hidden) + 0.5 * hidden, hidden.astype(images.dtype)], -1)


def enlarge(grid: jax.Array, factor: int) -> jax.Array:
    """Repeats each cell of [B, h, w, ...] to factor x factor pixels."""
    return repeat(grid, "b h w ... -> b (h p) (w q) ...", p=factor, q=factor)


def resize(grid: jax.Array, size: int) -> jax.Array:
    """Bilinear resize of [B, h, w, C] to [B, size, size, C]."""
    return jax.image.resize(grid, (grid.shape[0], size, size, grid.shape[-1]), "bilinear")


def random_cells(key: jax.Array, batch: int, grid: int, fraction: float) -> jax.Array:
    """Boolean [B, grid, grid] with exactly round(fraction * grid^2) cells set in each image."""
    cells = grid * grid
    noise = jax.random.uniform(key, (batch, cells))
    rank = jnp.argsort(jnp.argsort(noise, axis=-1), axis=-1)
    return (rank < round(fraction * cells)).reshape(batch, grid, grid)


def hide_random(key: jax.Array, images: jax.Array, patch_size: int, ratio: float) -> tuple[jax.Array, jax.Array]:
    """Hides a share `ratio` of each image's patches: (input [B, H, W, C + 1], hidden cells, boolean [B, h, w])."""
    cells = random_cells(key, images.shape[0], images.shape[1] // patch_size, ratio)
    return with_plane(images, enlarge(cells[..., None], patch_size).astype(images.dtype)), cells


def fixed_cells(grid: int) -> jax.Array:
    """Two fixed complementary random masks, boolean [2, grid, grid], each half of the cells."""
    half = random_cells(jax.random.key(0), 1, grid, SCORED_RATIO)[0]
    return jnp.stack([half, ~half])


def hidden_views(images: jax.Array, patch_size: int) -> jax.Array:
    """Inputs [2, B, H, W, C + 1] under the two complementary masks."""
    hidden = enlarge(fixed_cells(images.shape[1] // patch_size)[..., None], patch_size).astype(images.dtype)
    shape = (*images.shape[:3], 1)
    return jnp.stack([with_plane(images, jnp.broadcast_to(h, shape)) for h in hidden])


def at_hidden(maps: jax.Array) -> jax.Array:
    """From [2, B, h, w, ...] under the two masks keeps at each cell the view in which it was hidden: [B, h, w, ...]."""
    hidden = fixed_cells(maps.shape[2])[:, None]
    hidden = hidden.reshape(*hidden.shape, *(1,) * (maps.ndim - 4))
    return jnp.where(hidden[0], maps[0], maps[1])


def coarse_noise(key: jax.Array, batch: int, size: int, cells: int, channels: int = 1) -> jax.Array:
    """Smooth normal noise [B, size, size, channels]: `cells` x `cells` values, enlarged bilinearly, unit variance."""
    noise = resize(jax.random.normal(key, (batch, cells, cells, channels)), size)
    return noise / (noise.std(axis=(1, 2), keepdims=True) + EPS)


def box_filter(images: jax.Array, size: int) -> jax.Array:
    """Mean over size x size windows (odd size, edge values repeated), [B, H, W, C] -> the same."""
    for axis in (1, 2):
        pad = [(0, 0)] * 4
        pad[axis] = (size // 2, size // 2)
        padded = jnp.pad(images, pad, mode="edge")
        length = images.shape[axis]
        images = sum(jax.lax.slice_in_dim(padded, i, i + length, axis=axis) for i in range(size)) / size
    return images


def local_gradient(images: jax.Array) -> jax.Array:
    """Magnitude of the forward differences, mean over channels and, of images of 64 pixels, 5 x 5 of them (a like share
    of larger ones): [B, H, W, C] -> [B, H, W]."""
    size = max(3, 5 * images.shape[1] // 64 | 1)
    down = jnp.diff(images, axis=1, append=images[:, -1:])
    right = jnp.diff(images, axis=2, append=images[:, :, -1:])
    return box_filter(jnp.sqrt(jnp.square(down) + jnp.square(right)).mean(-1, keepdims=True), size)[..., 0]


def body_mask(images: jax.Array) -> jax.Array:
    """Where the patient is, float {0, 1} [B, H, W, 1]: smoothed brightness above 0.05, and what lies between such
    pixels in its row and in its column (air, fluid); everything if that is under 0.5 %.

    Medical images have a dark surround; histology has none and is covered whole.
    """
    size = max(3, images.shape[1] // 16 | 1)
    bright = (box_filter(images.mean(-1, keepdims=True), size) > 0.05).astype(jnp.float32)

    def between(axis: int) -> jax.Array:
        return jax.lax.cummax(bright, axis) * jax.lax.cummax(bright, axis, reverse=True)

    body = between(1) * between(2)
    enough = body.mean(axis=(1, 2, 3), keepdims=True) > 0.005
    return jnp.where(enough, body, 1.0)


def mean_in(images: jax.Array, area: jax.Array) -> jax.Array:
    """Mean of [B, H, W, C] weighted by `area` [B, H, W, 1], per image and channel: [B, 1, 1, C]."""
    return (images * area).sum((1, 2), keepdims=True) / (area.sum((1, 2), keepdims=True) + EPS)


def mean_where(values: jax.Array, where: jax.Array) -> jax.Array:
    """Mean of [B, ...] over `where` (same shape or broadcastable), per image: [B]."""
    where = jnp.broadcast_to(where, values.shape).astype(values.dtype)
    axes = tuple(range(1, values.ndim))
    return (values * where).sum(axes) / (where.sum(axes) + EPS)


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """-log softmax(logits)[labels]: [..., classes] and integer [...] -> [...]."""
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
    return -jnp.take_along_axis(log_p, labels[..., None], axis=-1)[..., 0]


def absolute_error(output: jax.Array, images: jax.Array) -> jax.Array:
    """Mean over channels of |output - images|: [..., H, W]."""
    return jnp.abs(output.astype(jnp.float32) - images).mean(-1)


def to_cells(images: jax.Array, size: int) -> jax.Array:
    """[B, H, W, ...] -> [B, H / size, W / size, size * size, ...]."""
    return rearrange(images, "b (h p) (w q) ... -> b h w (p q) ...", p=size, q=size)
