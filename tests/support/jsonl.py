"""Files of rows."""

import json


def write_rows(path, *rows):
    """A JSONL file of these rows; a text is written as it is."""
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path
