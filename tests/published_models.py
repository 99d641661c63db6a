"""Models of TorchRec and deepctr-torch with small tables, and inputs for them. Skips where a package is absent."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

TORCHREC = ("DLRM", "DLRM_DCN", "SimpleDeepFMNN", "weighted", "sequences")
DEEPCTR = ("DeepFM", "WDL", "DCN", "DCNMix", "xDeepFM", "AutoInt", "FiBiNET", "NFM", "PNN", "IFM", "DIFM", "ONN", "MLR", "DIN",
           "DIEN", "DIEN, attention first", "DIEN, AGRU", "DIEN, AUGRU")  # fmt: skip
WIDTH, DENSE = 8, 5
_GRU_TYPES = {"DIEN": "GRU", "DIEN, attention first": "AIGRU", "DIEN, AGRU": "AGRU", "DIEN, AUGRU": "AUGRU"}


@dataclass(frozen=True)
class Published:
    """A model in eval mode, what makes inputs of a batch size for it, and the poolings that its features must have."""

    model: nn.Module
    make: Callable[[int], tuple[Any, ...]]
    poolings: dict[str, str]
    least_batch: int = 1
    """DCNMix of deepctr-torch squeezes a batch of one away: it fails there, its partitioned form does not."""


class Sequences(nn.Module):
    """Rows of an `EmbeddingCollection`: attention over one history, the mean of another of its table, the gated sum of a third."""

    def __init__(self, tables: nn.Module) -> None:
        super().__init__()
        self.tables, self.query = tables, nn.Linear(DENSE, WIDTH)
        self.gate, self.top = nn.Linear(WIDTH, 1), nn.Linear(3 * WIDTH, 1)

    def forward(self, dense_features: Tensor, sparse_features: Any) -> Tensor:
        rows = self.tables(sparse_features)
        history = rows["f0"].to_padded_dense(4)  # bags may be longer: cut
        there = torch.arange(4) < rows["f0"].lengths()[:, None]
        scores = (history @ self.query(dense_features)[:, :, None]).squeeze(2).masked_fill(~there, -1e9)
        attended = (scores.softmax(1)[:, :, None] * history).sum(1)
        mean = self.summed(rows["f1"], rows["f1"].values()) / rows["f1"].lengths()[:, None].clamp(min=1)
        gated = self.summed(rows["f2"], rows["f2"].values() * self.gate(rows["f2"].values()).sigmoid())
        score: Tensor = self.top(torch.cat([attended, mean, gated], dim=1))
        return score

    def summed(self, bags: Any, rows: Tensor) -> Tensor:
        samples = torch.arange(bags.lengths().shape[0]).repeat_interleave(bags.lengths(), output_size=rows.shape[0])
        return rows.new_zeros(bags.lengths().shape[0], WIDTH).index_add(0, samples, rows)


def torchrec(name: str) -> Published:
    """One of `TORCHREC`: tables behind a `KeyedJaggedTensor` of three keys, bags empty or long; all but one pool their rows."""
    pytest.importorskip("torchrec", reason="torchrec is not installed", exc_type=ImportError)
    if name == "sequences":
        from torchrec.modules.embedding_configs import EmbeddingConfig
        from torchrec.modules.embedding_modules import EmbeddingCollection

        shared = EmbeddingConfig(name="goods", embedding_dim=WIDTH, num_embeddings=21, feature_names=["f0", "f1"])
        own = EmbeddingConfig(name="tags", embedding_dim=WIDTH, num_embeddings=22, feature_names=["f2"])
        model = Sequences(EmbeddingCollection(tables=[shared, own]))
        poolings = dict.fromkeys(("f0", "f1", "f2"), "none")
        return Published(model.eval(), lambda batch: (torch.rand(batch, DENSE), keyed(batch)), poolings)
    from torchrec.models.deepfm import SimpleDeepFMNN
    from torchrec.models.dlrm import DLRM, DLRM_DCN
    from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
    from torchrec.modules.embedding_modules import EmbeddingBagCollection

    modes = (PoolingType.SUM, PoolingType.SUM if name == "weighted" else PoolingType.MEAN, PoolingType.SUM)
    configs = [
        EmbeddingBagConfig(name=f"t{i}", embedding_dim=WIDTH, num_embeddings=20 + i, feature_names=[f"f{i}"], pooling=mode)
        for i, mode in enumerate(modes)
    ]
    tables = EmbeddingBagCollection(tables=configs, is_weighted=name == "weighted")
    builders: dict[str, Callable[[], nn.Module]] = {
        "DLRM": lambda: DLRM(tables, DENSE, [16, WIDTH], [16, 1]),
        "weighted": lambda: DLRM(tables, DENSE, [16, WIDTH], [16, 1]),
        "DLRM_DCN": lambda: DLRM_DCN(tables, DENSE, [16, WIDTH], [16, 1], 2, 4),
        "SimpleDeepFMNN": lambda: SimpleDeepFMNN(DENSE, tables, 16, 8),
    }
    weighted = name == "weighted"
    poolings = {f"f{i}": mode.value.lower() for i, mode in enumerate(modes)}
    return Published(builders[name]().eval(), lambda batch: (torch.rand(batch, DENSE), keyed(batch, weighted=weighted)), poolings)


def keyed(batch: int, *, weighted: bool = False) -> Any:
    """A `KeyedJaggedTensor` over three keys; the first bag of each has two ids or more."""
    from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

    lengths = torch.randint(0, 4, (3, batch))
    lengths[:, 0] += 2
    values = torch.cat([torch.randint(0, 20 + i, (int(row.sum()),)) for i, row in enumerate(lengths)])
    weights = torch.rand(values.numel()) if weighted else None
    return KeyedJaggedTensor(keys=["f0", "f1", "f2"], values=values, lengths=lengths.flatten(), weights=weights)


def deepctr(name: str) -> Published:
    """One of `DEEPCTR`: single ids, numbers, and histories averaged, summed and maximised, in one float matrix."""
    # Asks the package index for its newest release when imported; nothing here goes to the network.
    sys.modules.setdefault("requests", types.ModuleType("requests"))
    pytest.importorskip("deepctr_torch", reason="deepctr-torch is not installed", exc_type=ImportError)
    from deepctr_torch import models
    from deepctr_torch.inputs import DenseFeat, SparseFeat, VarLenSparseFeat

    columns: list[Any] = [SparseFeat(f"c{i}", 20 + i, WIDTH) for i in range(3)] + [DenseFeat("number", 2)]
    poolings = {"sum"}
    if name == "DIN":
        columns = [*_single_and_numbers(), _history()]
        model = models.DIN(columns, ["item"], att_weight_normalization=True)  # its attention runs in the sidecar
    elif name.startswith("DIEN"):
        columns = [*_single_and_numbers(), _history()]
        model = models.DIEN(columns, ["item"], gru_type=_GRU_TYPES[name])
        poolings = {"sum", "none"}
    elif name in ("PNN", "MLR"):
        model = getattr(models, name)(columns)
    else:
        if name not in ("FiBiNET", "ONN"):  # their interactions are of single ids
            columns.append(VarLenSparseFeat(SparseFeat("averaged", 30, WIDTH), 5, "mean"))
            columns.append(VarLenSparseFeat(SparseFeat("summed", 30, WIDTH), 4, "sum", length_name="summed_length"))
            columns.append(VarLenSparseFeat(SparseFeat("largest", 30, WIDTH), 4, "max"))
            poolings = {"sum", "max"}
        model = getattr(models, name)(columns, columns)
    torch.manual_seed(0)
    for parameter in model.parameters():  # the package's own are so small that every output is 0.5
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.3)
    empty = {"history_length"} if name.startswith("DIEN") else set()
    least = 2 if name == "DCNMix" else 1
    return Published(model.eval(), lambda batch: (_matrix(columns, batch, empty),), dict.fromkeys(poolings, ""), least)


def _single_and_numbers() -> list[Any]:
    from deepctr_torch.inputs import DenseFeat, SparseFeat

    return [SparseFeat("user", 20, 4), SparseFeat("item", 20, WIDTH), DenseFeat("number", 2)]


def _history() -> Any:
    from deepctr_torch.inputs import SparseFeat, VarLenSparseFeat

    return VarLenSparseFeat(SparseFeat("hist_item", 20, WIDTH, embedding_name="item"), 4, length_name="history_length")


def _matrix(columns: list[Any], batch: int, sometimes_empty: set[str]) -> Tensor:
    """deepctr-torch's only input: ids, numbers and lengths side by side as float32. Some lengths are 0, never the first."""
    from deepctr_torch.inputs import DenseFeat, VarLenSparseFeat, build_input_features

    by_name = {column.name: column for column in columns}
    parts = []
    for name, (begin, end) in build_input_features(columns).items():
        column, width = by_name.get(name), end - begin
        if column is None:
            length = torch.randint(1, 5, (batch, 1))
            length[1::2] *= name not in sometimes_empty
            parts.append(length)
        elif isinstance(column, DenseFeat):
            parts.append(torch.rand(batch, width))
        elif isinstance(column, VarLenSparseFeat):
            kept = torch.arange(width) < torch.randint(1, width + 1, (batch, 1))
            parts.append(torch.where(kept, torch.randint(1, column.vocabulary_size, (batch, width)), 0))
        else:
            parts.append(torch.randint(0, column.vocabulary_size, (batch, 1)))
    return torch.cat([part.float() for part in parts], dim=1)
