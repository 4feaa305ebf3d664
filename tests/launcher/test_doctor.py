"""The command: what it looks at, its table and its exit codes. The checks have their own tests."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from launcher import doctor
from launcher.checks.finding import Finding
from launcher.checks.machine import check_disk
from launcher.checks.software import Devices
from tests.launcher.checks.test_job import SRUN
from tests.launcher.checks.test_machine import file_system
from tests.launcher.checks.test_software import EIGHT_GPUS


@pytest.fixture
def healthy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """This machine without what its owner may have set, and with room enough."""
    for name in list(os.environ):
        if name.startswith(("SLURM_", "OMPI_", "NCCL_", "GLOO_", "MASTER_")) or name.endswith(
            ("RANK", "WORLD_SIZE")
        ):
            monkeypatch.delenv(name)
    extensions = tmp_path / "extensions"
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(extensions))
    monkeypatch.setattr(doctor, "check_disk", partial(check_disk, statvfs=file_system()))
    return extensions


def test_a_healthy_machine_is_well(healthy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(["--skip-ranks"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("0 errors, ")
    subjects = {line[9:25].strip() for line in lines[1:-1]}
    assert subjects >= {
        "versions",
        "GPUs",
        "MPI",
        "shared memory",
        "open files",
        "build locks",
        "network",
        "job",
    }
    assert subjects >= {"TMPDIR", "shard cache"}
    assert not subjects & {"run", "shards", "ranks"}


def test_the_table_has_columns(healthy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    doctor.main(["--skip-ranks"])
    lines = capsys.readouterr().out.splitlines()[1:-1]
    assert len(lines) > 10
    for line in lines:
        assert line[:9].strip() in ("ok", "warning", "error")
        assert line[9] != " "
        assert line[24] == " "
        assert line[25] != " "


def test_a_long_line_is_folded_below_its_column() -> None:
    finding = Finding("error", "build lock", "every later start waits on it silently " * 3, "rm " + "x" * 100)
    assert "\n" not in doctor.table_line(finding, None)
    lines = doctor.table_line(finding, 80).splitlines()
    assert len(lines) > 2
    assert all(line.startswith(" " * 25) and line[25] != " " for line in lines[1:])
    assert all(len(line) <= 80 for line in lines if "xxx" not in line)
    assert any("x" * 100 in line for line in lines), "a path that is to be copied stays in one piece"


def test_an_error_is_exit_code_1_and_hides_nothing(healthy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lock = healthy / "fused_adam" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    assert doctor.main(["--skip-ranks"]) == 1
    out = capsys.readouterr().out
    assert f"-> rm {lock}" in out
    assert "\nok       job" in out


def test_a_check_that_crashes_hides_no_other(
    healthy: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash() -> None:
        raise RuntimeError("boom\nof two lines")

    monkeypatch.setattr(Devices, "of_this_machine", crash)
    assert doctor.main(["--skip-ranks"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert any(
        line.startswith("error    GPUs") and "RuntimeError: boom of two lines" in line for line in lines
    )
    assert any(line.startswith("ok       job") for line in lines)


@pytest.mark.parametrize(
    ("num_gpus", "started"),
    [(0, [{}]), (1, [{"num_ranks": 1, "on_gpus": True}, {}]), (8, [{"num_ranks": 2, "on_gpus": True}])],
)
def test_ranks_are_started_on_what_there_is(
    healthy: Path, monkeypatch: pytest.MonkeyPatch, num_gpus: int, started: list[dict[str, Any]]
) -> None:
    calls: list[dict[str, Any]] = []

    def check(**settings: Any) -> list[Finding]:
        calls.append(settings)
        return [Finding("error", "ranks", "failed", "fix it")]

    monkeypatch.setattr(doctor, "check_ranks", check)
    devices = Devices(**{**vars(EIGHT_GPUS), "gpus": ("H200",) * num_gpus})
    monkeypatch.setattr(Devices, "of_this_machine", lambda: devices)
    assert doctor.main([]) == 1
    assert calls == started


def test_one_task_of_each_machine_reports(
    healthy: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (SRUN | {"MASTER_ADDR": "127.0.0.1"}).items():
        monkeypatch.setenv(name, value)
    assert doctor.main(["--skip-ranks"]) == 0
    assert capsys.readouterr().out == ""
    monkeypatch.setenv("SLURM_LOCALID", "0")
    doctor.main(["--skip-ranks"])
    assert "rank 1 of 16" in capsys.readouterr().out


@pytest.mark.parametrize("argv", [["--nothing"], ["--run"], ["stray"]])
def test_wrong_arguments_are_exit_code_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        doctor.main(argv)
    assert ended.value.code == 2
    assert "usage: doctor" in capsys.readouterr().err


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom launcher import doctor\ntry: doctor.main(['--help'])\nexcept SystemExit: pass\n"
        "assert not {'torch', 'deepspeed', 'transformers', 'pyarrow'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL, timeout=60)


def test_it_speaks_where_nothing_is_installed() -> None:
    bare = [sys.executable, "-I", "-S", doctor.__file__, "--skip-ranks"]
    result = subprocess.run(bare, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 1, result.stderr
    assert "torch is not installed" in result.stdout
    assert "Traceback" not in result.stderr


def test_it_speaks_where_torch_cannot_be_imported(healthy: Path) -> None:
    code = (
        "import sys; sys.modules['torch'] = None; from launcher import doctor; "
        "sys.exit(doctor.main(['--skip-ranks']))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 1, result.stderr
    assert "error    GPUs" in result.stdout
    assert "torch" in result.stdout
    assert "\nok       shared memory" in result.stdout or "\nwarning  shared memory" in result.stdout
    assert "Traceback" not in result.stderr
