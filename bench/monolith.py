"""The baseline: the same model, whole, in the same Triton Python backend, as a careful engineer would write it.

One forward pass for all requests of an `execute`, views instead of copies where torch allows them, inference mode,
weights in ordinary memory. Inputs, outputs and batching are the disaggregated model's own `config.pbtxt`.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import nn

MODEL_FILE = "model.pt"
SHIM = '''"""The whole model in one process; see sidepool.bench.monolith."""

from sidepool.bench.monolith import TritonPythonModel

__all__ = ["TritonPythonModel"]
'''


def write_monolith(model: nn.Module, *, config: Path, repository: Path, name: str) -> None:
    """Add `model` to a Triton repository as `name`, configured as `config` (the disaggregated model's config.pbtxt) is."""
    import torch

    version = repository / name / "1"
    version.mkdir(parents=True, exist_ok=True)
    text, replaced = re.subn(r'^name: "[^"]*"', f'name: "{name}"', config.read_text(encoding="utf-8"), count=1, flags=re.MULTILINE)
    if not replaced:
        raise ValueError(f"{config}: no line that begins with name:")
    (repository / name / "config.pbtxt").write_text(text, encoding="utf-8")
    (version / "model.py").write_text(SHIM, encoding="utf-8")
    torch.save(model, version / MODEL_FILE)


class TritonPythonModel:
    """What Triton's Python backend calls. torch is imported in `initialize`: auto-complete imports this module twice."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the model; `torch_threads` of the configuration is respected as in the disaggregated model."""
        import torch
        import triton_python_backend_utils as pb_utils
        from torch.utils._pytree import tree_leaves

        self._torch, self._pb, self._leaves = torch, pb_utils, tree_leaves
        config = json.loads(args["model_config"])
        parameters = {k: v["string_value"] for k, v in config["parameters"].items()}
        if threads := int(parameters["torch_threads"]):  # 0 leaves torch's choice
            torch.set_num_threads(threads)
        names = [entry["name"] for entry in config["input"]]
        self._jagged = [name for name in names if name.endswith((".lengths", ".values"))]
        self._plain = [name for name in names if name not in self._jagged]
        self._outputs = [entry["name"] for entry in config["output"]]
        path = Path(args["model_repository"]) / args["model_version"] / MODEL_FILE
        self._model = torch.load(path, weights_only=False).eval()

    def execute(self, requests: list[Any]) -> list[Any]:
        """Score all requests in one forward pass and hand each its rows."""
        torch = self._torch
        with torch.inference_mode():
            inputs, sizes = self._gather_jagged(requests) if self._jagged else self._gather_fixed(requests)
            outputs = [leaf.numpy() for leaf in self._leaves(self._model(*inputs))]
        responses, at = [], 0
        for size in sizes:
            rows = [output[at : at + size] for output in outputs]
            tensors = [
                self._pb.Tensor(name, part[None] if self._jagged else part) for name, part in zip(self._outputs, rows, strict=True)
            ]
            responses.append(self._pb.InferenceResponse(tensors))
            at += size
        return responses

    def _gather_fixed(self, requests: list[Any]) -> tuple[list[Any], list[int]]:
        """The model's tensors over all requests; a single request's tensors are used where they lie."""
        columns = [[self._array(request, name) for request in requests] for name in self._plain]
        merged = [arrays[0] if len(arrays) == 1 else np.concatenate(arrays) for arrays in columns]
        return [self._torch.from_numpy(array) for array in merged], [len(array) for array in columns[0]]

    def _gather_jagged(self, requests: list[Any]) -> tuple[list[Any], list[int]]:
        """Dense features, then the values and the offsets of every feature, over all requests."""
        from_numpy = self._torch.from_numpy
        dense = [self._array(request, self._plain[0])[0] for request in requests]
        lengths = [self._array(request, "sparse.lengths")[0] for request in requests]
        values = [self._array(request, "sparse.values")[0] for request in requests]
        merged = np.concatenate(lengths, axis=1) if len(lengths) > 1 else lengths[0]
        ends = np.cumsum(merged, axis=1, dtype=np.int64)
        offsets = from_numpy(ends - merged)
        per_feature = [from_numpy(ids) for ids in _values_by_feature(values, lengths)]
        rows = dense[0] if len(dense) == 1 else np.concatenate(dense)
        return [from_numpy(rows), per_feature, list(offsets)], [len(array) for array in dense]

    def _array(self, request: Any, name: str) -> NDArray[Any]:
        array: NDArray[Any] = self._pb.get_input_tensor_by_name(request, name).as_numpy()
        return array


def _values_by_feature(values: list[NDArray[np.int64]], lengths: list[NDArray[np.int32]]) -> list[NDArray[np.int64]]:
    """Values of each feature over all requests, from one feature-major array and `[features, batch]` lengths per request."""
    split = [np.split(ids, np.cumsum(bags.sum(axis=1))[:-1]) for ids, bags in zip(values, lengths, strict=True)]
    if len(split) == 1:
        return split[0]
    return [np.concatenate(parts) for parts in zip(*split, strict=True)]
