"""MLPerf LoadGen as the generator: its Server and Offline scenarios against a model in Triton, with its result files.

LoadGen decides what is sent when and measures by itself; requests go through tritonclient, as a submission's would.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tritonclient.grpc as tritonclient

from sidepool.bench.traffic import CLIENT_TIMEOUT_S, Arrays, infer_inputs
from sidepool.client.arguments import deadline_ns
from sidepool.client.scoring import translate
from sidepool.wire.errors import ConfigError, TransportError

SCENARIOS = ("server", "offline")
# Of DLRM in MLPerf Inference's data centre division: 60 ms for 99 % of the queries.
LATENCY_MS, PERCENTILE = 60.0, 0.99
# MLPerf's least duration is ten minutes; here a run is as long as it is asked to be, and the summary says INVALID where that or
# anything else falls short of the rules.
SUMMARY = "mlperf_log_summary.txt"


@dataclass(frozen=True)
class MlperfRun:
    """Where LoadGen's files are, what its summary says, and requests that failed, by error code (LoadGen knows no errors)."""

    directory: Path
    valid: bool
    summary: dict[str, str]
    """`Scenario`, `Result is`, `Samples per second` and the rest, by name."""
    failed: dict[str, int]


class _Served:
    """The system under test: the requests of a model, asked through one client."""

    def __init__(self, client: Any, model: str, requests: Sequence[Arrays], deadline_ms: float | None, loadgen: Any) -> None:
        self._client, self._model, self._loadgen = client, model, loadgen
        self.inputs = [infer_inputs(arrays) for arrays in requests]
        # A server that does not answer at all must not hang LoadGen, which waits for every sample.
        self._options: dict[str, float] = {"client_timeout": CLIENT_TIMEOUT_S}
        if deadline_ms is not None:
            self._options["timeout"] = max(1, deadline_ns(deadline_ms) // 1000)
        self._lock = threading.Lock()
        self.failed: Counter[str] = Counter()

    def issue(self, samples: Sequence[Any]) -> None:
        """LoadGen's thread: send, do not wait."""
        for sample in samples:
            try:
                self._client.async_infer(self._model, self.inputs[sample.index], self._complete(sample.id), **self._options)
            except Exception as e:  # whatever the client raises, LoadGen waits for an answer
                self._complete(sample.id)(None, e)

    def flush(self) -> None:
        """Nothing is held back."""

    def _complete(self, sample_id: int) -> Any:
        def complete(result: Any, error: Exception | None) -> None:
            if error is not None:
                with self._lock:
                    self.failed[translate(error, self._model).code] += 1
            # LoadGen reads the scores in accuracy mode only.
            self._loadgen.QuerySamplesComplete([self._loadgen.QuerySampleResponse(sample_id, 0, 0)])

        return complete


def run_mlperf(
    address: str,
    model: str,
    requests: Sequence[Arrays],
    *,
    scenario: str,
    rate: float,
    seconds: float,
    directory: Path,
    latency_ms: float = LATENCY_MS,
    deadline_ms: float | None = None,
) -> MlperfRun:
    """One run of LoadGen against `model` of the Triton at `address`; a sample is one of `requests`.

    scenario: `server`: Poisson arrivals of `rate` queries per second, of one sample each; `offline`: all samples at once, `rate`
    times `seconds` of them. directory: where LoadGen writes `mlperf_log_summary.txt`, `mlperf_log_detail.txt` and the rest.
    latency_ms: the limit of the server scenario, for 99 % of the queries. Raises `ConfigError`, `TransportError`.
    """
    try:
        import mlperf_loadgen as loadgen
    except ImportError as e:
        raise ConfigError(f"mlperf: LoadGen is not installed ({e}); pip install mlcommons-loadgen") from e
    if scenario not in SCENARIOS:
        raise ConfigError(f"mlperf: found {scenario!r}; allowed: {', '.join(SCENARIOS)}")
    directory.mkdir(parents=True, exist_ok=True)
    settings, logs = _settings(loadgen, scenario, rate, seconds, latency_ms), loadgen.LogSettings()
    logs.log_output.outdir = str(directory)
    logs.log_output.copy_summary_to_stdout = False
    logs.enable_trace = False
    with tritonclient.InferenceServerClient(address) as client:
        served = _Served(client, model, requests, deadline_ms, loadgen)
        try:
            client.infer(model, served.inputs[0])
        except Exception as e:
            raise TransportError(str(translate(e, f"Triton at {address}, model {model!r}"))) from e
        system = loadgen.ConstructSUT(served.issue, served.flush)
        library = loadgen.ConstructQSL(len(requests), len(requests), lambda indices: None, lambda indices: None)
        try:
            loadgen.StartTestWithLogSettings(system, library, settings, logs)
        finally:
            loadgen.DestroyQSL(library)
            loadgen.DestroySUT(system)
    summary = read_summary(directory / SUMMARY)
    valid = summary.get("Result is") == "VALID" and not served.failed
    return MlperfRun(directory, valid, summary, dict(served.failed))


def _settings(loadgen: Any, scenario: str, rate: float, seconds: float, latency_ms: float) -> Any:
    settings = loadgen.TestSettings()
    settings.mode = loadgen.TestMode.PerformanceOnly
    settings.min_duration_ms = int(seconds * 1000)
    settings.min_query_count = 1
    if scenario == "server":
        settings.scenario = loadgen.TestScenario.Server
        settings.server_target_qps = rate
        settings.server_target_latency_ns = int(latency_ms * 1e6)
        settings.server_target_latency_percentile = PERCENTILE
    else:
        settings.scenario = loadgen.TestScenario.Offline
        settings.offline_expected_qps = rate
    return settings


def read_summary(path: Path) -> dict[str, str]:
    """The `name : value` lines of LoadGen's summary."""
    pairs = (line.split(":", 1) for line in path.read_text(encoding="utf-8").splitlines() if ":" in line)
    return {name.strip(): value.strip() for name, value in pairs}
