"""The list of methods and regularizers, as text."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable

from ..arguments import REQUIRED, Argument, fields_of
from ..methods.base import Method
from ..methods.registry import methods
from ..options import PAIRS
from ..regularizers.base import Regularizer
from ..regularizers.registry import regularizers

INDENT = "    "


def describe(names: Iterable[str] | None = None, width: int = 79) -> str:
    """Label, summary, options and source of methods and regularizers.

    Args:
        names: which; all where None or empty.
        width: of the lines.

    Raises:
        ValueError: a name that neither a method nor a regularizer has.
    """
    chosen = set(names or ())
    kinds = {"methods (--method)": methods(), "regularizers (--regularizer)": regularizers()}
    known = {name for found in kinds.values() for name in found}
    for name in sorted(chosen - known):
        raise ValueError(f"{name!r} is not a method or regularizer; expected one of {', '.join(sorted(known))}")
    parts = []
    for title, found in kinds.items():
        shown = [_describe(kind, width) for name, kind in found.items() if not chosen or name in chosen]
        parts += [title, *shown] if shown else []
    parts += [
        f"--method {pair} is --method {method} --regularizer {regularizer}"
        for pair, (method, regularizer) in PAIRS.items()
        if not chosen or pair in chosen
    ]
    return "\n\n".join(parts)


def _describe(kind: type[Method] | type[Regularizer], width: int) -> str:
    head = [kind.name, *([kind.label] if kind.label else []), kind.summary]
    lines = [textwrap.fill("  ".join(head), width, subsequent_indent=INDENT)]
    for argument in fields_of(kind.Options):
        lines += [f"{INDENT}{argument.flag} ({_value(argument)})", _fill(argument.help, width, 2 * INDENT)]
    if kind.source:
        lines.append(_fill(f"from: {kind.source}", width, INDENT))
    return "\n".join(line for line in lines if line)


def _value(argument: Argument) -> str:
    return "required" if argument.default is REQUIRED else f"default {argument.default}"


def _fill(text: str, width: int, indent: str) -> str:
    return textwrap.fill(text, width, initial_indent=indent, subsequent_indent=indent)
