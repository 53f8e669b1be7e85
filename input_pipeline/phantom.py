"""Anatomical phantoms: grey images like slices of a head, a chest and an abdomen, with lesions and exact masks.

The embedded default data of the detector: nothing is downloaded, every image is a pure function of (seed, subject,
slice), so counts can change without changing any subject. Anatomy is drawn in unit coordinates (x to the right, y
down, both in [-1, 1] over the image), so the same subject has the same content at every image size; only the pixel
noise is drawn per pixel. A phantom resembles anatomy; it is no model of a scanner and says nothing about patients.

Axes: N images, H W image rows and columns (H = W), M mask rows and columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from input_pipeline.phantom_anatomy import DRAW, LATTICE, Canvas, over, spline_noise

ANATOMIES = ("head", "chest", "abdomen")
LESIONS = ("mass", "cyst", "ring", "haze", "distortion", "foci")
SLICES_PER_SUBJECT = 2
# Subjects of a split start at its offset: no subject is in two splits, whatever the counts.
SUBJECT_OFFSET = {"train": 0, "valid": 100_000, "test": 200_000}
NOTICEABLE = 0.04  # smallest change of a noise-free intensity (range 0..1) that counts as lesion; about one noise sigma

_PLACEMENT_SIZE = 64  # lesions are placed on this grid at every image size, so that they do not move with it

Array = np.ndarray


@dataclass(frozen=True)
class _Lesion:
    """A lesion in unit coordinates of the image. Its effect ends exactly at `reach` times its radius."""

    kind: str
    cx: float
    cy: float
    radius: float
    seed: tuple[int, ...]

    reach = 1.9

    def deform(self, x: Array, y: Array) -> tuple[Array, Array]:
        """Where each pixel takes its anatomy from: pushed outwards by a mass, twisted by a distortion."""
        u, v = x - self.cx, y - self.cy
        bump = np.maximum(1 - (u * u + v * v) / (self.reach * self.radius) ** 2, 0) ** 2
        rng = np.random.default_rng([*self.seed, 0])
        if self.kind == "distortion":
            turn = rng.choice([-1, 1]) * rng.uniform(0.9, 1.3) * bump
            return self.cx + np.cos(turn) * u - np.sin(turn) * v, self.cy + np.sin(turn) * u + np.cos(turn) * v
        shrink = 1 - {"mass": 0.55, "cyst": 0.35, "ring": 0.4}.get(self.kind, 0.0) * bump
        return self.cx + shrink * u, self.cy + shrink * v

    def depth(self, x: Array, y: Array) -> Array:
        """Depth inside the irregular outline of the lesion (of all foci), in unit lengths."""
        rng = np.random.default_rng([*self.seed, 1])
        if self.kind == "foci":
            count, spread = rng.integers(4, 8), 1.3 * self.radius
            angle = 2.4 * np.arange(count) + rng.uniform(0, 6.28)  # golden angle: evenly spread, never a regular figure
            away = spread * np.sqrt((np.arange(count) + rng.uniform(0.2, 0.8, count)) / count)
            radii = rng.uniform(0.045, 0.075, count)
            each = [
                r - np.hypot(x - self.cx - d * np.cos(t), y - self.cy - d * np.sin(t))
                for r, d, t in zip(radii, away, angle, strict=True)
            ]
            return np.max(each, axis=0)
        u, v = x - self.cx, y - self.cy
        angle = np.arctan2(v, u)
        rough = {"cyst": 0.06, "haze": 0.16}.get(self.kind, 0.1)
        waves = [2 / k * rough * rng.uniform(0.4, 1) * np.cos(k * angle + rng.uniform(0, 6.28)) for k in (2, 3, 5)]
        return self.radius * (1 + sum(waves)) - np.hypot(u, v)

    def paint(self, c: Canvas, x: Array, y: Array, image: Array, local: float) -> Array:
        """Adds the lesion to the deformed anatomy; `local` is the intensity of the tissue there."""
        rng = np.random.default_rng([*self.seed, 2])
        depth = self.depth(x, y)
        texture = 0.03 * spline_noise(c.lattice, x, y, 10, 11)
        bright = min(local + rng.uniform(0.18, 0.32), 0.95)
        dark = max(local - rng.uniform(0.25, 0.4), 0.08)
        if self.kind == "mass":
            return over(image, c.inside(depth, 0.05), bright + 2 * texture)
        if self.kind == "cyst":
            return over(image, c.inside(depth, 0.02), dark)
        if self.kind == "ring":
            image = over(image, c.inside(depth, 0.03), bright + 0.05)
            return over(image, c.inside(depth - 0.35 * self.radius, 0.03), dark + texture)
        if self.kind == "haze":
            smooth = ndimage.gaussian_filter(image, 0.1 / c.pixel, mode="nearest")
            return over(image, 0.85 * c.inside(depth, 0.1), smooth + rng.uniform(0.1, 0.2) + texture)
        if self.kind == "foci":
            return over(image, c.inside(depth, 0.03), bright)
        return image


def _render(seed: int, subject: int, anatomy: str, z: int, size: int, lesion: _Lesion | None, local: float = 0.5):
    """Noise-free slice `z` of a subject.

    Returns image float [size, size] in [0, 1], and the depth inside the tissue where focal lesions, respectively
    distortions, may sit.
    """
    rng = np.random.default_rng([seed, subject, 0])
    near, far = rng.standard_normal((2, LATTICE, LATTICE))
    lattice = np.cos(0.5 * z) * near + np.sin(0.5 * z) * far  # neighbouring slices: alike, not equal
    pixel = 2 / size
    axis = (np.arange(size) + 0.5) * pixel - 1
    px, py = np.meshgrid(axis, axis)
    x, y = (px, py) if lesion is None else lesion.deform(px, py)

    turn, scale = np.deg2rad(rng.normal(0, 4)), rng.uniform(0.93, 1.07)
    dx, dy = rng.normal(0, 0.025, 2)
    wx, wy = (0.025 * spline_noise(lattice, x, y, 1.7, field) for field in (20, 21))
    u, v = (x - dx) * scale, (y - dy) * scale
    c = Canvas(np.cos(turn) * u + np.sin(turn) * v + wx, np.cos(turn) * v - np.sin(turn) * u + wy, pixel, lattice)
    image, focal, body = DRAW[anatomy](c, np.random.default_rng([seed, subject, 1]), z)
    if lesion is not None:
        image = lesion.paint(c, px, py, image, local)

    bias = 1 + rng.uniform(0.02, 0.08) * spline_noise(near, px, py, 0.8, 22)
    image = np.clip(image, 0, 1.1) ** rng.uniform(0.85, 1.2) * rng.uniform(0.78, 1.05) * bias + rng.uniform(0, 0.03)
    return np.clip(image, 0, 1), focal, body


def _place(seed: int, subject: int, anatomy: str, kind: str) -> tuple[_Lesion, float]:
    """The most visible of a few random lesions of this kind in this subject, and the tissue intensity at its place."""
    rng = np.random.default_rng([seed, subject, 2])
    image, focal, body = _render(seed, subject, anatomy, 0, _PLACEMENT_SIZE, None)
    low, high = {"haze": (0.2, 0.32), "distortion": (0.2, 0.26), "foci": (0.13, 0.2)}.get(kind, (0.11, 0.2))
    tissue = (body if kind == "distortion" else focal) > 0
    if kind == "cyst":
        tissue &= image > 0.3  # dark on dark would not be seen
    room = ndimage.distance_transform_edt(tissue) * 2 / _PLACEMENT_SIZE
    best, most = None, -1.0
    for trial in range(4):
        radius = rng.uniform(low, high)
        rows, columns = np.nonzero(room >= min(0.7 * radius, 0.9 * room.max()))
        i = rng.integers(len(rows))
        row, column = rows[i], columns[i]
        x, y = (np.array([column, row]) + 0.5) * 2 / _PLACEMENT_SIZE - 1
        lesion = _Lesion(kind, x, y, radius, (seed, subject, 3, trial))
        local = float(np.quantile(image[max(row - 4, 0) : row + 5, max(column - 4, 0) : column + 5], 0.7))
        changed = np.abs(_render(seed, subject, anatomy, 0, _PLACEMENT_SIZE, lesion, local)[0] - image)
        visible = float(changed.sum()) / radius**2
        if visible > most:
            best, most = (lesion, local), visible
    return best


def _lesion_mask(clean: Array, abnormal: Array) -> Array:
    """Where the noise-free image changed noticeably, with gaps closed and holes filled: bool, as the images."""
    changed = np.pad(np.abs(abnormal - clean) > NOTICEABLE, 8)
    radius = max(1, round(0.03 * len(clean)))
    disk = np.hypot(*np.mgrid[-radius : radius + 1, -radius : radius + 1]) <= radius + 0.3
    closed = ndimage.binary_closing(np.pad(changed, radius), disk)[radius:-radius, radius:-radius]
    return ndimage.binary_fill_holes(closed)[8:-8, 8:-8]


def make_slice(
    image_size: int, mask_size: int, seed: int, subject: int, anatomy: str, z: int, kind: str | None
) -> tuple[Array, Array]:
    """One slice with (`kind` of `LESIONS`) or without (`None`) a lesion; a pure function of its arguments.

    Both versions of a slice carry the same noise: they differ by the lesion alone, nowhere by more than `NOTICEABLE`
    (range 0..1) outside the mask.

    Returns:
      image uint8 [image_size, image_size, 1], mask uint8 {0, 1} [mask_size, mask_size, 1].
    """
    image = _render(seed, subject, anatomy, z, image_size, None)[0]
    mask = np.zeros((mask_size, mask_size), bool)
    if kind is not None:
        lesion, local = _place(seed, subject, anatomy, kind)
        clean, image = image, _render(seed, subject, anatomy, z, image_size, lesion, local)[0]
        if mask_size != image_size:
            clean = _render(seed, subject, anatomy, z, mask_size, None)[0]
            mask = _lesion_mask(clean, _render(seed, subject, anatomy, z, mask_size, lesion, local)[0])
        else:
            mask = _lesion_mask(clean, image)
    rng = np.random.default_rng([seed, subject, 4, z])
    noisy = image + rng.uniform(0.01, 0.03) * rng.standard_normal(image.shape)
    pixels = np.round(255 * np.clip(noisy, 0, 1)).astype(np.uint8)
    return pixels[..., None], mask.astype(np.uint8)[..., None]


def make_dataset(
    image_size: int,
    mask_size: int,
    num_train: int,
    num_valid: int,
    num_test: int,
    seed: int,
    anatomies: tuple[str, ...] = ANATOMIES,
) -> dict[str, dict]:
    """All splits. Training slices are normal; half of the subjects of `valid` and `test` have a lesion.

    Args:
      image_size: side of the square images in pixels, at least 32.
      mask_size: side of the masks in pixels, at least 32; they are drawn at this size, not resized.
      num_train: number of training slices.
      num_valid: number of validation slices, a multiple of 4 (two subjects of two slices, one normal, one not).
      num_test: number of test slices, a multiple of 4.
      seed: any non-negative integer; the slices of a subject depend on it and on nothing else.
      anatomies: which organs, taking turns.

    Returns:
      {"train" | "valid" | "test": {"image": uint8 [N, image_size, image_size, 1], "mask": uint8 {0, 1} [N, mask_size,
      mask_size, 1], "label": int32 [N] (1: lesion), "name": N relative paths in the BMAD layout, "group": N subjects}}.

    Raises:
      ValueError: a size or a count out of range.
    """
    if min(image_size, mask_size) < 32:
        raise ValueError(f"phantoms need image_size and mask_size of at least 32, got {image_size} and {mask_size}")
    if not anatomies or set(anatomies) - set(ANATOMIES):
        raise ValueError(f"phantom anatomies: expected some of {ANATOMIES}, found {tuple(anatomies)}")
    counts = {"train": num_train, "valid": num_valid, "test": num_test}
    for split, count in counts.items():
        if not 0 <= count <= SLICES_PER_SUBJECT * SUBJECT_OFFSET["valid"]:
            raise ValueError(f"num_{split} must be in [0, {SLICES_PER_SUBJECT * SUBJECT_OFFSET['valid']}], got {count}")
        if split != "train" and count % 4:
            raise ValueError(f"num_{split} must be a multiple of 4 (half normal, two slices a subject), got {count}")
    sizes = (image_size, mask_size, seed, tuple(anatomies))
    return {split: _make_split(split, count, *sizes) for split, count in counts.items()}


def _make_split(split: str, count: int, image_size: int, mask_size: int, seed: int, anatomies: tuple[str, ...]) -> dict:
    images = np.zeros((count, image_size, image_size, 1), np.uint8)
    masks = np.zeros((count, mask_size, mask_size, 1), np.uint8)
    labels, names, groups = np.zeros(count, np.int32), [], []
    for n in range(count):
        i, z = divmod(n, SLICES_PER_SUBJECT)
        # Normal and abnormal subjects take turns, then anatomies, then kinds of lesion: any count is mixed evenly.
        abnormal = split != "train" and i % 2 == 1
        turn = i if split == "train" else i // 2
        anatomy = anatomies[turn % len(anatomies)]
        kind = LESIONS[turn // len(anatomies) % len(LESIONS)] if abnormal else None
        subject = SUBJECT_OFFSET[split] + i
        images[n], masks[n] = make_slice(image_size, mask_size, seed, subject, anatomy, z, kind)
        labels[n] = abnormal
        group = f"{anatomy}{subject:06d}"
        folder, suffix = ("Ungood", f"_{kind}") if abnormal else ("good", "")
        names.append(f"{split}/{folder}/{group}_{z}{suffix}.png")
        groups.append(group)
    return {"image": images, "mask": masks, "label": labels, "name": names, "group": groups}
