"""The core's own tests of rdma, in the builds that .ci/native-tests makes: with address and with thread checks."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

BUILD = Path(__file__).parents[2] / "build"


@pytest.mark.parametrize(
    ("checks", "name", "last"),
    [
        ("address", "rdma_test", "4 passed, 0 failed"),
        ("thread", "rdma_test", "4 passed, 0 failed"),
        ("thread", "lines_test", "ok rdma: engines share no cache line\n5 passed, 0 failed"),
    ],
)
def test_the_cores_own_tests_of_rdma_pass(checks: str, name: str, last: str) -> None:
    program = BUILD / f"native-{checks}" / name
    if not program.exists():
        pytest.skip(f"no {program.relative_to(BUILD.parent)}; .ci/native-tests makes it")
    # Fixed addresses: older thread sanitizers cannot place their shadow memory otherwise.
    command = ["setarch", "-R", program]
    ran = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=240, check=False)
    assert ran.returncode == 0, ran.stdout
    assert last in ran.stdout
