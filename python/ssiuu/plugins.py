"""Classes by name: registered by decorator, in this package or by an entry point of another."""

from __future__ import annotations

import dataclasses
import importlib
import logging
import pkgutil
from importlib import metadata
from typing import Any, Generic, TypeVar

from .options import OPTION_NAMES

logger = logging.getLogger(__name__)
Kind = TypeVar("Kind", bound=type)


class NameTakenError(ValueError):
    """Two classes, or two options, of one name."""


class Registry(Generic[Kind]):
    """Classes that have a `name` and `Options`, by name.

    Args:
        what: one of them is called, in messages.
        package: whose modules register them; also the group of entry points by which other packages name modules that
            do.
        reserved: names that mean something else.
    """

    def __init__(self, what: str, package: str, reserved: tuple[str, ...] = ()):
        self.what, self.package, self.reserved = what, package, reserved
        self._known: dict[str, Kind] = {}
        self._is_loaded = False

    def register(self, kind: Kind) -> Kind:
        """Class decorator.

        Raises:
            NameTakenError: a name that another class has, or an option name that every run has.
        """
        if kind.name in self.reserved:
            raise NameTakenError(f"{kind.name!r} is short for a pair of method and regularizer; rename {_origin(kind)}")
        if kind.name in self._known:
            raise NameTakenError(
                f"two {self.what}s are named {kind.name!r}: {_origin(self._known[kind.name])} and {_origin(kind)}; "
                "rename one"
            )
        for option in option_names(kind):
            if option in OPTION_NAMES:
                raise NameTakenError(
                    f"{self.what} {kind.name!r} has an option {option!r}, which every run has; choose another"
                )
        self._known[kind.name] = kind
        return kind

    def all(self) -> dict[str, Kind]:
        """All of them by name, sorted, those of other packages included."""
        if not self._is_loaded:
            self._is_loaded = True
            self._load()
        return dict(sorted(self._known.items()))

    def _load(self) -> None:
        """Import every module of the package, and what other packages offer.

        A package whose entry point cannot be imported is left out with a warning: other runs do not need it.
        """
        for module in pkgutil.iter_modules(importlib.import_module(self.package).__path__):
            importlib.import_module(f"{self.package}.{module.name}")
        for entry in metadata.entry_points(group=self.package):
            try:
                entry.load()
            except NameTakenError:
                raise
            except Exception as error:
                logger.warning(
                    "%s of the package %s cannot be loaded (%s) and is left out", entry.name, entry.dist.name, error
                )


def option_names(kind: Any) -> list[str]:
    """Names of the options of a registered class."""
    return [field.name for field in dataclasses.fields(kind.Options)]


def _origin(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
