"""Memory that a checkpoint's file is mapped into: what has been read need not stay resident."""

from __future__ import annotations

import ctypes
import mmap
from bisect import bisect_right
from functools import cache
from pathlib import Path

from torch import Tensor

# Linux's number: takes pages away without losing what they hold, unlike MADV_DONTNEED, which drops what a process wrote.
MADV_PAGEOUT = 21


def is_mapped_file(tensor: Tensor) -> bool:
    """Whether `tensor` lies in a mapped file, as after `torch.load(mmap=True)`; False where the system does not say."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return False
    ranges = []
    for line in lines:
        span, _, _, _, inode, *_ = line.split()
        begin, _, end = span.partition("-")
        ranges.append((int(begin, 16), int(end, 16), inode != "0"))
    at = bisect_right(ranges, (tensor.data_ptr(), 1 << 64, True)) - 1
    return at >= 0 and tensor.data_ptr() < ranges[at][1] and ranges[at][2]


def page_out(tensor: Tensor) -> None:
    """Ask the system to take the pages of a contiguous tensor in a mapped file; they come back from the file when read again."""
    page = mmap.PAGESIZE
    begin = tensor.data_ptr() // page * page
    end = -(-(tensor.data_ptr() + tensor.nbytes) // page) * page
    # Best effort: an old kernel or a file that belongs to someone else keeps its pages, and nothing is lost.
    _libc().madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), MADV_PAGEOUT)


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)
