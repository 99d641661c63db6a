"""The verbs tests in tests/rdma/, run in the SoftRoCE guest, once with each generation of verbs libraries."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CANNOT = 77  # what tests/guest/run exits with where the guest cannot be had; its last line says why
# Boot, Python's slow start there, and the tests: everything here together must stay under eight minutes.
LIMITS_S = {"distribution": 300, "current": 120}


@pytest.mark.slow
@pytest.mark.timeout(900)  # the first run makes the guest's image and builds the current verbs libraries
@pytest.mark.parametrize("verbs", LIMITS_S)
def test_everything_on_rdma_holds_in_a_guest_with_softroce(verbs: str, tmp_path: Path) -> None:
    command = ".venv/bin/python -m pytest -q -p no:cacheprovider --junitxml=$OUT/junit.xml tests/rdma"
    run = [ROOT / "tests/guest/run", "--verbs", verbs, "--limit", str(LIMITS_S[verbs]), "--out", tmp_path, command]
    done = subprocess.run(run, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", check=False)
    if done.returncode == CANNOT:
        pytest.skip(done.stdout.splitlines()[-1])
    print(done.stdout)
    assert done.returncode == 0, f"status {done.returncode}; what the guest printed is above or below"
    assert 'failures="0"' in (tmp_path / "junit.xml").read_text()


def test_a_failing_command_in_the_guest_is_told_with_its_output_and_leaves_nothing_behind(tmp_path: Path) -> None:
    run = [ROOT / "tests/guest/run", "--limit", "120", "--out", tmp_path, "echo said; echo kept > $OUT/file; exit 3"]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    if done.returncode == CANNOT:
        pytest.skip(done.stderr.splitlines()[-1])
    assert (done.returncode, done.stdout, (tmp_path / "file").read_text()) == (3, "said\n", "kept\n")
