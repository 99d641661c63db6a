"""The verbs tests in tests/rdma/, run in the SoftRoCE guest, once with each generation of verbs libraries, and over two guests."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from criteo_artifact import write_criteo

ROOT = Path(__file__).resolve().parents[1]
CANNOT = 77  # what tests/guest/run exits with where the guest cannot be had; its last line says why
# When to give up. Everything in this file together should stay under eight minutes on two cores that nobody else uses.
LIMITS_S = {"distribution": 840, "current": 360}
# Everything with the distribution's libraries, the lanes' contract suite included. With current ones, each pair of ends (native,
# pyverbs) in either role, and refusals: all that passes through the libraries.
TESTS = {
    "distribution": "tests/rdma tests/contract -k rdma",
    "current": "tests/rdma/test_{guest,interop,lane}.py -k 'specification or refused or whole or every_size'",
}
TWO_GUESTS_LIMIT_S = 90

pytestmark = pytest.mark.slow


def in_guest(program: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run `tests/guest/<program>`; what it printed, standard error included, is shown where the test fails."""
    command = [ROOT / "tests/guest" / program, *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", check=False)
    if done.returncode == CANNOT:
        pytest.skip(done.stdout.splitlines()[-1])
    print(done.stdout)
    return done


@pytest.mark.timeout(1200)  # the first run makes the guest's image and builds the current verbs libraries
@pytest.mark.parametrize("verbs", LIMITS_S)
def test_everything_on_rdma_holds_in_a_guest_with_softroce(verbs: str, tmp_path: Path) -> None:
    command = ".venv/bin/python -m pytest -q -p no:cacheprovider --junitxml=$OUT/junit.xml " + TESTS[verbs]
    if verbs == "distribution":
        write_criteo(tmp_path / "criteo")
        command = f"SIDEPOOL_CRITEO={tmp_path / 'criteo'} {command}"
    done = in_guest("run", "--verbs", verbs, "--limit", str(LIMITS_S[verbs]), "--out", tmp_path / "out", command)
    assert done.returncode == 0
    assert 'failures="0"' in (tmp_path / "out" / "junit.xml").read_text()


def test_two_guests_write_into_each_others_memory_and_look_up_over_a_lane() -> None:
    command = "PYTHONPATH=tests:$PYTHONPATH .venv/bin/python tests/rdma/write_across.py $GUEST_ADDRESS $PEER_ADDRESS"
    done = in_guest("two_guests", "--limit", str(TWO_GUESTS_LIMIT_S), command, command)
    assert done.returncode == 0
    assert {"first: wrote", "second: wrote"} == {" ".join(line.split()[:2]) for line in done.stdout.splitlines() if "wrote" in line}


def test_a_failing_command_in_the_guest_is_told_with_its_output_and_its_files() -> None:
    done = in_guest("run", "--limit", "60", "echo said; exit 3")
    assert (done.returncode, "said\n" in done.stdout) == (3, True)
