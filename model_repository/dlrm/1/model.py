"""The ranker: Triton loads this file; everything is in sidepool.triton_backend."""

from sidepool.triton_backend import TritonPythonModel  # noqa: F401
