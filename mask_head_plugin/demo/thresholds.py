"""Parses score thresholds: a default, and different values for some classes.

Shape alphabet: K classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ..messages import ConfigError, listed, nearest_name


def class_thresholds(
    class_names: Sequence[str], default: float, by_class: Sequence[str]
) -> npt.NDArray[np.float64]:
    """Returns the (K,) scores that detections of each class must exceed.

    Args:
        class_names: names of the model's K classes.
        default: threshold of classes that ``by_class`` does not list.
        by_class: values of ``--class-thresholds``.

    Raises:
        ConfigError: as in ``parsed_thresholds``, or if the model does not have a listed class.
    """
    given = parsed_thresholds(by_class)
    unknown = [name for name in given if name not in class_names]
    if unknown:
        near = nearest_name(unknown[0], class_names)
        hint = f"did you mean {near!r}?" if near else f"it has {listed(class_names)}"
        told = listed([repr(name) for name in unknown])
        raise ConfigError(f"--class-thresholds: the model has no class {told}; {hint}")
    return np.array([given.get(name, default) for name in class_names])


def parsed_thresholds(by_class: Sequence[str]) -> dict[str, float]:
    """Parses "NAME=SCORE" entries, and returns scores by class name.

    Args:
        by_class: "NAME=SCORE" entries with scores from 0 to 1.

    Raises:
        ConfigError: if an entry has a different form, or a class occurs twice.
    """
    given: dict[str, float] = {}
    for text in by_class:
        name, _, value = text.rpartition("=")
        try:
            score = float(value)
        except ValueError:
            score = -1.0
        if not name or not 0 <= score <= 1:
            raise ConfigError(
                f"--class-thresholds {text!r} is not NAME=SCORE with a score from 0 to 1"
            )
        if name in given:
            raise ConfigError(f"--class-thresholds contains {name!r} twice")
        given[name] = score
    return given
