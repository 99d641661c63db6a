"""The ranker: the dense half of a partitioned model, inside Triton's Python backend.

A model's `model.py` says `from sidepool.triton_backend import TritonPythonModel`. Triton imports it twice before it
initialises anything (auto-complete of the configuration), so nothing heavy is imported here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sidepool.triton_backend.ranker import Ranker

__all__ = ["TritonPythonModel"]


class TritonPythonModel:
    """What Triton's Python backend calls, in one thread: `initialize` once, `execute` many times, `finalize` once."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read the artifact, connect to the sidecars, load the dense program. An error here fails the model's load."""
        import triton_python_backend_utils as pb_utils

        from sidepool.triton_backend.orphan import end_with_server
        from sidepool.triton_backend.ranker import Ranker
        from sidepool.triton_backend.settings import read_settings

        end_with_server()
        self._ranker: Ranker = Ranker(read_settings(args), pb_utils)

    def execute(self, requests: list[Any]) -> list[Any]:
        """Score many requests in one lookup and one forward pass; one response per request, in order."""
        return self._ranker.execute(requests)

    def finalize(self) -> None:
        """Stop threads and close lanes."""
        self._ranker.close()
