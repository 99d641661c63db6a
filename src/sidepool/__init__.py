"""sidepool: embedding tables on CPU sidecars, the dense net in Triton."""

__version__ = "0.1.0"
