from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest
from PIL import Image

from data_pipeline.claim import claimed
from data_pipeline.convert import prepare
from data_pipeline.decode import decode
from data_pipeline.manifest import read_manifest
from data_pipeline.reader import ShardReader
from data_pipeline.storage import LocalFolder
from data_pipeline.verify import check_folder
from launcher import verify
from launcher.prepare import main
from tests.drawings import write_drawings
from tests.mmeb import contents, row, write_subset


def start_prepare(*arguments: object, launcher: Sequence[str] = ()) -> subprocess.Popen[bytes]:
    """The command as a person types it, in a process group of its own."""
    repository = Path(__file__).parents[2]
    command = [*launcher, sys.executable, "launcher/prepare.py", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(repository), "OMPI_ALLOW_RUN_AS_ROOT": "1"}
    environment |= {
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "PATH": f"{sysconfig.get_path('scripts')}:{os.environ['PATH']}",
    }
    return subprocess.Popen(
        command,
        cwd=repository,
        env=environment,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def test_kill_at_twenty_random_moments_leaves_no_trace(tmp_path: Path) -> None:
    """SIGKILL to the command and all its writers, wherever they are; every other time to the command
    alone."""
    drawings = write_drawings(tmp_path / "drawings", num_images=60).mmeb
    prepare(drawings, tmp_path / "whole", rows_per_shard=1)
    generator = random.Random(0)
    out = tmp_path / "out"
    arguments = ("--mmeb", drawings, "--out", out, "--rows_per_shard", "1", "--processes", "2")
    kills = 0
    seen = set()
    while kills < 20:
        # counted in shards, not seconds: the same on a slow machine and a fast one
        more = generator.randint(0, 40)
        target = len(list(out.glob("*/*.tar"))) + more
        running = start_prepare(*arguments)
        while running.poll() is None and len(list(out.glob("*/*.tar"))) < target:
            time.sleep(0.001)
        time.sleep(generator.random() * 0.005)
        with contextlib.suppress(ProcessLookupError):
            (os.killpg if kills % 2 else os.kill)(running.pid, signal.SIGKILL)
        assert running.stdout is not None
        running.stdout.close()
        if running.wait() == 0:
            assert contents(out) == contents(tmp_path / "whole")
            shutil.rmtree(out)  # it was done: begin anew
            continue
        kills += 1
        seen.add(len(list(out.glob("*/*.tar"))))
    assert len(seen) > 10, "the kills came at different moments"
    writers = [
        process for process in psutil.process_iter(["cmdline"]) if str(out) in (process.info["cmdline"] or ())
    ]
    assert psutil.wait_procs(writers, timeout=10)[1] == [], "writers outlive the command"
    running = start_prepare(*arguments)
    assert running.communicate()[0]
    assert running.returncode == 0
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.parametrize("launcher", [(), ("mpirun", "-n", "2", "--oversubscribe")], ids=["alone", "mpirun"])
def test_a_second_conversion_waits_for_the_first_and_says_so(
    drawings: Path, tmp_path: Path, launcher: tuple[str, ...]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with claimed(out / "prepare.lock"):  # as a first conversion that has just begun
        running = start_prepare("--mmeb", drawings, "--out", out, "--processes", "1", launcher=launcher)
        assert running.stdout is not None
        before = b""
        while b"waiting until it ends" not in before:
            before += (line := running.stdout.readline())
            assert line, before.decode()
        assert f"{out} is being written by process {os.getpid()} on " in before.decode()
        assert sorted(out.iterdir()) == [out / "prepare.lock"]
    output, _ = running.communicate(timeout=120)
    assert running.returncode == 0, output.decode()
    prepare(drawings, tmp_path / "whole")
    assert contents(out) == contents(tmp_path / "whole")


def test_mpirun_spreads_the_work_and_writes_the_same_bytes(drawings: Path, tmp_path: Path) -> None:
    prepare(drawings, tmp_path / "whole", rows_per_shard=10)
    launcher = ("mpirun", "-n", "3", "--oversubscribe")
    arguments = ("--mmeb", drawings, "--out", tmp_path / "out", "--rows_per_shard", "10")
    for _ in range(2):  # the second time it is done already
        running = start_prepare(*arguments, launcher=launcher)
        output, _ = running.communicate(timeout=120)
        assert running.returncode == 0, output.decode()
        assert output.decode().count("Shapes_t2i  ") == 1, "one task speaks"
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    running = start_prepare("--mmeb", tmp_path, "--out", tmp_path / "x", launcher=launcher)
    output, _ = running.communicate(timeout=120)
    assert running.returncode == 2
    assert output.decode().count("error: ") == 1
    assert "no <SUBSET>/original-*.parquet here" in output.decode()


def test_many_tasks_without_mpi_are_told_so(
    drawings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in (
        ("SLURM_STEP_ID", "0"),
        ("SLURM_PROCID", "0"),
        ("SLURM_LOCALID", "0"),
        ("SLURM_NTASKS", "2"),
    ):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SLURM_STEP_NODELIST", "node1")
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    arguments = ["--mmeb", str(drawings), "--out", str(tmp_path / "out")]
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    assert main(arguments) == 2
    assert "several tasks were started, but mpi4py finds no MPI library" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


LIMITED = """
import resource, sys
from pathlib import Path
from launcher import verify
from launcher.prepare import main
# a file that grows further fails as on a full disk
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
places = ["--mmeb", sys.argv[1], "--out", sys.argv[2]]
sys.exit(main([*places, "--rows_per_shard", "40", "--processes", sys.argv[3]]))
"""


@pytest.mark.parametrize("processes", ["1", "2"])
def test_a_disk_that_takes_no_more_is_named_and_the_conversion_continues(
    drawings: Path, tmp_path: Path, processes: str
) -> None:
    prepare(drawings, tmp_path / "whole", rows_per_shard=40)
    result = subprocess.run(
        [sys.executable, "-c", LIMITED, str(drawings), str(tmp_path / "out"), processes],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert result.returncode == 2, result.stderr
    assert "error: cannot read or write " in result.stderr
    assert "File too large; free space or fix the cause, then give the same command again" in result.stderr
    prepare(drawings, tmp_path / "out", rows_per_shard=40)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_really_full_disk(drawings: Path, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(small)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("only root may mount a small disk")
    try:
        running = start_prepare("--mmeb", drawings, "--out", small / "out", "--rows_per_shard", "40")
        output, _ = running.communicate(timeout=60)
        assert running.returncode == 2, output.decode()
        assert "No space left on device; free space or fix the cause" in output.decode()
        subprocess.run(["mount", "-o", "remount,size=16m", str(small)], check=True)
        prepare(drawings, small / "out", rows_per_shard=40)
        prepare(drawings, tmp_path / "whole", rows_per_shard=40)
        assert contents(small / "out") == contents(tmp_path / "whole")
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_wrong_places_and_names_are_one_line(
    drawings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def error_of(*arguments: object) -> str:
        assert main([*map(str, arguments), "--processes", "1"]) == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1
        return lines[0]

    (tmp_path / "file").write_text("x")
    assert f"cannot read or write {tmp_path}/file" in error_of("--mmeb", drawings, "--out", tmp_path / "file")
    assert f"cannot read or write {tmp_path}/file/out" in error_of(
        "--mmeb", drawings, "--out", tmp_path / "file/out"
    )
    killed_at_once = tmp_path / "killed"
    killed_at_once.mkdir()
    (killed_at_once / "prepare.json.node-1.partial").write_text("{")
    assert main(["--mmeb", str(drawings), "--out", str(killed_at_once), "--processes", "1"]) == 0
    (killed_at_once / "prepare.json").write_text("{")
    assert "prepare.json is damaged; remove" in error_of("--mmeb", drawings, "--out", killed_at_once)
    root = tmp_path / "mmeb"
    write_subset(root, [row()], "My Set")
    write_subset(root, [row()], "Öther")
    write_subset(root, [row()], "-v")
    write_subset(root, [row()], ".hidden")
    assert "not a name of a source: '-v', 'My Set'; letters" in error_of(
        "--mmeb", root, "--out", tmp_path / "x"
    )
    root = tmp_path / "numbers"
    write_subset(root, [{**row(), "pos_text": 5}])
    assert "row 0: column pos_text holds 5 (int64); it must be text" in error_of(
        "--mmeb", root, "--out", tmp_path / "x"
    )
    assert not (tmp_path / "x").exists()
    out = tmp_path / "old"
    prepare(drawings, out)
    values = json.loads((out / "manifest.json").read_text())
    (out / "manifest.json").write_text(json.dumps({**values, "format": 1}))
    assert "remove the folder and run launcher/prepare.py" in error_of("--mmeb", drawings, "--out", out)


def test_a_subset_of_which_every_row_was_rejected_ends_with_code_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, out = tmp_path / "mmeb", tmp_path / "out"
    write_subset(root, [row()], "Good")
    for name in ("Bad", "Worse"):
        write_subset(root, [row(pos_text="")] * 3, name)
    for _ in range(2):  # the second time it is done already
        assert main(["--mmeb", str(root), "--out", str(out), "--processes", "1"]) == 1
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert [line.partition(", the first")[0] for line in lines] == [
            "error: Bad: all 3 rows were rejected",
            "error: Worse: all 3 rows were rejected",
        ]
        assert "the first because of pos: neither text nor image; fix what" in lines[0]
    assert main(["--mmeb", str(root), "--out", str(tmp_path / "good"), "--subsets", "Good"]) == 0


def test_every_finding_of_every_subset_is_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By both commands, and nothing is written."""
    root, out = tmp_path / "mmeb", tmp_path / "out"
    write_subset(root, [{**row(), "qry": 1, "pos_text": 2}], "Numbers")
    write_subset(root, [row()], "Part")
    first = root / "Part/original-00000-of-00001.parquet"
    first.rename(first.with_name("original-00000-of-00003.parquet"))
    assert main(["--mmeb", str(root), "--out", str(out)]) == 2
    refused = capsys.readouterr().err.removeprefix("error: ").splitlines()
    table = root / "Numbers/original-00000-of-00001.parquet"
    assert refused[:2] == [
        f"{table}:row 0: column qry holds 1 (int64); it must be text",
        f"{table}:row 0: column pos_text holds 2 (int64); it must be text",
    ]
    assert f"{root}/Part/original: 2 of 3 parts missing: -00001-of-00003, -00002-of-00003" in refused[2]
    assert not out.exists()
    assert verify.main([str(root), "--processes", "1"]) == 1
    verified = capsys.readouterr().out.splitlines()
    assert [line for line in verified if line.startswith(str(root))] == refused
    assert verified[-1] == "3 findings"


def write_layouts(root: Path) -> dict[str, list[str]]:
    """A tiny file of each layout: layout -> arguments."""
    (root / "cc3m/images").mkdir(parents=True)
    (root / "vg").mkdir()
    for path in (root / "cc3m/images/a.jpg", root / "vg/1.jpg"):
        Image.new("RGB", (8, 8)).save(path)
    rows = [
        {"id": "a", "image": "a.jpg", "caption": "a b", "blip_caption": "a"},
        {"id": "b", "image": "b.jpg"},
    ]
    (root / "cc3m/metadata.json").write_text(json.dumps(rows))
    box = {"x": 0, "y": 0, "width": 4, "height": 4, "phrase": "p"}
    regions = [box, {**box, "width": 40}]
    (root / "region_descriptions.json").write_text(json.dumps([{"id": 1, "regions": regions}]))
    (root / "nli.csv").write_text("sent0,sent1,hard_neg\na,b,c\na,b,\n")
    write_subset(root / "mmeb", [row()], "Sub")
    return {
        "mmeb": ["--mmeb", str(root / "mmeb")],
        "captions": ["--captions", str(root / "cc3m")],
        "texts": ["--texts", str(root / "nli.csv")],
        "regions": ["--regions", str(root / "region_descriptions.json"), "--images", str(root / "vg")],
    }


def test_each_layout_becomes_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    layouts = write_layouts(tmp_path)
    expected = {
        "mmeb": ("Sub", 1, 1, 0),
        "captions": ("cc3m", 2, 1, 1),
        "texts": ("nli", 2, 2, 0),
        "regions": ("region_descriptions", 1, 1, 0),
    }
    for layout, arguments in layouts.items():
        out = tmp_path / f"out_{layout}"
        assert main([*arguments, "--out", str(out), "--processes", "2"]) == 0
        printed = capsys.readouterr().out
        source, *counts = expected[layout]
        assert printed.splitlines()[1].split()[:4] == [source, *map(str, counts)]
        assert ("1 regions of 1 images; 1 regions of these were left out" in printed) == (layout == "regions")
        manifest = read_manifest(LocalFolder(out))
        assert check_folder(LocalFolder(out), manifest, deep=True, processes=1) == []
        decode(ShardReader(LocalFolder(out), manifest).read(source, 0))
    assert (
        main([*layouts["texts"], "--out", str(tmp_path / "other"), "--source", "NLI", "--max_rows", "1"]) == 0
    )
    assert list(read_manifest(LocalFolder(tmp_path / "other")).sources) == ["NLI"]
    assert main([*layouts["captions"], "--out", str(tmp_path / "out_texts")]) == 2
    assert "holds a conversion with other images, layout, subsets; remove it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("layout", "options", "message"),
    [
        ("texts", ["--images", "x"], "--images is not for --texts, which takes --source"),
        ("mmeb", ["--source", "x"], "--source is not for --mmeb, which takes --subsets, --split"),
        ("regions", ["--split", "original"], "--split is not for --regions, which takes --images, --source"),
        ("captions", ["--subsets", "x"], "--subsets is not for --captions, which takes --images, --source"),
        ("texts", ["--source", "a b"], "'a b' cannot name a source: letters, digits"),
    ],
)
def test_choices_of_another_layout_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], layout: str, options: list[str], message: str
) -> None:
    arguments = [*write_layouts(tmp_path)[layout], "--out", str(tmp_path / "out"), *options]
    assert main(arguments) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_command_line(drawings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--mmeb", str(drawings), "--out", str(tmp_path / "out")]
    assert main([*arguments, "--dry-run"]) == 0
    assert "Shapes_t2i" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    assert main([*arguments, "--max_rows", "5", "--subsets", "Shapes_t2i"]) == 0
    assert "Shapes_t2i                           5         5         0" in capsys.readouterr().out
    assert main([*arguments, "--rows_per_shard", "0"]) == 2
    assert capsys.readouterr().err == "error: --rows_per_shard 0 must be >= 1\n"
    assert main(["--mmeb", str(tmp_path / "no"), "--out", str(tmp_path / "out")]) == 2


def half_a_pair_in(layout: str, root: Path) -> None:
    """In the path of an image, or a name, of the layout's first row; a second one is right."""
    half = "\ud800"
    if layout == "captions":
        rows = [{"image": f"{half}.jpg", "caption": "a"}, {"image": "a.jpg", "caption": half}]
        (root / "cc3m/metadata.json").write_text(json.dumps([*rows, {"image": "a.jpg", "caption": "b"}]))
        return
    box = {"x": 0, "y": 0, "width": 4, "height": 4, "phrase": "p"}
    regions = [{**box, "region_id": half, "phrase": half}, box]
    (root / "region_descriptions.json").write_text(json.dumps([{"id": 1, "regions": regions}]))


@pytest.mark.parametrize("layout", ["captions", "regions"])
def test_half_a_surrogate_pair_rejects_its_row_alone(tmp_path: Path, layout: str) -> None:
    arguments = write_layouts(tmp_path)[layout]
    half_a_pair_in(layout, tmp_path)
    assert main([*arguments, "--out", str(tmp_path / "out"), "--processes", "1"]) == 0
    (path,) = (tmp_path / "out").glob("*/rejected.jsonl")
    assert all("reason" in json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
    assert "half a surrogate pair" in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("layout", ["captions", "regions"])
def test_images_of_another_folder_are_no_continuation(
    tmp_path: Path, layout: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = write_layouts(tmp_path / "first")[layout]
    command = [*arguments, "--out", str(tmp_path / "out"), "--processes", "1"]
    assert main(command) == 0
    assert main([*command, "--images", str(tmp_path / "first")]) == 2
    assert "holds a conversion with other images; remove it" in capsys.readouterr().err
    moved = [value.replace(str(tmp_path / "first"), str(tmp_path / "moved")) for value in command]
    (tmp_path / "first").rename(tmp_path / "moved")
    assert main(moved) == 0
