"""The eight models of DeepRecSys (Gupta et al., ISCA 2020), with the sizes of its released configurations.

Widths, tables, rows, dimensions and ids per bag are those of `models/configs/*.json` in harvard-acc/DeepRecSys; rows are capped.
What these do not say, such as the number of tasks, is a constant here with its reason. Ids are `[batch, tables, ids]`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from sidepool.bench.models.dlrm import EXAMPLE_BATCH, mlp

# All eight together take 0.5 GB in fp32.
DEFAULT_MAX_ROWS = 10_000
# Tasks of the multi-task model: the paper leaves N open; clicks, likes and watch time are its example.
TASKS = 3
# Steps of DIEN's history: the tables of its configuration beside user, candidate and context.
PROFILE_TABLES = 3


@dataclass(frozen=True)
class Sizes:
    """One configuration. `dense`: widths from the numeric input on; `top`: widths behind the joined vectors."""

    rows: tuple[int, ...]
    dim: int
    ids: int
    dense: tuple[int, ...]
    top: tuple[int, ...]
    history: int = 0
    """Behaviours of a user: positions of DIN's history, at most so many steps of DIEN's."""


SIZES: dict[str, Sizes] = {
    "ncf": Sizes((140_000, 140_000, 28_000, 28_000), 64, 1, (), (256, 256, 128, 64, 64)),
    "wide_and_deep": Sizes((1_000_000,) * 27, 32, 1, (512,), (1024, 512, 256, 1)),
    "mt_wide_and_deep": Sizes((500_000,) * 41 + (5_000_000,) * 2, 32, 1, (512,), (1024, 512)),
    "dlrm_rmc1": Sizes((4_000_000,) * 8, 32, 80, (128, 64, 32), (256, 64, 1)),
    "dlrm_rmc2": Sizes((500_000,) * 32, 64, 120, (256, 128, 64), (128, 64, 1)),
    "dlrm_rmc3": Sizes((2_000_000,) * 10, 32, 20, (2560, 1024, 256, 32), (512, 256, 1)),
    "din": Sizes((1_000_000, 100_000, 10_000_000, 10_000_000), 32, 3, (), (200, 80, 2), history=250),
    "dien": Sizes((500_000,) * 41 + (5_000_000,) * 2, 32, 1, (), (200, 80, 2), history=40),
}
# Widths of each task's own network.
TASK_WIDTHS = (512, 256, 128)


def deeprecsys(name: str, max_rows: int = DEFAULT_MAX_ROWS, max_tables: int | None = None) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """The model of that name (`SIZES`) in eval mode, and example inputs.

    max_rows: of a table. max_tables: takes the first ones only; DIEN's history has a step per table behind its profile.
    """
    sizes = replace(SIZES[name], rows=tuple(min(n, max_rows) for n in SIZES[name].rows[:max_tables]))
    kinds: dict[str, Callable[[Sizes], nn.Module]] = {"ncf": Ncf, "mt_wide_and_deep": MultiTask, "din": Din, "dien": Dien}
    return kinds.get(name, Ranker)(sizes).eval(), inputs(name, sizes.rows, EXAMPLE_BATCH)


Draw = Callable[[int, tuple[int, ...]], Tensor]
"""`draw(rows, shape)`: int64 ids below `rows`, of that shape."""


def uniform_ids(rows: int, shape: tuple[int, ...]) -> Tensor:
    """Every row alike, from torch's generator."""
    return torch.randint(0, rows, shape)


def inputs(name: str, rows: Sequence[int], batch: int, draw: Draw = uniform_ids) -> tuple[Tensor, ...]:
    """Inputs of the model of that name, whose tables have `rows` rows: ids that `draw` gives, random numbers."""
    sizes = SIZES[name]
    if sizes.history:
        profile = torch.stack([draw(n, (batch, sizes.ids)) for n in rows[:PROFILE_TABLES]], dim=1)
        if name == "din":
            return profile, draw(rows[-1], (batch, sizes.history))
        return profile, torch.stack([draw(n, (batch,)) for n in rows[PROFILE_TABLES:]], dim=1)
    ids = torch.stack([draw(n, (batch, sizes.ids)) for n in rows], dim=1)
    return (torch.rand(batch, sizes.dense[0]), ids) if sizes.dense else (ids,)


class Tables(nn.Module):
    """Sums of bags `[batch, tables, ids]`, a vector per table."""

    def __init__(self, rows: Sequence[int], dim: int) -> None:
        super().__init__()
        self.bags = nn.ModuleList(nn.EmbeddingBag(n, dim, mode="sum") for n in rows)

    def forward(self, ids: Tensor) -> list[Tensor]:
        return [bag(ids[:, i]) for i, bag in enumerate(self.bags)]


class Ncf(nn.Module):
    """Neural collaborative filtering: a product of user and item beside a network over both."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.tables = Tables(sizes.rows, sizes.dim)
        self.deep = mlp((2 * sizes.dim, *sizes.top), last_relu=True)
        self.score = nn.Linear(sizes.dim + sizes.top[-1], 1)

    def forward(self, ids: Tensor) -> Tensor:
        user, deep_user, item, deep_item = self.tables(ids)
        deep = self.deep(torch.cat([deep_user, deep_item], dim=1))
        return torch.sigmoid(self.score(torch.cat([user * item, deep], dim=1)))


class Ranker(nn.Module):
    """Wide & Deep and DLRM as configured: numbers through a network, joined with the pooled vectors, a network on top."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.tables = Tables(sizes.rows, sizes.dim)
        self.bottom = mlp(sizes.dense, last_relu=True)
        self.top = mlp((sizes.dense[-1] + len(sizes.rows) * sizes.dim, *sizes.top), last_relu=False)

    def forward(self, dense: Tensor, ids: Tensor) -> Tensor:
        return torch.sigmoid(self.top(torch.cat([self.bottom(dense), *self.tables(ids)], dim=1)))


class MultiTask(Ranker):
    """Wide & Deep with a network per task on what all share; one output per task."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__(sizes)
        self.tasks = nn.ModuleList(mlp((sizes.top[-1], *TASK_WIDTHS, 1), last_relu=False) for _ in range(TASKS))

    def forward(self, dense: Tensor, ids: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        shared = torch.relu(self.top(torch.cat([self.bottom(dense), *self.tables(ids)], dim=1)))
        return {f"task_{i}": torch.sigmoid(task(shared)) for i, task in enumerate(self.tasks)}


class Din(nn.Module):
    """Deep interest network: behaviours weighed by how they go with the candidate, the last profile vector."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.tables = Tables(sizes.rows[:PROFILE_TABLES], sizes.dim)
        self.behaviour = nn.Embedding(sizes.rows[-1], sizes.dim)
        self.attention = mlp((3 * sizes.dim, sizes.dim, 1), last_relu=False)
        self.top = mlp(((PROFILE_TABLES + 1) * sizes.dim, *sizes.top), last_relu=False)

    def forward(self, profile: Tensor, history: Tensor) -> Tensor:
        vectors, rows = self.tables(profile), self.behaviour(history)
        candidate = vectors[-1].unsqueeze(1).expand_as(rows)
        weights = self.attention(torch.cat([rows, candidate, rows * candidate], dim=2))
        return torch.softmax(self.top(torch.cat([*vectors, (rows * weights).sum(1)], dim=1)), dim=1)


class Dien(nn.Module):
    """Deep interest evolution network: a recurrent net over behaviours, a second one whose updates attention scales."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.tables = Tables(sizes.rows[:PROFILE_TABLES], sizes.dim)
        self.behaviours = nn.ModuleList(nn.Embedding(n, sizes.dim) for n in sizes.rows[PROFILE_TABLES:])
        self.interest = nn.GRU(sizes.dim, sizes.dim, batch_first=True)
        self.gates = nn.Linear(2 * sizes.dim, 2 * sizes.dim)
        self.proposal = nn.Linear(2 * sizes.dim, sizes.dim)
        self.top = mlp(((PROFILE_TABLES + 1) * sizes.dim, *sizes.top), last_relu=False)

    def forward(self, profile: Tensor, history: Tensor) -> Tensor:
        vectors = self.tables(profile)
        steps = torch.stack([table(history[:, i]) for i, table in enumerate(self.behaviours)], dim=1)
        interests, _ = self.interest(steps)
        attention = torch.softmax((interests * vectors[-1].unsqueeze(1)).sum(2), dim=1)
        state = torch.zeros_like(vectors[-1])
        for i in range(steps.shape[1]):
            both = torch.cat([interests[:, i], state], dim=1)
            update, reset = self.gates(both).sigmoid().chunk(2, dim=1)
            update = update * attention[:, i : i + 1]
            proposal = torch.tanh(self.proposal(torch.cat([interests[:, i], reset * state], dim=1)))
            state = (1 - update) * state + update * proposal
        return torch.softmax(self.top(torch.cat([*vectors, state], dim=1)), dim=1)
