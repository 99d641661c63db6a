"""What the cut knows about hardware is in the wheel, and every figure says where it comes from."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

from sidepool.partition.profiles import SHIPPED

ROOT = Path(__file__).parents[2]
PROFILES = yaml.safe_load(SHIPPED.read_text(encoding="utf-8"))


def test_the_wheel_holds_the_profiles(tmp_path: Path) -> None:
    """Without the native core, which takes minutes to build and is not what is asked here."""
    settings = [f"--config-settings={x}" for x in ("wheel.cmake=false", f"build-dir={tmp_path / 'build'}")]
    command = [sys.executable, "-m", "pip", "wheel", str(ROOT), "--no-deps", "--no-build-isolation", "-q", "-w", str(tmp_path)]
    subprocess.run([*command, *settings], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as held:
        assert held.read("sidepool/partition/profiles.yaml") == SHIPPED.read_bytes()


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in ("cpu", "gpu", "link") for name in PROFILES[kind]])
def test_every_profile_has_a_source_that_gives_its_figures(kind: str, name: str) -> None:
    found = PROFILES[kind][name]
    source = found["source"].replace(",", "")
    assert len(source) > 20
    if kind == "link":
        rate = re.match(r"\d+", name)
        assert rate is None or found["bytes_per_s"] == int(rate[0]) * 1e9 / 8
        return
    assert found["gather_bytes_per_s"] == found["bytes_per_s"] / 2  # as the file's first lines say
    assert f"{found['watts']} W" in source
    if kind == "gpu":
        assert f"{found['flops_per_s'] / 1e12:g} TFLOPS" in source
        assert f"{found['bytes_per_s'] / 1e9:g} GB/s" in source or f"{found['bytes_per_s'] / 1e12:g} TB/s" in source
        return
    cores, ghz, per_cycle = (float(re.search(rf"([\d.]+) {unit}", source)[1]) for unit in ("cores", "GHz", "fp32"))  # type: ignore[index]
    assert found["flops_per_s"] == pytest.approx(cores * ghz * 1e9 * per_cycle, rel=0.01)
    channels, rate_mt = map(int, re.search(r"(\d+) x DDR\d-(\d+)", source).groups())  # type: ignore[union-attr]
    assert found["bytes_per_s"] == channels * rate_mt * 1e6 * 8
