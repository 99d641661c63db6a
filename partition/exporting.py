"""`torch.export` of a model with a varying batch, and what to change where it fails."""

from __future__ import annotations

import inspect
import io
import linecache
import logging
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from sidepool.partition.all_samples import all_samples
from sidepool.partition.keyed_jagged import OPERATORS
from sidepool.wire.errors import CutError

# Namespaces of operators that torch itself brings: a program of these runs wherever torch does.
KNOWN_NAMESPACES = frozenset({"aten", "prim", "prims", "higher_order"})
# What torch.export raises where values, not sizes, decide what is computed.
_DATA_DEPENDENT = ("GuardOnDataDependent", "DataDependent", "DynamicOutputShape", "data-dependent")
_FIXED_SIZE = ("ConstraintViolation", "specialized", "Specializ", "constant")

REMEDIES = {
    "data": "values decide there what is computed; compute both ways and choose with torch.where, or choose before the model",
    "size": "a size is fixed there as a number; take it from a tensor's shape (x.shape[0])",
    "loop": "the batch is fixed as a number somewhere, as by a loop over samples; compute all samples at once",
    "other": "express that line with torch's own operators on tensors, or move it out of the model",
}


@contextmanager
def quiet_torch() -> Iterator[None]:
    """Hide deprecations that torch.export and fx raise against torch itself, and what they log of errors that they raise too."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with _quiet_warnings():
            yield
    finally:
        logging.disable(before)


@contextmanager
def _quiet_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", category=UserWarning, module=r"torch\..*")
        # Recurrent layers put their own weights in place while they are traced.
        warnings.filterwarnings("ignore", message=r"The tensor attributes .* were assigned during export")
        yield


def export_model(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ExportedProgram:
    """`model` in eval mode as a functionalised program, the first dimension of every argument varying.

    A model that computes chosen samples only is exported as computing all of them (`all_samples`). Raises `CutError` that
    names operator and source line and says what to change.
    """
    try:
        return _export(model, args, kwargs)
    except Exception as e:
        with all_samples(model) as masks:
            if _chooses_samples(model, args, kwargs, masks):
                try:
                    return _export(model, args, kwargs)
                except Exception as again:
                    raise explained(again) from again
        raise explained(e, _fixed_size(model, args, kwargs)) from e


def _export(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], varying: Any = Dim.DYNAMIC) -> ExportedProgram:
    bound = inspect.signature(model.forward).bind(*args, **kwargs).arguments
    shapes = {name: pytree.tree_map(lambda _: {0: varying}, value) for name, value in bound.items()}
    args, kwargs = _apart(args, kwargs)
    # Where it fails, torch prints the whole graph.
    with quiet_torch(), redirect_stderr(io.StringIO()):
        program = torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)
        operators = [n.target for n in program.graph.nodes if n.op == "call_function"]
        jagged = {o: OPERATORS[str(o)] for o in operators if str(o) in OPERATORS}
        if not jagged and not _writes(operators):
            return program
        # Functionalised, so that no operator writes into what another one reads; nothing else is decomposed.
        functional: ExportedProgram = program.run_decompositions(jagged)
        return functional


def _apart(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments, a tensor that is given twice as two: torch.export takes it for one input."""
    seen: set[int] = set()

    def own(value: Any) -> Any:
        again = id(value) in seen
        seen.add(id(value))
        return value.clone() if again and isinstance(value, Tensor) else value

    found: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_map(own, (args, kwargs))
    return found


def _writes(operators: Sequence[Any]) -> bool:
    """Whether one of them writes into its arguments. To functionalise takes longer than to export where features are many."""
    return any(
        isinstance(o, torch._ops.HigherOrderOperator) or (isinstance(o, torch._ops.OpOverload) and o._schema.is_mutable)
        for o in operators
    )


def _chooses_samples(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], masks: list[Tensor]) -> bool:
    """Whether the model chooses samples, and gets through where it is given all. `masks` are those of the call here."""
    try:
        found = model(*args, **kwargs)
    except CutError:
        raise
    except Exception:  # whatever the model raises where it meets what it did not expect: then this is no way to capture it
        return False
    if not masks:
        return False
    if all(bool(mask.all()) for mask in masks):
        raise CutError(
            "example inputs: the model leaves samples out by a mask, but none of these; allowed: examples that it leaves out too\n"
            "remedy: add a sample that the mask leaves out, such as one with an empty history"
        )
    return all(isinstance(t, Tensor) for t in pytree.tree_leaves(found))


def _fixed_size(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.fx.Node | None:
    """The operator that stands in the way of another batch, as a node: the first that fails for a batch twice as large."""
    try:
        program = _export(model, args, kwargs, Dim.AUTO)
        twice = [torch.cat([t, t]) for t in pytree.tree_leaves((args, kwargs))]
        states = {**program.state_dict, **program.constants}
        given = iter(twice)
        known: dict[torch.fx.Node, Any] = {}
        for spec, node in zip(program.graph_signature.input_specs, program.graph.nodes, strict=False):
            known[node] = states[str(spec.target)] if spec.target is not None else next(given)
    except Exception:  # then there is no more to say than what failed first
        return None
    for node in program.graph.nodes:
        if node.op == "call_function":
            try:
                args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), known.__getitem__)
                known[node] = node.target(*args, **kwargs)
            except Exception:
                found: torch.fx.Node = node
                return found
    return None


def check_operators(graph: torch.fx.Graph) -> None:
    """Raise `CutError` for an operator that torch does not bring: the ranker could not load a program that has it."""
    for node in graph.nodes:
        namespace = getattr(node.target, "namespace", None)
        if node.op == "call_function" and namespace is not None and namespace not in KNOWN_NAMESPACES:
            raise CutError(
                f"model: found operator {node.target} ({source_line(node)}); allowed: operators of torch itself\n"
                "remedy: express it with torch's own operators, or apply it before or after the model"
            )


def source_line(node: torch.fx.Node) -> str:
    """Where in the model's code a node comes from, for messages: `file:line in function`, as torch recorded it."""
    trace = str(node.meta.get("stack_trace") or "")
    places = [line.strip() for line in trace.splitlines() if line.strip().startswith("File ")]
    outside = [place for place in places if "/torch/" not in place] or places
    return outside[-1] if outside else "unknown source line"


def explained(error: BaseException, fixed: torch.fx.Node | None = None) -> CutError:
    """`error` of torch.export as what failed, at which operator and line of the model, and what to change.

    fixed: an operator that was found to fail for another batch.
    """
    name, text = type(error).__name__, str(error)
    kind = "data" if any(word in name + text for word in _DATA_DEPENDENT) else "other"
    if kind == "other" and any(word in name + text for word in _FIXED_SIZE):
        kind = "size"
    frames = list(_frames(error))
    where, operator = _model_line(frames), _operator(frames)
    if kind == "size" and where is None:
        where, operator = (None, None) if fixed is None else (source_line(fixed), str(fixed.target))
        kind = "size" if where else "loop"
    at = f" at {where}" if where else ""
    at += f", operator {operator}" if operator else ""
    return CutError(
        f"model: torch.export cannot capture it with a varying batch{at}: {name}: {first_lines(error)}\n"
        f"remedy: {REMEDIES[kind] if where or kind != 'other' else 'no control flow over values, no batch size fixed as a number'}"
    )


def first_lines(error: BaseException) -> str:
    """The beginning of an error's text, on one line."""
    return " ".join(line.strip() for line in str(error).strip().splitlines()[:3])[:500]


def _frames(error: BaseException) -> Iterator[TracebackType]:
    """Of `error` and of what it was raised from, outermost first."""
    origin = error.__cause__ or error.__context__
    traces = [error.__traceback__] + ([origin.__traceback__] if origin is not None else [])
    for trace in traces:
        while trace is not None:
            yield trace
            trace = trace.tb_next


def _model_line(frames: list[TracebackType]) -> str | None:
    """The innermost line that is neither torch's nor ours."""
    ours = inspect.getsourcefile(explained) or ""
    folder = ours[: ours.rindex("/") + 1]
    for frame in reversed(frames):
        code = frame.tb_frame.f_code
        file = code.co_filename
        if "/torch/" in file or file.startswith(("<", folder)) or file in _PYTHON:
            continue
        line = linecache.getline(file, frame.tb_lineno).strip()
        return f'File "{file}", line {frame.tb_lineno}, in {code.co_name}: {line}'
    return None


# Of Python's own files, those that show in traces.
_PYTHON = frozenset(m.__file__ for m in (inspect, traceback, __import__("contextlib"), __import__("functools")) if m.__file__)


def _operator(frames: list[TracebackType]) -> str | None:
    """The innermost operator that was being traced."""
    for frame in reversed(frames):
        found = frame.tb_frame.f_locals.get("func")
        if isinstance(found, torch._ops.OpOverload):
            return str(found)
    return None
