"""A process that asked for it does not outlive its parent, even while a thread holds the GIL for ever."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

PATIENCE_S = 30.0

CHILD = """
import re, sys
from sidepool.client.lifetime import end_with_parent
end_with_parent(0.1)
print("watching", flush=True)
re.match("(a+)+b", "a" * 64)  # takes ages, and never lets go of the GIL
"""
PARENT = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdout=subprocess.PIPE, text=True)
child.stdout.readline()
print(child.pid, flush=True)
sys.stdin.read()
"""


def alive(pid: int) -> bool:
    """Whether the process exists and is no zombie (whose parent may be slow to take notice)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_process_ends_with_its_parent_though_its_interpreter_is_stuck() -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT, CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    try:
        time.sleep(0.3)
        assert alive(child), "its parent lives"
        parent.kill()
        deadline = time.monotonic() + PATIENCE_S
        while alive(child) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not alive(child)
    finally:
        if alive(child):
            os.kill(child, 9)
        parent.communicate()
