"""A model as a Triton repository holds it: the directory with `config.pbtxt`, whose `1/model.py` is importable Python.

Two kinds: the PyTorch backend's (one `nn.Module` class, its weights beside it in `1/model.pt`) and the Python backend's
(`TritonPythonModel`, which makes a module in `initialize`). TorchScript alone has no Python to import.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sidepool.partition.exporting import first_lines
from sidepool.wire.errors import CutError

# Samples of the examples that are made: not 1, which torch.export takes for a constant.
EXAMPLES = 4
SEED = 6
_TORCH_TYPES = {
    "TYPE_FP32": torch.float32, "TYPE_FP16": torch.float16, "TYPE_FP64": torch.float64, "TYPE_INT64": torch.int64,
    "TYPE_INT32": torch.int32, "TYPE_BOOL": torch.bool,
}  # fmt: skip
_UTILS = "triton_python_backend_utils"
_REMEDY = "remedy: MODULE:FUNCTION, a function that makes the model and returns it with example inputs"


def load_triton_model(directory: Path) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """The module of a Triton model, and examples of its declared inputs: ids 0, which every table has, and numbers in [0, 1).

    Raises `CutError` where there is no importable module, or where inputs leave sizes open.
    """
    config = _config(directory)
    code = directory / "1" / "model.py"
    if not code.is_file():
        raise CutError(f"source: {directory} holds no 1/model.py; allowed: a model whose Python can be imported\n{_REMEDY}")
    try:
        with _backend_utils():
            model = _module_of(_imported(code), directory, config)
    except CutError:
        raise
    except Exception as e:
        raise CutError(f"source: {code} cannot be run: {type(e).__name__}: {first_lines(e)}\n{_REMEDY}") from e
    return model, _examples(directory, config)


def _config(directory: Path) -> dict[str, Any]:
    path = directory / "config.pbtxt"
    try:
        from google.protobuf import json_format, text_format
        from tritonclient.grpc import model_config_pb2
    except ImportError as e:
        raise CutError("source: a model of Triton's needs tritonclient\nremedy: pip install tritonclient[grpc]") from e
    try:
        parsed = text_format.Parse(path.read_text(encoding="utf-8"), model_config_pb2.ModelConfig())
    except (OSError, UnicodeDecodeError, text_format.ParseError) as e:
        raise CutError(f"source: {path} cannot be read: {first_lines(e)}") from e
    found: dict[str, Any] = json_format.MessageToDict(parsed, preserving_proto_field_name=True)
    for tensor in [*found.get("input", []), *found.get("output", [])]:
        tensor["dims"] = [int(n) for n in tensor["dims"]]  # 64-bit numbers are text in protobuf's JSON
    return found


def _imported(path: Path) -> ModuleType:
    name = f"sidepool_triton_model_{path.parent.parent.name}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Registered, so that torch finds the sources of what the file defines; beside it, as in Triton, what it imports.
    sys.modules[name] = module
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.parent))
    return module


def _module_of(code: ModuleType, directory: Path, config: Mapping[str, Any]) -> nn.Module:
    backend = getattr(code, "TritonPythonModel", None)
    if backend is not None:
        held = backend()
        arguments = {"model_name": directory.name, "model_version": "1", "model_repository": str(directory.resolve())}
        device = {"model_instance_kind": "CPU", "model_instance_device_id": "0", "model_instance_name": f"{directory.name}_0"}
        held.initialize({**arguments, **device, "model_config": json.dumps(config)})
        held_module: nn.Module = _only(
            [v for v in vars(held).values() if isinstance(v, nn.Module)], f"{directory}: TritonPythonModel holds"
        )
        return held_module
    classes = [v for v in vars(code).values() if isinstance(v, type) and issubclass(v, nn.Module) and v.__module__ == code.__name__]
    model: nn.Module = _only(classes, f"{directory}: 1/model.py defines")()
    weights = directory / "1" / "model.pt"
    if weights.is_file():
        model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    return model


def _only(found: list[Any], where: str) -> Any:
    if len(found) != 1:
        raise CutError(f"source: {where} {len(found)} modules of torch; allowed: exactly one\n{_REMEDY}")
    return found[0]


def _examples(directory: Path, config: Mapping[str, Any]) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(SEED)
    batched = int(config.get("max_batch_size", 0)) > 0
    examples = []
    for given in config.get("input", []):
        name, dims = given["name"], given["dims"]
        if given["data_type"] not in _TORCH_TYPES:
            raise CutError(f"source: {directory}: input {name}: found {given['data_type']}; allowed: {', '.join(_TORCH_TYPES)}")
        shape = [EXAMPLES, *dims] if batched else [EXAMPLES, *dims[1:]]
        if -1 in shape or (not batched and dims[:1] != [-1]):
            allowed = "fixed sizes behind the batch" if batched else "-1, the batch, then fixed sizes"
            raise CutError(f"source: {directory}: input {name}: found dims {dims}; allowed: {allowed}\n{_REMEDY}")
        dtype = _TORCH_TYPES[given["data_type"]]
        examples.append(torch.rand(shape, generator=generator).to(dtype))
    return tuple(examples)


@contextmanager
def _backend_utils() -> Iterator[None]:
    """While this is open, code of the Python backend finds the part of Triton's module that `initialize` uses."""
    before = sys.modules.get(_UTILS)
    utils = ModuleType(_UTILS)
    utils.get_input_config_by_name = lambda config, name: _by_name(config["input"], name)  # type: ignore[attr-defined]
    utils.get_output_config_by_name = lambda config, name: _by_name(config["output"], name)  # type: ignore[attr-defined]
    utils.triton_string_to_numpy = lambda found: _numpy_type(found)  # type: ignore[attr-defined]
    sys.modules[_UTILS] = utils
    try:
        yield
    finally:
        del sys.modules[_UTILS]
        if before is not None:
            sys.modules[_UTILS] = before


def _by_name(tensors: list[dict[str, Any]], name: str) -> dict[str, Any] | None:
    return next((t for t in tensors if t["name"] == name), None)


def _numpy_type(found: str) -> Any:
    return np.dtype(str(_TORCH_TYPES[found]).removeprefix("torch.")).type
