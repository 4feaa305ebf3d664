"""Every command of every README is run: here, in test_train.py, or by the command that runs these tests."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from tests.launcher.runs import REPOSITORY, run_command, train_command

READMES = {path: path.read_text() for path in [REPOSITORY / "README.md", *REPOSITORY.glob("*/README.md")]}
README = READMES[REPOSITORY / "README.md"]
COMMAND = re.compile(
    r"^ {4,7}((?:make|python|mpirun|deepspeed|srun|sbatch|source|hf|agff|tensorboard) [^#\n]*[^#\s])",
    re.MULTILINE,
)
COMMANDS = list(dict.fromkeys(command for text in READMES.values() for command in COMMAND.findall(text)))
SNIPPETS = re.findall(r"^```python\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)

ELSEWHERE = {
    "make test": "runs this test",
    "make test-full": "this test is part of it",
    "make test-ecosystem": "wants 5.5 GB of other libraries; `make test-full` runs it",
    "make bench": "tests/benchmarks/test_bench.py tries its parts; its figures are in the READMEs",
    "make family": "tests/benchmarks/family tries its parts; its figures are in the READMEs",
    "make ablation": "tests/benchmarks/ablation tries its parts",
    "make test-gpu": "needs a GPU; tests/gpu runs its code on CPU ranks",
    "make install": "the environment these tests run in",
    "make test-slurm": "tests/slurm, by hand; its fast part runs with these tests where Slurm is installed",
    "sbatch slurm/train_8node.sh --recipe mmeb_qwen2vl_2b": "tests/slurm, with the quickstart's recipe",
    "sbatch --partition=cpu slurm/convert.sh runs/mmeb_qwen2vl_2b-zero2 releases/mmeb_qwen2vl_2b": (
        "tests/slurm"
    ),
    "srun -p gpu -A my_project -l --nodes=8 --ntasks-per-node=1 --gpus-per-node=8 "
    ".venv/bin/python launcher/doctor.py --shards shards/mmeb": (
        "needs the nodes; tests/slurm starts doctor under srun"
    ),
    "hf download --repo-type dataset TIGER-Lab/MMEB-train --local-dir mmeb": "needs the data hub",
    "hf download Qwen/Qwen2-VL-2B-Instruct --local-dir models/Qwen2-VL-2B-Instruct": "needs the model hub",
    **{
        command: "test_train.py tries these launchers on one machine"
        for command in (
            "mpirun -n 16 --hostfile hosts -x MASTER_ADDR=first python launcher/train.py --deepspeed "
            "ds_configs/zero3.json",
            "deepspeed --hostfile hosts --no_ssh --node_rank 0 --master_addr first launcher/train.py",
        )
    },
    "sbatch slurm/evaluate.sh releases/mmeb_qwen2vl_2b --mmeb_eval /data/MMEB-eval --mmvp /data/MMVP_VLM "
    "--cache /scratch/vectors": "tests/slurm, with the quickstart's sets",
    **{
        command: "the quickstart's drawings; test_search.py and mining/test_mining.py run these chains"
        for command in (
            "python launcher/embed.py releases/quickstart .cache/quickstart/data/mmeb/images/Emoji_t2i "
            "vectors/drawings",
            "python launcher/embed.py releases/quickstart "
            ".cache/quickstart/data/mmeb/Emoji_t2i/original-00000-of-00001.parquet vectors/texts "
            "--sides query",
            "python launcher/search.py indexes/drawings --build vectors/drawings --fine",
            'python launcher/search.py indexes/drawings "a red heart" --html heart.html',
            "python launcher/search.py indexes/drawings --measure_recall 500 --queries vectors/texts",
            "python launcher/mine.py releases/quickstart .cache/quickstart/data/mmeb mined --num_negatives 4",
        )
    },
    "deepspeed --hostfile hosts launcher/train.py": "needs pdsh and sshd; run by hand",
    "make demo": "needs the package registries; run by hand, its figures are in the README",
    "python launcher/quickstart_data.py": "needs the package registries; part of make demo",
    "tensorboard --logdir runs": "a server; test_train.py reads the events it shows",
    **{train_command(stage): "the fixture `trained` of test_train.py" for stage in (1, 2, 3)},
}


def test_readmes_have_commands_and_those_run_elsewhere_are_still_in_them() -> None:
    assert len(COMMANDS) > 20
    assert set(ELSEWHERE) <= set(COMMANDS)


def test_readme_is_short() -> None:
    assert len(README.splitlines()) <= 180, "what belongs beside its code?"


def test_files_that_a_readme_names_are_there() -> None:
    named = {
        (readme.relative_to(REPOSITORY).as_posix(), name)
        for readme, text in READMES.items()
        for name in re.findall(r"`((?:agff|data_pipeline|ds_configs|launcher|slurm|tests)/[\w./*-]*)`", text)
    }
    assert len(named) > 15
    assert [
        (readme, name) for readme, name in sorted(named) if not list(REPOSITORY.glob(name.rstrip("/")))
    ] == []


@pytest.mark.timeout(600)
def test_the_other_commands_run_as_they_stand(
    project: Path, train_once: Callable[[int], tuple[Path, str]]
) -> None:
    train_once(3)
    for command in COMMANDS:
        if command in ELSEWHERE:
            continue
        result = run_command(command, project)
        assert result.returncode == 0, f"{command}\n{result.stdout}"
        assert "Traceback" not in result.stdout
    assert (project / "releases/mine/agff_config.json").exists()
    assert (project / "runs/quickstart-zero3/scores.json").exists()
    images = project / ".cache/quickstart/data/mmeb_eval/images/Emoji_t2i-fxemoji"
    images.mkdir(parents=True)
    for name in ("fxemoji_2764.png", "fxemoji_1f480.png"):
        Image.new("RGB", (56, 56), "red").save(images / name)
    for snippet in SNIPPETS:
        (project / "snippet.py").write_text(snippet)
        result = run_command("python snippet.py", project)
        assert result.returncode == 0, f"{snippet}\n{result.stdout}"
