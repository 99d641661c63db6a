"""CRC-32C (Castagnoli), the checksum of shard files; in hardware where the processor has it."""

from __future__ import annotations

from typing import Any

from sidepool import _native


def crc32c(buffer: Any, seed: int = 0) -> int:
    """CRC-32C of a C-contiguous buffer (bytes, memoryview, NumPy array); `seed` is the checksum of the bytes before it.

    Releases the GIL. Raises `TypeError` or `ValueError` for something that is not a contiguous buffer.
    """
    return _native.crc32c(buffer, seed)
