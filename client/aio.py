"""`AsyncEmbeddingClient`: the same lookups for asyncio."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from sidepool.client.embedding import EmbeddingClient, PartsResult, Pooled
from sidepool.wire.plan import Plan
from sidepool.wire.plan_source import PlanSource

# Lookups under way at once; a thread that waits in the native core costs nothing but its stack.
DEFAULT_THREADS = 16

T = TypeVar("T")


class AsyncEmbeddingClient:
    """`EmbeddingClient` with awaitable calls: each runs in a bounded pool of threads, in the core, without the GIL.

    Cancelling an await does not stop the lookup, which ends within its deadline; until then `out` is still written to.
    """

    @classmethod
    async def connect(cls, plan: Plan | Path | str | PlanSource, *, threads: int = DEFAULT_THREADS, **options: Any) -> Self:
        """As `EmbeddingClient.connect`, whose `options` these are; at most `threads` lookups run at once, more wait."""
        client = await asyncio.to_thread(partial(EmbeddingClient.connect, plan, **options))
        return cls(client, threads)

    def __init__(self, client: EmbeddingClient, threads: int = DEFAULT_THREADS) -> None:
        """Takes over `client`: closing this closes it."""
        self._client = client
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="sidepool-lookup")

    @property
    def plan(self) -> Plan:
        return self._client.plan

    async def lookup(self, *args: Any, **kwargs: Any) -> Pooled:
        """See `EmbeddingClient.lookup`."""
        return await self._run(self._client.lookup, *args, **kwargs)

    async def lookup_fixed(self, *args: Any, **kwargs: Any) -> Pooled:
        """See `EmbeddingClient.lookup_fixed`."""
        return await self._run(self._client.lookup_fixed, *args, **kwargs)

    async def lookup_parts(self, *args: Any, **kwargs: Any) -> PartsResult:
        """See `EmbeddingClient.lookup_parts`."""
        return await self._run(self._client.lookup_parts, *args, **kwargs)

    def stats(self) -> dict[str, Any]:
        return self._client.stats()

    async def close(self) -> None:
        """Close the lanes; lookups that wait fail with `TransportError`. Idempotent."""
        await asyncio.to_thread(self._client.close)
        self._pool.shutdown(wait=True)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.close()

    async def _run(self, call: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, partial(call, *args, **kwargs))
