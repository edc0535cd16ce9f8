"""Faults at the writes of a folder: a full disk, a folder that is read-only, a process that is killed."""

import contextlib
import errno
import os
import sys
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_REMOVING = ("os.remove", "os.rmdir", "shutil.rmtree")
_EVENTS = ("os.rename", "os.mkdir", *_REMOVING)
_active = None


class Killed(BaseException):
    """What SIGKILL looks like from inside: nothing catches it, and nothing is written or removed after it."""


def _audit(event, arguments):
    if _active is None or not (event == "open" or event in _EVENTS):
        return
    if event in _REMOVING and _active.kind == "full":
        return  # takes no space
    path, *rest = arguments
    if event != "open" or rest[1] & _WRITING:
        _active.write(path, lambda: None)


sys.addaudithook(_audit)  # for the life of the process: it cannot be taken back


class Fault:
    """From the `at`-th write below `folder` on.

    Args:
        kind: "full" (the file is begun, then there is no space), "read-only" or "killed".
    """

    def __init__(self, folder, kind, at):
        self.folder, self.kind, self.at, self.count = Path(folder).resolve(), kind, at, 0

    def write(self, path, begin, error=None):
        """Count a write to `path`; where the fault has come, `begin` the file and fail."""
        with contextlib.suppress(TypeError, ValueError):  # descriptors, and names of other kinds
            if self.folder not in (Path(os.fsdecode(path)).absolute(), *Path(os.fsdecode(path)).absolute().parents):
                return
            self.count += 1
        if not self.count or self.count < self.at:
            return
        if self.kind == "killed":
            if self.count == self.at:
                begin()
            raise Killed
        if self.kind == "read-only":
            raise OSError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        begin()
        raise error or OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


@contextlib.contextmanager
def fault(folder, kind, at, monkeypatch):
    """A `Fault` while inside; writers that Python's audit does not see are watched too."""
    global _active
    with monkeypatch.context() as patched:
        save, serialize = torch.save, safetensors.torch.serialize_file

        def watched_save(value, file, *rest, **options):
            if _active is not None and isinstance(file, (str, os.PathLike)):
                full = RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 704 vs 598")
                _active.write(file, lambda: _begin(file), full)
            return save(value, file, *rest, **options)

        def watched_serialize(tensors, file, *rest, **options):
            if _active is not None:
                full = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
                _active.write(file, lambda: _begin(file), full)
            return serialize(tensors, file, *rest, **options)

        patched.setattr(torch, "save", watched_save)
        patched.setattr(safetensors.torch, "serialize_file", watched_serialize)
        _active = Fault(folder, kind, at)
        try:
            yield _active
        finally:
            _active = None


def _begin(file):
    """Half a file, as a writer leaves it that did not get to its end."""
    global _active
    active, _active = _active, None
    try:
        Path(file).write_bytes(b"half")
    finally:
        _active = active
