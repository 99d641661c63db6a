"""Lookups as a load: on sidecars directly, or on shards in this process (`lane="local"`), from native threads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sidepool import _native
from sidepool.bench.load.target import OUTCOMES, SPIN_US, Driver, check_at_once
from sidepool.client import EmbeddingClient, arguments
from sidepool.client.arguments import Part
from sidepool.wire.errors import ConfigError, Status

# Lookups under way at once: the slots that a lane has at most, so more could not be under way at one sidecar.
CALLERS = 64


class LookupTarget:
    """An `EmbeddingClient`, and the distinct lookups that it is asked; results are fp32."""

    def __init__(
        self,
        client: EmbeddingClient,
        parts: Sequence[Part],
        *,
        callers: int = CALLERS,
        deadline_ms: float = 1000.0,
        priority: int = 0,
        spin_us: int = SPIN_US,
    ) -> None:
        """`client` stays the caller's. callers: lookups that may be under way at once, each a native thread.

        A lookup due while all are busy starts late: its latency shows that, and so does `generator.late_us`. deadline_ms: of each
        lookup, from when it was due; what could only start later ends with DEADLINE, unasked.
        Raises `ConfigError`, `LookupRejected`.
        """
        if not parts:
            raise ConfigError("parts: found none; allowed: at least one lookup")
        self._client, self._parts, self._spin_us = client, list(parts), spin_us
        self._callers = check_at_once("callers", callers)
        self._budget_ns = arguments.deadline_ns(deadline_ms)
        self._priority = arguments.priority_level(priority)

    @property
    def requests(self) -> int:
        return len(self._parts)

    def driver(self) -> Driver:
        try:
            return _native.lookup_load(
                self._client.native,
                self._parts,
                callers=self._callers,
                budget_ns=self._budget_ns,
                priority=self._priority,
                spin_us=self._spin_us,
            )
        except TypeError as fault:
            raise arguments.explain_parts(self._parts, len(self._client.plan.features), fault) from fault

    def status_name(self, status: int) -> str:
        return Status(status).name if status in list(Status) else OUTCOMES[status]

    def describe(self) -> dict[str, Any]:
        return {
            "kind": "lookups",
            "sidecars": len(self._client.plan.sidecars),
            "requests": len(self._parts),
            "callers": self._callers,
            "deadline_ms": self._budget_ns / 1e6,
        }

    def close(self) -> None:
        """The client is its owner's."""
