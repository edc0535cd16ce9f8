"""Benchmarks by name: their sets, and what they are read from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from . import faithun, tofu
from .facts import FactSets


class DataSet(NamedTuple):
    """A benchmark with a split of its own.

    Attributes:
        name: on the command line.
        needs: what its source has to be.
        source: the default of its source; None where there is none.
        extra: names of the sets that it has beside forget, retain and test.
        read: from a source and the names of the extra sets (None: those that are there) to its facts.
    """

    name: str
    needs: str
    source: str | None
    extra: tuple[str, ...]
    read: Callable[[str, Sequence[str] | None], FactSets]

    def load(self, source: str | None, extra: Sequence[str] | None = None) -> FactSets:
        """Its facts.

        Args:
            source: what `needs` says; None takes the default.
            extra: names of the extra sets; None takes those that the source has.

        Raises:
            ValueError: no source, an unknown extra set, or data that is missing or malformed.
            FileNotFoundError: a folder or a file that is not there.
        """
        source = self.source if source is None else source
        if source is None:
            raise ValueError(f"data={self.name!r} needs a source; give data_from: {self.needs}")
        for name in extra or ():
            if name not in self.extra:
                raise ValueError(f"extra={name!r} is not a set of {self.name}; expected of {', '.join(self.extra)}")
        return self.read(source, None if extra is None else list(dict.fromkeys(extra)))


def _tofu(forget: str, perturbed: bool) -> DataSet:
    return DataSet(
        f"tofu-{forget}{'-perturbed' if perturbed else ''}",
        "a folder of TOFU's sets as .jsonl or .json files, or a datasets name",
        tofu.HUB,
        tofu.EXTRA,
        lambda source, extra: tofu.load_tofu(source, forget, perturbed, extra),
    )


_ALL = (
    DataSet(
        "faithun",
        f"a folder with {faithun.FILE} and its index files",
        None,
        tuple(faithun.EXTRA),
        faithun.load_faithun,
    ),
    *(_tofu(forget, perturbed) for perturbed in (False, True) for forget in tofu.RETAIN),
)
DATA_SETS = {data.name: data for data in _ALL}


def get_data_set(name: str) -> DataSet:
    """The benchmark of that name; a ValueError that lists the names otherwise."""
    if name not in DATA_SETS:
        raise ValueError(f"data={name!r} is unknown; expected one of {', '.join(DATA_SETS)}")
    return DATA_SETS[name]
