"""Draws synthetic objects. Only the colour of an object reveals its class.

An image shows one object in its tight box, as RoIAlign would cut it out. The object has an outline
made of random waves and a textured background; in every second image, another object covers a
corner. All classes have the same distribution of outlines, so the class does not help to predict
the mask. Each class has a colour, and the colours are as far apart as the colour cube allows.
``confusion`` adds noise to the colour of each object, in units of the smallest distance between two
classes. This limits the accuracy of any classifier.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]

TRAINING, TUNING, TEST = 1, 2, 3
"""Seeds of a study's objects. A training seed varies only the weights and the order of objects."""
SIDE = 28
"""Side of an image in pixels, equal to that of the mask branch's output."""
WAVES = np.arange(1, 6)
CONTRAST = 0.3
"""Smallest distance between the colours of object and background, on a scale of [0, 1]."""


@dataclass(frozen=True)
class MadeObjects:
    """Objects with their masks.

    Attributes:
        images: (N, 3, SIDE, SIDE) float32, about in [-1, 1].
        masks: (N, SIDE, SIDE) bool.
        classes: (N,) int64 in [0, K).
        posterior: (N,) float64, the probability of the true class according to the best possible
            classifier, which is given the object's exact colour.
    """

    images: npt.NDArray[np.float32]
    masks: npt.NDArray[np.bool_]
    classes: npt.NDArray[np.int64]
    posterior: FloatArray


def class_colours(num_classes: int) -> FloatArray:
    """Returns (K, 3) colours in [0, 1], each as far as possible from the previous ones."""
    steps = np.linspace(0, 1, 9)
    grid = np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), -1).reshape(-1, 3)
    chosen = [0]
    distance = np.full(len(grid), np.inf)
    while len(chosen) < num_classes:
        distance = np.minimum(distance, np.linalg.norm(grid - grid[chosen[-1]], axis=1))
        chosen.append(int(distance.argmax()))
    return grid[chosen]


def smallest_distance(colours: FloatArray) -> float:
    """Returns the distance between the two closest colours, or 1 if there is only one colour."""
    apart = np.linalg.norm(colours[:, None] - colours[None], axis=-1)
    return float(apart[~np.eye(len(colours), dtype=bool)].min(initial=1.0))


def make_objects(seed: int, num_objects: int, num_classes: int, confusion: float) -> MadeObjects:
    """Returns the objects for a seed.

    Args:
        seed: seed of all random numbers. Outlines and textures depend only on the seed. So does a
            background, unless it is too similar to the object's colour.
        num_objects: N.
        num_classes: K, from 1 to 729.
        confusion: standard deviation of the noise of an object's colour along each axis, in units
            of the smallest distance between two classes.
    """
    shapes, paints, dice = (np.random.default_rng([seed, stream]) for stream in range(3))
    masks = outlines(shapes, num_objects)
    others = np.roll(outlines(shapes, num_objects), (SIDE // 2, SIDE // 2), (1, 2))
    others &= (np.arange(num_objects) % 2 == 0)[:, None, None]
    colours = class_colours(num_classes)
    classes, of_others = dice.integers(num_classes, size=(2, num_objects))
    spread = confusion * smallest_distance(colours)
    noise = dice.normal(0, spread, (2, num_objects, 3))
    colour, of_other = colours[classes] + noise[0], colours[of_others] + noise[1]
    ground = paints.uniform(0, 1, (num_objects, 3))
    ground = np.where(_near(ground, colour), 1 - np.round(ground), ground)
    ground = np.where(_near(ground, colour), np.full(3, 0.5), ground)
    images = np.where(masks[:, None], colour[:, :, None, None], ground[:, :, None, None])
    images = np.where(others[:, None], of_other[:, :, None, None], images)
    images += paints.normal(0, 0.08, images.shape)
    posterior = true_class_probability(colour, classes, colours, spread)
    return MadeObjects((2 * images - 1).astype(np.float32), masks & ~others, classes, posterior)


def true_class_probability(
    colour: FloatArray, classes: npt.NDArray[np.int64], colours: FloatArray, spread: float
) -> FloatArray:
    """Returns (N,) probabilities of the true classes, given (N, 3) colours and their noise.

    Args:
        colour: (N, 3) colours of the objects.
        classes: (N,) true classes.
        colours: (K, 3) colours of the classes.
        spread: standard deviation of the noise along each axis; 0 means no noise.
    """
    if spread == 0:
        return np.ones(len(classes))
    squared = ((colour[:, None] - colours) ** 2).sum(-1)
    likelihood = np.exp((squared.min(1, keepdims=True) - squared) / (2 * spread**2))
    return np.asarray(likelihood[np.arange(len(classes)), classes] / likelihood.sum(1))


def _near(ground: FloatArray, colour: FloatArray) -> npt.NDArray[np.bool_]:
    return np.linalg.norm(ground - colour, axis=1, keepdims=True) < CONTRAST


def outlines(rng: np.random.Generator, num_objects: int) -> npt.NDArray[np.bool_]:
    """Returns (N, SIDE, SIDE) masks that touch all four sides of their box."""
    swing = rng.normal(0, 1, (num_objects, len(WAVES))) * 0.5 / np.sqrt(WAVES)
    phase = rng.uniform(0, 2 * np.pi, swing.shape)
    angle = np.linspace(0, 2 * np.pi, 181)[:-1]
    radius = np.exp((swing[:, :, None] * np.cos(WAVES[:, None] * angle + phase[:, :, None])).sum(1))
    x, y = radius * np.cos(angle), radius * np.sin(angle)
    low = np.stack([x.min(1), y.min(1)], 1)
    size = np.stack([x.max(1), y.max(1)], 1) - low
    pixel = (np.arange(SIDE) + 0.5) / SIDE
    px = low[:, 0, None, None] + size[:, 0, None, None] * pixel[None, None, :]
    py = low[:, 1, None, None] + size[:, 1, None, None] * pixel[None, :, None]
    turn = np.round((np.arctan2(py, px) % (2 * np.pi)) / (2 * np.pi) * 180).astype(np.int64) % 180
    reach = np.take_along_axis(radius, turn.reshape(num_objects, -1), 1).reshape(turn.shape)
    return np.hypot(px, py) < reach
