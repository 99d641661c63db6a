"""PyTorch model → cut → plan → artifact. torch is imported on first use, so that `sidepool --help` costs none of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sidepool.partition.partitioner import partition_model
    from sidepool.partition.report import PartitionReport

__all__ = ["PartitionReport", "partition_model"]


def __getattr__(name: str) -> Any:
    if name == "partition_model":
        from sidepool.partition.partitioner import partition_model

        return partition_model
    if name == "PartitionReport":
        from sidepool.partition.report import PartitionReport

        return PartitionReport
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
