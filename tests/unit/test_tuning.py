"""Tuning without a Triton: the climb on known surfaces, its memory, the search for a rate, the files, the online controller."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from google.protobuf import text_format
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from tritonclient.grpc import model_config_pb2

from sidepool.bench.tune_command import limit_of
from sidepool.bench.tuning.climb import GAIN, Climb
from sidepool.bench.tuning.knobs import Knobs, Queries, sidecar_config, starting_points, static_baseline, steps, triton_config
from sidepool.bench.tuning.rates import PRECISION, highest_rate, in_turns, search
from sidepool.client.dense import DenseGraph
from sidepool.triton_backend.controller import BARRED, PATIENCE, SETTLE, SplitController
from sidepool.triton_backend.splitting import SplitDense
from sidepool.wire.errors import ConfigError

CORES, QUERIES = 4, Queries(1000)
PEAK = Knobs(instances=2, workers=3, split_samples=128, max_batch=2000, engines=2, engine_spin_us=50)


def hill(knobs: Knobs) -> float:
    """A surface with one peak: 10 % lost per step from it, in each knob."""
    away = 0
    for name, values in steps(CORES, QUERIES).items():
        places = [abs(np.searchsorted(values, getattr(k, name))) for k in (knobs, PEAK)]
        away += abs(int(places[0]) - int(places[1]))
    return float(100 * 0.9**away)


def climb(state: Path, score: Callable[[Knobs, float], float], **changes: object) -> Climb:
    given: dict[str, object] = {
        "starts": starting_points(CORES, QUERIES),
        "steps": steps(CORES, QUERIES),
        "score": score,
        "state": state,
        "about": {"model": "m"},
    }
    return Climb(**{**given, **changes})  # type: ignore[arg-type]


def test_a_climb_finds_the_peak_of_a_hill_and_measures_nothing_twice(tmp_path: Path) -> None:
    asked: list[Knobs] = []

    def score(knobs: Knobs, beat: float) -> float:
        asked.append(knobs)
        found = hill(knobs)
        return found if found >= GAIN * beat else 0.0

    walk = climb(tmp_path / "state.json", score)
    assert walk.run() == PEAK
    assert walk.finished
    assert walk.best_score == 100
    assert len(asked) == len(set(asked)) == len(walk.tried) < 60


def test_an_interrupted_climb_goes_on_where_it_was(tmp_path: Path) -> None:
    whole: list[Knobs] = []
    climb(tmp_path / "whole.json", lambda knobs, beat: whole.append(knobs) or hill(knobs)).run()
    parts: list[Knobs] = []

    def score(knobs: Knobs, beat: float) -> float:
        if len(parts) == 7:
            raise KeyboardInterrupt
        parts.append(knobs)
        return hill(knobs)

    with pytest.raises(KeyboardInterrupt):
        climb(tmp_path / "state.json", score).run()
    rest: list[Knobs] = []
    asked = climb(tmp_path / "state.json", lambda knobs, beat: rest.append(knobs) or hill(knobs))
    assert asked.run() == PEAK
    assert parts + rest == whole
    # Time was up before anything could be measured again: the best so far stands.
    assert climb(tmp_path / "state.json", score, may_go_on=lambda: False).run() == PEAK
    with pytest.raises(ConfigError, match="another model"):
        climb(tmp_path / "state.json", score, about={"model": "other"}).run()


@given(st.floats(0.5, 1e5), st.floats(0.1, 1e5))
def test_the_highest_rate_is_found_from_any_guess(capacity: float, guess: float) -> None:
    asked = []

    def meets(rate: float) -> bool:
        asked.append(rate)
        return rate <= capacity

    assert capacity / PRECISION <= highest_rate(meets, guess) <= capacity
    assert len(asked) < 45


def test_searches_take_turns_and_what_meets_its_limit_nowhere_is_zero() -> None:
    order = []

    def meets(name: str, capacity: float) -> Callable[[float], bool]:
        return lambda rate: order.append(name) or rate <= capacity  # type: ignore[func-returns-value]

    found = in_turns({"a": (search(10), meets("a", 20)), "b": (search(10), meets("b", 0))})
    assert 20 / PRECISION <= found["a"] <= 20
    assert found["b"] == 0
    assert order[:6] == ["a", "b"] * 3


def test_settings_are_written_where_triton_and_a_sidecar_read_them() -> None:
    text = 'name: "m"\nmax_batch_size: 512\ndynamic_batching { max_queue_delay_microseconds: 0 }\n'
    text += 'instance_group [ { count: 1 kind: KIND_CPU } ]\nparameters { key: "lane" value { string_value: "shm" } }\n'
    config = triton_config(text, PEAK, name="n", least_batch=1000, limit_ms=50, online=True)
    merged = text_format.Parse(config, model_config_pb2.ModelConfig())
    assert (merged.name, merged.max_batch_size, merged.instance_group[0].count) == ("n", 2000, 2)
    parameters = {key: value.string_value for key, value in merged.parameters.items()}
    ranker = {"torch_threads": "1", "workers": "3", "split_samples": "128", "spin_us": "50", "limit_ms": "50"}
    assert parameters == {"lane": "shm", **ranker}
    queue = merged.dynamic_batching.default_queue_policy
    assert (queue.default_timeout_microseconds, queue.TimeoutAction.Name(queue.timeout_action)) == (25_000, "REJECT")
    assert not merged.dynamic_batching.preferred_batch_size
    for least in (7, 1):
        config = triton_config(text, replace(PEAK, max_batch=0), name="n", least_batch=least, limit_ms=50)
        alone = text_format.Parse(config, model_config_pb2.ModelConfig())
        assert (alone.max_batch_size, list(alone.dynamic_batching.preferred_batch_size)) == (least, [1])
        assert "limit_ms" not in alone.parameters
    sidecar = "name: s\nlisten: {grpc: '10.0.0.7:50151', tcp: '10.0.0.7:0', unix: null}\n"
    assert yaml.safe_load(sidecar_config(sidecar, PEAK)) == {**yaml.safe_load(sidecar), "engines": 2, "spin_us": 50}
    assert yaml.safe_load(sidecar_config(sidecar, PEAK, "127.0.0.1:5"))["listen"] == {
        "grpc": "127.0.0.1:5",
        "tcp": "127.0.0.1:0",
        "unix": None,
    }


def test_the_static_baseline_splits_the_largest_query_evenly_over_the_cores() -> None:
    assert static_baseline(3, QUERIES) == Knobs(instances=3, workers=3, split_samples=334)
    assert static_baseline(2, Queries(9, jagged=True)) == Knobs(instances=2, workers=2, split_samples=5)
    whole = Queries(9, jagged=True, divisible=False)
    assert {start.split_samples for start in starting_points(2, whole)} == {0} == set(steps(2, whole)["split_samples"])


def test_triton_merges_samples_or_requests_and_takes_at_least_the_largest_query() -> None:
    assert (QUERIES.least_batch, QUERIES.merged) == (1000, (0, 1000, 2000, 4000))
    assert (Queries(9, jagged=True).least_batch, Queries(9, jagged=True).merged[0]) == (1, 0)


def test_a_limit_is_a_percentile_and_milliseconds() -> None:
    assert limit_of("p99.9=12.5ms") == (99.9, 12.5)
    for wrong in ("100ms", "p95=0ms", "p100=5ms", "p95=5s"):
        with pytest.raises(ConfigError, match="--slo"):
            limit_of(wrong)


class Doubling:
    """Stands for a dense program: sums and doubles, and keeps the sizes of its batches."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.batches: list[int] = []

    def run(
        self, pooled: torch.Tensor, sequences: list[NDArray[np.float32]], inputs: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, ...]:
        if (pooled < 0).any():
            raise ValueError("negative")
        self.batches.append(len(pooled))
        rows = torch.from_numpy(sequences[0]).reshape(len(pooled), -1)
        return (pooled.sum(1) + rows.sum(1) + inputs["x"][:, 0], 2 * pooled)


def split(dense: Doubling, workers: int, split_samples: int) -> SplitDense:
    assert isinstance(DenseGraph, type)
    graph: DenseGraph = dense  # type: ignore[assignment]
    return SplitDense(graph, workers=workers, split_samples=split_samples, torch_threads=1, cpu=None, gpu_min_samples=0)


@pytest.mark.parametrize("workers", [1, 3])
def test_sub_batches_give_what_the_whole_batch_gives(workers: int) -> None:
    random = np.random.default_rng(0)
    pooled, x = torch.from_numpy(random.random((50, 4), np.float32)), torch.from_numpy(random.random((50, 1), np.float32))
    rows = random.random((50 * 3, 2), np.float32)
    whole, pieces = Doubling(), Doubling()
    expected = split(whole, 1, 0).run(pooled, [rows], {"x": x})
    runs = split(pieces, workers, 16)
    for ours, theirs in zip(runs.run(pooled, [rows], {"x": x}), expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert whole.batches == [50]
    assert sorted(pieces.batches) == [12, 12, 13, 13]
    with pytest.raises(ValueError, match="negative"):
        runs.run(pooled - 2, [rows], {"x": x})
    runs.close()


class Clock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now_ns = 0

    def __call__(self) -> int:
        return self.now_ns


def windows(controller: SplitController, clock: Clock, count: int, batch_ms: float, every_ms: float) -> list[str]:
    """What is done in so many windows of batches that come at this pace."""
    done = []
    for _ in range(int(count * max(1000 / every_ms, 20))):
        clock.now_ns += int(every_ms * 1e6)
        step = controller.observe(int(batch_ms * 1e6))
        if step is not None:
            done.append(step)
    return done


def test_the_controller_steps_after_patience_stays_between_its_marks_and_takes_back_what_hurt() -> None:
    clock = Clock()
    controller = SplitController(limit_ms=10, split_samples=256, least=64, most=1024, clock=clock)
    # Busy for 95 %, 19 ms of mean wait: up, once it has been so for long enough.
    assert windows(controller, clock, PATIENCE - 1, 2, 2.1) == []
    assert windows(controller, clock, 2, 2, 2.1) == ["up"]
    assert controller.split_samples == 512
    # It helped. Half busy, 1 ms of wait: between the marks nothing happens, however long.
    assert windows(controller, clock, 20, 2, 4) == []
    # Idle: down, and what made batches slower under the same load is taken back, and not tried again soon.
    assert windows(controller, clock, PATIENCE + 1, 2, 40) == ["down"]
    assert controller.split_samples == 256
    assert windows(controller, clock, SETTLE + 1, 4, 40) == ["back"]
    assert controller.split_samples == 512
    assert windows(controller, clock, BARRED - SETTLE - 2, 2, 40) == []


def test_the_controller_never_leaves_its_range() -> None:
    clock = Clock()
    controller = SplitController(limit_ms=10, split_samples=128, least=64, most=256, clock=clock)
    assert windows(controller, clock, 60, 0.1, 20) == ["down"]
    assert controller.split_samples == 64
