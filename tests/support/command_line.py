"""The command line in this process, with what it prints."""

import io
import sys
from typing import NamedTuple
from unittest.mock import patch

from ssiuu.cli import main


class Result(NamedTuple):
    """Exit status, and what was printed."""

    status: int
    stdout: str
    stderr: str

    @property
    def output(self):
        return self.stdout + self.stderr


def run(*arguments, charset="utf-8"):
    """`ssiuu` with these arguments, on a terminal of this encoding."""
    streams = [io.TextIOWrapper(io.BytesIO(), encoding=charset, write_through=True) for _ in range(2)]
    with patch.object(sys, "stdout", streams[0]), patch.object(sys, "stderr", streams[1]):
        status = main([str(argument) for argument in arguments])
    return Result(status, *(stream.buffer.getvalue().decode(charset) for stream in streams))
