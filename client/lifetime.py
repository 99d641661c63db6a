"""For processes that embed a client and must not outlive the one that started them."""

from __future__ import annotations

from sidepool import _native


def end_with_parent(grace_s: float) -> None:
    """End this process, with its lanes, `grace_s` after its parent has ended, should it still be there.

    Works while other threads hold the GIL for ever. Nothing is run on the way out. Raises `NativeError` where the kernel
    cannot watch a process (before Linux 5.3).
    """
    _native.end_with_parent(grace_s)
