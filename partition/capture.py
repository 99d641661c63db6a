"""Capture a model as a graph of ATen operators over named inputs (`torch.export`, functionalised, batch dynamic)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from inspect import signature
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.utils import _pytree as pytree

from sidepool.partition.exporting import export_model, first_lines
from sidepool.partition.keyed_jagged import PlainArguments, plain_arguments
from sidepool.partition.normal_form import normalise
from sidepool.wire.call import call_leaves, call_signature, parameter_names
from sidepool.wire.errors import CutError
from sidepool.wire.model import Returns, TensorSpec

# What NumPy, and with it the ranker, can hold.
DTYPES: dict[torch.dtype, Any] = {
    torch.float32: "float32",
    torch.float16: "float16",
    torch.float64: "float64",
    torch.int64: "int64",
    torch.int32: "int32",
    torch.bool: "bool",
}


@dataclass(frozen=True)
class Call:
    """How a model is called."""

    parameters: tuple[str, ...]
    """As `parameter_names` gives them."""
    places: tuple[str, ...]
    """Where in the arguments each input lies, as `call_leaves` says it."""
    returns: Returns


@dataclass(frozen=True)
class Captured:
    """A model as one flat graph. Tensors are the model's own, never copies."""

    graph: fx.Graph
    inputs: tuple[fx.Node, ...]
    """Placeholders of the model's inputs, in call order."""
    examples: tuple[Tensor, ...]
    """Example values of `inputs`."""
    states: Mapping[fx.Node, tuple[str, Tensor]]
    """Placeholders of parameters, buffers and constants: qualified name and value."""
    parameters: frozenset[fx.Node]
    outputs: tuple[fx.Node, ...]
    output_names: tuple[str, ...]
    expected: tuple[Tensor, ...]
    """What the model itself gives for `examples`."""
    call: Call
    keys: Mapping[fx.Node, tuple[str, str]]
    """Inputs that are part of a `KeyedJaggedTensor`: key, and which of `plain_tensors`; a key's are side by side, in its order."""
    ask: Callable[[Sequence[Tensor]], tuple[Tensor, ...]]
    """What the model itself gives for other values of `inputs`; raises whatever the model does."""
    unread: tuple[str, ...] = ()
    """Tables that nothing looks up: they are no part of what is served."""

    def input_specs(self) -> tuple[TensorSpec, ...]:
        """Names, dtypes and shapes of the inputs, and where they are given; sizes that vary are -1."""
        specs = zip((_spec(str(node.target), node) for node in self.inputs), self.call.places, strict=True)
        return tuple(spec.model_copy(update={"argument": None if place == spec.name else place}) for spec, place in specs)

    def output_specs(self) -> tuple[TensorSpec, ...]:
        """Names, dtypes and shapes of the outputs, batch first."""
        return tuple(_spec(name, node) for name, node in zip(self.output_names, self.outputs, strict=True))


def capture(model: nn.Module, example_inputs: Any) -> Captured:
    """Export `model`; its training mode is restored afterwards.

    example_inputs: a tensor, a tuple of arguments or a dict of keyword arguments; lists, dicts and TorchRec's
    `KeyedJaggedTensor` may be nested in them. Every tensor's first dimension (batch, or ids of a jagged feature) must be at
    least 2.
    Raises `CutError` where inputs or model cannot be captured.
    """
    if not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule):
        raise CutError(f"model: found {type(model).__name__}; allowed: a torch.nn.Module in Python")
    args, kwargs = _arguments(example_inputs)
    with plain_arguments(model, args, kwargs) as plain:
        tree = pytree.tree_structure((plain.args, plain.kwargs))

        def ask(given: Sequence[Tensor]) -> tuple[Tensor, ...]:
            plain_args, plain_kwargs = pytree.tree_unflatten(given, tree)
            with plain_arguments(model, args, kwargs), _evaluating(model):
                return _outputs(model(*plain_args, **plain_kwargs))[1]

        return _capture(model, plain, ask)


def _capture(model: nn.Module, plain: PlainArguments, ask: Callable[[Sequence[Tensor]], tuple[Tensor, ...]]) -> Captured:
    args, kwargs, keys = plain.args, plain.kwargs, plain.keys
    examples = tuple(_checked_examples((args, kwargs), keys))
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        if tensor.device.type != "cpu":
            raise CutError(
                f"model: {name} lies on {tensor.device}; allowed: cpu\nremedy: partition model.cpu(), with example inputs there"
            )
    with _evaluating(model):
        result = _run(model, args, kwargs)
        names, expected = _outputs(result)
        program = export_model(model, args, kwargs)
    call = _call(model, args, kwargs, result)
    captured = _captured(program, examples, call, names, expected, keys, ask)
    unread = tuple(_unread_tables(model, captured))
    left_out = [p.name for p in signature(model.forward).parameters.values() if p.default is not p.empty]
    left_out = [name for name in left_out if name not in signature(model.forward).bind(*args, **kwargs).arguments]
    if unread and left_out:
        raise CutError(
            f"example inputs: do not reach the table {unread[0]}, and leave out {', '.join(left_out)}; allowed: examples that look "
            "up every table\nremedy: give what is left out, or take the table out of the model"
        )
    return replace(captured, unread=unread)


def _call(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Call:
    parameters = parameter_names(model.forward)
    leaves, tree = pytree.tree_flatten((args, kwargs))
    numbers = call_leaves(call_signature(parameters), *pytree.tree_unflatten(range(len(leaves)), tree))
    returns: Returns = "tensor" if isinstance(result, Tensor) else "dict" if isinstance(result, Mapping) else "tuple"
    return Call(parameters, tuple(sorted(numbers, key=numbers.__getitem__)), returns)


def _unread_tables(model: nn.Module, captured: Captured) -> Iterator[str]:
    read = {value.data_ptr() for node, (_, value) in captured.states.items() if node.users}
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.weight.data_ptr() not in read:
            yield name


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode, without gradients; the training mode of every module is restored."""
    modes = {module: module.training for module in model.modules()}
    # An exported program refuses to change its mode: its operators have none.
    nn.Module.train(model, False) if isinstance(model, fx.GraphModule) else model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training


def _arguments(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example_inputs, Tensor):
        return (example_inputs,), {}
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, Sequence) and not isinstance(example_inputs, str):
        return tuple(example_inputs), {}
    raise CutError(
        f"example inputs: found {type(example_inputs).__name__}; allowed: a tensor, a tuple of arguments or "
        "a dict of keyword arguments"
    )


def _checked_examples(arguments: Any, keys: Sequence[tuple[str, str] | None]) -> Iterator[Tensor]:
    leaves, _ = pytree.tree_flatten(arguments)
    if not leaves:
        raise CutError("example inputs: found none; allowed: at least one tensor")
    for position, (leaf, key) in enumerate(zip(leaves, keys, strict=True)):
        where = f"example inputs: tensor {position}" if key is None else f"example inputs: {key[1]} of {key[0]!r}"
        if not isinstance(leaf, Tensor):
            raise CutError(f"{where}: found {leaf!r}; allowed: tensors only (fix constants inside the model)")
        if leaf.device.type != "cpu":
            raise CutError(f"{where}: lies on {leaf.device}; allowed: cpu")
        if leaf.dtype not in DTYPES:
            raise CutError(f"{where}: found dtype {leaf.dtype}; allowed: {', '.join(DTYPES.values())}")
        # Export treats sizes 0 and 1 as constants, so an example of size 1 would fix the batch.
        if leaf.dim() == 0 or leaf.shape[0] < 2:
            raise CutError(f"{where}: found shape {list(leaf.shape)}; allowed: a first dimension of at least 2 (batch, or ids)")
        yield leaf


def _run(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    try:
        return model(*args, **kwargs)
    except Exception as e:
        raise CutError(f"example inputs: the model itself refuses them: {type(e).__name__}: {first_lines(e)}") from e


def _outputs(result: Any) -> tuple[tuple[str, ...], tuple[Tensor, ...]]:
    """Names and values of what the model returns: `score` for one tensor, a dict's keys, else `output_0`, …"""
    names: tuple[str, ...] = ()
    values: tuple[Tensor, ...] = ()
    if isinstance(result, Tensor):
        names, values = ("score",), (result,)
    elif isinstance(result, Mapping):
        names, values = tuple(map(str, result.keys())), tuple(result.values())
    elif isinstance(result, Sequence) and not isinstance(result, str):
        names, values = tuple(f"output_{i}" for i in range(len(result))), tuple(result)
    if len(set(names)) != len(names):
        raise CutError(f"model: returns outputs named {', '.join(names)}; allowed: every name once")
    if not values or not all(isinstance(v, Tensor) for v in values):
        raise CutError(f"model: returns {type(result).__name__}; allowed: a tensor, or a tuple or dict of tensors")
    for name, value in zip(names, values, strict=True):
        if value.dtype not in DTYPES:
            raise CutError(f"model: output {name}: found dtype {value.dtype}; allowed: {', '.join(DTYPES.values())}")
    return names, values


def _captured(
    program: ExportedProgram,
    examples: tuple[Tensor, ...],
    call: Call,
    names: tuple[str, ...],
    expected: tuple[Tensor, ...],
    keys: Sequence[tuple[str, str] | None],
    ask: Callable[[Sequence[Tensor]], tuple[Tensor, ...]],
) -> Captured:
    graph = program.graph
    normalise(graph)
    nodes = {node.name: node for node in graph.nodes}
    for output in program.graph_signature.output_specs:
        if output.kind is not OutputKind.USER_OUTPUT:
            raise CutError(
                f"model: writes to {output.target!r} in forward; allowed: a model that only reads its parameters and buffers"
            )
    inputs: list[fx.Node] = []
    states: dict[fx.Node, tuple[str, Tensor]] = {}
    parameters: set[fx.Node] = set()
    for spec in program.graph_signature.input_specs:
        node = nodes[spec.arg.name]
        if spec.kind is InputKind.USER_INPUT:
            inputs.append(node)
            continue
        target = str(spec.target)
        value = program.state_dict[target] if target in program.state_dict else program.constants[target]
        if not isinstance(value, Tensor):
            raise CutError(f"model: holds {target!r} of {type(value).__name__}; allowed: tensors only")
        states[node] = (target, value)
        if spec.kind is InputKind.PARAMETER:
            parameters.add(node)
    outputs = tuple(graph.output_node().args[0])
    for name, node, value in zip(names, outputs, expected, strict=True):
        shape = node.meta["val"].shape
        if len(shape) == 0 or isinstance(shape[0], int):
            raise CutError(f"model: output {name}: found shape {list(shape)}; allowed: the batch as its first dimension")
        if value.shape[0] != expected[0].shape[0]:
            allowed = f"{expected[0].shape[0]}, as in {names[0]}"
            raise CutError(f"model: output {name}: found {value.shape[0]} samples; allowed: {allowed}")
    named = {node: key for node, key in zip(inputs, keys, strict=True) if key is not None}
    return Captured(graph, tuple(inputs), examples, states, frozenset(parameters), outputs, names, expected, call, named, ask)


def _spec(name: str, node: fx.Node) -> TensorSpec:
    value = node.meta["val"]
    return TensorSpec(name=name, dtype=DTYPES[value.dtype], shape=tuple(n if isinstance(n, int) else -1 for n in value.shape))
