"""A ranker whose Triton was killed ends too.

Triton's stub process notices by itself within a second, but where Triton dies while it takes a response, the stub waits for it
for ever, and holds the GIL and our lanes (seen on 2.51). In a container everything ends together; elsewhere the sidecars would
keep the lanes of a dead deployment.
"""

from __future__ import annotations

from pathlib import Path

from sidepool.client.lifetime import end_with_parent

STUB = "triton_python_backend_stub"
# The stub's own way out comes first: it looks every 0.3 s, then finalizes its models, which takes milliseconds.
GRACE_S = 2.0


def end_with_server(program: Path = Path("/proc/self/exe")) -> None:
    """End this process a few seconds after its Triton has ended. Does nothing outside Triton's stub, in a test, say."""
    if program.resolve().name == STUB:
        end_with_parent(GRACE_S)
