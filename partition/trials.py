"""Inputs to try a cut on: the examples, and random ones of the same sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, fx

from sidepool.partition.capture import Captured
from sidepool.partition.lookups import Jagged, Lookup
from sidepool.partition.sources import Columns

# Any number: the same model is tried on the same inputs every time.
SEED = 20


def trials(captured: Captured, lookups: Sequence[Lookup]) -> tuple[Captured, ...]:
    """`captured` with its examples, then with random inputs and what the model itself gives for them.

    Random: ids from all of their tables, bags of other lengths, numbers within the range of the examples. A model may refuse
    these, where an input means more than ids; then the samples of the examples are mixed, each input on its own, and last in step.
    """
    for make in (_fresh, _mixed, _reversed):
        generator = torch.Generator().manual_seed(SEED)
        examples = tuple(make(captured, lookups, generator))
        try:
            expected = captured.ask(examples)
        except Exception:  # whatever the model raises for inputs that it was not made for
            continue
        return captured, replace(captured, examples=examples, expected=expected)
    return (captured,)


def _fresh(captured: Captured, lookups: Sequence[Lookup], generator: torch.Generator) -> Iterator[Tensor]:
    jagged = [x.source for x in lookups if isinstance(x.source, Jagged)]
    offsets = {s.offsets: s for s in jagged}
    values = {s.values for s in jagged}
    for node, example in zip(captured.inputs, captured.examples, strict=True):
        if node in offsets:
            total = captured.examples[captured.inputs.index(offsets[node].values)].shape[0]
            yield _shuffled_bags(example, total, offsets[node].include_last_offset, generator)
        elif example.dtype.is_floating_point and example.numel():
            low, high = example.min(), example.max()
            yield (low + (high - low) * torch.rand(example.shape, generator=generator)).to(example.dtype)
        elif node in values or any(isinstance(x.source, Columns) and x.source.root is node for x in lookups):
            yield _fresh_ids(node, example, lookups, generator)
        else:
            yield example[torch.randint(0, example.shape[0], (example.shape[0],), generator=generator)]


def _fresh_ids(node: fx.Node, example: Tensor, lookups: Sequence[Lookup], generator: torch.Generator) -> Tensor:
    """Ids of whole tables where columns are looked up, the examples' elsewhere."""
    flat = example.reshape(example.shape[0], -1).clone()
    limits: dict[int, int] = {}
    for lookup in lookups:
        source, rows = lookup.source, lookup.weight.shape[0]
        if isinstance(source, Columns) and source.root is node:
            limits |= {c: min(rows, limits.get(c, rows)) for c in range(source.begin, source.end)}
        elif isinstance(source, Jagged) and source.values is node:
            limits[0] = min(rows, limits.get(0, rows))
    for column, rows in limits.items():
        flat[:, column] = torch.randint(0, rows, flat[:, column].shape, generator=generator).to(flat.dtype)
    return flat.reshape(example.shape)


def _shuffled_bags(offsets: Tensor, total: int, last: bool, generator: torch.Generator) -> Tensor:
    """The same bags in another order: other lengths at every place, as many ids in all."""
    ends = offsets[1:] if last else torch.cat([offsets[1:], offsets.new_tensor([total])])
    starts = offsets[:-1] if last else offsets
    lengths = (ends - starts)[torch.randperm(starts.shape[0], generator=generator)]
    shuffled = torch.cat([offsets[:1], offsets[0] + lengths.cumsum(0)]).to(offsets.dtype)
    return shuffled if last else shuffled[:-1]


def _rows_by(captured: Captured, order: Callable[[int], Tensor], jagged: set[fx.Node]) -> Iterator[Tensor]:
    for node, example in zip(captured.inputs, captured.examples, strict=True):
        yield example if node in jagged else example[order(example.shape[0])]


def _mixed(captured: Captured, lookups: Sequence[Lookup], generator: torch.Generator) -> Iterator[Tensor]:
    return _rows_by(captured, lambda n: torch.randint(0, n, (n,), generator=generator), _of_bags(lookups))


def _reversed(captured: Captured, lookups: Sequence[Lookup], generator: torch.Generator) -> Iterator[Tensor]:
    """Jagged inputs cannot be put into another order without the others: with them, the examples as they are."""
    bags = _of_bags(lookups)
    return _rows_by(captured, lambda n: torch.arange(n) if bags else torch.arange(n).flip(0), bags)


def _of_bags(lookups: Sequence[Lookup]) -> set[fx.Node]:
    sources = [x.source for x in lookups if isinstance(x.source, Jagged)]
    return {node for s in sources for node in (s.values, s.offsets, s.weights) if node is not None}
