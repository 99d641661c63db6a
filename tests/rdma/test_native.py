"""The core's own rdma tests, in the two builds that .ci/native-tests makes: with address and with thread checks."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

BUILD = Path(__file__).parents[2] / "build"


@pytest.mark.parametrize("checks", ["address", "thread"])
def test_the_cores_rdma_tests_pass_under_the_sanitizers(checks: str) -> None:
    program = BUILD / f"native-{checks}" / "rdma_test"
    if not program.exists():
        pytest.skip(f"no {program.relative_to(BUILD.parent)}; .ci/native-tests makes it")
    # Fixed addresses: older thread sanitizers cannot place their shadow memory otherwise.
    command = ["setarch", "-R", program]
    ran = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=240, check=False)
    assert ran.returncode == 0, ran.stdout
    assert "4 passed, 0 failed" in ran.stdout
