"""A program that never closes its client ends as quietly as one that does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from sidecar_process import ready
from small_artifact import write_small_artifact

from sidepool.bench.triton_server import free_ports

PROGRAM = """
import sys
from sidepool.client import EmbeddingClient
client = EmbeddingClient.connect(sys.argv[1], lane=sys.argv[2])
assert client.lookup([3], [1, 0], deadline_ms=60_000).out.any()
"""


def test_a_client_that_is_never_closed_leaves_no_message_at_exit(tmp_path: Path) -> None:
    artifact = write_small_artifact(tmp_path, address=f"127.0.0.1:{free_ports(1)[0]}")
    with ready(artifact.config):
        for lane in ("shm", "tcp", "grpc"):
            command = [sys.executable, "-c", PROGRAM, str(tmp_path / "plan.yaml"), lane]
            ended = subprocess.run(command, capture_output=True, text=True)
            assert (lane, ended.returncode, ended.stdout, ended.stderr) == (lane, 0, "", "")
