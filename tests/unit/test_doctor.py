"""`sidepool doctor` reports what it finds, whatever it finds."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import pytest

from sidepool import doctor
from sidepool.__main__ import main

LANES = {"lane shm", "lane tcp", "lane grpc", "lane rdma"}
EVERYTHING = LANES | {"SIMD", "huge pages", "hugetlbfs", "memlock", "RDMA", "gRPC load", "torch", "Triton"}
EVERYTHING |= {"lookahead", "cores", "NUMA", "/dev/shm"}


def test_every_finding_is_reported_as_json_with_advice_where_it_is_not_ok(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    findings = json.loads(capsys.readouterr().out)
    assert {f["name"] for f in findings} == EVERYTHING
    assert all(f["found"] for f in findings)
    assert all(bool(f["todo"]) == (f["state"] != "ok") for f in findings)


def test_the_text_names_every_finding(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert [name for name in EVERYTHING if name not in text] == []


@pytest.mark.parametrize(
    ("text", "state"), [("always [madvise] never", "ok"), ("[always] madvise never", "ok"), ("always madvise [never]", "limited")]
)
def test_the_huge_page_setting_is_read_from_the_kernel(tmp_path: Path, text: str, state: str) -> None:
    setting = tmp_path / "enabled"
    setting.write_text(text)
    assert doctor.transparent_huge_pages(setting).state == state


def test_a_kernel_without_huge_pages_is_said_to_have_none(tmp_path: Path) -> None:
    assert doctor.transparent_huge_pages(tmp_path / "enabled").state == "absent"


def test_reserved_pages_are_counted(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 1 kB\nHugePages_Total:      12\nHugePages_Free: 3\nHugepagesize:       2048 kB\n")
    assert "12 pages of 2048 kB reserved, 3 free" in doctor.reserved_huge_pages(meminfo).found


@pytest.mark.parametrize(("limit", "state"), [(resource.RLIM_INFINITY, "ok"), (8 << 20, "limited")])
def test_the_memlock_limit_is_reported(monkeypatch: pytest.MonkeyPatch, limit: int, state: str) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda which: (limit, limit))
    assert doctor.memlock().state == state


def test_numa_nodes_are_shown_with_their_usable_cores(tmp_path: Path) -> None:
    for number, cpus in enumerate(("0-3", "4-7")):
        (tmp_path / f"node{number}").mkdir()
        (tmp_path / f"node{number}" / "cpulist").write_text(f"{cpus}\n")
    (tmp_path / "has_memory").write_text("0-1\n")
    assert doctor.numa(tmp_path, frozenset({0, 4, 5})).found.startswith("node 0: 1 usable cores; node 1: 2 usable cores")
    assert doctor.numa(tmp_path / "none").found.startswith("no nodes")


def test_a_missing_shared_memory_mount_is_absent(tmp_path: Path) -> None:
    assert doctor.shared_memory(tmp_path / "none").state == "absent"
