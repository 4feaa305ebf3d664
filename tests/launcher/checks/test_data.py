"""Shards and run folders are damaged; each damage is found, and its remedy helps."""

from __future__ import annotations

import json
import subprocess
import threading
from collections.abc import Callable
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
import yaml

from agff.checkpoint_folder import check_checkpoint
from agff.files import file_fingerprint
from data_pipeline.convert import prepare
from launcher import doctor
from launcher.checks.data import check_run, check_shards
from launcher.checks.finding import Finding
from launcher.command_line import parse_train_arguments
from launcher.run.config import as_dict
from tests.drawings import write_drawings
from tests.launcher.checks.test_finding import only, states


@pytest.fixture(scope="module")
def undamaged_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    prepare(write_drawings(folder / "drawings").mmeb, folder / "out", rows_per_shard=10)
    return folder / "out"


@pytest.fixture
def shards(undamaged_shards: Path, tmp_path: Path) -> Path:
    subprocess.run(["cp", "-r", undamaged_shards, tmp_path / "shards"], check=True)
    return tmp_path / "shards"


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def overwrite(path: Path) -> None:
    path.write_bytes(b"0" * path.stat().st_size)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def of_another_step(path: Path) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), "step": 3}))


def without_hashes(path: Path) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), "files": ["random-00000.pt"]}))


SHARD = "Shapes_VQA/Shapes_VQA-00000.tar"


def test_undamaged_shards_are_well(shards: Path) -> None:
    (finding,) = check_shards(str(shards))
    assert finding.state == "ok"
    assert "samples" in finding.found


@pytest.mark.parametrize(
    ("name", "damage", "text"),
    [
        (SHARD, cut, "bytes, the manifest says"),
        (SHARD, Path.unlink, "shard is missing"),
        ("Shapes_VQA/index.arrow", cut, "index has"),
        ("manifest.json", cut, "damaged manifest"),
        ("manifest.json", Path.unlink, "no shards here"),
    ],
)
def test_damaged_shards_are_an_error(
    shards: Path, name: str, damage: Callable[[Path], None], text: str
) -> None:
    damage(shards / name)
    finding = only(check_shards(str(shards)))
    assert finding.state == "error"
    assert text in finding.found
    assert name.removesuffix("manifest.json") in finding.found
    assert finding.remedy


def test_each_damaged_shard_is_a_line_and_very_many_are_counted(
    shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damaged = sorted(shards.glob("*/*.tar"))
    for path in damaged:
        path.unlink()
    findings = check_shards(str(shards))
    assert len(damaged) > 9
    assert [finding.found for finding in findings] == [f"{path}: shard is missing" for path in damaged]
    monkeypatch.setattr("launcher.checks.data.MOST_LINES", 5)
    findings = check_shards(str(shards))
    assert len(findings) == 6
    assert findings[-1].found == f"{len(damaged) - 5} more of the kind"
    assert "verify.py" in findings[-1].remedy


def test_a_command_instead_of_a_folder_is_refused() -> None:
    assert only(check_shards("pipe:cat")).state == "error"


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *arguments: object) -> None:
        pass


def test_remote_shards_are_asked_for_and_not_fetched(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(shards))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            url = f"http://127.0.0.1:{server.server_port}"
            assert states(check_shards(url)) == ["ok"]
            cut(shards / SHARD)
            changed = only(check_shards(url))
            (shards / SHARD).unlink()
            missing = only(check_shards(url))
        finally:
            server.shutdown()
            thread.join()
    assert f"{url}/{SHARD}" in changed.found
    assert "the manifest says" in changed.found
    assert "missing" in missing.found
    assert not (tmp_path / "home").exists()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder as training leaves it: checkpoints of steps 2 and 4 by two ranks."""
    folder = tmp_path / "run"
    for step in (2, 4):
        checkpoint = folder / "checkpoints" / f"step-{step:06d}"
        checkpoint.mkdir(parents=True)
        for rank in range(2):
            torch.save({"state": torch.arange(9)}, checkpoint / f"random-{rank:05d}.pt")
            for part in ("optim", "model"):
                torch.save(
                    {"x": torch.arange(99)}, checkpoint / f"zero_pp_rank_{rank}_mp_rank_00_{part}_states.pt"
                )
        files = {
            path.name: f"{path.stat().st_size} bytes, sha256 {'0' * 64}" for path in checkpoint.iterdir()
        }
        state = {"step": step, "world_size": 2, "files": files, "data_plan": {}}
        (checkpoint / "state.json").write_text(json.dumps(state))
    (folder / "config.yaml").write_text(yaml.safe_dump(as_dict(parse_train_arguments([]).config)))
    (folder / "deepspeed.json").write_text("{}")
    return folder


NEWEST = "checkpoints/step-000004"


def test_a_complete_run_is_well(run: Path) -> None:
    assert check_run(run) == [Finding("ok", "run", f"{run}: checkpoint of step 4 is complete")]


def test_a_run_without_checkpoint_is_well(run: Path) -> None:
    subprocess.run(["rm", "-r", run / "checkpoints"], check=True)
    assert check_run(run) == [Finding("ok", "run", f"{run}: no checkpoint yet")]


@pytest.mark.parametrize(
    ("name", "damage", "text"),
    [
        ("random-00001.pt", cut, "random-00001.pt: found "),
        ("zero_pp_rank_1_mp_rank_00_optim_states.pt", cut, "optim_states.pt: found "),
        ("zero_pp_rank_0_mp_rank_00_model_states.pt", empty, "model_states.pt: found 0 bytes"),
        ("zero_pp_rank_0_mp_rank_00_optim_states.pt", Path.unlink, "cannot read it: No such file"),
        ("zero_pp_rank_0_mp_rank_00_optim_states.pt", overwrite, "damaged: not a file that torch.save wrote"),
        ("state.json", cut, "state.json: cannot be read"),
        ("state.json", empty, "state.json: cannot be read"),
        ("state.json", of_another_step, "state.json: is of step 3"),
        ("state.json", without_hashes, "state.json: `files` must be a mapping of names to hashes"),
    ],
)
def test_an_unreadable_checkpoint_is_an_error(
    run: Path, name: str, damage: Callable[[Path], None], text: str
) -> None:
    damage(run / NEWEST / name)
    findings = check_run(run)
    assert findings
    for finding in findings:
        assert finding.state == "error"
        assert f"mv {run / NEWEST} {run / NEWEST}.damaged" in finding.remedy
        assert "then continues from step 2" in finding.remedy
    assert text in findings[0].found


@pytest.mark.parametrize("damage", [cut, empty, Path.unlink])
def test_doctor_and_resume_report_the_same_files(run: Path, damage: Callable[[Path], None]) -> None:
    paths = sorted((run / NEWEST).glob("*.pt"))
    state = json.loads((run / NEWEST / "state.json").read_text())
    state["files"] = {path.name: file_fingerprint(path) for path in paths}
    (run / NEWEST / "state.json").write_text(json.dumps(state))
    for path in paths:
        damage(path)
    hashed = [check_checkpoint(run, 4, part=part, num_parts=2) for part in range(2)]
    named = [problem.partition(": ")[0] for problems in hashed for problem in problems]
    assert sorted(named) == [finding.found.partition(": ")[0] for finding in check_run(run)]
    assert sorted(named) == [str(path) for path in paths]


def test_the_remedy_for_a_damaged_checkpoint_works(run: Path) -> None:
    cut(run / NEWEST / "random-00000.pt")
    remedy = only(check_run(run)).remedy
    command = remedy[remedy.index("mv ") :].split(";")[0]
    subprocess.run(command, shell=True, check=True)
    assert check_run(run) == [Finding("ok", "run", f"{run}: checkpoint of step 2 is complete")]


def test_a_checkpoint_without_its_state_does_not_count(run: Path) -> None:
    (run / NEWEST / "state.json").unlink()
    finding = only(check_run(run))
    assert finding.state == "warning"
    assert "would continue from step 2" in finding.found
    (run / "checkpoints/step-000002/state.json").unlink()
    findings = check_run(run)
    assert states(findings) == ["error", "error"]
    assert "would start from step 0" in findings[0].found


def test_a_checkpoint_of_an_older_version_is_not_to_be_thrown_away(run: Path) -> None:
    path = run / NEWEST / "state.json"
    state = json.loads(path.read_text())
    del state["data_plan"]
    path.write_text(json.dumps(state))
    finding = only(check_run(run))
    assert finding.state == "warning"
    assert "data_plan missing" in finding.found
    assert "mv" not in finding.remedy


def test_left_over_folders_are_a_note(run: Path) -> None:
    (run / "checkpoints/step-000006.partial").mkdir()
    findings = check_run(run)
    assert states(findings) == ["ok", "ok"]
    assert "step-000006.partial" in findings[1].found


@pytest.mark.parametrize("name", ["config.yaml", "deepspeed.json"])
@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_text("{not: [closed")])
def test_an_unreadable_configuration_is_an_error(
    run: Path, name: str, damage: Callable[[Path], None]
) -> None:
    damage(run / name)
    finding = only(check_run(run))
    assert finding.state == "error"
    assert name in finding.remedy


def test_a_run_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    assert only(check_run(tmp_path / "absent")).state == "error"


def test_the_command_checks_what_is_named(
    run: Path, shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    doctor.main(["--skip-ranks", "--run", str(run), "--shards", str(shards)])
    lines = capsys.readouterr().out.splitlines()
    assert {"run", "shards"} <= {line[9:25].strip() for line in lines if line.startswith("ok ")}
