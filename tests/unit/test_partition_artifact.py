"""What lies in the output directory: layout, configuration, checksums, report."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from google.protobuf import text_format
from safetensors import safe_open

from sidepool.bench.models.dlrm import multi_hot, single_id
from sidepool.partition import PartitionReport, partition_model
from sidepool.partition.triton_config import TritonOptions, config_text
from sidepool.sidecar.config import load_sidecar_config
from sidepool.wire.errors import CutError
from sidepool.wire.model import DenseProgram, FeatureSource, FixedSource, JaggedSource, ModelSpec, TensorSpec
from sidepool.wire.plan import load_plan
from sidepool.wire.shards import load_manifest


@pytest.fixture(scope="module")
def fixed(tmp_path_factory: pytest.TempPathFactory) -> tuple[PartitionReport, torch.nn.Module]:
    model, example = single_id(max_rows=80)
    out = tmp_path_factory.mktemp("fixed") / "out"
    return partition_model(model, example, out, name="dlrm", sidecars=2), model


@pytest.fixture(scope="module")
def jagged(tmp_path_factory: pytest.TempPathFactory) -> PartitionReport:
    model, example = multi_hot(max_rows=80)
    return partition_model(model, example, tmp_path_factory.mktemp("jagged") / "out", name="dlrm", sidecars=2)


def crc32c_bit_by_bit(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def test_the_layout_is_the_documented_one(fixed: tuple[PartitionReport, torch.nn.Module]) -> None:
    out = fixed[0].out_dir
    files = {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()}
    shards = {f for f in files if f.endswith(".safetensors")} - {"check.safetensors"}
    assert len(shards) == 26
    assert all(re.fullmatch(r"sidecars/sidecar-[01]/shards/table-\d{4}\.safetensors", f) for f in shards)
    assert files - shards == {
        "plan.yaml", "report.txt", "report.json", "cut.txt", "cut.html", "check.safetensors",
        "model_repository/dlrm/config.pbtxt", "model_repository/dlrm/1/model.py",
        "model_repository/dlrm/1/plan.yaml", "model_repository/dlrm/1/model.yaml", "model_repository/dlrm/1/dense.pt2",
        "sidecars/sidecar-0/sidecar.yaml", "sidecars/sidecar-0/shards/shards.json",
        "sidecars/sidecar-1/sidecar.yaml", "sidecars/sidecar-1/shards/shards.json",
    }  # fmt: skip


def test_shards_hold_the_models_rows_and_their_checksums(fixed: tuple[PartitionReport, torch.nn.Module]) -> None:
    report, model = fixed
    weights = dict(model.named_parameters())
    held = set()
    for sidecar in report.plan.sidecars:
        directory = report.out_dir / "sidecars" / sidecar.name / "shards"
        manifest = load_manifest(directory)
        assert manifest.sidecar == sidecar.name
        assert manifest.plan_fingerprint == load_plan(report.out_dir / "plan.yaml").fingerprint
        for shard in manifest.shards:
            with safe_open(directory / shard.file, framework="np") as file:
                assert list(file.keys()) == [shard.table]
                rows = file.get_tensor(shard.table)
            np.testing.assert_array_equal(rows, weights[f"{shard.table}.weight"].detach().numpy())
            assert shard.crc32c == crc32c_bit_by_bit(rows.tobytes())
            held.add(shard.table)
    assert held == {t.name for t in report.plan.tables}


def test_both_sidecars_get_about_half_of_everything(fixed: tuple[PartitionReport, torch.nn.Module]) -> None:
    first, second = fixed[0].json["sidecars"]
    assert abs(first["tables"] - second["tables"]) <= 2
    assert abs(first["bytes"] - second["bytes"]) < 0.2 * (first["bytes"] + second["bytes"])


def test_the_sidecars_configuration_is_accepted_by_the_sidecar(fixed: tuple[PartitionReport, torch.nn.Module]) -> None:
    for port, sidecar in enumerate(fixed[0].plan.sidecars, 50151):
        path = fixed[0].out_dir / "sidecars" / sidecar.name / "sidecar.yaml"
        config = load_sidecar_config(path)
        assert config.name == sidecar.name
        assert config.listen.grpc == sidecar.address == f"127.0.0.1:{port}"
        assert (path.parent / config.plan).resolve() == (fixed[0].out_dir / "plan.yaml").resolve()
        assert yaml.safe_load(path.read_text())["listen"] == {
            "grpc": sidecar.address, "tcp": "127.0.0.1:0", "unix": None, "metrics": "127.0.0.1:0",
        }  # fmt: skip


def test_the_tcp_lane_listens_on_the_host_that_rankers_are_told(tmp_path: Path) -> None:
    model, inputs = single_id(max_rows=10)
    addresses = ["10.0.0.7:50151", "[fd00::8]:50151"]
    partition_model(model, inputs, tmp_path / "out", name="dlrm", addresses=addresses)
    listens = [yaml.safe_load(p.read_text())["listen"] for p in sorted((tmp_path / "out" / "sidecars").glob("*/sidecar.yaml"))]
    assert [listen["tcp"] for listen in listens] == ["10.0.0.7:0", "[fd00::8]:0"]


def test_fixed_width_inputs_keep_sample_batching(fixed: tuple[PartitionReport, torch.nn.Module]) -> None:
    text = (fixed[0].out_dir / "model_repository/dlrm/config.pbtxt").read_text()
    for expected in (
        'name: "dlrm"', 'backend: "python"', "max_batch_size: 512", '{ name: "dense" data_type: TYPE_FP32 dims: [ 13 ] }',
        '{ name: "sparse" data_type: TYPE_INT64 dims: [ 26 ] }', '{ name: "score" data_type: TYPE_FP32 dims: [ 1 ] }',
        "max_queue_delay_microseconds: 0", "max_queue_size: 1024", "kind: KIND_CPU", 'key: "lane" value { string_value: "shm" }',
        'key: "deadline_ms" value { string_value: "1000" }',
    ):  # fmt: skip
        assert expected in text
    assert "ragged" not in text


def test_jagged_inputs_let_the_batch_dimension_mean_request(jagged: PartitionReport) -> None:
    text = (jagged.out_dir / "model_repository/dlrm/config.pbtxt").read_text()
    for expected in (
        "max_batch_size: 64", '{ name: "dense" data_type: TYPE_FP32 dims: [ -1, 13 ] allow_ragged_batch: true }',
        '{ name: "sparse.lengths" data_type: TYPE_INT32 dims: [ 26, -1 ] allow_ragged_batch: true }',
        '{ name: "sparse.values" data_type: TYPE_INT64 dims: [ -1 ] allow_ragged_batch: true }',
        '{ name: "score" data_type: TYPE_FP32 dims: [ -1, 1 ] }',
    ):  # fmt: skip
        assert expected in text
    assert 'name: "values_0"' not in text
    names = ",".join(f.name for f in jagged.plan.features)
    assert f'parameters {{ key: "features" value {{ string_value: "{names}" }} }}' in text
    assert "sparse.weights" not in text


def test_options_reach_the_configuration(jagged: PartitionReport) -> None:
    options = TritonOptions(
        max_batch=7, max_queue_delay_us=50, max_queue=9, instance_kind="gpu", instances=2, lane="tcp", deadline_ms=30
    )
    text = config_text(jagged.model, options)
    for expected in (
        "max_batch_size: 7",
        "microseconds: 50",
        "max_queue_size: 9",
        "count: 2 kind: KIND_GPU",
        'string_value: "tcp"',
        'string_value: "30"',
    ):
        assert expected in text


def test_the_local_lane_says_where_the_shards_lie(jagged: PartitionReport) -> None:
    text = config_text(jagged.model, TritonOptions(lane="local"))
    found = re.search(r'key: "shards" value { string_value: "([^"]+)" }', text)
    assert found
    version = jagged.out_dir / "model_repository" / "dlrm" / "1"
    assert (version / found[1]).resolve() == (jagged.out_dir / "sidecars").resolve()
    assert '"shards"' not in config_text(jagged.model, TritonOptions())


def test_weights_and_single_columns_have_their_triton_shape() -> None:
    model = ModelSpec(
        name="m",
        inputs=(
            TensorSpec(name="v", dtype="int64", shape=(-1,)), TensorSpec(name="o", dtype="int64", shape=(-1,)),
            TensorSpec(name="w", dtype="float32", shape=(-1,)), TensorSpec(name="user", dtype="int32", shape=(-1,)),
        ),
        features=(
            FeatureSource(feature="f", source=JaggedSource(values="v", offsets="o", weights="w")),
            FeatureSource(feature="user", source=FixedSource(input="user", begin=0, end=1)),
        ),
        dense=DenseProgram(file="dense.pt2", inputs=()),
        outputs=(TensorSpec(name="score", dtype="float32", shape=(-1,)),),
    )  # fmt: skip
    text = config_text(model, TritonOptions())
    assert '"sparse.lengths" data_type: TYPE_INT32 dims: [ 1, -1 ]' in text
    assert '"sparse.weights" data_type: TYPE_FP32 dims: [ -1 ]' in text
    assert '"user" data_type: TYPE_INT32 dims: [ -1 ]' in text
    fixed_only = model.model_copy(update={"inputs": model.inputs[3:], "features": model.features[1:]})
    text = config_text(fixed_only, TritonOptions())
    assert '"user" data_type: TYPE_INT32 dims: [ 1 ] }' in text
    assert '"score" data_type: TYPE_FP32 dims: [ 1 ] reshape: { shape: [ ] } }' in text
    assert '"degraded"' not in text
    assert '{ name: "degraded" data_type: TYPE_STRING dims: [ 1 ] }' in config_text(fixed_only, TritonOptions(), degraded=True)
    taken = model.model_copy(update={"outputs": (TensorSpec(name="degraded", dtype="float32", shape=(-1,)),)})
    with pytest.raises(CutError, match=r"output 'degraded': this name is taken under on_missing_shard degrade"):
        config_text(taken, TritonOptions(), degraded=True)
    taken = model.model_copy(update={"inputs": (*model.inputs, TensorSpec(name="sparse.values", dtype="int64", shape=(-1,)))})
    with pytest.raises(CutError, match=r"input 'sparse.values': this name is taken"):
        config_text(taken, TritonOptions())


def test_triton_can_parse_both_configurations(fixed: tuple[PartitionReport, torch.nn.Module], jagged: PartitionReport) -> None:
    model_config = pytest.importorskip("tritonclient.grpc").model_config_pb2
    for report, inputs in ((fixed[0], {"dense", "sparse"}), (jagged, {"dense", "sparse.lengths", "sparse.values"})):
        text = (report.out_dir / "model_repository/dlrm/config.pbtxt").read_text()
        config = text_format.Parse(text, model_config.ModelConfig())
        assert {i.name for i in config.input} == inputs
        assert {i.allow_ragged_batch for i in config.input} == {report.model.jagged}
        assert config.parameters["lane"].string_value == "shm"
        assert config.dynamic_batching.default_queue_policy.allow_timeout_override


def test_the_shim_is_short_and_imports_only_the_backend(fixed: tuple[PartitionReport, torch.nn.Module]) -> None:
    lines = (fixed[0].out_dir / "model_repository/dlrm/1/model.py").read_text().splitlines()
    assert len(lines) <= 20
    assert [line for line in lines if "import" in line] == ["from sidepool.triton_backend import TritonPythonModel  # noqa: F401"]


def test_the_report_counts_the_bytes_on_the_wire(fixed: tuple[PartitionReport, torch.nn.Module], jagged: PartitionReport) -> None:
    data = json.loads((fixed[0].out_dir / "report.json").read_text())
    wire = [s["wire_bytes"]["128"] for s in data["sidecars"]]
    assert sum(w["request"] for w in wire) == 128 * 26 * 8
    assert sum(w["response"] for w in wire) == 128 * 26 * 64 * 4
    assert sum(jagged.wire_bytes(s, 1)[0] for s in (0, 1)) == 214 * 8 + 26 * 4
    assert sum(t["bytes"] for t in data["tables"]) == sum(s["bytes"] for s in data["sidecars"])
    text = (jagged.out_dir / "report.txt").read_text()
    for expected in (
        "sidecar-0",
        "127.0.0.1:50152",
        "tables.20",
        "sparse.lengths: int32 [26, -1]",
        "score: float32 [-1, 1]",
        "values_0, values_1",
    ):
        assert expected in text
