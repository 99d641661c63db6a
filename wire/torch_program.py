"""Programs saved by `torch.export`, made cheap to call. torch is imported when one is loaded."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sidepool.wire.checksum import crc32c
from sidepool.wire.errors import PlanError, ShardCorrupt
from sidepool.wire.model import MODEL_FILE
from sidepool.wire.program import TorchFile

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from torch import Tensor

    Values = NDArray[np.float32]

Program = Callable[..., "tuple[Tensor, ...]"]
"""Flat positional tensors in, a flat tuple of tensors out."""


def load_program(
    file: Path,
    device: torch.device | None = None,
    *,
    crc32c: int | None = None,
    rewrite: Callable[[torch.fx.GraphModule], object] | None = None,
) -> Program:
    """Load a program, on `device` if one is given (else where it was exported). crc32c: of the file, from `model.yaml`.

    `rewrite` may change the graph that is called.

    `ExportedProgram.module()` checks shapes and unflattens arguments on every call, which costs more than a small graph
    does; the calling convention is settled here once, and shapes are the caller's to check. Raises `ShardCorrupt`.
    """
    from torch.export.passes import move_to_device_pass

    exported = load_exported(file, crc32c)
    if device is not None and device.type != "cpu":
        exported = move_to_device_pass(exported, device)
    return _flat(exported, rewrite)


def load_exported(file: Path, crc32c: int | None) -> torch.export.ExportedProgram:
    """What `torch.export.save` wrote into `file`. torch itself does not notice a bit that changed. Raises `ShardCorrupt`."""
    import torch

    content = _read(file, crc32c, MODEL_FILE)
    try:
        return torch.export.load(io.BytesIO(content))
    except Exception as e:  # whatever unzipping and unpickling raise
        raise ShardCorrupt(f"{file}: cannot be loaded as a torch.export program: {e}") from e


def _read(file: Path, checksum: int | None, source: str) -> bytes:
    try:
        content = file.read_bytes()
    except OSError as e:
        raise ShardCorrupt(f"{file}: cannot be read: {e}") from e
    if checksum is not None and crc32c(content) != checksum:
        raise ShardCorrupt(f"{file}: CRC-32C: found {crc32c(content):#010x}; allowed: {checksum:#010x} (from {source})")
    return content


def external_call(directory: Path, found: TorchFile, what: str) -> Callable[[list[Values], Values], None]:
    """What runs a program of torch's for a table set: fills in `[samples, dim]` from `[samples, values]` of every lookup and input.

    It may be called by several threads at once. Raises `PlanError` where torch is not installed and `ShardCorrupt` for the file.
    """
    path = directory / found.file
    _read(path, found.crc32c, "the plan")
    try:
        import torch
    except ImportError as e:
        raise PlanError(
            f"{what}: its program has {', '.join(found.operators)}, which take torch, and torch is not installed here\n"
            "remedy: install torch beside the sidecar, or partition without --sidecar-torch"
        ) from e
    program = load_program(path)

    def call(leaves: list[Values], results: Values) -> None:
        with torch.inference_mode():
            torch.from_numpy(results).copy_(program(*map(torch.from_numpy, leaves))[0])

    return call


def _flat(exported: torch.export.ExportedProgram, rewrite: Callable[[torch.fx.GraphModule], object] | None) -> Program:
    """The graph of `exported` without its calling convention; parameters become plain attributes, found without a search."""
    import torch

    module = exported.module(check_guards=False)
    if rewrite is not None:
        rewrite(module)
    graph = module.graph
    graph.set_codegen(torch.fx.graph.CodeGen())
    for i, node in enumerate(n for n in graph.nodes if n.op == "get_attr"):
        held: Any = module
        for step in str(node.target).split("."):
            held = getattr(held, step)
        if isinstance(held, torch.Tensor):
            node.target = f"held_{i}"
            module.__dict__[node.target] = held.detach()
    module.recompile()
    forward: Program = module.forward  # not __call__: the hooks there are the checks and the unflattening
    return forward
