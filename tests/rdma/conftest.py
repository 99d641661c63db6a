"""Tests that need RDMA devices: they run in the SoftRoCE guest, where tests/test_rdma_guest.py takes them."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # verbs_peer, cable

if not Path("/sys/class/infiniband/rxeA").exists():
    collect_ignore_glob = ["test_*.py"]
