"""Stores class names with a model and its predictions, and matches classes by name.

The class numbers of a model are those of its training data. Another data set may have the same
classes in a different order, so numbers are meaningless without names. Code that combines weights
or predictions with a data set matches their classes with the functions in this module.

Shape alphabet: K classes of a model, N detections.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from detectron2.structures import Instances
from torch import nn

from .config import ConfigError
from .messages import listed

_KEY = "_class_names"
"""Name of the attribute of models and Instances that contains class names. Because of the
underscore, Instances does not treat it as a field.
"""


@dataclass(frozen=True)
class ClassMatch:
    """Two lists of classes, matched by name.

    Attributes:
        found: the classes of weights or predictions, in the order of their numbers.
        wanted: the classes of a data set, in its order.
    """

    found: Sequence[str]
    wanted: Sequence[str]

    @classmethod
    def of(
        cls, found: Sequence[str], wanted: Sequence[str], *, source: str, owner: str
    ) -> ClassMatch:
        """Matches the classes of ``source``, such as a file, with those of ``owner``.

        Raises:
            ConfigError: if a name is ambiguous because it occurs twice in one of the lists.
        """
        for names, whose in ((found, source), (wanted, owner)):
            twice = [name for name, count in Counter(names).items() if count > 1]
            if twice:
                raise ConfigError(
                    f"classes are matched by name, but {whose} has {twice[0]!r} twice"
                )
        return cls(found, wanted)

    @property
    def new(self) -> list[str]:
        return [name for name in self.wanted if name not in self.found]

    @property
    def dropped(self) -> list[str]:
        return [name for name in self.found if name not in self.wanted]

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """For each class that occurs in both lists, its numbers in ``found`` and in ``wanted``."""
        numbers = {name: number for number, name in enumerate(self.found)}
        return [(numbers[x], k) for k, x in enumerate(self.wanted) if x in numbers]

    def __str__(self) -> str:
        if not self.new and not self.dropped:
            return "another order"
        return f"new: {listed(self.new)}; dropped: {listed(self.dropped)}"


def name_classes(model: nn.Module, names: Sequence[str] | None) -> None:
    """Stores class names in a model, and makes the model add them to all its predictions.

    Args:
        model: any model that returns a list of ``{"instances": ...}``.
        names: names of the model's K classes, in the order of its output rows. None if they are
            unknown; this removes the hook that adds names, which torch.jit.script cannot compile.
    """
    for key in [k for k, x in model._forward_hooks.items() if x is _name_predictions]:
        del model._forward_hooks[key]
    if names is not None:
        model.register_forward_hook(_name_predictions)
    setattr(model, _KEY, None if names is None else list(names))


def _name_predictions(model: nn.Module, _inputs: Any, outputs: Any) -> None:
    for output in outputs if isinstance(outputs, list) else ():  # training returns a dict of losses
        if isinstance(output, dict) and "instances" in output:
            setattr(output["instances"], _KEY, getattr(model, _KEY))


def class_names_of(model: Any) -> list[str] | None:
    """Returns the class names of a model, or of the model that it wraps; None if unknown."""
    while isinstance(model, nn.Module) and not hasattr(model, _KEY):
        # These are attributes of DistributedDataParallel and GeneralizedRCNNWithTTA.
        model = getattr(model, "module", None) or getattr(model, "model", None)
    names: list[str] | None = getattr(model, _KEY, None)
    return names


def predicted_names(instances: Instances) -> list[str] | None:
    """Returns the class names stored in a model's output, or None if unknown.

    Only the Instances that a model returned have class names. Instances derived from them do not.
    """
    names: list[str] | None = getattr(instances, _KEY, None)
    return names


def check_trained(found: Sequence[str], wanted: Sequence[str], dataset: str) -> ClassMatch:
    """Matches a data set's classes with a model's. The model must have all classes of the data set.

    Args:
        found: the classes of the model.
        wanted: the classes of the data set.
        dataset: name of the data set.

    Raises:
        ConfigError: if the model does not have one of the classes, or a name occurs twice.
    """
    owner = f"data set {dataset!r}"
    match = ClassMatch.of(found, wanted, source="the model", owner=owner)
    if match.new:
        raise ConfigError(
            f"{owner} has classes that the model lacks ({match}); evaluate on data with the "
            f"model's classes: {listed(found)}"
        )
    return match


def matched_predictions(
    instances: Instances, found: Sequence[str] | None, wanted: Sequence[str], dataset: str
) -> Instances:
    """Returns detections whose ``pred_classes`` use the class numbers of a data set.

    Args:
        instances: N detections; not changed.
        found: the classes of the model. If None, they are assumed to be those of the data set.
        wanted: the classes of the data set. Detections of other classes are dropped.
        dataset: name of the data set.

    Raises:
        ConfigError: see check_trained.
    """
    wanted = [str(name) for name in wanted]
    if found is None or list(found) == wanted:
        return instances
    number_of = torch.full((len(found),), -1, dtype=torch.int64)
    for theirs, ours in check_trained(found, wanted, dataset).pairs:
        number_of[theirs] = ours
    classes = number_of.to(instances.pred_classes.device)[instances.pred_classes]
    kept = classes >= 0
    result = Instances(instances.image_size, **instances.get_fields())
    result.pred_classes = classes
    return result if bool(kept.all()) else result[kept]
