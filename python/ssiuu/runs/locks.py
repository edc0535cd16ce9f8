"""One process at a time in a folder."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
from collections.abc import Iterator
from pathlib import Path

logger = logging.getLogger(__name__)

LOCK = ".lock"
TRIES = 10


class BusyError(ValueError):
    """Another process holds the lock."""


@contextlib.contextmanager
def locked(folder: Path, name: str = LOCK) -> Iterator[None]:
    """Lock a folder. It is created if it is missing, and then removed again if nothing was written to it.

    The operating system releases the lock when the process ends, however it ends. Creating the lock also shows at once
    whether the folder can be written to.

    Args:
        name: of the lock's file; processes that hold different locks do not exclude each other.

    Raises:
        BusyError: another process holds it.
        OSError: a folder that cannot be made or written to.
    """
    new = not folder.exists()
    try:
        descriptor = _take(folder / name)
        try:
            yield
        finally:
            try:
                with contextlib.suppress(OSError):
                    (folder / name).unlink()
            finally:
                os.close(descriptor)
    finally:
        if new:
            with contextlib.suppress(OSError):  # it is not empty
                folder.rmdir()


def _take(path: Path) -> int:
    # Another process that ends may remove the folder or the file between any two of these lines.
    for attempt in range(1, TRIES + 1):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except (FileExistsError, FileNotFoundError):
            if attempt == TRIES:
                raise
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            break
        except OSError as error:  # a file system without locks
            logger.warning("%s cannot be locked (%s); do not start a second process in it", path.parent, error)
        if _is_at(path, descriptor):
            return descriptor
        os.close(descriptor)
    raise BusyError(f"another process is at work in {path.parent}; wait for it, or choose another folder")


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False
