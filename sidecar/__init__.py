"""The CPU-node process: holds shards, answers subrequests, and is controlled over gRPC (docs/sidecar.md)."""
