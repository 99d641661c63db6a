"""A /dev/shm that is too small, as containers have it by default: Triton says so, and our lanes do not need it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from sidepool.bench.triton_server import missing

pytestmark = pytest.mark.triton

# In a mount namespace of its own, so that the tiny /dev/shm is nobody else's.
IN_TINY_SHM = 'mount -t tmpfs -o size="$1" tmpfs /dev/shm && shift && exec "$@"'
START = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from served_dlrm import served
from sidepool.doctor import shared_memory
finding = shared_memory()
print(finding.state, finding.todo)
with served(jagged=True, directory=Path(sys.argv[2])) as running:
    running.check_serving()
    print("serves")
    print(running.refusal(running.request(20_000), parameters={"deadline_ms": 60_000}))
    running.check_serving()
    print("still serves")
"""


def run_with_shm(size: str, directory: Path) -> subprocess.CompletedProcess[str]:
    if missing() is not None:
        pytest.skip(f"no Triton: {missing()}")
    isolated = ["unshare", "--mount", "sh", "-c", IN_TINY_SHM, "sh", size]
    if subprocess.run([*isolated, "true"], capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a tmpfs in a mount namespace of its own (root)")
    program = [sys.executable, "-c", START, str(Path(__file__).parents[1]), str(directory)]
    return subprocess.run([*isolated, *program], capture_output=True, text=True, check=False, timeout=200)


def test_a_triton_that_cannot_start_for_want_of_shared_memory_says_so(tmp_path: Path) -> None:
    ended = run_with_shm("64k", tmp_path)
    assert ended.returncode != 0
    assert "limited give Triton's Python backend 1 GiB" in ended.stdout
    assert "Unable to initialize shared memory" in ended.stderr
    assert "No space left on device" in ended.stderr


def test_a_request_too_large_for_the_shared_memory_is_refused_and_the_next_one_works(tmp_path: Path) -> None:
    """Sidecars and shm lanes run in the same tiny /dev/shm: their slots are memfds, which are not counted against it."""
    ended = run_with_shm("6m", tmp_path)
    assert ended.returncode == 0, ended.stderr
    said = ended.stdout.splitlines()
    assert said[1] == "serves"
    assert "shared memory" in said[2]
    assert said[-1] == "still serves"
