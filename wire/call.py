"""How a model is called: its parameters as `model.yaml` keeps them, and where in the arguments of a call each tensor lies."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from inspect import Parameter, Signature, signature
from typing import Any

from sidepool.wire.errors import LookupRejected

_STARS: dict[Any, str] = {Parameter.VAR_POSITIONAL: "*", Parameter.VAR_KEYWORD: "**"}


def parameter_names(forward: Callable[..., Any]) -> tuple[str, ...]:
    """The parameters of a model's `forward` in order, those that take what is left over as `*name` and `**name`."""
    return tuple(_STARS.get(p.kind, "") + p.name for p in signature(forward).parameters.values())


def call_signature(parameters: Sequence[str]) -> Signature:
    """What `parameter_names` gave, to bind calls with. Everything may be left out: the tensors found tell what is missing."""
    found: list[Parameter] = []
    kind: Any = Parameter.POSITIONAL_OR_KEYWORD
    for name in parameters:
        if name.startswith("*"):
            kind = Parameter.VAR_KEYWORD if name.startswith("**") else Parameter.VAR_POSITIONAL
            found.append(Parameter(name.lstrip("*"), kind))
            kind = Parameter.KEYWORD_ONLY
        else:
            found.append(Parameter(name, kind, default=None))
    return Signature(found)


def call_leaves(how: Signature, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What one call gives, by where it lies: `user`, `batch['ids'][0]`, … An argument of None counts as left out.

    The order of keywords and dictionary keys does not matter, as it does not to a model. Raises `LookupRejected`.
    """
    from torch.utils import _pytree as pytree

    try:
        bound = how.bind(*args, **kwargs).arguments
    except TypeError as e:
        raise LookupRejected(f"inputs: {e}; allowed: {', '.join(how.parameters)}") from e
    leaves = ((name + pytree.keystr(path), leaf) for name, value in bound.items() for path, leaf in _leaves(pytree, value))
    return {place: leaf for place, leaf in leaves if leaf is not None}


def _leaves(pytree: Any, value: Any) -> Sequence[tuple[Any, Any]]:
    found: Sequence[tuple[Any, Any]] = pytree.tree_flatten_with_path(value)[0]
    return found
