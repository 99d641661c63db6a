"""Programs saved by `torch.export`, made cheap to call. torch is imported when one is loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sidepool.wire.checksum import crc32c
from sidepool.wire.errors import PlanError, ShardCorrupt
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
    file: Path, device: torch.device | None = None, *, rewrite: Callable[[torch.fx.GraphModule], object] | None = None
) -> Program:
    """Load a program, on `device` if one is given (else where it was exported). `rewrite` may change the graph that is called.

    `ExportedProgram.module()` checks shapes and unflattens arguments on every call, which costs more than a small graph
    does; the calling convention is settled here once, and shapes are the caller's to check. Raises `ShardCorrupt`.
    """
    import torch
    from torch.export.passes import move_to_device_pass

    try:
        exported = torch.export.load(file)
    except Exception as e:  # whatever unzipping and unpickling raise
        raise ShardCorrupt(f"{file}: cannot be loaded as a torch.export program: {e}") from e
    if device is not None and device.type != "cpu":
        exported = move_to_device_pass(exported, device)
    return _flat(exported, rewrite)


def external_call(directory: Path, found: TorchFile, what: str) -> Callable[[list[Values], Values], None]:
    """What runs a program of torch's for a table set: fills in `[samples, dim]` from `[samples, values]` of every lookup and input.

    It may be called by several threads at once. Raises `PlanError` where torch is not installed and `ShardCorrupt` for the file.
    """
    path = directory / found.file
    try:
        content = path.read_bytes()
    except OSError as e:
        raise ShardCorrupt(f"{path}: cannot be read: {e}") from e
    if crc32c(content) != found.crc32c:
        raise ShardCorrupt(f"{path}: CRC-32C: found {crc32c(content):#010x}; allowed: {found.crc32c:#010x} (from the plan)")
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
