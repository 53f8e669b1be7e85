"""Drawing of the phantoms' anatomy: head, chest and abdomen in unit coordinates, from ellipses and smooth noise.

Each drawing takes the canvas, the subject's random numbers and the slice z, and gives the noise-free image and the
depths inside the tissue where focal lesions, respectively distortions, may sit: float [H, W] each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

LATTICE = 64  # period of the noise lattice in cells; the highest frequency used spans 32 of them
_BSPLINE_STD = 0.4794  # of a 2-D cubic B-spline with unit normal coefficients: 151 / 315

Array = np.ndarray


@dataclass
class Canvas:
    """Unit coordinates of the pixels (after pose and lesion deformation) and the subject's noise lattice."""

    x: Array
    y: Array
    pixel: float  # width of a pixel in unit coordinates: the least width of an edge
    lattice: Array

    def ellipse(self, cx: float, cy: float, a: float, b: float, degrees: float = 0.0) -> Array:
        """Approximate depth inside an ellipse with half axes a, b: positive inside, zero on the edge."""
        cos, sin = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
        u, v = self.x - cx, self.y - cy
        return (1 - np.hypot((cos * u + sin * v) / a, (cos * v - sin * u) / b)) * np.sqrt(a * b)

    def inside(self, depth: Array, width: float = 0.0) -> Array:
        """Antialiased weight in [0, 1] of the points with depth > 0."""
        return np.clip(depth / max(width, 1.5 * self.pixel) + 0.5, 0, 1)

    def noise(self, frequency: float, field: int) -> Array:
        """Smooth noise, mean 0, variance 1, `frequency` cells to a unit length; `field` picks an independent part."""
        return spline_noise(self.lattice, self.x, self.y, frequency, field)

    def ridge(self, frequency: float, field: int, width: float) -> Array:
        """Weight of thin curved lines (sulci, vessels): where the noise crosses zero."""
        return np.exp(-((self.noise(frequency, field) / width) ** 2))


def spline_noise(lattice: Array, x: Array, y: Array, frequency: float, field: int) -> Array:
    """Smooth noise of variance 1 at unit coordinates x, y [H, W]; see `Canvas.noise`."""
    shift = 17.37 * field
    at = np.stack([(y + 1) * frequency + shift, (x + 1) * frequency + 1.7 * shift])
    return ndimage.map_coordinates(lattice, at, order=3, mode="grid-wrap", prefilter=False) / _BSPLINE_STD


def over(image: Array, weight: Array, value: float | Array) -> Array:
    """Paints `value` over an image [H, W] with a weight in [0, 1]."""
    return image + weight * (value - image)


def _head(c: Canvas, rng: np.random.Generator, z: int) -> tuple[Array, Array, Array]:
    outer = c.ellipse(0, 0, rng.uniform(0.64, 0.74) - 0.02 * z, rng.uniform(0.8, 0.9) - 0.02 * z)
    skull = outer - rng.uniform(0.04, 0.07)
    brain = skull - rng.uniform(0.05, 0.08)
    image = over(np.full_like(c.x, 0.03), c.inside(outer), rng.uniform(0.6, 0.75))
    image = over(image, c.inside(skull), 0.1)
    image = over(image, c.inside(skull - 0.02) * c.inside(-brain - 0.015), 0.3)
    csf = rng.uniform(0.1, 0.17)
    image = over(image, c.inside(brain), csf)

    surface = np.exp(-((np.maximum(brain, 0) / rng.uniform(0.16, 0.22)) ** 4))
    folds = c.noise(rng.uniform(6, 7.5), 0)  # sulci follow its zero lines, gyri lie between them
    grey, white = rng.uniform(0.4, 0.47), rng.uniform(0.66, 0.76)
    cortex = brain - 0.012 - 0.1 * surface * np.exp(-((folds / 0.18) ** 2))
    image = over(image, c.inside(cortex, 0.03), grey + 0.015 * c.noise(14, 1))
    matter = brain - 0.06 - 0.2 * surface * np.exp(-((folds / 0.55) ** 2))
    image = over(image, c.inside(matter, 0.04), white + 0.015 * c.noise(14, 3))

    side = Canvas(np.abs(c.x), c.y, c.pixel, c.lattice)  # mirrored: one description for both hemispheres
    size = rng.uniform(0.75, 1.25) * (1 - 0.2 * z)
    top, tilt = rng.uniform(-0.2, -0.12), rng.uniform(12, 25)
    image = over(image, 0.8 * side.inside(side.ellipse(0.2, 0.02, 0.07, 0.19, -15), 0.03), grey)
    image = over(image, 0.7 * side.inside(side.ellipse(0.09, 0.12, 0.07, 0.1, 10), 0.03), grey)
    front = side.ellipse(0.075, top, 0.042 * size, 0.15 * size, tilt)
    back = side.ellipse(0.13, 0.27, 0.05 * size, 0.16 * size, -tilt)
    image = over(image, side.inside(np.maximum(front, back), 0.02), csf)
    gap = np.exp(-((c.x / max(0.014, c.pixel * 0.7)) ** 2)) * c.inside(brain)
    image = over(image, 0.9 * gap * side.inside(np.abs(c.y + 0.04) - 0.36, 0.1), csf)
    return image, brain - 0.03, brain + 0.06


def _bones(c: Canvas, rng: np.random.Generator, image: Array, wall: Array, z: int) -> Array:
    """Vertebra with its canal behind, ribs as bright dashes along the body wall."""
    angle = np.arctan2(c.y, c.x)
    dashes = np.cos(rng.integers(11, 15) * angle + rng.uniform(0, 6.28) + 0.9 * z)
    rib = c.inside(0.028 - np.abs(wall - 0.035), 0.02) * np.clip(2.5 * (dashes - 0.1), 0, 1)
    image = over(image, rib * c.inside(np.abs(c.x) - 0.12, 0.1), rng.uniform(0.82, 0.92))
    y = rng.uniform(0.36, 0.42)
    bone = np.maximum(c.ellipse(0, y, 0.14, 0.11), c.ellipse(0, y + 0.15, 0.045, 0.13))
    wings = c.ellipse(0, y + 0.13, 0.2, 0.035)
    shell = rng.uniform(0.85, 0.95)
    image = over(image, c.inside(np.maximum(bone, wings)), shell)
    image = over(image, c.inside(c.ellipse(0, y, 0.105, 0.078), 0.03), shell - 0.2 + 0.04 * c.noise(14, 9))
    return over(image, c.inside(c.ellipse(0, y + 0.14, 0.05, 0.042)), 0.42)


def _chest(c: Canvas, rng: np.random.Generator, z: int) -> tuple[Array, Array, Array]:
    body = c.ellipse(0, 0, rng.uniform(0.84, 0.92), rng.uniform(0.62, 0.7))
    muscle = body - rng.uniform(0.04, 0.08)
    image = over(np.full_like(c.x, 0.02), c.inside(body), rng.uniform(0.28, 0.34))
    soft = rng.uniform(0.5, 0.56)
    image = over(image, c.inside(muscle - 0.02 * c.noise(4, 0)), soft + 0.02 * c.noise(12, 1))
    image = _bones(c, rng, image, muscle, z)

    tall, heart_x = rng.uniform(0.42, 0.47), rng.uniform(0.06, 0.12)
    lungs = np.maximum(c.ellipse(-0.42, 0.0, 0.3, tall, 8), c.ellipse(0.43, 0.02, 0.29, tall, -8))
    heart = c.ellipse(heart_x, -0.14, rng.uniform(0.24, 0.3) + 0.03 * z, rng.uniform(0.2, 0.26) + 0.02 * z, 30)
    lungs = np.minimum(np.minimum(lungs, muscle - 0.09), -0.03 - heart)
    air = rng.uniform(0.1, 0.17)
    image = over(image, c.inside(lungs), air + 0.02 * c.noise(10, 2))
    u, v = np.abs(c.x) - 0.2, c.y - 0.04
    away, wind = np.hypot(u, v), 0.25 * c.noise(3, 3)
    for count, start, width in ((7, 0.0, 0.026), (11, 0.14, 0.02), (15, 0.24, 0.014)):  # they spread from the hilum
        phase = count * np.arctan2(v, u) + count * wind + rng.uniform(0, 6.28)
        vessel = width * (1 - 1.4 * away) - np.abs(np.sin(phase / 2)) * away * 2 / count
        weight = np.clip(0.3 + vessel / c.pixel, 0, 1) * c.inside(away - start, 0.06) * c.inside(lungs - 0.01, 0.03)
        image = over(image, weight, soft - 0.08)

    blood = soft + rng.uniform(0.08, 0.16)
    image = over(image, 0.6 * c.inside(-heart - 0.01, 0.02) * c.inside(heart + 0.05, 0.02), 0.34)
    image = over(image, c.inside(heart), soft + 0.05)
    image = over(image, c.inside(c.ellipse(heart_x - 0.06, -0.16, 0.1, 0.12, 20), 0.03), blood)
    image = over(image, c.inside(c.ellipse(heart_x + 0.12, -0.1, 0.09, 0.12, 30), 0.03), blood)
    image = over(image, c.inside(c.ellipse(0.13, 0.24, 0.07, 0.07)), blood)
    image = over(image, c.inside(c.ellipse(-0.02, 0.15, 0.045, 0.05) - 0.01 * z), 0.05)
    return image, np.maximum(lungs - 0.02, heart - 0.02), muscle


def _abdomen(c: Canvas, rng: np.random.Generator, z: int) -> tuple[Array, Array, Array]:
    body = c.ellipse(0, 0, rng.uniform(0.8, 0.9), rng.uniform(0.64, 0.74))
    muscle = body - rng.uniform(0.05, 0.13)
    cavity = muscle - rng.uniform(0.06, 0.08)
    fat = rng.uniform(0.22, 0.28)
    image = over(np.full_like(c.x, 0.02), c.inside(body), fat)
    soft = rng.uniform(0.46, 0.52)
    image = over(image, c.inside(muscle), soft + 0.02 * c.noise(12, 0))
    image = over(image, c.inside(cavity), fat + 0.02 * c.noise(10, 1))
    image = _bones(c, rng, image, muscle, z)
    for x in (-0.25, 0.25):  # the muscles beside the spine
        image = over(image, c.inside(c.ellipse(x, 0.45, 0.12, 0.1)), soft)

    loops = np.minimum(c.ellipse(0.15, -0.02, 0.5, 0.36), cavity - 0.02)
    bowel = 0.06 * (c.noise(5, 2) - 0.1)
    image = over(image, c.inside(np.minimum(loops, bowel)), soft + 0.1)
    image = over(image, c.inside(np.minimum(loops, bowel - 0.03), 0.03), rng.uniform(0.35, 0.5))
    stomach = np.minimum(c.ellipse(rng.uniform(0.2, 0.3), -0.32, 0.25, 0.13, 25), cavity - 0.02)
    image = over(image, c.inside(stomach + 0.025), soft + 0.06)
    level = c.inside(-0.35 + rng.uniform(-0.06, 0.06) - c.y)  # gas above the fluid level
    image = over(image, c.inside(stomach), over(np.full_like(c.x, soft - 0.08), level, 0.04))

    organ = rng.uniform(0.6, 0.68)
    left_lobe = c.ellipse(-0.14, rng.uniform(-0.36, -0.3), rng.uniform(0.2, 0.32), 0.13, -12)
    liver = np.maximum(c.ellipse(-0.46, -0.04, rng.uniform(0.26, 0.34), 0.4, 10), left_lobe)
    liver = np.minimum(liver - 0.03 * z, cavity - 0.02) + 0.015 * c.noise(3, 3)
    image = over(image, c.inside(liver + 0.02), fat)
    spleen = np.minimum(c.ellipse(0.58, 0.1, 0.12, 0.25, -20), cavity - 0.02)
    image = over(image, c.inside(liver), organ + 0.025 * c.noise(12, 4))
    image = over(image, c.ridge(3.2, 5, 0.13) * c.inside(liver - 0.04, 0.05), organ + 0.15)
    image = over(image, c.inside(spleen), organ + 0.03 + 0.02 * c.noise(12, 4))
    for x in (-0.33, 0.34):
        y, tilt = rng.uniform(0.22, 0.3), np.sign(x) * rng.uniform(10, 30)
        kidney = c.ellipse(x, y, 0.12, 0.15, tilt)
        image = over(image, c.inside(kidney + 0.03), fat)
        image = over(image, c.inside(kidney), 0.78)
        image = over(image, c.inside(c.ellipse(0.85 * x, y, 0.06, 0.07, tilt), 0.04), 0.5)
    image = over(image, c.inside(c.ellipse(0.07, 0.22, 0.06, 0.06)), 0.82)
    image = over(image, c.inside(c.ellipse(-0.09, 0.22, 0.07, 0.045)), 0.72)
    return image, np.maximum(liver, spleen) - 0.02, cavity


DRAW: dict[str, Callable] = {"head": _head, "chest": _chest, "abdomen": _abdomen}
