"""A private directory for the shm lane's socket, which does not outlive the process, however it ends."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Only directories of exactly this kind are ever removed.
PREFIX = "sidepool-lane-"


@contextmanager
def private_directory() -> Iterator[Path]:
    """A directory of mode 0700 under /run/user (or /tmp), removed on exit.

    What a killed process left behind is removed by the next one: an owner holds a lock on its directory for as long
    as it lives, so a directory whose lock is free has no owner.
    """
    base = _runtime_directory()
    _remove_abandoned(base)
    # Made and locked under a hidden name, so that nobody who looks for abandoned directories sees it unlocked.
    hidden = Path(tempfile.mkdtemp(prefix="." + PREFIX, dir=base))
    lock = os.open(hidden, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        directory = hidden.rename(base / hidden.name.removeprefix("."))
        try:
            yield directory
        finally:
            shutil.rmtree(directory, ignore_errors=True)
    finally:
        os.close(lock)


def _runtime_directory() -> Path:
    per_user = Path(f"/run/user/{os.getuid()}")
    return per_user if os.access(per_user, os.W_OK) else Path("/tmp")


def _remove_abandoned(base: Path) -> None:
    for directory in base.glob(PREFIX + "*"):
        try:
            if directory.lstat().st_uid != os.getuid():
                continue
            lock = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(directory, ignore_errors=True)
        except BlockingIOError:
            pass  # its owner lives
        finally:
            os.close(lock)
