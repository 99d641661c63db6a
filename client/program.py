"""Programs saved by `torch.export`, made cheap to call. torch is imported when one is loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sidepool.wire.errors import ShardCorrupt

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Program = Callable[..., "tuple[Tensor, ...]"]
"""Flat positional tensors in, a flat tuple of tensors out."""


def load_program(file: Path, device: torch.device | None = None) -> Program:
    """Load a program, on `device` if one is given (else where it was exported).

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
    return _flat(exported)


def _flat(exported: torch.export.ExportedProgram) -> Program:
    """The graph of `exported` without its calling convention; parameters become plain attributes, found without a search."""
    import torch

    module = exported.module(check_guards=False)
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
