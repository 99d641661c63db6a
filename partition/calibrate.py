"""`sidepool partition --calibrate FILE`: measure this machine's roofline with torch's own operators."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable

import torch
from torch.nn.functional import embedding_bag

from sidepool.partition.profiles import DEFAULT_CPU, DEFAULT_GPU, Processor, Profiles, shipped

# Per figure; the best run counts, since everything that disturbs a run makes it slower.
SECONDS, LEAST_RUNS = 0.4, 5
MATRIX = 1024  # 2 GFLOP per product: far above any launch
STREAM_VALUES = 1 << 26  # 256 MB: more than the caches of most machines
GATHER_ROWS, GATHER_DIM = 1 << 20, 64  # rows of 256 bytes out of the same 256 MB
BAG_IDS = 32  # so that what is written is little beside what is read


def calibrate() -> Profiles:
    """Profiles of this machine: its CPU as torch uses it with its present threads, and its first GPU if torch sees one."""
    cpu = f"{platform.node() or 'this machine'}: torch {torch.__version__}, {torch.get_num_threads()} threads"
    found = Profiles(cpu={"measured": _measure("cpu", cpu, shipped().cpu[DEFAULT_CPU])})
    if not torch.cuda.is_available():
        return found
    gpu = f"{torch.cuda.get_device_name(0)}: torch {torch.__version__}"
    return found.model_copy(update={"gpu": {"measured": _measure("cuda", gpu, shipped().gpu[DEFAULT_GPU])}})


def _measure(device: str, what: str, like: Processor) -> Processor:
    """`like` gives what torch cannot measure: watts, and the fixed cost of a lookup in a sidecar."""
    with torch.no_grad():
        # Results go into memory that exists: fresh pages cost many times the copy itself.
        square, product = torch.rand(2, MATRIX, MATRIX, device=device)
        stream = torch.ones(STREAM_VALUES, device=device)
        table = stream.view(GATHER_ROWS, GATHER_DIM)
        # Every row once: rows that come back would be read from a cache.
        ids = torch.randperm(GATHER_ROWS, device=device).view(-1, BAG_IDS)
        tiny = torch.rand(8, device=device)
        launch = _seconds(device, lambda: torch.relu(tiny), repeat=100)
        return Processor(
            flops_per_s=2 * MATRIX**3 / _seconds(device, lambda: torch.mm(square, square, out=product)),
            bytes_per_s=2 * stream.nbytes / _seconds(device, lambda: stream.mul_(1.0)),
            gather_bytes_per_s=ids.numel() * GATHER_DIM * 4 / _seconds(device, lambda: embedding_bag(ids, table, mode="sum")),
            launch_ns=launch * 1e9,
            lookup_ns=like.lookup_ns if device == "cpu" else launch * 1e9,
            watts=like.watts,
            source=f"measured on {what}; watts as of {like.source}",
        )


def _seconds(device: str, run: Callable[[], object], repeat: int = 1) -> float:
    best, runs = float("inf"), 0
    end = time.perf_counter() + SECONDS
    while runs < LEAST_RUNS or time.perf_counter() < end:
        begin = time.perf_counter()
        for _ in range(repeat):
            run()
        if device != "cpu":
            torch.cuda.synchronize()
        best = min(best, (time.perf_counter() - begin) / repeat)
        runs += 1
    return best
