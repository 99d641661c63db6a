"""The Prometheus endpoint: reads the engines' counters when scraped (docs/metrics.md), keeps nothing itself."""

from __future__ import annotations

import logging
import socket
import sys
import threading
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from itertools import accumulate
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler

import prometheus_client
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import ThreadingWSGIServer
from prometheus_client.registry import Collector

import sidepool
from sidepool import _native
from sidepool.sidecar import logs
from sidepool.sidecar.config import join_endpoint, split_endpoint
from sidepool.sidecar.moving import Mover
from sidepool.sidecar.serving import Serving, State
from sidepool.wire.errors import ConfigError

PREFIX = "sidepool_sidecar_"
# The engine number under which `stats()` sums up the lanes that have closed.
CLOSED = -1

# A scraper sends its request at once; whoever does not holds a thread for no longer than this.
SILENCE_S = 5.0
# A few scrapers, and strangers besides; each connection costs a thread.
MAX_CONNECTIONS = 64

Label = tuple[str, ...]

_TABLE_COUNTERS = {
    "table_lookups": ("lookups", "Features pooled from the table"),
    "table_rows": ("rows", "Rows read"),
    "table_read_bytes": ("bytes", "Row bytes read"),
    "table_out_of_range": ("out_of_range", "Ids outside the table, whatever its policy"),
}
_LANE_COUNTERS = {
    "lane_received_frames": ("received", "Request frames"),
    "lane_sent_frames": ("sent", "Response frames"),
    "lane_request_bytes": ("request_bytes", "Bytes of request frames"),
    "lane_response_bytes": ("response_bytes", "Bytes of response frames"),
    "credit_waits": ("credit_waits", "Times a response waited for room at the ranker"),
    "lane_late_bytes": ("late_bytes", "Response bytes not sent because their deadline had passed"),
}


class SidecarCollector(Collector):
    """Turns `stats()` into Prometheus metrics."""

    def __init__(self, serving: Serving, mover: Mover) -> None:
        self._serving = serving
        self._mover = mover

    def collect(self) -> Iterator[Metric]:
        stats = self._serving.server.stats()
        yield from self._identity(stats)
        yield from self._tables(stats)
        yield from _engines(stats["engines"])
        yield from _lanes(stats["lanes"])
        move = self._mover.counters()
        yield _gauge("move_done_bytes", "Row bytes of a new plan that are here", {(): move.done_bytes}, [])
        yield _gauge("move_total_bytes", "Row bytes of the new plan that is on its way here, else 0", {(): move.total_bytes}, [])
        statuses: dict[Label, float] = {(code,): n for code, n in stats["statuses"].items()}
        yield _counter("subrequests", "Subrequests answered", statuses, ["code"])
        yield _histogram("queue_seconds", "Time from a subrequest's arrival to its start", stats["queue_us"])
        yield _histogram("pool_seconds", "Time to gather and pool a subrequest", stats["pool_us"])

    def _identity(self, stats: dict[str, Any]) -> Iterator[Metric]:
        build = (sidepool.__version__, str(_native.WIRE_VERSION), _native.simd_level())
        yield _gauge("build_info", "Version in use", {build: 1}, ["version", "wire_version", "simd"])
        present = self._serving.state
        yield _gauge("state", "1 for the present state", {(str(s),): int(s is present) for s in State}, ["state"])
        yield _gauge("plan_epoch", "Plan epoch being served, 0 before the first", {(): stats["epoch"]}, [])
        yield _gauge("in_flight", "Subrequests accepted and not yet answered", {(): self._serving.server.in_flight()}, [])

    def _tables(self, stats: dict[str, Any]) -> Iterator[Metric]:
        published = self._serving.published
        if published is None:
            return
        plan, held = published.plan, published.tables
        counted = {entry["table"]: entry for entry in stats["tables"]}
        sizes: dict[Label, float] = defaultdict(int)
        ahead: dict[Label, float] = {}
        sums: dict[str, dict[Label, float]] = {name: defaultdict(int) for name in _TABLE_COUNTERS}
        for i, shard in plan.held_by(plan.sidecar_index[self._serving.name]):
            label = (plan.tables[i].name,)
            sizes[label] += shard.bytes(plan.tables[i])
            # A scrape may fall between a publication and the engines' taking notice: what has no counters yet is left out.
            if (entry := counted.get(plan.first_shard[i] + shard.number)) is not None:
                ahead[label] = entry["rows_ahead"]
                for name, (key, _) in _TABLE_COUNTERS.items():
                    sums[name][label] += entry[key]
        for name, (_, text) in _TABLE_COUNTERS.items():
            yield _counter(name, text, sums[name], ["table"])
        yield _gauge("table_rows_ahead", "Rows between the start of a row's fetch and its use", ahead, ["table"])
        yield _gauge("table_bytes", "Row bytes of the table", sizes, ["table"])
        yield _gauge("resident_bytes", "Row bytes held", {(): held.bytes}, [])
        yield _gauge("huge_page_bytes", "Row bytes held in huge-page memory", {(): held.huge_bytes}, [])


class _Handler(WSGIRequestHandler):
    """Answers one scrape. A peer that says nothing for `timeout` seconds is cut off (socketserver.StreamRequestHandler)."""

    timeout = SILENCE_S

    def log_message(self, format: str, *args: Any) -> None:
        """Scrapes are not events."""


class _BoundedServer(ThreadingWSGIServer):
    """A thread per connection, at most `MAX_CONNECTIONS`; a further peer is hung up on."""

    # socketserver's 5 would make a burst of scrapers wait for TCP's retransmissions.
    request_queue_size = MAX_CONNECTIONS

    def __init__(self, host: str, port: int, registry: prometheus_client.CollectorRegistry) -> None:
        self.address_family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        self._free = threading.BoundedSemaphore(MAX_CONNECTIONS)
        super().__init__((host, port), _Handler)
        self.set_app(prometheus_client.make_wsgi_app(registry))

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._free.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """What a peer sends, or does not, must not fill the log."""
        logs.log(logging.DEBUG, "scrape failed", peer=str(client_address), error=repr(sys.exception()))


class MetricsServer:
    """The HTTP server of the endpoint, on daemon threads of its own."""

    def __init__(self, endpoint: str, serving: Serving, mover: Mover) -> None:
        """Bind `endpoint`; raises `ConfigError` when it is taken."""
        registry = prometheus_client.CollectorRegistry()
        registry.register(SidecarCollector(serving, mover))
        host, port = split_endpoint(endpoint)
        try:
            self._server = _BoundedServer(host, port, registry)
        except OSError as e:
            raise ConfigError(f"listen.metrics: found {endpoint!r}: {e.strerror or e}; allowed: a free host:port") from e
        self._thread = threading.Thread(target=self._server.serve_forever, name="metrics", daemon=True)
        self._thread.start()
        self.address = join_endpoint(host, self._server.server_port)
        """`host:port` actually bound."""

    def close(self) -> None:
        """Stop answering and close the port."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _engines(engines: Iterable[dict[str, int]]) -> Iterator[Metric]:
    rows: dict[Label, dict[str, int]] = {(str(i),): engine for i, engine in enumerate(engines)}
    for key, text in (("queued", "Subrequests waiting"), ("in_flight", "Subrequests being served")):
        yield _gauge(f"engine_{key}", text, {label: e[key] for label, e in rows.items()}, ["engine"])
    counted = {
        "served": "Subrequests served",
        "shed": "Subrequests refused because their deadline could not be met",
        "shed_on_arrival": "Those of them that were refused before they queued",
        "helped": "Pieces pooled of other engines' subrequests",
    }
    for key, text in counted.items():
        yield _counter(f"engine_{key}", text, {label: e[key] for label, e in rows.items()}, ["engine"])
    busy: dict[Label, float] = {label: e["busy_ns"] / 1e9 for label, e in rows.items()}
    yield _counter("engine_busy_seconds", "Time spent on subrequests", busy, ["engine"])


def _lanes(lanes: Iterable[dict[str, Any]]) -> Iterator[Metric]:
    live: dict[Label, float] = defaultdict(int)
    sums: dict[str, dict[Label, float]] = {name: defaultdict(int) for name in _LANE_COUNTERS}
    for lane in lanes:
        label = (lane["kind"],)
        live[label] += lane["engine"] != CLOSED
        for name, (key, _) in _LANE_COUNTERS.items():
            sums[name][label] += lane[key]
    yield _gauge("lanes", "Lanes open", live, ["kind"])
    for name, (_, text) in _LANE_COUNTERS.items():
        yield _counter(name, text, sums[name], ["kind"])


def _gauge(name: str, text: str, values: Mapping[Label, float], labels: list[str]) -> Metric:
    family = GaugeMetricFamily(PREFIX + name, text, labels=labels)
    for label, value in values.items():
        family.add_metric(label, value)
    return family


def _counter(name: str, text: str, values: Mapping[Label, float], labels: list[str]) -> Metric:
    family = CounterMetricFamily(PREFIX + name, text, labels=labels)
    for label, value in values.items():
        family.add_metric(label, value)
    return family


def _histogram(name: str, text: str, histogram: dict[str, Any]) -> Metric:
    """From counts per bound in µs to Prometheus' cumulative buckets in seconds."""
    edges = [*(str(bound / 1e6) for bound in histogram["bounds"]), "+Inf"]
    buckets = list(zip(edges, accumulate(histogram["counts"]), strict=True))
    family = HistogramMetricFamily(PREFIX + name, text)
    family.add_metric([], buckets, histogram["sum"] / 1e6)
    return family
