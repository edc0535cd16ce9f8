"""Rows of data from a file, a dataset, or the sets that the package embeds."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Iterable
from importlib import resources
from pathlib import Path
from typing import TypeVar

BUILTIN = "builtin"
PACKED = {"gzip": b"\x1f\x8b", "zip": b"PK\x03\x04", "parquet": b"PAR1", "zstandard": b"\x28\xb5\x2f\xfd"}
T = TypeVar("T")


def read_rows(source: str | Path, embedded: str) -> Iterable[tuple[str, object]]:
    """(where it is, row) of each row of a file or a dataset. A file is JSON Lines, or one JSON array.

    Args:
        source: "builtin", the path of a file, or a `datasets` name as "name" or "name:configuration".
        embedded: the package's file that "builtin" means.

    Raises:
        FileNotFoundError: a path that does not exist.
        ValueError: a folder, a packed file, text that is not UTF-8, malformed JSON (with its line), or a dataset that
            cannot be loaded.
    """
    if source == BUILTIN:
        return _parse((resources.files("ssiuu") / "data" / "builtin" / embedded).read_bytes(), embedded)
    path = Path(source)
    if path.is_dir():
        raise ValueError(f"{path} is a folder; expected a .jsonl file in it, a datasets name or 'builtin'")
    if path.suffix in (".jsonl", ".json") or path.exists():
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist; expected a .jsonl file, a datasets name or 'builtin'")
        return _parse(path.read_bytes(), str(path))
    return _read_dataset(str(source))


def read_text(path: Path) -> str:
    """The text of a file.

    Raises:
        FileNotFoundError: a path that does not exist.
        ValueError: a packed file, or text that is not UTF-8.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    return _decoded(path.read_bytes(), str(path), "UTF-8 text")


def dataset_configurations(name: str) -> list[str]:
    """The configurations of a `datasets` name; a ValueError if it cannot be reached."""
    import datasets

    return _reached(name, lambda: datasets.get_dataset_config_names(name))


def _decoded(content: bytes, name: str, expected: str) -> str:
    for kind, magic in PACKED.items():
        if content.startswith(magic):
            raise ValueError(f"{name} is a {kind} file; expected {expected}: convert it first")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 text (byte {error.start}); save it as UTF-8") from None


def _parse(content: bytes, name: str) -> Iterable[tuple[str, object]]:
    text = _decoded(content, name, "JSON Lines as UTF-8 text")
    return _parse_array(text, name) if text.lstrip().startswith("[") else _parse_lines(text, name)


def _parse_array(text: str, name: str) -> Iterable[tuple[str, object]]:
    try:
        rows = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{name} begins with '[' and is not a JSON array: {error}; expected JSON Lines") from None
    return [(f"{name}, row {number}", row) for number, row in enumerate(rows, 1)]


def _parse_lines(text: str, name: str) -> Iterable[tuple[str, object]]:
    # splitlines() breaks at U+2028 too, which JSON allows within a text. Blank lines at the end are ignored.
    for number, line in enumerate(text.rstrip().split("\n") if text.strip() else [], 1):
        where = f"{name}, line {number}"
        if not line.strip():
            raise ValueError(f"{where} is empty; expected one JSON object per line")
        try:
            yield where, json.loads(line)
        except ValueError as error:
            raise ValueError(f"{where} is not JSON: {error}; expected one JSON object per line") from None


def _read_dataset(source: str) -> Iterable[tuple[str, object]]:
    import datasets  # takes seconds to import, and most runs need no dataset

    name, _, configuration = source.partition(":")
    rows = _reached(source, lambda: datasets.load_dataset(name, configuration or None, split="train"))
    for number, row in enumerate(rows, 1):
        yield f"{source}, row {number}", row


def _reached(source: str, load: Callable[[], T]) -> T:
    import datasets

    try:
        return load()
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(
            f"{source} could not be loaded: {textwrap.shorten(str(error), 300)}; "
            "expected a .jsonl file, a datasets name or 'builtin'"
        ) from error


def check_text(value: object, field: str, where: str) -> None:
    """Raise a ValueError that names the place unless `value` is a text that a tokenizer can read."""
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{where}, field {field!r} is {value!r}; expected a text that is not empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where}, field {field!r} has half of a surrogate pair at character {error.start + 1} ({value!a}); "
            "expected whole characters: write the data again from its source"
        ) from None
