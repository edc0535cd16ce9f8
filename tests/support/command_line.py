"""The command line in this process, with what it prints."""

import io
import sys
from typing import NamedTuple
from unittest.mock import patch

from ssiuu.cli import main


class Result(NamedTuple):
    """Exit status, and what went to stdout and stderr together."""

    status: int
    output: str


def run(*arguments, charset="utf-8"):
    """`ssiuu` with these arguments, on a terminal of this encoding."""
    written = io.BytesIO()
    stream = io.TextIOWrapper(written, encoding=charset, write_through=True)
    with patch.object(sys, "stdout", stream), patch.object(sys, "stderr", stream):
        status = main([str(argument) for argument in arguments])
    return Result(status, written.getvalue().decode(charset))
