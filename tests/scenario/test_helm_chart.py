"""What Helm creates from the chart: every object as Kubernetes' own schemas want it, every sidecar.yaml as a sidecar reads it."""

from __future__ import annotations

import copy
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import referencing
import yaml
from helm_release import CHART, HERE, VERSIONS, Object, RefusedError, install, schemas
from referencing.jsonschema import DRAFT202012

from sidepool import __main__ as entry
from sidepool.partition.inventory import CpuNode, Inventory, Nic
from sidepool.sidecar.config import SidecarConfig, load_sidecar_config
from sidepool.wire.config import dump_yaml
from sidepool.wire.plan import Feature, Plan, Shard, SidecarAddress, Table, save_plan

EVERYTHING: dict[str, Any] = {
    "rdma": {"enabled": True, "listen": {"path": {"device": "mlx5_0"}}},
    "tls": {"secretName": "sidecars", "mutual": True},
    "podMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
    "topology": {"podLabel": "dc/pod", "pod": "p1", "rackLabel": "dc/rack", "racks": ["r1", "r2"]},
    "triton": {"gpus": 1, "args": ["--log-verbose=1"], "nodeSelector": {"gpu": "yes"}},
    "sidecars": {"config": {"engines": 4}, "tolerations": [{"key": "tables", "operator": "Exists"}]},
    "artifact": {"volume": {"hostPath": {"path": "/data"}}, "subPath": "deploy"},
    "imagePullSecrets": [{"name": "registry"}],
}
CASES: dict[str, dict[str, Any]] = {
    "default": {},
    "everything": EVERYTHING,
    "own volumes": {
        "sidecars": {
            "members": [{"name": "sidecar-0"}, {"name": "sidecar-1", "config": {"engines": 2}}, {"name": "new", "empty": True}],
            "storage": {"size": "10Gi", "storageClassName": "fast"},
        }
    },
    "shared pod": {"samePod": True, "podMonitor": {"enabled": True}},
    "shared pod with everything": EVERYTHING | {"samePod": True},
}


@pytest.fixture(scope="module")
def created(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Object]]:
    return {name: install(values, tmp_path_factory.mktemp("helm")) for name, values in CASES.items()}


class Schemas:
    """The validators of one version of Kubernetes, and the chart's own of the one custom resource."""

    def __init__(self, version: str) -> None:
        self._document = schemas(version)
        resource = referencing.Resource(self._document, DRAFT202012)
        self._registry = referencing.Registry().with_resource(self._document["$id"], resource)
        self._pod_monitor = json.loads((HERE / "podmonitor.json").read_text())

    def faults(self, item: Object) -> list[str]:
        schema = self._pod_monitor
        if item["kind"] != "PodMonitor":
            group, _, version = item["apiVersion"].rpartition("/")
            name = f"io.k8s.api.{group or 'core'}.{version}.{item['kind']}"
            assert name in self._document["$defs"]
            schema = {"$ref": f"{self._document['$id']}#/$defs/{name}"}
        validator = jsonschema.Draft202012Validator(schema, registry=self._registry)
        return [f"{item['kind']} {e.json_path}: {e.message}" for e in validator.iter_errors(item)]


@pytest.mark.parametrize("version", VERSIONS)
def test_every_object_is_what_kubernetes_takes_and_holds_nothing_it_does_not_know(
    created: dict[str, list[Object]], version: str
) -> None:
    known = Schemas(version)
    for objects in created.values():
        for item in objects:
            assert known.faults(item) == []
    wrong = copy.deepcopy(one(created["default"], "StatefulSet"))
    container = wrong["spec"]["template"]["spec"]["containers"][0]
    container["livenesProbe"] = container.pop("livenessProbe")
    assert "livenesProbe" in known.faults(wrong)[0], "the schemas would let a slip pass"


@pytest.mark.parametrize("case", CASES)
def test_every_name_leads_somewhere(created: dict[str, list[Object]], case: str) -> None:
    objects = created[case]
    pods = [o for o in objects if o["kind"] in ("StatefulSet", "Deployment")]
    config_maps = {o["metadata"]["name"] for o in objects if o["kind"] == "ConfigMap"}
    for workload in pods:
        spec, labels = workload["spec"]["template"]["spec"], workload["spec"]["template"]["metadata"]["labels"]
        volumes = {v["name"]: v for v in spec["volumes"]}
        assert {v["configMap"]["name"] for v in volumes.values() if "configMap" in v} <= config_maps
        volumes |= {claim["metadata"]["name"]: claim for claim in workload["spec"].get("volumeClaimTemplates", [])}
        for container in containers(spec):
            assert {m["name"] for m in container["volumeMounts"]} <= volumes.keys()
            paths = [m["mountPath"] for m in container["volumeMounts"]]
            assert len(paths) == len(set(paths))
        for spread in spec.get("topologySpreadConstraints", []):
            assert matches(spread["labelSelector"]["matchLabels"], labels)
        assert matches(workload["spec"]["selector"]["matchLabels"], labels)
        ports = [p["containerPort"] for c in containers(spec) for p in c.get("ports", [])]
        names = [p["name"] for c in containers(spec) for p in c.get("ports", []) if "name" in p]
        assert len(ports) == len(set(ports))
        assert len(names) == len(set(names))
    for item in objects:
        if item["kind"] in ("Service", "PodDisruptionBudget", "PodMonitor"):
            selector = item["spec"]["selector"]
            selected = [
                p for p in pods if matches(selector.get("matchLabels", selector), p["spec"]["template"]["metadata"]["labels"])
            ]
            assert len(selected) == 1
            if item["kind"] == "PodMonitor":
                named = {p.get("name") for c in containers(selected[0]["spec"]["template"]["spec"]) for p in c.get("ports", [])}
                assert {e["port"] for e in item["spec"]["podMetricsEndpoints"]} <= named


@pytest.mark.parametrize("case", [case for case in CASES if case != "own volumes"])
def test_sidecars_read_their_configuration_and_listen_where_the_pod_says(
    created: dict[str, list[Object]], case: str, tmp_path: Path
) -> None:
    objects = created[case]
    configs = sidecar_configs(objects, tmp_path)
    assert [c.name for c in configs] == ["sidecar-0", "sidecar-1"]
    for number, config in enumerate(configs):
        assert config.plan == "/artifact/plan.yaml"
        assert config.shards == f"/artifact/sidecars/sidecar-{number}/shards"
        assert (config.listen.rdma is not None) == ("everything" in case)
        assert (config.tls is not None) == ("everything" in case)
        assert config.engines == (4 if "everything" in case else 1)
    if case.startswith("shared pod"):
        spec = one(objects, "Deployment")["spec"]["template"]["spec"]
        assert not [o for o in objects if o["kind"] == "StatefulSet"]
        sidecars = spec["initContainers"]
        assert [c["restartPolicy"] for c in sidecars] == ["Always"] * 2
        triton = spec["containers"][0]
        assert next(v for v in spec["volumes"] if v["name"] == "shm")["emptyDir"]["medium"] == "Memory"
        for number, (container, config) in enumerate(zip(sidecars, configs, strict=True)):
            assert container["command"][-1] == f"/etc/sidepool/{number}.yaml"
            assert config.listen.tcp is None
            assert config.listen.unix == f"/run/sidepool/{number}.sock"
            for shared in ("/dev/shm", "/run/sidepool"):
                assert mount(container, shared) == mount(triton, shared)
    else:
        workload = one(objects, "StatefulSet")["spec"]
        assert workload["replicas"] == 2
        sidecars = workload["template"]["spec"]["containers"] * 2
        assert sidecars[0]["command"][-1] == "/etc/sidepool/$(MEMBER).yaml"
        assert sidecars[0]["env"][0]["valueFrom"]["fieldRef"]["fieldPath"] == "metadata.labels['apps.kubernetes.io/pod-index']"
        headless = next(o for o in objects if o["kind"] == "Service" and o["spec"].get("clusterIP") == "None")
        assert headless["metadata"]["name"] == workload["serviceName"]
    for container, config in zip(sidecars, configs, strict=True):
        listening = {config.listen.grpc, config.listen.tcp, config.listen.metrics} - {None}
        assert {f"0.0.0.0:{p['containerPort']}" for p in container["ports"]} == listening
        assert container["livenessProbe"]["tcpSocket"]["port"] == port(config.listen.grpc)
        if config.tls is None:
            assert container["startupProbe"]["grpc"] == container["readinessProbe"]["grpc"] == {"port": port(config.listen.grpc)}


def test_sidecars_with_volumes_of_their_own_copy_their_shards_once_and_new_ones_wait(
    created: dict[str, list[Object]], tmp_path: Path
) -> None:
    objects = created["own volumes"]
    configs = sidecar_configs(objects, tmp_path)
    assert [(c.name, c.plan, c.shards, c.engines) for c in configs] == [
        ("sidecar-0", "/artifact/plan.yaml", "/data/shards", 1),
        ("sidecar-1", "/artifact/plan.yaml", "/data/shards", 2),
        ("new", None, "/data/shards", 1),
    ]
    workload = one(objects, "StatefulSet")["spec"]
    assert workload["volumeClaimTemplates"][0]["spec"]["resources"]["requests"]["storage"] == "10Gi"
    (copying,) = workload["template"]["spec"]["initContainers"]
    script = copying["command"][-1]
    for folder in ("etc", "artifact", "data"):
        script = script.replace(f"/{folder}/", f"{tmp_path}/{folder}/")
        (tmp_path / folder).mkdir()
    (tmp_path / "etc" / "sidepool").mkdir()
    for name, text in one(objects, "ConfigMap")["data"].items():
        (tmp_path / "etc" / "sidepool" / name).write_text(text.replace("/artifact/", f"{tmp_path}/artifact/"))
    shards, copied = tmp_path / "artifact" / "sidecars" / "sidecar-1" / "shards", tmp_path / "data" / "shards"
    shards.mkdir(parents=True)

    def start(member: str) -> None:
        subprocess.run(["sh", "-ec", script], env={"MEMBER": member, "PATH": os.defpath}, check=True)

    start("2")
    assert not copied.exists(), "the new one has none"
    (shards / "manifest.yaml").write_text("first")
    (tmp_path / "data" / "shards.copy").mkdir()
    (tmp_path / "data" / "shards.copy" / "half").touch()
    start("1")
    assert [(path.name, path.read_text()) for path in copied.iterdir()] == [("manifest.yaml", "first")]
    (shards / "manifest.yaml").write_text("second")
    start("1")
    assert (copied / "manifest.yaml").read_text() == "first"
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == ["shards"]


def test_one_more_member_restarts_nobody_and_what_all_are_told_everybody(created: dict[str, list[Object]], tmp_path: Path) -> None:
    def pod(members: int, **config: object) -> Object:
        names = [{"name": f"sidecar-{i}"} for i in range(members)]
        found: Object = one(install({"sidecars": {"members": names, "config": config}}, tmp_path), "StatefulSet")["spec"][
            "template"
        ]
        return found

    same = one(created["default"], "StatefulSet")["spec"]["template"]
    assert pod(2) == pod(3) == same
    assert pod(2, engines=2) != same


def test_devices_and_rights_are_asked_for_where_they_are_used(created: dict[str, list[Object]]) -> None:
    objects = created["everything"]
    sidecar = one(objects, "StatefulSet")["spec"]["template"]["spec"]["containers"][0]
    triton = one(objects, "Deployment")["spec"]["template"]["spec"]["containers"][0]
    for container in (sidecar, triton):
        assert container["resources"]["limits"]["rdma/hca_shared_devices_a"] == 1
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"], "add": ["IPC_LOCK"]}
    assert triton["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert "nvidia.com/gpu" not in sidecar["resources"]["limits"]
    plain = one(created["default"], "StatefulSet")["spec"]["template"]["spec"]["containers"][0]
    assert list(plain["resources"]["limits"]) == ["memory"]
    assert plain["securityContext"]["capabilities"] == {"drop": ["ALL"]}


def test_a_plan_says_who_the_sidecars_are_what_they_need_and_where_they_may_run(tmp_path: Path) -> None:
    tables = tuple(Table(name=f"t{i}", rows=1_000_000, dim=64) for i in range(4))
    old = Plan(
        epoch=1,
        model="ranking",
        tables=tables,
        features=tuple(Feature(name=t.name, table=t.name) for t in tables),
        sidecars=(SidecarAddress(name="one", address="127.0.0.1:1"),),
        shards=tuple(Shard(table=t.name, sidecar="one", rows=(0, t.rows), columns=(0, t.dim)) for t in tables),
    )
    nodes = tuple(
        CpuNode(
            name=f"cpu-{i}",
            address=f"ranking-sidecar-{i}.ranking-sidecar.shop.svc:50151",
            memory_bytes=600_000_000,
            cores=8,
            nics=(Nic(name="mlx5_0", gbps=100, numa=i),),
            rack=f"r{i}",
            pod="p7",
        )
        for i in range(2)
    )
    inventory, written = tmp_path / "nodes.yaml", tmp_path / "values.yaml"
    inventory.write_text(dump_yaml(Inventory(cpu_nodes=nodes)))
    save_plan(old, tmp_path / "plan.yaml")
    words = [str(tmp_path / "plan.yaml"), "--inventory", str(inventory), "--strategy", "capacity_balanced"]
    assert entry.main(["plan", *words, "--helm-values", str(written)]) == 0
    values = yaml.safe_load(written.read_text())
    values["topology"] |= {"podLabel": "dc/pod", "rackLabel": "dc/rack"}
    objects = install(values, tmp_path)
    configs = sidecar_configs(objects, tmp_path)
    assert [(c.name, c.memory.numa) for c in configs] == [("cpu-0", 0), ("cpu-1", 1)]
    spec = one(objects, "StatefulSet")["spec"]["template"]["spec"]
    wanted = spec["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
    assert wanted[0]["matchExpressions"] == [
        {"key": "dc/pod", "operator": "In", "values": ["p7"]},
        {"key": "dc/rack", "operator": "In", "values": ["r0", "r1"]},
    ]
    assert [s["topologyKey"] for s in spec["topologySpreadConstraints"]] == ["kubernetes.io/hostname", "dc/rack"]
    held = 2 * tables[0].bytes
    asked = int(spec["containers"][0]["resources"]["requests"]["memory"])
    assert 1.1 * held + 150e6 <= asked < 1.1 * held + 2e9
    assert int(spec["containers"][0]["resources"]["limits"]["memory"]) >= asked + held
    rankers = one(objects, "Deployment")["spec"]["template"]["spec"]
    assert "p7" in json.dumps(rankers["affinity"])
    assert "r0" not in json.dumps(rankers["affinity"]), "rankers need no rack"


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"sidecar": {}}, "additional properties 'sidecar' not allowed"),
        ({"sidecars": {"members": []}}, "/sidecars/members"),
        ({"ports": {"grpc": 70000}}, "/ports/grpc"),
        ({"triton": {"replicas": "two"}}, "/triton/replicas"),
        ({"rdma": {"resource": "hca"}}, "/rdma/resource"),
    ],
)
def test_wrong_values_are_refused_by_name(tmp_path: Path, values: dict[str, Any], said: str) -> None:
    with pytest.raises(RefusedError, match=said):
        install(values, tmp_path)


def test_every_value_of_the_chart_is_in_its_schema() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())

    def check(value: object, known: dict[str, Any], where: str) -> None:
        if isinstance(value, dict) and "properties" in known:
            for key, below in value.items():
                assert key in known["properties"], f"{where}.{key}"
                check(below, known["properties"][key], f"{where}.{key}")

    check(yaml.safe_load((CHART / "values.yaml").read_text()), schema, "values")


def one(objects: list[Object], kind: str) -> Object:
    (found,) = [o for o in objects if o["kind"] == kind]
    return found


def containers(spec: Object) -> list[Object]:
    return [*spec.get("initContainers", []), *spec["containers"]]


def matches(selector: dict[str, str], labels: dict[str, str]) -> bool:
    return selector.items() <= labels.items()


def mount(container: Object, path: str) -> str:
    return str(next(m["name"] for m in container["volumeMounts"] if m["mountPath"] == path))


def port(endpoint: str) -> int:
    return int(endpoint.rpartition(":")[2])


def sidecar_configs(objects: list[Object], directory: Path) -> list[SidecarConfig]:
    found = []
    for name, text in sorted(one(objects, "ConfigMap")["data"].items()):
        if not name.endswith(".yaml"):
            continue
        (directory / name).write_text(text)
        found.append(load_sidecar_config(directory / name))
    return found
