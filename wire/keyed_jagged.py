"""TorchRec's `KeyedJaggedTensor` as plain tensors, without importing TorchRec: told by its class's name.

A keyed jagged tensor holds, per key, a bag of ids for every sample. Both who partitions a model and who calls it see it as
`{key: {"values": [ids], "offsets": [batch + 1], "weights": [ids] or absent}}`: torch's embedding bags with a last offset.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sidepool.wire.errors import LookupRejected

if TYPE_CHECKING:
    from torch import Tensor


def is_keyed_jagged(value: object) -> bool:
    """Whether `value` is a TorchRec `KeyedJaggedTensor`."""
    kind = type(value)
    return kind.__name__ == "KeyedJaggedTensor" and kind.__module__.startswith("torchrec.")


def plain_tensors(value: Any) -> dict[str, dict[str, Tensor]]:
    """The tensors of a `KeyedJaggedTensor` by key; ids and weights are views of its own.

    Raises `LookupRejected` where keys have batch sizes of their own, which one batch of samples cannot have.
    """
    if value.variable_stride_per_key() or value.inverse_indices_or_none() is not None:
        raise LookupRejected("KeyedJaggedTensor: found a batch size per key; allowed: one for all keys")
    plain = {}
    for key, jagged in value.to_dict().items():
        # One dtype, as torch's embedding bag wants them.
        tensors = {"values": jagged.values(), "offsets": jagged.offsets().to(jagged.values().dtype)}
        weights = jagged.weights_or_none()
        plain[key] = tensors if weights is None else tensors | {"weights": weights}
    return plain
