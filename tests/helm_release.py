"""What Helm creates in a cluster: the real Helm, against an API server that takes every object and runs nothing."""

from __future__ import annotations

import contextlib
import hashlib
import json
import platform
import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent / "helm"
CHART = HERE.parents[1] / "deploy" / "helm" / "sidepool"
BUILD = HERE.parents[1] / "build" / "helm"
LIBRARY = "helm_sdkpy/_lib/linux-amd64/libhelm_sdkpy.so"
SCHEMAS = "kubernetes_validate/kubernetes-json-schema/v{}.0-local-strict/_definitions.json"
# The oldest that the chart allows, and the newest there is.
VERSIONS = ("1.29", "1.37")
FETCH_TIMEOUT_S, HELM_TIMEOUT_S = 240.0, 60.0
# group/version -> kind -> plural
KINDS = {
    "v1": {"ConfigMap": "configmaps", "Service": "services"},
    "apps/v1": {"Deployment": "deployments", "StatefulSet": "statefulsets"},
    "policy/v1": {"PodDisruptionBudget": "poddisruptionbudgets"},
    "monitoring.coreos.com/v1": {"PodMonitor": "podmonitors"},
}

Object = dict[str, Any]


class RefusedError(Exception):
    """Helm did not install; its message."""


@cache
def fetched() -> Path:
    """The directory with Helm and the schemas, fetched once (70 MB); skips the test where they cannot be had."""
    requirements = HERE / "requirements.txt"
    ready = BUILD / hashlib.sha256(requirements.read_bytes()).hexdigest()[:16]
    if ready.is_dir():
        return ready
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        pytest.skip(f"helm: the wheel carries it for Linux on x86-64 only, not for {platform.system()} on {platform.machine()}")
    partial = ready.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    # Version 3.12 is what the first wheel asks for; none of its Python is run.
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps", "--require-hashes"]
    command += ["--only-binary=:all:", "--python-version=3.12", f"--dest={partial}", f"--requirement={requirements}"]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=FETCH_TIMEOUT_S)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as e:
        reason = (e.stderr or "").strip().splitlines()[-1:] or [str(e)]
        pytest.skip(f"helm: cannot be fetched: {reason[0]}")
    wanted = {LIBRARY, *(SCHEMAS.format(version) for version in VERSIONS)}
    for wheel in partial.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(partial, wanted & set(archive.namelist()))
        wheel.unlink()
    partial.rename(ready)
    return ready


def schemas(version: str) -> dict[str, Any]:
    """The API schemas of one version of Kubernetes, every object closed to unknown fields."""
    document: dict[str, Any] = json.loads((fetched() / SCHEMAS.format(version)).read_text(encoding="utf-8"))
    return document


def install(values: dict[str, Any], directory: Path) -> list[Object]:
    """The objects that Helm creates for the chart with `values`; raises `RefusedError`."""
    with _api_server() as (url, created):
        kubeconfig = directory / "kubeconfig.json"
        kubeconfig.write_text(json.dumps(_kubeconfig(url)), encoding="utf-8")
        done = subprocess.run(
            [sys.executable, str(HERE / "install.py"), str(fetched() / LIBRARY), str(kubeconfig), str(CHART)],
            input=json.dumps(values),
            capture_output=True,
            text=True,
            timeout=HELM_TIMEOUT_S,
            # Releases are kept in the process: they are no part of what is tested.
            env={"HOME": str(directory), "HELM_DRIVER": "memory"},
        )
    if done.returncode != 0:
        raise RefusedError(done.stderr.strip())
    return created


def _kubeconfig(url: str) -> Object:
    return {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "here", "cluster": {"server": url}}],
        "users": [{"name": "me", "user": {}}],
        "contexts": [{"name": "here", "context": {"cluster": "here", "user": "me"}}],
        "current-context": "here",
    }


@contextlib.contextmanager
def _api_server() -> Iterator[tuple[str, list[Object]]]:
    """An API server on loopback, as far as Helm asks it; yields its URL and the objects created so far."""
    created: list[Object] = []
    answers = _discovery()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            found = answers.get(self.path.partition("?")[0])
            self._answer(404 if found is None else 200, found or {"kind": "Status", "apiVersion": "v1", "reason": "NotFound"})

        def do_POST(self) -> None:
            created.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self._answer(201, created[-1])

        def _answer(self, status: int, content: Object) -> None:
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            """Nothing is logged."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", created
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _discovery() -> dict[str, Object]:
    groups = [group.split("/") for group in KINDS if "/" in group]
    named = [
        {"name": name, "versions": [v := {"groupVersion": f"{name}/{version}", "version": version}], "preferredVersion": v}
        for name, version in groups
    ]
    answers: dict[str, Object] = {
        "/version": {"major": "1", "minor": "31", "gitVersion": "v1.31.0"},
        "/api": {"kind": "APIVersions", "versions": ["v1"]},
        "/apis": {"kind": "APIGroupList", "apiVersion": "v1", "groups": named},
    }
    for group, kinds in KINDS.items():
        resources = [{"name": n, "singularName": "", "namespaced": True, "kind": k, "verbs": ["create"]} for k, n in kinds.items()]
        path = f"/apis/{group}" if "/" in group else f"/api/{group}"
        answers[path] = {"kind": "APIResourceList", "groupVersion": group, "resources": resources}
    return answers
