"""Models that compute chosen samples only: captured as computing all of them, and choosing at the end.

Sequence models leave out samples without a history: `x[mask]` of the batch, `masked_select`, packed sequences for recurrent
layers, and at the end `result[mask] = found`. How many samples that leaves depends on the data, which no exported graph can
express. What a sample gives does not depend on others, so computing every sample and keeping the chosen results is the same.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.utils import rnn
from torch.overrides import TorchFunctionMode

from sidepool.wire.errors import CutError


@dataclass(frozen=True)
class Padded:
    """Stands for a packed sequence: `[batch, steps, …]`, of which the first `lengths[sample]` steps count."""

    values: Tensor
    lengths: Tensor


@contextmanager
def all_samples(model: nn.Module) -> Iterator[list[Tensor]]:
    """While this is open, `model` computes all samples where it would choose some; yields the masks of a call, as they come."""
    masks: list[Tensor] = []
    layers = [m for m in model.modules() if isinstance(m, nn.RNNBase)]
    stepping = [m for m in model.modules() if type(m).__qualname__ == _STEPPING]
    modules = [sys.modules[name] for name in sorted({type(m).__module__ for m in model.modules()} - {"builtins"})]
    names = [(vars(m), n, v) for m in (*modules, rnn) for n, v in vars(m).items() if v is PACK or v is PAD]
    # Restored below; torch's own functions are reached through whatever names the model's modules gave them.
    for where, name, value in names:
        where[name] = _pack if value is PACK else _pad
    for layer in layers:
        layer.forward = functools.partial(_recurrent, layer)
    for other in stepping:
        other.forward = functools.partial(_stepped, other)
    own = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        with _Choosing(masks):
            return own(*args, **kwargs)

    given = vars(model).get("forward")
    functools.update_wrapper(forward, own)  # names of the inputs come from the signature
    model.forward = forward
    try:
        yield masks
    finally:
        for where, name, value in names:
            where[name] = value
        for changed in (*layers, *stepping):
            del changed.forward
        if given is None:
            del model.forward
        else:
            model.forward = given


# deepctr-torch's recurrent layer for AGRU and AUGRU. It steps through packed data, whose sizes depend on the data, and has no other
# form; `rnn` is one step of it: input, state and the step's weight, one per sample.
_STEPPING = "DynamicGRU"
PACK, PAD = rnn.pack_padded_sequence, rnn.pad_packed_sequence


def _pack(input: Tensor, lengths: Tensor, batch_first: bool = False, enforce_sorted: bool = True) -> Padded:
    return Padded(input if batch_first else input.transpose(0, 1), lengths)


def _pad(
    sequence: Any, batch_first: bool = False, padding_value: float = 0.0, total_length: int | None = None
) -> tuple[Tensor, Tensor]:
    if not isinstance(sequence, Padded):
        return PAD(sequence, batch_first, padding_value, total_length)
    values = sequence.values
    counts = _steps(sequence) < sequence.lengths.unsqueeze(1)
    padded = values.masked_fill(~counts.unsqueeze(2), padding_value)
    if total_length is not None and total_length != values.shape[1]:
        padded = nn.functional.pad(padded, (0, 0, 0, total_length - values.shape[1]), value=padding_value)
    return (padded if batch_first else padded.transpose(0, 1)), sequence.lengths


def _recurrent(layer: nn.RNNBase, sequence: Any, state: Any = None) -> Any:
    """A layer over all steps: forwards in time, what lies behind a sequence's end reaches nothing before it."""
    own: Callable[..., Any] = functools.partial(type(layer).forward, layer)
    if not isinstance(sequence, Padded):
        return own(sequence, state)
    if layer.bidirectional or layer.num_layers != 1 or isinstance(layer, nn.LSTM):
        raise CutError(
            f"model: packed sequences go through {layer}; allowed: nn.GRU or nn.RNN of one layer, forwards in time\n"
            "remedy: give the layer padded sequences and take its results at each sequence's end"
        )
    values = sequence.values if layer.batch_first else sequence.values.transpose(0, 1)
    found, _ = own(values, state)
    steps = found if layer.batch_first else found.transpose(0, 1)
    ends = _steps(sequence) == (sequence.lengths - 1).unsqueeze(1)
    last = torch.where(ends.unsqueeze(2), steps, 0.0).sum(1)
    return Padded(steps, sequence.lengths), last.unsqueeze(0)


def _stepped(layer: Any, sequence: Any, weights: Any = None, state: Any = None) -> Any:
    """A layer that takes its steps itself, over all steps: as `_recurrent`, with a weight per step."""
    if not isinstance(sequence, Padded) or not isinstance(weights, Padded):
        return type(layer).forward(layer, sequence, weights, state)
    values = sequence.values
    state = values.new_zeros(values.shape[0], layer.hidden_size) if state is None else state
    found = []
    for i in range(values.shape[1]):
        state = layer.rnn(values[:, i], state, weights.values[:, i])
        found.append(state)
    return Padded(torch.stack(found, dim=1), sequence.lengths)


def _steps(sequence: Padded) -> Tensor:
    return torch.arange(sequence.values.shape[1]).unsqueeze(0)


class _Choosing(TorchFunctionMode):
    def __init__(self, masks: list[Tensor]) -> None:
        super().__init__()
        self.masks = masks

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.__getitem__ and _chooses(args[1], args[0]):
            self.masks.append(args[1])
            return args[0].clone()
        if func is Tensor.__getitem__ and _chooses_steps(args[1], args[0]):
            return torch.where(args[1].unsqueeze(2), args[0], 0.0).sum(1)
        if func is Tensor.__setitem__ and _chooses(args[1], args[0]):
            target, mask, found = args
            self.masks.append(mask)
            spread = mask.reshape(-1, *[1] * (target.dim() - 1))
            target.copy_(torch.where(spread, found, target))
            return None
        if func in (torch.masked_select, Tensor.masked_select) and not kwargs and _chooses_alike(args[1], args[0]):
            self.masks.append(args[1])
            return args[0].reshape(-1)
        return func(*args, **kwargs)


def _chooses(mask: Any, chosen: Tensor) -> bool:
    """Whether `mask` is one truth value per sample of `chosen`."""
    return isinstance(mask, Tensor) and mask.dtype is torch.bool and mask.dim() == 1 and bool(mask.shape[0] == chosen.shape[0])


def _chooses_steps(mask: Any, chosen: Tensor) -> bool:
    """Whether `mask` is truth values `[batch, steps]`, and, where they are known, at most one of a sample's is true."""
    if not isinstance(mask, Tensor) or mask.dtype is not torch.bool or mask.dim() != 2 or chosen.dim() != 3:
        return False
    return mask.shape == chosen.shape[:2] and (isinstance(mask, FakeTensor) or bool((mask.sum(1) <= 1).all()))


def _chooses_alike(mask: Tensor, chosen: Tensor) -> bool:
    return mask.dim() == chosen.dim() and all(n == 1 for n in mask.shape[1:]) and _chooses(mask.flatten(), chosen)
