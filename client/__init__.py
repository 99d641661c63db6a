"""The embedded library: pooled embedding vectors from sidecars, scores from Triton, a partitioned model in one process."""

from sidepool.client.aio import AsyncEmbeddingClient
from sidepool.client.embedding import EmbeddingClient, PartsResult, Pooled
from sidepool.client.lanes import TlsFiles
from sidepool.client.pipeline import Pipeline
from sidepool.client.scoring import ScoreClient
from sidepool.client.timings import SidecarTimings, Timings

__all__ = [
    "AsyncEmbeddingClient",
    "EmbeddingClient",
    "PartsResult",
    "Pipeline",
    "Pooled",
    "ScoreClient",
    "SidecarTimings",
    "Timings",
    "TlsFiles",
]
