"""The import table of the architecture, enforced on the source itself."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("wire", "client", "sidecar", "partition", "triton_backend", "bench")
# folder -> what it may import of ours, beside itself
ALLOWED = {
    "wire": {"_native"},
    "client": {"wire", "_native"},
    "sidecar": {"wire", "_native"},
    "partition": {"wire"},
    "triton_backend": {"client", "wire"},
    "bench": set(FOLDERS) | {"_native", "doctor"},
}
WITH_TORCH = {"partition", "triton_backend", "bench"}
# Heavy packages that neither auto-complete (triton_backend) nor `--help` (command modules) may pay for.
HEAVY = {"torch", "numpy", "grpc", "tritonclient", "pydantic", "yaml", "safetensors", "rich"}


def sources(folder: str) -> list[Path]:
    found = sorted((ROOT / folder).rglob("*.py"))
    assert found, f"no sources in {folder}/"
    return [path for path in found if "_pb2" not in path.name]


def imports(path: Path, *, top_level_only: bool = False) -> Iterator[str]:
    """Dotted names of imported modules; those only for type checkers are left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            pending += node.orelse
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif not (top_level_only and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)):
            pending += ast.iter_child_nodes(node)


def ours(path: Path) -> set[str]:
    """Folders (or `_native`, `doctor`) of sidepool that `path` imports."""
    names = (name.split(".") for name in imports(path))
    return {parts[1] for parts in names if parts[0] == "sidepool" and len(parts) > 1 and parts[1] != "__version__"}


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_imports_only_what_the_architecture_allows(folder: str) -> None:
    wrong = {str(path.relative_to(ROOT)): ours(path) - ALLOWED[folder] - {folder} for path in sources(folder)}
    assert {path: found for path, found in wrong.items() if found} == {}


@pytest.mark.parametrize("folder", sorted(set(FOLDERS) - WITH_TORCH))
def test_torch_is_never_needed_just_to_import_what_serves_without_it(folder: str) -> None:
    wrong = [
        str(path.relative_to(ROOT))
        for path in sources(folder)
        for name in imports(path, top_level_only=True)
        if name.split(".")[0] == "torch"
    ]
    assert wrong == []


def test_importing_the_triton_backend_imports_nothing_heavy() -> None:
    found = {name.split(".")[0] for name in imports(ROOT / "triton_backend" / "__init__.py", top_level_only=True)}
    assert found & (HEAVY | {"sidepool", "triton_python_backend_utils"}) == set()


def test_only_the_entry_point_and_what_starts_processes_read_the_environment() -> None:
    allowed = {"bench/triton_server.py"}  # hands its own environment on to the server it starts
    readers = set()
    for path in (path for folder in FOLDERS for path in sources(folder)):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if any(isinstance(n, ast.Attribute) and n.attr in ("environ", "getenv") for n in ast.walk(tree)):
            readers.add(str(path.relative_to(ROOT)))
    assert readers - allowed == set()


def test_the_model_file_of_the_example_repository_is_a_shim() -> None:
    shims = sorted((ROOT / "model_repository").glob("*/1/model.py"))
    assert shims
    assert all(len(path.read_text(encoding="utf-8").splitlines()) <= 20 for path in shims)
