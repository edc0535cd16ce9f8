"""Instruction data of the benign retraining attack."""

from __future__ import annotations

import logging
from pathlib import Path

from .sources import check_text, read_rows

logger = logging.getLogger(__name__)


def load_instructions(source: str | Path) -> list[tuple[str, str]]:
    """Read (prompt, response) pairs in Alpaca's schema: instruction, input (may be empty), output.

    Args:
        source: "builtin" (written for this project), the path of a .jsonl file, or a `datasets` name.

    Rows whose output is empty are skipped and counted.

    Raises:
        FileNotFoundError: a path that does not exist.
        ValueError: a malformed row (file, line number, field), or no rows.
    """
    rows = list(read_rows(source, "instructions.jsonl"))
    pairs = [_as_pair(row, where) for where, row in rows if not _is_unanswered(row)]
    if not pairs:
        raise ValueError(f"instructions {source} has no rows with an output; expected at least one")
    if len(pairs) < len(rows):
        logger.warning("%d of %d rows of %s have an empty output; skipped", len(rows) - len(pairs), len(rows), source)
    return pairs


def _is_unanswered(row: object) -> bool:
    """Whether the output is there and empty, as in 28 rows of the original Alpaca."""
    return isinstance(row, dict) and isinstance(row.get("output"), str) and not row["output"].strip()


def _as_pair(row: object, where: str) -> tuple[str, str]:
    if not isinstance(row, dict):
        raise ValueError(f"{where} is a {type(row).__name__}; expected an object with instruction and output")
    for field in ("instruction", "output"):
        check_text(row.get(field), field, where)
    given = row.get("input") or ""
    if given != "":
        check_text(given, "input", where)
    question = f"{row['instruction']}\n{given}" if given else row["instruction"]
    return f"Instruction: {question}\nResponse:", f" {row['output']}"
