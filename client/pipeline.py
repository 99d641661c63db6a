"""`Pipeline`: a partitioned model in one process, for tests and notebooks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from sidepool.client.dense import DenseGraph
from sidepool.client.embedding import DEFAULT_DEADLINE_MS, EmbeddingClient
from sidepool.client.index_program import FeatureRouter
from sidepool.client.lanes import Lane
from sidepool.wire.call import call_leaves, call_signature
from sidepool.wire.errors import ConfigError, LookupRejected
from sidepool.wire.keyed_jagged import is_keyed_jagged, plain_tensors
from sidepool.wire.model import MODEL_FILE, PLAN_FILE, ModelSpec, TensorSpec, load_model
from sidepool.wire.plan import load_plan

if TYPE_CHECKING:
    from torch import Tensor

    Outputs = Tensor | tuple[Tensor, ...] | dict[str, Tensor]


class Pipeline:
    """Calls like the model that was partitioned: same inputs, same outputs. Used by one thread at a time."""

    @classmethod
    def open(cls, artifact_dir: Path | str, *, lane: Lane = "local", device: str = "cpu", **connect: Any) -> Self:
        """Open what partitioning wrote into `artifact_dir`.

        lane: `local` maps the artifact's shards into this process; any other lane connects to the running sidecars of its
        plan. device: where the dense graph runs. `connect`: more options of `EmbeddingClient.connect`.
        Raises `ConfigError`, `PlanError`, `ShardCorrupt`, `TransportError`.
        """
        root = Path(artifact_dir)
        directory = model_directory(root)
        plan = load_plan(directory / PLAN_FILE)
        model = load_model(directory / MODEL_FILE, plan)
        router = FeatureRouter(model, plan, directory)
        dense = DenseGraph(model, directory, device=device)
        if lane == "local":
            connect.setdefault("shards_dir", root)
        client = EmbeddingClient.connect(directory / PLAN_FILE, lane=lane, fixed_columns=router.fixed_columns, **connect)
        return cls(model, router, client, dense)

    def __init__(self, model: ModelSpec, router: FeatureRouter, client: EmbeddingClient, dense: DenseGraph) -> None:
        """Takes over `client`: closing the pipeline closes it."""
        self.model = model
        self._router = router
        self._client = client
        self._dense = dense
        self._signature = call_signature(model.parameters or [t.name for t in model.inputs])
        self._places = {t.argument or t.name: t for t in model.inputs}

    def __call__(self, *inputs: Any, deadline_ms: float = DEFAULT_DEADLINE_MS, **named_inputs: Any) -> Outputs:
        """The model's outputs, in a tensor, tuple or dict as the model returns them. Inputs as the original model takes them, by
        place or by name, tensors nested in lists, tuples, dicts or TorchRec's `KeyedJaggedTensor` included.

        Raises `LookupRejected` and whatever a lookup raises.
        """
        from torch.utils import _pytree

        leaves, tree = _pytree.tree_flatten((inputs, named_inputs), is_leaf=is_keyed_jagged)
        plain = [plain_tensors(leaf) if is_keyed_jagged(leaf) else leaf for leaf in leaves]
        found = call_leaves(self._signature, *_pytree.tree_unflatten(plain, tree))
        for place in (*found, *self._places):
            if place not in found or place not in self._places:
                what = place if place in found else f"no {place}"
                raise LookupRejected(f"inputs: found {what}; allowed: {', '.join(self._places)}")
        return self.run({spec.name: found[place] for place, spec in self._places.items()}, deadline_ms=deadline_ms)

    def run(self, inputs: Mapping[str, Any], *, deadline_ms: float = DEFAULT_DEADLINE_MS) -> Outputs:
        """As a call, with the inputs by their names in `self.model`."""
        tensors = {spec.name: _checked(inputs[spec.name], spec) for spec in self.model.inputs}
        part = self._router.route({name: t.numpy() for name, t in tensors.items()})
        result = self._client.lookup_parts([part], output_dtype=self._dense.output_dtype, deadline_ms=deadline_ms)
        if result.errors[0] is not None:
            raise result.errors[0]
        outputs = self._dense.run(self._dense.as_tensor(result.out), result.sequences, tensors)
        if self.model.returns == "dict":
            return dict(zip((t.name for t in self.model.outputs), outputs, strict=True))
        return outputs[0] if self.model.returns == "tensor" and len(outputs) == 1 else outputs

    def close(self) -> None:
        """Close the lanes. Idempotent."""
        self._client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def model_directory(root: Path) -> Path:
    """The one directory in an artifact that holds the model's description."""
    found = [root] if (root / MODEL_FILE).is_file() else sorted(path.parent for path in root.rglob(MODEL_FILE))
    if len(found) != 1:
        raise ConfigError(f"{root}: found {MODEL_FILE} in {[str(d) for d in found]}; allowed: an artifact, which holds exactly one")
    return found[0]


def _checked(leaf: Any, spec: TensorSpec) -> Tensor:
    """`leaf` as a host tensor, if it has the dtype and the fixed sizes of `spec`."""
    import torch

    if not isinstance(leaf, torch.Tensor):
        raise LookupRejected(f"{spec.name}: found {type(leaf).__name__}; allowed: a {spec.dtype} tensor")
    dtype = str(leaf.dtype).removeprefix("torch.")
    fits = leaf.dim() == len(spec.shape) and all(want in (-1, size) for want, size in zip(spec.shape, leaf.shape, strict=True))
    if dtype != spec.dtype or not fits:
        allowed = f"{spec.dtype} {list(spec.shape)}, -1 any size"
        raise LookupRejected(f"{spec.name}: found {dtype} {list(leaf.shape)}; allowed: {allowed}")
    return leaf.detach().cpu()
