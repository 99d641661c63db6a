"""The dense half of a partitioned model, on the CPU or on one GPU. torch is imported when a graph is loaded."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from sidepool.client.linear_layers import pack_linear_layers, rounded_up
from sidepool.wire.errors import ConfigError, LookupRejected
from sidepool.wire.model import FixedSource, ModelSpec
from sidepool.wire.torch_program import Program, load_program

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# Larger batches gain nothing from a captured graph: their kernels outlast their launches by far.
MAX_CAPTURED_BATCH = 4096
# Side-stream calls before a capture, so that lazily created handles and workspaces exist (torch's own examples use 3).
WARMUP_CALLS = 3
# Batch sizes up to the largest take 13 graphs; more than a few such sets means shapes that never come back.
MAX_CAPTURED_GRAPHS = 64

_log = logging.getLogger("sidepool.client")


class DenseGraph:
    """`dense.pt2`: pooled vectors, sequences and model inputs in, model outputs out. On the CPU for any thread, else one at a time.

    On the CPU, large linear layers are oneDNN's, and batches are computed as one of few sizes (linear_layers.py). On CUDA a call
    runs on a stream of its own. Where the batch is the only size that varies, whole batches of 1, 2, 4, … are captured as CUDA
    graphs at first use. In either case samples beyond the real batch are stale rows whose results are cut off, which the cut
    allows because no operator behind it mixes samples.
    """

    def __init__(
        self,
        model: ModelSpec,
        directory: Path,
        *,
        device: str = "cpu",
        threads: int | None = None,
        max_captured_batch: int = MAX_CAPTURED_BATCH,
    ) -> None:
        """Load the dense program of `model` from `directory` to `device` (`cpu`, `cuda`, `cuda:N`).

        threads: torch's intra-op threads, for the whole process; None leaves torch's default.
        max_captured_batch: largest CUDA graph; 0 captures none. Raises `ShardCorrupt` and `ConfigError`.
        """
        import torch

        self._torch = torch
        self.device = torch.device(device)
        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise ConfigError(f"device: found {device!r}, but torch sees no CUDA device; allowed: cpu")
        if threads is not None:
            torch.set_num_threads(threads)
        self.output_dtype = model.dense.pooled_dtype
        """What a lookup's results must be."""
        self._dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[self.output_dtype]
        self._inputs = model.dense.inputs
        sources = {f.feature: f.source for f in model.features}
        self._bag_ids = [_bag_ids(sources[name]) for name in model.dense.sequences]
        file, crc32c = directory / model.dense.file, model.dense.crc32c
        self._run: Callable[[Sequence[Tensor]], tuple[Tensor, ...]]
        if self.device.type == "cuda":
            # Numbers of ids hardly ever come back.
            largest = 0 if None in self._bag_ids else max_captured_batch
            self._run = _CudaRunner(load_program(file, self.device, crc32c=crc32c), self.device, largest)
        else:
            self._run = _CpuRunner(file, crc32c, only_batch_varies=None not in self._bag_ids and not model.dense_reads_bags)

    def host_buffer(self, rows: int, columns: int) -> Tensor:
        """A `[rows, columns]` host tensor of what the program takes, for the lookup to write into; pinned where a GPU follows."""
        return self._torch.empty((rows, columns), dtype=self._dtype, pin_memory=self.device.type == "cuda")

    def as_array(self, rows: Tensor) -> NDArray[Any]:
        """A host tensor of what the program takes as a lookup's `out`, in the same memory."""
        array: NDArray[Any] = (rows.view(self._torch.uint16) if self.output_dtype == "bf16" else rows).numpy()
        return array

    def as_tensor(self, rows: NDArray[Any]) -> Tensor:
        """A lookup's results as what the program takes, in the same memory."""
        return self._torch.from_numpy(rows).view(self._dtype)

    def run(self, pooled: Tensor, sequences: Sequence[NDArray[Any]], inputs: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """The model's outputs, on the host and owned by the caller.

        pooled: `[batch, Σ dim]` of the program's `pooled_dtype`. sequences: per feature of `DenseProgram.sequences`,
        `[ids of all bags, dim]`, as a lookup gives them. inputs: the model's
        inputs by name. All on the host; they may be reused once this returns.
        Raises `LookupRejected` for an input that is missing or does not fit the graph.
        """
        torch, batch = self._torch, pooled.shape[0]
        tensors = [pooled]
        for rows, bag_ids in zip(sequences, self._bag_ids, strict=True):
            tensors.append(self.as_tensor(rows if bag_ids is None else rows.reshape(batch, bag_ids, rows.shape[1])))
        for name in self._inputs:
            if name not in inputs:
                raise LookupRejected(f"{name}: missing; found the inputs {sorted(inputs)}")
            tensors.append(inputs[name])
        with torch.inference_mode():
            try:
                return self._run(tensors)
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, TypeError, IndexError) as e:
                found = ", ".join(f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}" for t in tensors)
                raise LookupRejected(f"inputs: found {found}; they do not fit the dense graph: {e}") from e


def _bag_ids(source: object) -> int | None:
    return source.end - source.begin if isinstance(source, FixedSource) else None


class _CpuRunner:
    """Calls the program; where it has layers of oneDNN's, as one of few sizes of batch."""

    def __init__(self, file: Path, crc32c: int | None, *, only_batch_varies: bool) -> None:
        packed: list[int] = []
        self._program = load_program(file, crc32c=crc32c, rewrite=lambda graph: packed.append(pack_linear_layers(graph)))
        self._rounds_up = only_batch_varies and packed[0] > 0

    def __call__(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        batch = tensors[0].shape[0]
        rows = rounded_up(batch) if self._rounds_up else batch
        if rows == batch or any(t.dim() == 0 or t.shape[0] != batch for t in tensors):
            return tuple(self._program(*tensors))
        outputs = self._program(*(_with_rows(t, rows) for t in tensors))
        if any(out.dim() == 0 or out.shape[0] != rows for out in outputs):
            return tuple(self._program(*tensors))  # not what samples have
        return tuple(out[:batch] for out in outputs)


def _with_rows(tensor: Tensor, rows: int) -> Tensor:
    """`tensor` with so many rows, more than it has: numbers that lie behind it in its memory, or zeros (good as ids) in a copy."""
    if tensor.is_contiguous() and tensor.is_floating_point():
        end = tensor.storage_offset() + rows * tensor.stride(0)
        if end * tensor.element_size() <= tensor.untyped_storage().nbytes():
            return tensor.as_strided((rows, *tensor.shape[1:]), tensor.stride())
    longer = tensor.new_zeros((rows, *tensor.shape[1:]))
    longer[: len(tensor)] = tensor
    return longer


class _CudaRunner:
    """Copies in, computes and copies out on one stream; replays captured graphs where shapes allow it."""

    def __init__(self, program: Program, device: torch.device, max_captured_batch: int) -> None:
        import torch

        self._torch = torch
        self._program = program
        self._device = device
        self._max_captured_batch = max_captured_batch
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._captured: dict[tuple[object, ...], _Captured | None] = {}

    def __call__(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        torch, batch = self._torch, tensors[0].shape[0]
        with torch.cuda.stream(self._stream):
            captured = self._capture_for(batch, tensors)
            if captured is None:
                outputs = self._program(*(t.to(self._device, non_blocking=True) for t in tensors))
            else:
                for static, given in zip(captured.inputs, tensors, strict=True):
                    static[:batch].copy_(given, non_blocking=True)
                captured.graph.replay()
                outputs = tuple(out[:batch] for out in captured.outputs)
            results = tuple(torch.empty(out.shape, dtype=out.dtype, pin_memory=True) for out in outputs)
            for result, out in zip(results, outputs, strict=True):
                result.copy_(out, non_blocking=True)
        self._stream.synchronize()
        return results

    def _capture_for(self, batch: int, tensors: Sequence[Tensor]) -> _Captured | None:
        """The graph for the next power of two, captured now if need be; None where the call must run as it is."""
        if not 0 < batch <= self._max_captured_batch or any(t.dim() == 0 or t.shape[0] != batch for t in tensors):
            return None
        bucket = 1 << (batch - 1).bit_length()
        key = (bucket, *((t.dtype, t.shape[1:]) for t in tensors))
        if key not in self._captured and len(self._captured) < MAX_CAPTURED_GRAPHS:
            self._captured[key] = self._capture(bucket, tensors)
        return self._captured.get(key)

    def _capture(self, bucket: int, tensors: Sequence[Tensor]) -> _Captured | None:
        torch = self._torch
        inputs = [torch.zeros((bucket, *t.shape[1:]), dtype=t.dtype, device=self._device) for t in tensors]
        for _ in range(WARMUP_CALLS):
            self._program(*inputs)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self._stream):
                outputs = self._program(*inputs)
        except RuntimeError as e:  # an operator that waits for the device cannot be captured
            _log.warning("batches up to %d run without a CUDA graph: %s", bucket, e)
            return None
        if any(out.dim() == 0 or out.shape[0] != bucket for out in outputs):
            return None
        return _Captured(graph, inputs, tuple(outputs))


class _Captured:
    """One CUDA graph with the device tensors it reads and writes."""

    def __init__(self, graph: torch.cuda.CUDAGraph, inputs: list[Tensor], outputs: tuple[Tensor, ...]) -> None:
        self.graph = graph
        self.inputs = inputs
        self.outputs = outputs
