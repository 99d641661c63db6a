"""FBGEMM's CPU build, where there is one: what some tests compare with. Without it, `needs_fbgemm` tests are skipped."""

from __future__ import annotations

import importlib.util
import warnings

import pytest

INSTALLED = importlib.util.find_spec("fbgemm_gpu") is not None
needs_fbgemm = pytest.mark.skipif(not INSTALLED, reason="fbgemm-gpu-cpu is not installed; it has wheels for x86-64 only")

if INSTALLED:
    with warnings.catch_warnings():
        # It registers operators that this build of torch has no device for, and speaks of optimizers that it leaves out.
        warnings.simplefilter("ignore")
        from fbgemm_gpu.split_embedding_configs import SparseType
        from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation, PoolingMode
        from fbgemm_gpu.split_table_batched_embeddings_ops_inference import IntNBitTableBatchedEmbeddingBagsCodegen
        from fbgemm_gpu.split_table_batched_embeddings_ops_training import ComputeDevice, SplitTableBatchedEmbeddingBagsCodegen
else:
    SparseType = EmbeddingLocation = PoolingMode = ComputeDevice = None
    IntNBitTableBatchedEmbeddingBagsCodegen = SplitTableBatchedEmbeddingBagsCodegen = None

__all__ = [
    "INSTALLED",
    "ComputeDevice",
    "EmbeddingLocation",
    "IntNBitTableBatchedEmbeddingBagsCodegen",
    "PoolingMode",
    "SparseType",
    "SplitTableBatchedEmbeddingBagsCodegen",
    "needs_fbgemm",
]
