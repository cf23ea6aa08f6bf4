"""Resolves name conflicts with the user's project in detectron2's registries and catalogs.

The package and the project may both register a name such as ``MaskRCNN`` or ``shapes_train``. The
project's object then gets the name, no matter which object was registered first, because a project
must not break when it imports this package.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, TypeVar

from detectron2.data import DatasetCatalog, Metadata, MetadataCatalog
from detectron2.utils.registry import Registry

logger = logging.getLogger(__name__)

PACKAGE = __name__.partition(".")[0]

Registered = TypeVar("Registered", bound=Callable[..., Any])


def register_in(registry: Registry) -> Callable[[Registered], Registered]:
    """Returns a decorator that registers a class or function of this package.

    If the user's project also registers the name, the package's object becomes
    ``mask_head_plugin.<name>``.
    """
    registry.__class__ = _YieldingRegistry
    decorator: Callable[[Registered], Registered] = registry.register()
    return decorator


def registered_name(registry: Registry, registered: object) -> str:
    """Returns the name under which a class or function is registered."""
    return next(name for name, each in registry if each is registered)


def _is_own(registered: object) -> bool:
    return getattr(registered, "__module__", "").partition(".")[0] == PACKAGE


class _YieldingRegistry(Registry):
    def _do_register(self, name: str, obj: Any) -> None:
        held = self._obj_map.get(name)
        if held is not None and _is_own(held) != _is_own(obj):
            own, other = (held, obj) if _is_own(held) else (obj, held)
            self._obj_map[name] = other
            name, obj = f"{PACKAGE}.{name}", own
            logger.warning(
                "the name %s is used by %s, so this package's object is registered as %r in the %s "
                "registry",
                own.__name__,
                other.__module__,
                name,
                self._name,
            )
        super()._do_register(name, obj)


def register_dataset(name: str, load: Callable[[], list[dict[str, Any]]], **metadata: Any) -> None:
    """Registers a data set of this package, unless the user has registered one of the same name.

    If the user registers such a data set later, it replaces the package's.

    Args:
        name: name in detectron2's catalogs. If it is already registered, nothing changes.
        load: a function that returns the records.
        metadata: values for the data set's Metadata.
    """
    if name in DatasetCatalog:
        logger.warning(
            "data set %s already exists and is kept; this package's data set is not registered",
            name,
        )
        return
    DatasetCatalog.__class__ = _YieldingCatalog
    DatasetCatalog.register(name, load)
    MetadataCatalog[name] = _YieldingMetadata(name=name).set(**metadata)


class _YieldingCatalog(type(DatasetCatalog)):  # type: ignore[misc]
    def register(self, name: str, func: Callable[[], Any]) -> None:
        metadata = MetadataCatalog.data.get(name)  # MetadataCatalog.get would create an entry
        if isinstance(metadata, _YieldingMetadata):
            metadata.give_way()
        super().register(name, func)


class _YieldingMetadata(Metadata):
    """Metadata of a data set of this package. Becomes ordinary Metadata if a value is changed."""

    def give_way(self) -> None:
        """Turns this object into the empty metadata of a data set that is not yet registered."""
        logger.warning(
            "data set %s of this package is no longer registered: its metadata was changed",
            self.name,
        )
        DatasetCatalog.pop(self.name, None)
        for key in set(vars(self)) - {"name"}:
            delattr(self, key)
        object.__setattr__(self, "__class__", Metadata)

    def set(self, **values: Any) -> Metadata:
        if any(vars(self).get(key, value) != value for key, value in values.items()):
            self.give_way()
        return Metadata.set(self, **values)

    def __setattr__(self, key: str, value: Any) -> None:
        if vars(self).get(key, value) != value:
            self.give_way()
        Metadata.__setattr__(self, key, value)
