"""Instruction data of the benign retraining attack."""

from __future__ import annotations

from pathlib import Path

from .facts import read_rows


def load_instructions(source: str | Path) -> list[tuple[str, str]]:
    """Read (prompt, response) pairs in Alpaca's schema: instruction, input (may be empty), output.

    Args:
        source: "builtin" (written for this project), the path of a .jsonl file, or a `datasets` name.

    Raises:
        FileNotFoundError: a path that does not exist.
        ValueError: a malformed row (file, line number, field), or no rows.
    """
    pairs = [_as_pair(row, where) for where, row in read_rows(source, "instructions.jsonl")]
    if not pairs:
        raise ValueError(f"instructions {source} has no rows; expected at least one")
    return pairs


def _as_pair(row: object, where: str) -> tuple[str, str]:
    if not isinstance(row, dict):
        raise ValueError(f"{where} is a {type(row).__name__}; expected an object with instruction and output")
    for field in ("instruction", "output"):
        value = row.get(field)
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"{where}, field {field!r} is {value!r}; expected a text that is not empty")
    given = row.get("input") or ""
    question = f"{row['instruction']}\n{given}" if given else row["instruction"]
    return f"Instruction: {question}\nResponse:", f" {row['output']}"
