"""Tests that need RDMA devices. They run in the SoftRoCE guest: tests/scenario/test_rdma_guest.py starts it, and says why where it cannot."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))  # verbs_peer, cable

if not Path("/sys/class/infiniband/rxeA").exists():
    collect_ignore_glob = ["test_*.py"]
