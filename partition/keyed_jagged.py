"""Models over TorchRec's `KeyedJaggedTensor`: captured as models over plain tensors, a bag per key and sample.

What TorchRec's jagged tensors call of FBGEMM becomes torch's own operators: the ranker has no FBGEMM.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils import _pytree as pytree

from sidepool.wire.errors import CutError, LookupRejected
from sidepool.wire.keyed_jagged import is_keyed_jagged, plain_tensors


@dataclass(frozen=True)
class PlainArguments:
    """A model's example arguments with every `KeyedJaggedTensor` as nested dicts of tensors."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    keys: tuple[tuple[str, str] | None, ...]
    """Per tensor: its key and which of `plain_tensors` it is, None for any that is no part of a `KeyedJaggedTensor`."""


@contextmanager
def plain_arguments(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[PlainArguments]:
    """While this is open, `model` takes plain tensors where it takes a `KeyedJaggedTensor`; raises `CutError`."""
    leaves, tree = pytree.tree_flatten((args, kwargs), is_leaf=is_keyed_jagged)
    keyed = {i: leaf for i, leaf in enumerate(leaves) if is_keyed_jagged(leaf)}
    try:
        plain = [plain_tensors(leaf) if i in keyed else leaf for i, leaf in enumerate(leaves)]
    except LookupRejected as e:
        raise CutError(f"example inputs: {e}") from e
    keys: list[tuple[str, str] | None] = []
    for i, leaf in enumerate(plain):
        keys += [(key, what) for key, bag in leaf.items() for what in bag] if i in keyed else [None]
    plain_args, plain_kwargs = pytree.tree_unflatten(plain, tree)
    if not keyed:
        yield PlainArguments(plain_args, plain_kwargs, tuple(keys))
        return
    own, given = model.forward, "forward" in vars(model)

    def forward(*args: Any, **kwargs: Any) -> Any:
        found = pytree.tree_flatten((args, kwargs), is_leaf=_is_plain_bags)[0]
        again = [_keyed_jagged(keyed[i], leaf) if i in keyed else leaf for i, leaf in enumerate(found)]
        args, kwargs = pytree.tree_unflatten(again, tree)
        return own(*args, **kwargs)

    # Names of the inputs come from the signature.
    forward.__signature__ = inspect.signature(own)  # type: ignore[attr-defined]
    model.forward = forward
    try:
        yield PlainArguments(plain_args, plain_kwargs, tuple(keys))
    finally:
        if given:
            model.forward = own
        else:
            del model.forward


def _is_plain_bags(value: object) -> bool:
    return isinstance(value, dict) and bool(value) and all(isinstance(v, dict) and "offsets" in v for v in value.values())


def _keyed_jagged(example: Any, bags: dict[str, dict[str, Tensor]]) -> Any:
    """`bags` as TorchRec's own type, cut into keys already: cutting it would depend on the data."""
    base, jagged_type = type(example), type(next(iter(example.to_dict().values())))

    class Cut(base):  # type: ignore[misc, valid-type]
        # TorchRec's own cuts the ids of all keys.
        def __getitem__(self, key: str) -> Any:
            return self.to_dict()[key]

    parts = {
        key: jagged_type(values=bag["values"], weights=bag.get("weights"), lengths=_lengths(bag), offsets=bag["offsets"])
        for key, bag in bags.items()
    }
    weights = [bag["weights"] for bag in bags.values() if "weights" in bag]
    return Cut(
        keys=list(parts),
        values=torch.cat([bag["values"] for bag in bags.values()]),
        weights=torch.cat(weights) if weights else None,
        lengths=torch.cat([part.lengths() for part in parts.values()]),
        stride=next(iter(bags.values()))["offsets"].shape[0] - 1,
        length_per_key=[bag["values"].shape[0] for bag in bags.values()],
        jt_dict=parts,
    )


def _lengths(bag: dict[str, Tensor]) -> Tensor:
    return bag["offsets"][1:] - bag["offsets"][:-1]


def _padded(values: Tensor, offsets: Sequence[Tensor], lengths: Sequence[int], padding: float = 0.0) -> Any:
    """Bags of `values` `[ids, …]` as `[batch, length, …]`, cut or filled to that length."""
    if len(offsets) != 1:
        return NotImplemented  # bags of bags
    place = offsets[0][:-1, None] + torch.arange(lengths[0], device=values.device)
    filler = values.new_full((1, *values.shape[1:]), padding)
    return torch.cat([values, filler])[torch.where(place < offsets[0][1:, None], place, values.shape[0])]


OPERATORS: Mapping[str, Callable[..., Any]] = {
    "fbgemm.asynchronous_complete_cumsum.default": lambda lengths: functional.pad(lengths.cumsum(-1, dtype=lengths.dtype), (1, 0)),
    "fbgemm.jagged_2d_to_dense.default": lambda values, offsets, length: _padded(values, [offsets], [length]),
    "fbgemm.jagged_to_padded_dense.default": _padded,
}
"""FBGEMM's operators by name → the same by torch's own."""
