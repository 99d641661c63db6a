"""The ranker: many Triton requests become one lookup and one dense forward pass, and are answered one by one."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sidepool.client.dense import DenseGraph
from sidepool.client.embedding import EmbeddingClient, PartsResult
from sidepool.client.index_program import FeatureRouter
from sidepool.triton_backend.admission import Admission
from sidepool.triton_backend.controller import SplitController
from sidepool.triton_backend.incoming import Incoming, Reader
from sidepool.triton_backend.settings import RankerParameters, Settings
from sidepool.triton_backend.splitting import SplitDense
from sidepool.triton_backend.stages import StageReporter, StageTimes
from sidepool.wire.errors import ConfigError, DeadlineExceeded, LookupRejected, SidepoolError
from sidepool.wire.etcd_members import EtcdMembers
from sidepool.wire.model import DEGRADED_OUTPUT, MODEL_FILE, PLAN_FILE, TensorSpec, load_model
from sidepool.wire.plan import OnMissingShard, Plan
from sidepool.wire.plan_source import FilePlanSource, PlanSource
from sidepool.wire.rdma import RdmaPath

# Asking Triton whether a request was cancelled is a message to the server process and back: 50 µs on an idle machine,
# milliseconds on a busy one. Triton itself drops requests that are cancelled while queued; only requests that cost tens
# of milliseconds are worth another question.
SAMPLES_WORTH_ASKING = 4096
# Buffers grow by doubling from here, so that steady traffic allocates nothing.
FIRST_BUFFER_ROWS = 512
# How far from the configured split_samples the online controller goes, as a factor: two steps each way.
SPLIT_RANGE = 4
# Batch sizes whose views are kept; more than a server sees in steady traffic, and under a megabyte.
MAX_VIEWS = 1024


class Ranker:
    """Owned and used by the thread in which Triton calls the model, except for the metrics thread it starts.

    It follows `plan.yaml` of its artifact, or the plan in etcd: where that is replaced, the next lookups are under the new plan.
    """

    def __init__(self, settings: Settings, pb_utils: Any) -> None:
        """Load the artifact and connect. Sidecars that are down do not fail this: they are connected when they come up."""
        import torch

        self._torch, self._pb = torch, pb_utils
        parameters = settings.parameters
        plan_file, coordination = settings.artifact / PLAN_FILE, settings.coordination
        source: PlanSource = FilePlanSource(plan_file) if coordination is None else coordination.plan_source(plan_file)
        self._members = None if coordination is None else EtcdMembers(coordination.connect(), coordination.prefix)
        plan = source.read()
        model = load_model(settings.artifact / MODEL_FILE, plan)
        router = FeatureRouter(model, plan, settings.artifact)
        self._reader = Reader(model, router, parameters.deadline_ms)
        if parameters.split_samples and model.dense_reads_bags:
            found = f"parameters: split_samples: found {parameters.split_samples}"
            raise ConfigError(f"{found}; allowed: 0, since the dense half reads ids, which differ in number from sample to sample")
        self._admission = Admission(parameters.max_ids)
        self._dense = DenseGraph(model, settings.artifact, device=settings.device, threads=parameters.torch_threads or None)
        on_cpu = None
        if parameters.gpu_min_samples and settings.device != "cpu":
            on_cpu = DenseGraph(model, settings.artifact, threads=parameters.torch_threads or None)
        self._split = SplitDense(
            self._dense,
            workers=parameters.workers,
            split_samples=parameters.split_samples,
            torch_threads=parameters.torch_threads,
            cpu=on_cpu,
            gpu_min_samples=parameters.gpu_min_samples,
        )
        self._controller = _controller(parameters)
        self._outputs = model.outputs
        self._names_degraded = DEGRADED_OUTPUT in settings.outputs
        self._warn_of_unnamed(plan)
        self._width = plan.out_dim
        # Zeroed, so that no request pays for the first touch of its pages.
        self._pooled = self._dense.host_buffer(FIRST_BUFFER_ROWS, self._width).zero_()
        # One pair of views per batch size seen: making them costs 10 µs, most of what one sample's tensors cost.
        self._views: dict[int, tuple[Any, NDArray[Any]]] = {}
        self._client = EmbeddingClient.connect(
            source,
            lane=parameters.lane,
            spin_us=parameters.spin_us,
            shards_dir=settings.shards,
            tls=settings.tls,
            require_all=False,
            rdma=RdmaPath(
                device=parameters.rdma_device,
                port=parameters.rdma_port,
                gid_index=parameters.rdma_gid_index,
                traffic_class=parameters.rdma_traffic_class,
            ),
            rdma_engines=parameters.rdma_engines,
            pooling=parameters.pooling,
            hedge_budget=parameters.hedge_budget,
            window_delay_us=parameters.window_delay_us,
            # What Triton hands over at once is bounded before anything is made of it, and nothing else is under way.
            max_ids=0,
            fixed_columns=router.fixed_columns,
            name=f"ranker {settings.name}",
            address_of=None if self._members is None else self._members.address,
        )
        self._times = StageTimes()
        self._reporter = StageReporter(self._times, model=settings.name, version=settings.version, pb_utils=pb_utils)

    def close(self) -> None:
        """Stop reporting and close every lane."""
        self._reporter.close()
        self._split.close()
        self._client.close()
        if self._members is not None:
            self._members.close()

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """One response per request, in order; a request that cannot be scored gets an error of its own. Never raises."""
        begin_ns = time.perf_counter_ns()
        responses: list[Any] = [None] * len(requests)
        accepted: list[Incoming] = []
        for position, request in enumerate(requests):
            try:
                incoming = self._reader.read(position, request)
                if incoming.samples >= SAMPLES_WORTH_ASKING and request.is_cancelled():
                    responses[position] = self._cancelled()
                else:
                    accepted.append(incoming)
            except Exception as e:
                responses[position] = self._refusal(e)
        accepted, refused = self._admission.sort(accepted)
        for incoming, error in refused:
            responses[incoming.position] = self._refusal(error)
        if accepted:
            try:
                self._score(accepted, responses, begin_ns)
            except Exception as e:
                for incoming in accepted:
                    responses[incoming.position] = self._refusal(e)
        return responses

    def _score(self, accepted: list[Incoming], responses: list[Any], begin_ns: int) -> None:
        """One lookup and one forward pass over `accepted`; fills their places in `responses`."""
        samples = sum(incoming.samples for incoming in accepted)
        if samples == 0:
            for incoming in accepted:
                responses[incoming.position] = self._answer([_empty(spec) for spec in self._outputs], 0, ())
            return
        pooled, pooled_array = self._pooled_rows(samples)
        inputs = self._merged_inputs(accepted)
        looked_up_ns = time.perf_counter_ns()
        # The longest budget: a short one must not fail its neighbours. Whoever's own budget has run out is told so below.
        result = self._client.lookup_parts(
            [incoming.part for incoming in accepted],
            pooled_array,
            deadline_ms=max(incoming.budget_ns for incoming in accepted) / 1e6,
            priority=max(incoming.priority for incoming in accepted),
            traceparent=next((incoming.traceparent for incoming in accepted if incoming.traceparent), None),
        )
        dense_ns = time.perf_counter_ns()
        outputs = self._split.run(pooled, result.sequences, inputs)
        out_ns = time.perf_counter_ns()
        self._admission.learn(samples, out_ns - begin_ns)
        self._respond(accepted, result, outputs, responses, out_ns - begin_ns)
        self._times.add(
            requests=len(accepted),
            samples=samples,
            tensors_in_ns=looked_up_ns - begin_ns,
            lookup=result.raw_timings,
            sidecars=result.sidecars,
            dense_ns=out_ns - dense_ns,
            tensors_out_ns=time.perf_counter_ns() - out_ns,
        )
        if self._controller is not None:
            self._adjust(self._controller, out_ns - begin_ns)

    def _adjust(self, controller: SplitController, elapsed_ns: int) -> None:
        step = controller.observe(elapsed_ns)
        if step is not None:
            self._pb.Logger.log_info(f"sidepool: split_samples {self._split.split_samples} -> {controller.split_samples} ({step})")
            self._split.split_samples = controller.split_samples
            self._times.add_adjustment(step)

    def _respond(
        self,
        accepted: list[Incoming],
        result: PartsResult,
        outputs: list[NDArray[Any]],
        responses: list[Any],
        elapsed_ns: int,
    ) -> None:
        """Hand every request its rows, or its error."""
        at = 0
        for incoming, error in zip(accepted, result.errors, strict=True):
            end = at + incoming.samples
            if error is None and elapsed_ns > incoming.budget_ns:
                error = DeadlineExceeded(f"scored after {elapsed_ns / 1e6:.1f} ms; the budget was {incoming.budget_ns / 1e6:g} ms")
            if error is not None:
                responses[incoming.position] = self._refusal(error)
            else:
                responses[incoming.position] = self._answer(
                    [output[at:end] for output in outputs], incoming.samples, result.degraded
                )
            at = end

    def _warn_of_unnamed(self, plan: Plan) -> None:
        if plan.on_missing_shard is OnMissingShard.DEGRADE and not self._names_degraded:
            self._pb.Logger.log_warn(
                f"sidepool: plan: on_missing_shard is degrade, but config.pbtxt declares no output {DEGRADED_OUTPUT!r}: "
                "callers are not told which features lost rows"
            )

    def _answer(self, outputs: list[NDArray[Any]], samples: int, degraded: Sequence[str]) -> Any:
        jagged = self._reader.jagged
        tensors = [
            self._pb.Tensor(spec.name, rows[None] if jagged else rows) for spec, rows in zip(self._outputs, outputs, strict=True)
        ]
        if self._names_degraded:
            names = ",".join(degraded).encode()
            tensors.append(self._pb.Tensor(DEGRADED_OUTPUT, np.full((1 if jagged else samples, 1), names, np.object_)))
        return self._pb.InferenceResponse(tensors)

    def _refusal(self, error: Exception) -> Any:
        """The error response; anything that sidepool did not raise on purpose is a defect and goes to Triton's log too."""
        triton = self._pb.TritonError
        if not isinstance(error, SidepoolError):
            self._pb.Logger.log_error(f"sidepool: {type(error).__name__}: {error}")
            error = SidepoolError(f"{type(error).__name__}: {error}")
        self._times.add_error(error.code)
        kind = (
            triton.INVALID_ARG if isinstance(error, LookupRejected) else triton.UNAVAILABLE if error.retryable else triton.INTERNAL
        )
        return self._pb.InferenceResponse(error=triton(f"[{error.code}] {error}", kind))

    def _cancelled(self) -> Any:
        self._times.add_error("CANCELLED")
        return self._pb.InferenceResponse(
            error=self._pb.TritonError("[CANCELLED] the caller gave up", self._pb.TritonError.CANCELLED)
        )

    def _pooled_rows(self, samples: int) -> tuple[Any, NDArray[Any]]:
        """The first `samples` rows of the buffer that lookups write into, as tensor and as array; grown by doubling."""
        views = self._views.get(samples)
        if views is None:
            if len(self._views) == MAX_VIEWS:
                self._views.clear()
            if samples > len(self._pooled):
                self._pooled = self._dense.host_buffer(1 << (samples - 1).bit_length(), self._width).zero_()
                self._views.clear()
            rows = self._pooled[:samples]
            views = self._views[samples] = (rows, self._dense.as_array(rows))
        return views

    def _merged_inputs(self, accepted: list[Incoming]) -> dict[str, Any]:
        """The dense program's inputs over all requests; a single request's are used where they lie."""
        from_numpy = self._torch.from_numpy
        if len(accepted) == 1:
            return {name: from_numpy(array) for name, array in accepted[0].inputs.items()}
        return {name: from_numpy(array) for name, array in self._reader.merged(accepted).items()}


def _controller(parameters: RankerParameters) -> SplitController | None:
    """None where nothing is to be adjusted: no limit, or nothing to split over."""
    if not parameters.limit_ms or not parameters.split_samples:
        return None
    return SplitController(
        limit_ms=parameters.limit_ms,
        split_samples=parameters.split_samples,
        least=max(1, parameters.split_samples // SPLIT_RANGE),
        most=parameters.split_samples * SPLIT_RANGE,
    )


def _empty(spec: TensorSpec) -> NDArray[Any]:
    """What a request without samples gets: an output without rows."""
    return np.empty([max(size, 0) for size in spec.shape], spec.dtype)
