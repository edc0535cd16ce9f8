"""Methods and regularizers by name: registered by decorator, or by an entry point of another package."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from collections.abc import Mapping
from functools import cache
from importlib import metadata
from typing import Any, NamedTuple

import ssiuu.methods
import ssiuu.regularizers

from ..options import OPTION_NAMES, UnlearnOptions
from ..regularizers.base import Regularizer
from .base import Method

# Entry points of other packages; each names a module whose import registers what it defines.
GROUPS = ("ssiuu.methods", "ssiuu.regularizers")
# Names under which a method and a regularizer go together.
PAIRS = {"ssiuu": ("gd", "ssiuu")}

_methods: dict[str, type[Method]] = {}
_regularizers: dict[str, type[Regularizer]] = {}


class Appearance(NamedTuple):
    """How tables and figures show a run: its name, and a colour."""

    label: str
    color: str


def register_method(kind: type[Method]) -> type[Method]:
    """Class decorator; see `Method`.

    Raises:
        ValueError: a name that is taken, or an option name that a run has already.
    """
    return _register(kind, _methods, "method")


def register_regularizer(kind: type[Regularizer]) -> type[Regularizer]:
    """Class decorator; see `Regularizer`. Raises as `register_method`."""
    return _register(kind, _regularizers, "regularizer")


def methods() -> dict[str, type[Method]]:
    """All methods by name, those of other packages included."""
    _load()
    return dict(sorted(_methods.items()))


def regularizers() -> dict[str, type[Regularizer]]:
    """All regularizers by name, those of other packages included."""
    _load()
    return dict(sorted(_regularizers.items()))


def resolve(method: str, regularizer: str) -> tuple[type[Method], type[Regularizer]]:
    """The classes of two names.

    Raises:
        ValueError: an unknown name, whose message lists the names; a pair ("ssiuu") with a regularizer beside it.
    """
    if method in PAIRS:
        if regularizer not in ("none", PAIRS[method][1]):
            backbone, own = PAIRS[method]
            raise ValueError(
                f"method={method!r} is {backbone} with the regularizer {own}, and regularizer={regularizer!r} was "
                f"given beside it; use method={backbone!r}"
            )
        method, regularizer = PAIRS[method]
    found = []
    for kind, name, known in (("method", method, methods()), ("regularizer", regularizer, regularizers())):
        if name not in known:
            names = [*known, *PAIRS] if kind == "method" else known
            raise ValueError(f"{kind}={name!r} is unknown; expected one of {', '.join(names)}")
        found.append(known[name])
    return tuple(found)


def make(options: UnlearnOptions) -> tuple[Method, Regularizer]:
    """The method and the regularizer of a run, with their options.

    Raises:
        ValueError: unknown names, settings that neither has or that are out of range, or a pair that cannot go
            together.
    """
    classes = resolve(options.method, options.regularizer)
    settings = dict(options.settings)
    made = []
    for kind in classes:
        names = [field.name for field in dataclasses.fields(kind.Options) if field.name in settings]
        made.append(kind(kind.Options(**{name: settings.pop(name) for name in names})))
    method, regularizer = made
    if settings:
        known = [field.name for kind in classes for field in dataclasses.fields(kind.Options)]
        raise ValueError(
            f"{next(iter(settings))} is not an option of method {method.name!r} with regularizer "
            f"{regularizer.name!r}; expected one of {', '.join([*known, *OPTION_NAMES])}"
        )
    method.check(options)
    regularizer.check(method, options)
    if options.update_in_backward and not regularizer.updates_in_backward:
        able = ", ".join(name for name, kind in regularizers().items() if kind.updates_in_backward)
        raise ValueError(
            f"update_in_backward=True with regularizer={regularizer.name!r}, whose optimizer cannot do it; expected "
            f"one of {able}, or leave --update-in-backward out"
        )
    return method, regularizer


def all_options(options: UnlearnOptions) -> dict[str, Any]:
    """Names and values of a run's options, its method's and regularizer's with their defaults filled in."""
    method, regularizer = make(options)
    return {**options.flat(), **dataclasses.asdict(method.options), **dataclasses.asdict(regularizer.options)}


def appearance(config: Mapping[str, Any]) -> Appearance:
    """Of a run with this config.json; a run of a package that is not installed here keeps its names."""
    method, regularizer = config["method"], config.get("regularizer", "none")
    if method in PAIRS or (method, regularizer) in PAIRS.values():
        kind = regularizers()[PAIRS[method][1] if method in PAIRS else regularizer]
        return Appearance(kind.label, kind.color)
    shown, extra = methods().get(method), regularizers().get(regularizer)
    if regularizer == "none":
        return Appearance(shown.label, shown.color) if shown else Appearance(method, "")
    label = f"{shown.label if shown else method} + {extra.label if extra else regularizer}"
    return Appearance(label, extra.color if extra else "")


def _register(kind: type, known: dict[str, type], what: str) -> type:
    if kind.name in known or (known is _methods and kind.name in PAIRS):
        raise ValueError(
            f"a {what} named {kind.name!r} is registered already; rename {kind.__module__}.{kind.__name__}"
        )
    for field in dataclasses.fields(kind.Options):
        if field.name in OPTION_NAMES:
            raise ValueError(f"{what} {kind.name!r} has an option {field.name!r}, which every run has; choose another")
    known[kind.name] = kind
    return kind


@cache
def _load() -> None:
    """Import every module of methods/ and regularizers/, and what other packages offer."""
    for package in (ssiuu.methods, ssiuu.regularizers):
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{package.__name__}.{module.name}")
    for group in GROUPS:
        for entry in metadata.entry_points(group=group):
            entry.load()
