"""What partitioning writes for the ranker: `model.yaml`, beside `plan.yaml` and the programs it names.

The three parts of a partitioned model: *index* (ids from the model's inputs, on the ranker's CPU), *lookups*
(the plan's features) and *dense* (everything behind the pooled vectors).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from sidepool.wire.config import FormatVersion, Frozen, dump_yaml, load_yaml
from sidepool.wire.errors import PlanError
from sidepool.wire.plan import MAX_FEATURES, Name, Plan, Pooling

PLAN_FILE = "plan.yaml"
MODEL_FILE = "model.yaml"

TensorName = Annotated[str, Field(min_length=1, max_length=256)]
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.\-]+$")]
Checksum = Annotated[int, Field(ge=0, lt=1 << 32)]
Returns = Literal["tensor", "tuple", "dict"]
OutputDtype = Literal["fp32", "fp16", "bf16"]
"""What the results of a lookup are. Rows are added in fp32 and rounded once, to nearest even; fp16 ends at 65,504."""


class TensorSpec(Frozen):
    """A named input or output tensor. `shape` has -1 for the sizes that vary; the first -1 is the batch."""

    name: TensorName
    dtype: Literal["float32", "float16", "float64", "int64", "int32", "bool"]
    shape: tuple[int, ...]
    argument: str | None = None
    """Of an input: where it lies in a call of the model (`batch['ids'][0]`); None: it is the argument of its own name."""


class FixedSource(Frozen):
    """A feature with the same number of ids in every bag: columns `[begin, end)` of an id matrix `[batch, width]`.

    `end - begin` ids per bag. An input of shape `[batch]` counts as one column.
    """

    kind: Literal["fixed"] = "fixed"
    input: TensorName
    begin: Annotated[int, Field(ge=0)]
    end: Annotated[int, Field(ge=1)]


class JaggedSource(Frozen):
    """A feature in torch's EmbeddingBag form: `values [nnz]` and `offsets [batch]` (or `[batch + 1]`), int64."""

    kind: Literal["jagged"] = "jagged"
    values: TensorName
    offsets: TensorName
    include_last_offset: bool = False
    weights: TensorName | None = None


class FeatureSource(Frozen):
    """Where the ids of one feature of the plan come from: inputs of the model or outputs of the index program."""

    feature: Name
    source: Annotated[FixedSource | JaggedSource, Field(discriminator="kind")]


# In Triton, of models whose plan degrades: names of the features that lost rows, separated by commas, or an empty string;
# one per sample, or per request where requests bring jagged ids.
DEGRADED_OUTPUT = "degraded"


class IndexProgram(Frozen):
    """Index arithmetic that is more than slicing columns: a `torch.export` program, run on the ranker's CPU."""

    file: FileName
    inputs: tuple[TensorName, ...]
    outputs: tuple[TensorName, ...]
    """Names under which `FeatureSource`s refer to the program's outputs."""
    crc32c: Checksum | None = None
    """Of the file; None: not compared."""


class DenseProgram(Frozen):
    """The dense half: a `torch.export` program over `(pooled [batch, Σ dim], *sequences, *inputs)`."""

    file: FileName
    sequences: tuple[Name, ...] = ()
    """Features with pooling `none`, each given as `[batch, ids per bag, dim]`, or `[ids, dim]` where bags are jagged."""
    inputs: tuple[TensorName, ...]
    pooled_dtype: OutputDtype = "fp32"
    """What it takes `pooled` and the sequences as, and so what lookups ask sidecars for."""
    crc32c: Checksum | None = None
    """Of the file; None: not compared."""


class ModelSpec(Frozen):
    """How a ranker turns the model's inputs into its outputs."""

    version: FormatVersion = 1
    name: Name
    inputs: Annotated[tuple[TensorSpec, ...], Field(min_length=1)]
    """The original model's inputs, flattened, in call order."""
    features: Annotated[tuple[FeatureSource, ...], Field(min_length=1, max_length=MAX_FEATURES)]
    """In plan order."""
    index: IndexProgram | None = None
    dense: DenseProgram
    outputs: Annotated[tuple[TensorSpec, ...], Field(min_length=1)]
    parameters: tuple[str, ...] = ()
    """Of the original model's `forward`, in order (`*name`, `**name`); without any, the inputs are the parameters."""
    returns: Returns = "tensor"
    """What the original model returns its outputs in; several are a tuple unless they are a dict."""

    @property
    def jagged(self) -> bool:
        """Whether any feature has a varying number of ids per bag."""
        return any(isinstance(f.source, JaggedSource) for f in self.features)

    @property
    def bag_inputs(self) -> frozenset[str]:
        """Names of the inputs that hold ids, offsets or weights of jagged features."""
        sources = (f.source for f in self.features if isinstance(f.source, JaggedSource))
        return frozenset(name for s in sources for name in (s.values, s.offsets, s.weights) if name is not None)

    @property
    def dense_reads_bags(self) -> bool:
        """Whether the dense program takes any of `bag_inputs`: then other sizes than the batch vary."""
        return not self.bag_inputs.isdisjoint(self.dense.inputs)


def load_model(path: Path, plan: Plan) -> ModelSpec:
    """Read `model.yaml` and check it against its plan; raises `PlanError`."""
    model = load_yaml(path, ModelSpec, error=PlanError)
    ours, theirs = [f.feature for f in model.features], [f.name for f in plan.features]
    if ours != theirs:
        raise PlanError(f"{path}: features: found {ours[:4]}…; allowed: exactly the plan's features in its order, {theirs[:4]}…")
    inputs = {t.name for t in model.inputs}
    for field, program in (("index", model.index), ("dense", model.dense)):
        for name in program.inputs if program else ():
            if name not in inputs:
                raise PlanError(f"{path}: {field}.inputs: found {name!r}; allowed: {sorted(inputs)}")
    rows = tuple(f.name for f in plan.features if f.pooling is Pooling.NONE)
    if model.dense.sequences != rows:
        raise PlanError(f"{path}: dense.sequences: found {model.dense.sequences}; allowed: {rows} (pooling none in the plan)")
    known = inputs | set(model.index.outputs if model.index else ())
    for i, feature in enumerate(model.features):
        source = feature.source
        if isinstance(source, FixedSource):
            names = [source.input]
        else:
            names = [source.values, source.offsets, *filter(None, [source.weights])]
        for name in names:
            if name not in known:
                raise PlanError(f"{path}: features.{i}.source: found {name!r}; allowed: {sorted(known)}")
        if isinstance(source, FixedSource) and source.end <= source.begin:
            raise PlanError(f"{path}: features.{i}.source.end: found {source.end}; allowed: above begin ({source.begin})")
    return model


def save_model(model: ModelSpec, path: Path) -> None:
    """Write `model` as YAML."""
    path.write_text(dump_yaml(model), encoding="utf-8")
