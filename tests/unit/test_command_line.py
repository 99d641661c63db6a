"""The command `sidepool`: quick help, one line per error, the usual exit statuses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from sidepool import __main__ as entry
from sidepool import doctor
from sidepool.wire.errors import ConfigError


def test_help_names_every_command_and_imports_no_torch() -> None:
    code = """
import sys
from sidepool.__main__ import main
try:
    main(["--help"])
finally:
    print("torch" in sys.modules, "numpy" in sys.modules)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.splitlines()[-1] == "False False"
    assert all(command in out for command in ("partition", "sidecar", "demo", "doctor", "bench"))


@pytest.mark.parametrize("command", list(entry.COMMANDS))
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        entry.main([command, "--help"])
    assert stopped.value.code == 0
    assert f"usage: sidepool {command}" in capsys.readouterr().out


def test_an_expected_error_is_one_line_with_its_code(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise ConfigError("x: found 1; allowed: 2")

    monkeypatch.setattr(doctor, "examine", fail)
    assert entry.main(["doctor"]) == 2
    assert capsys.readouterr().err == "sidepool doctor: error: [CONFIG] x: found 1; allowed: 2\n"


def test_ctrl_c_exits_as_shells_expect(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "examine", interrupt)
    assert entry.main(["doctor"]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_a_missing_sidecar_configuration_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert entry.main(["sidecar", "--config", str(tmp_path / "none.yaml")]) == 2
    assert "none.yaml" in capsys.readouterr().err
