"""Where a model to partition comes from: a function, a saved program, or the directory of a model in Triton."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from sidepool.partition.exporting import first_lines, quiet_torch
from sidepool.partition.triton_model import load_triton_model
from sidepool.wire.errors import CutError


def load_source(source: str) -> tuple[nn.Module, Any, str]:
    """The model of `source`, example inputs for it, and a name; raises `CutError`.

    MODULE:FUNCTION (or FILE.py:FUNCTION) is called and returns the first two. FILE.pt2, from `torch.export.save`, has both. Of a
    directory with `config.pbtxt`, the module in `1/model.py` is taken, with examples made from the declared inputs.
    """
    path = Path(source)
    if source.endswith(".pt2"):
        return *_saved_program(path), path.stem
    if path.is_dir():
        return *load_triton_model(path), path.resolve().name
    return _from_function(source)


def _saved_program(path: Path) -> tuple[nn.Module, Any]:
    import torch

    try:
        with quiet_torch():
            program = torch.export.load(path)
            module = program.module(check_guards=False)
    except Exception as e:  # torch raises whatever its parsers do
        raise CutError(f"source: {path} cannot be loaded: {type(e).__name__}: {first_lines(e)}") from e
    if program.example_inputs is None:
        raise CutError(f"source: {path} holds no example inputs\nremedy: MODULE:FUNCTION that loads it and returns both")
    args, kwargs = program.example_inputs
    if args and kwargs:
        raise CutError(f"source: {path} takes arguments by place and by name; allowed: one of the two\nremedy: export it again")
    return module, kwargs or args


def _from_function(source: str) -> tuple[nn.Module, Any, str]:
    module_name, colon, function_name = source.rpartition(":")
    if not colon or not module_name or not function_name.isidentifier():
        raise CutError(f"source: found {source!r}; allowed: MODULE:FUNCTION, FILE.py:FUNCTION, FILE.pt2 or a directory")
    function = getattr(_load_module(module_name), function_name, None)
    if not callable(function):
        raise CutError(f"source: {module_name} has no function {function_name!r}; allowed: a function without arguments")
    try:
        result = function()
    except Exception as e:
        raise CutError(f"source: {source} failed: {type(e).__name__}: {e}") from e
    if not isinstance(result, tuple) or len(result) != 2 or not isinstance(result[0], nn.Module):
        found = f"({', '.join(type(r).__name__ for r in result)})" if isinstance(result, tuple) else type(result).__name__
        raise CutError(f"source: {source} returned {found}; allowed: a tuple (torch.nn.Module, example inputs)")
    return result[0], result[1], function_name


def _load_module(name: str) -> ModuleType:
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        if not name.endswith(".py"):
            return importlib.import_module(name)
        path = Path(name).resolve()
        spec = importlib.util.spec_from_file_location(path.stem, path)
        if spec is None or spec.loader is None or not path.is_file():
            raise CutError(f"source: found {name!r}; allowed: an importable module or an existing .py file")
        module = importlib.util.module_from_spec(spec)
        # Registered, so that torch finds the sources of what the file defines.
        sys.modules[path.stem] = module
        spec.loader.exec_module(module)
        return module
    except CutError:
        raise
    except Exception as e:
        raise CutError(f"source: {name} cannot be imported: {type(e).__name__}: {e}") from e
