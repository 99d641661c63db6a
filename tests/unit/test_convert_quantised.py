"""Quantised tables of FBGEMM, TorchRec and torch.ao are laid out anew, bit by bit: they answer as the modules that wrote them."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from artifact_oracle import served
from fbgemm import (
    ComputeDevice,
    EmbeddingLocation,
    IntNBitTableBatchedEmbeddingBagsCodegen,
    SparseType,
    SplitTableBatchedEmbeddingBagsCodegen,
    needs_fbgemm,
)
from torch import Tensor

from sidepool.__main__ import main
from sidepool.partition import convert, quantised, shard_writer
from sidepool.partition.checkpoints import open_checkpoint
from sidepool.wire.errors import CutError, ShardCorrupt
from sidepool.wire.plan import load_plan

ROWS = torch.from_numpy(np.random.default_rng(5).standard_normal((50, 12), dtype=np.float32))
# The kind of each table, and its dim: rows that fill no alignment.
FBGEMM_TABLES = {"fp32": 4, "fp16": 12, "int8": 12, "int4": 20}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_writer, "CHUNK_BYTES", 7 * 12 * 4)


def save(path: Path, state: Any) -> Path:
    torch.save(state, path)
    return path


def converted(tmp_path: Path, state: Any, *options: str) -> dict[str, Tensor]:
    """Every row of every table, as the sidecar of what the command wrote looks it up."""
    out = tmp_path / "out"
    assert main(["convert", str(save(tmp_path / "model.pt", state)), "--out", str(out), *options]) == 0
    return {name: torch.from_numpy(rows) for name, rows in served(out).items()}


def formats(tmp_path: Path) -> list[str]:
    return [str(table.row_format) for table in load_plan(tmp_path / "out" / "plan.yaml").tables]


def fbgemm_inference(row_alignment: int | None) -> Any:
    specs = [(f"t_{k}", 50 + d, d, getattr(SparseType, k.upper()), EmbeddingLocation.HOST) for k, d in FBGEMM_TABLES.items()]
    module = IntNBitTableBatchedEmbeddingBagsCodegen(
        specs, device="cpu", output_dtype=SparseType.FP32, row_alignment=row_alignment, feature_table_map=[0, 1, 2, 2, 3]
    )
    module.initialize_weights()
    torch.manual_seed(1)
    for kind, (weights, tail) in zip(FBGEMM_TABLES, module.split_embedding_weights(), strict=True):
        if tail is not None:
            weights.copy_(torch.randint(0, 256, weights.shape))
            tail.copy_((torch.randn(len(tail), 2) / 8).half().view(torch.uint8))
        else:
            values = torch.randn(len(weights), FBGEMM_TABLES[kind])
            weights.copy_((values.half() if kind == "fp16" else values).view(torch.uint8))
    return module


@needs_fbgemm
@pytest.mark.parametrize("row_alignment", [None, 16])
@pytest.mark.parametrize("split", [True, False])
def test_an_fbgemm_inference_module_is_taken_by_the_documented_export(
    tmp_path: Path, row_alignment: int | None, split: bool
) -> None:
    module = fbgemm_inference(row_alignment)
    exec(quantised.EXPORT.replace("split_embedding_weights()", f"split_embedding_weights({split})"), {
        "module": module, "torch": torch, "FILE": tmp_path / "tables.pt",
    })  # fmt: skip
    found = converted(tmp_path, torch.load(tmp_path / "tables.pt"))
    assert formats(tmp_path) == ["fp32", "fp32", "int8", "int4"]
    at, columns = 0, [0, 1, 2, 4]  # the fourth feature shares the third table
    for (name, rows, dim, *_), feature in zip(module.embedding_specs, columns, strict=True):
        lengths = torch.zeros(5, rows, dtype=torch.int64)
        lengths[feature] = 1
        offsets = torch.cat((torch.zeros(1, dtype=torch.int64), lengths.flatten().cumsum(0)))
        pooled = module(torch.arange(rows).int(), offsets.int())
        at = sum(FBGEMM_TABLES[k] for k in ["fp32", "fp16", "int8", "int8", "int4"][:feature])
        # FBGEMM's instructions may round scale * code + bias once more than ours.
        torch.testing.assert_close(found[name], pooled[:, at : at + dim], rtol=1e-6, atol=1e-6)


@needs_fbgemm
def test_the_state_dict_of_an_fbgemm_inference_module_has_no_weights_and_is_refused_with_the_export(tmp_path: Path) -> None:
    with pytest.raises(CutError, match=r"(?s)inference module, which has no weights.*remedy: save them: .*split_embedding_weights"):
        open_checkpoint(save(tmp_path / "model.pt", fbgemm_inference(None).state_dict()))


@needs_fbgemm
def test_the_int8_rows_of_fbgemms_training_module_are_ours_byte_for_byte(tmp_path: Path) -> None:
    specs = [(rows, dim, EmbeddingLocation.HOST, ComputeDevice.CPU) for rows, dim in ((50, 12), (7, 8))]
    module = SplitTableBatchedEmbeddingBagsCodegen(specs, weights_precision=SparseType.INT8)
    wanted = []
    for weight in module.split_embedding_weights():
        rows = torch.randn(len(weight), weight.shape[1] - 8)
        weight.data.copy_(torch.ops.fbgemm.FloatToFused8BitRowwiseQuantized(rows))
        wanted.append(torch.ops.fbgemm.Fused8BitRowwiseQuantizedToFloat(weight.data))
    found = converted(tmp_path, module.state_dict())
    assert formats(tmp_path) == ["int8", "int8"]
    for rows, theirs in zip(found.values(), wanted, strict=True):
        torch.testing.assert_close(rows, theirs, rtol=1e-6, atol=1e-6)


def torchrec_nibbles(codes: Tensor, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """What pickles as TorchRec's UInt4Tensor does: a wrapper subclass of twice the columns, with `N` and `elem`."""

    class UInt4Tensor(quantised.Nibbles):
        pass

    UInt4Tensor.__module__, UInt4Tensor.__qualname__ = "torchrec.tensor_types", "UInt4Tensor"
    package, module = ModuleType("torchrec"), ModuleType("torchrec.tensor_types")
    module.UInt4Tensor = UInt4Tensor  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torchrec", package)
    monkeypatch.setitem(sys.modules, "torchrec.tensor_types", module)
    wrapped = torch.Tensor._make_wrapper_subclass(UInt4Tensor, (len(codes), 2 * codes.shape[1]), dtype=torch.uint8)
    wrapped.N, wrapped.elem = 2, codes
    return wrapped


@needs_fbgemm
def test_torchrecs_codes_with_their_scales_beside_them_answer_as_fbgemm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = fbgemm_inference(16)
    parts = module.split_embedding_weights_with_scale_bias(2)
    state = {"dense.weight": torch.ones(2, 2)}
    for name, (codes, scale, bias) in (("eight", parts[2]), ("four", parts[3])):
        key = f"ebc.embedding_bags.{name}.weight"
        codes = torchrec_nibbles(codes, monkeypatch) if name == "four" else codes
        # Copies, since torch.save refuses views of one memory as different types.
        state |= {key: codes, f"{key}_qscale": scale.clone(), f"{key}_qbias": bias.clone()}
    found = converted(tmp_path, state)
    assert formats(tmp_path) == ["int8", "int4"]
    for name, (codes, scale, bias) in (("eight", parts[2]), ("four", parts[3])):
        values = codes if name == "eight" else torch.stack((codes & 15, codes >> 4), 2).flatten(1)
        wanted = values.double() * scale.double() + bias.double()
        torch.testing.assert_close(found[name].double(), wanted, rtol=1e-6, atol=1e-6)


def test_torchrecs_rows_whose_scales_are_not_beside_them_are_refused_with_remedies(tmp_path: Path) -> None:
    state = {"embedding_bags.t.weight": torch.zeros(5, 16, dtype=torch.uint8)}
    with pytest.raises(ShardCorrupt, match=r"(?s)t\.weight_qscale': missing.*split_scale_bias.*remedy: .*--packed-rows"):
        open_checkpoint(save(tmp_path / "model.pt", state))


@pytest.mark.parametrize(("bits", "dim"), [(8, 12), (8, 7), (4, 12)])
@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated", "ignore:torch.quantize_per_tensor")
def test_a_quantised_embedding_bag_of_torch_answers_as_torch(tmp_path: Path, bits: int, dim: int) -> None:
    plain = torch.nn.EmbeddingBag(50, dim, mode="sum", _weight=ROWS[:, :dim].clone())
    qconfigs = torch.ao.quantization.qconfig
    plain.qconfig = qconfigs.float_qparams_weight_only_qconfig if bits == 8 else qconfigs.float_qparams_weight_only_qconfig_4bit
    module = torch.ao.nn.quantized.EmbeddingBag.from_float(plain)
    found = converted(tmp_path, {f"emb.{key}": value for key, value in module.state_dict().items()})
    assert formats(tmp_path) == [f"int{bits}"]
    torch.testing.assert_close(found["emb"], module(torch.arange(50), torch.arange(50)), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bits", [8, 4])
def test_packed_rows_of_torch_are_taken_where_told_so(tmp_path: Path, bits: int) -> None:
    quantized = torch.ops.quantized
    pack = quantized.embedding_bag_byte_prepack if bits == 8 else quantized.embedding_bag_4bit_prepack
    unpack = quantized.embedding_bag_byte_unpack if bits == 8 else quantized.embedding_bag_4bit_unpack
    packed = pack(ROWS)
    state = {"embedding_bags.t.weight": packed, "other": torch.ones(3), "buffer": torch.zeros(0, 0, dtype=torch.uint8)}
    found = converted(tmp_path, state, "--packed-rows", f"int{bits}")
    assert list(found) == ["t"]
    torch.testing.assert_close(found["t"], unpack(packed), rtol=1e-6, atol=1e-6)


def test_quantised_rows_are_decoded_where_another_format_is_asked_for(tmp_path: Path) -> None:
    packed = torch.ops.quantized.embedding_bag_byte_prepack(ROWS)
    found = converted(tmp_path, {"t": packed}, "--packed-rows", "int8", "--row-format", "fp32")
    assert formats(tmp_path) == ["fp32"]
    torch.testing.assert_close(found["t"], torch.ops.quantized.embedding_bag_byte_unpack(packed), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("specs", "weights", "error", "message"),
    [
        ([("t", 2, 4, "int2")], [(torch.zeros(2, 1).byte(), None)], CutError, "'t': found rows of int2; allowed: fp32, fp16, int8"),
        ([("t", 3, 4, "fp16")], [(torch.zeros(3, 7).byte(), None)], ShardCorrupt, r"uint8 \[3, 7\]; allowed: uint8 \[3, 8\]"),
        ([("t", 3, 4, "fp16")], [], ShardCorrupt, "missing, or not a list of 1 tables"),
    ],
)  # fmt: skip
def test_an_export_that_is_not_whole_is_refused(tmp_path: Path, specs: Any, weights: Any, error: type, message: str) -> None:
    path = save(tmp_path / "model.pt", {"embedding_specs": specs, "split_embedding_weights": weights})
    with pytest.raises(error, match=message):
        convert.convert([path], tmp_path / "out", name="m")
    assert not (tmp_path / "out").exists()
