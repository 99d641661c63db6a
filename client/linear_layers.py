"""Large linear layers of a program on the CPU, run by oneDNN with weights that are laid out for it once.

torch gives fp32 matrix products to MKL, which takes its AVX2 kernels on processors that are not Intel's; oneDNN takes the widest
that there are. Measured with one thread of an AMD EPYC (Zen 5): 205 against 90 Gflop/s. Both add in fp32, in another order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, fx

# Multiply-adds of a call. Below it oneDNN's own cost, 20 µs and more on a busy machine, is more than it saves (measured: even at
# 0.5 to 1.5 million).
LEAST_WORK = 1 << 21
# oneDNN makes code for every size of batch that it meets (0.4 ms and more) and keeps that of 1024: so sizes are rounded up to one
# of so many per power of two, which computes 4 % for nothing.
SIZES_PER_OCTAVE = 8


def rounded_up(batch: int) -> int:
    """The size of batch as which `batch` samples are computed."""
    step = max(1, (1 << max(batch - 1, 0).bit_length()) // (2 * SIZES_PER_OCTAVE))
    return -(-batch // step) * step


def pack_linear_layers(program: fx.GraphModule) -> int:
    """Replace the fp32 linear layers of constant weights in the graph, each with the ReLU right behind it; how many.

    The graph is the caller's to compile afterwards.
    """
    import torch

    # torch's builds for other processors than x86 choose between their libraries themselves. The operators are those that
    # torch.compile takes for frozen weights; no version of torch promises them.
    on_x86 = torch.backends.cpu.get_cpu_capability().startswith("AVX")
    built_in = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if not on_x86 or not built_in or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return 0
    aten, packed = torch.ops.aten, 0
    for node in program.graph.find_nodes(op="call_function", target=aten.linear.default):
        x, *held = node.args
        tensors = [_held(program, argument) for argument in held]
        if any(tensor is None or tensor.dtype is not torch.float32 for tensor in tensors):
            continue
        user = next(iter(node.users)) if len(node.users) == 1 else None
        relu = user is not None and user.target in (aten.relu.default, aten.relu_.default)
        last = user if relu and user is not None else node
        with program.graph.inserting_before(node):
            call = program.graph.call_function(_linear(*tensors, relu=relu), (x,))
        last.replace_all_uses_with(call)
        for unused in dict.fromkeys((last, node, *held)):
            if not unused.users:
                program.graph.erase_node(unused)
        packed += 1
    return packed


def _held(program: fx.GraphModule, argument: Any) -> Any:
    """The tensor that a `get_attr` node stands for, or None."""
    if getattr(argument, "op", "") != "get_attr":
        return None
    held: Any = program
    for step in str(argument.target).split("."):
        held = getattr(held, step)
    return held.detach()


def _linear(weight: Tensor, bias: Tensor | None = None, *, relu: bool) -> Callable[[Tensor], Tensor]:
    """`x · weightᵀ + bias`, with a ReLU behind it if asked for; small calls go the way that torch takes."""
    import torch

    plain, onednn = torch.nn.functional.linear, torch.ops.mkldnn._linear_pointwise.default
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, None)
    outputs, behind = len(weight), "relu" if relu else "none"

    def linear(x: Tensor) -> Tensor:
        if x.numel() * outputs >= LEAST_WORK:
            result: Tensor = onednn(x, packed, bias, behind, [], "")
            return result
        result = plain(x, weight, bias)
        return result.relu_() if relu else result

    return linear
