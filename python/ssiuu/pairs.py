"""A method and a regularizer together: found by name, made with their options, and shown."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from .methods.base import Method
from .methods.registry import methods
from .options import OPTION_NAMES, PAIRS, UnlearnOptions
from .plugins import option_names
from .regularizers.base import Regularizer
from .regularizers.registry import regularizers


class Appearance(NamedTuple):
    """How tables and figures show a run: its name, and a colour ("" where it has none of its own)."""

    label: str
    color: str


def resolve(method: str, regularizer: str) -> tuple[type[Method], type[Regularizer]]:
    """The classes of two names.

    Raises:
        ValueError: an unknown name, whose message lists the names; a pair ("ssiuu") with a regularizer beside it; an
            option that both have.
    """
    known = {"method": [*methods(), *PAIRS], "regularizer": [*regularizers()]}
    for kind, name in (("method", method), ("regularizer", regularizer)):
        if name not in known[kind]:
            raise ValueError(f"{kind}={name!r} is unknown; expected one of {', '.join(known[kind])}")
    if method in PAIRS:
        if regularizer not in ("none", PAIRS[method][1]):
            backbone, own = PAIRS[method]
            raise ValueError(
                f"method={method!r} is {backbone} with the regularizer {own}, and regularizer={regularizer!r} was "
                f"given beside it; use method={backbone!r}"
            )
        method, regularizer = PAIRS[method]
    found = methods()[method], regularizers()[regularizer]
    shared = set(option_names(found[0])) & set(option_names(found[1]))
    if shared:
        raise ValueError(
            f"method {method!r} and regularizer {regularizer!r} both have an option {min(shared)!r}; rename one of "
            "them in its package"
        )
    return found


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
        names = [name for name in option_names(kind) if name in settings]
        made.append(kind(kind.Options(**{name: settings.pop(name) for name in names})))
    method, regularizer = made
    if settings:
        known = [name for kind in classes for name in option_names(kind)]
        raise ValueError(
            f"{next(iter(settings))} is not an option of method {method.name!r} with regularizer "
            f"{regularizer.name!r}; expected one of {', '.join([*known, *OPTION_NAMES])}"
        )
    method.check(options)
    regularizer.check(method, options)
    if options.stop_margin and not (options.stop_facts or method.stops_facts):
        raise ValueError(f"stop_margin={options.stop_margin} without stop_facts has no effect; add --stop-facts")
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
    """Of a run with this config.json: a method's own, with the regularizer behind its label.

    A run of a package that is not installed here keeps its names.
    """
    names = config["method"], config.get("regularizer", "none")
    method, regularizer = PAIRS.get(names[0], names)
    if (method, regularizer) in PAIRS.values():
        kind = regularizers()[regularizer]
        return Appearance(kind.label, kind.color)
    backbone, extra = methods().get(method), regularizers().get(regularizer)
    label, color = (backbone.label, backbone.color) if backbone else (method, "")
    return Appearance(label if regularizer == "none" else f"{label} + {extra.label if extra else regularizer}", color)


def option_owners() -> dict[str, str]:
    """Name of an option -> the methods and regularizers that have it, in words."""
    found: dict[str, list[str]] = {}
    for what, kinds in (("method", methods()), ("regularizer", regularizers())):
        for name, kind in kinds.items():
            for option in option_names(kind):
                found.setdefault(option, []).append(f"{what} {name}")
    return {option: ", ".join(owners) for option, owners in found.items()}
