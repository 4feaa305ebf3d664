"""`make family`: the order of its commands, its restart, its table."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.benchmarks.family.__main__ import SOURCES
from tests.benchmarks.family.methods import Method, Stage
from tests.benchmarks.family.report import MEASURED, PART, ROOT, texts
from tests.benchmarks.family.runner import run_tasks, source_digest
from tests.benchmarks.family.table import (
    COLUMNS,
    PAIRS,
    SHEETS,
    FamilyTable,
    agreement,
    facts_of,
    scores_of,
    table_of,
)
from tests.benchmarks.family.tasks import Comparison, Task

ONE = Method(name="one", title="One stage", stages=(Stage(recipe="quickstart", settings={"seed": "7"}),))
TWO = Method(
    name="two",
    title="Two stages",
    stages=(
        Stage(recipe="first", share=0.25, shards="texts", is_taught=True),
        Stage(recipe="second", share=0.75),
    ),
    sets={"regions": Path("sheets")},
)


def comparison(folder: Path, *methods: Method) -> Comparison:
    return Comparison(
        methods=methods,
        num_pairs=640,
        folder=folder,
        batch_size_of=lambda name: 32 if name == "first" else 64,
    )


class Machine:
    """Stands in for the commands: notes them, writes their output, fails when it is told."""

    def __init__(self) -> None:
        self.ran: list[str] = []
        self.found: dict[str, list[str]] = {}
        self.fails_at = ""

    def __call__(self, task: Task, log: Path) -> int:
        self.ran.append(task.name)
        if task.output is not None:
            there = sorted(path.name for path in task.output.glob("*")) if task.output.is_dir() else []
            self.found[task.name] = there
            task.output.mkdir(parents=True, exist_ok=True)
            (task.output / "part").write_text("")
        if task.name != self.fails_at:
            return 0
        log.write_text("error: no room\nkilled\n")
        return 3


ORDER = [
    "data",
    "shards of pairs",
    "shards of texts",
    "shards of held_out_texts",
    "vectors of texts by teacher",
    "vectors of held_out_texts by teacher",
    "train one",
    "release one",
    "vectors of held_out_texts by one",
    "evaluate one",
    "train two-1",
    "release two-1",
    "vectors of held_out_texts by two-1",
    "train two-2",
    "release two-2",
    "vectors of held_out_texts by two-2",
    "evaluate two",
]


def test_commands_come_behind_what_they_read() -> None:
    tasks = comparison(Path("f"), ONE, TWO).tasks()
    assert [task.name for task in tasks] == ORDER
    for place, task in enumerate(tasks):
        assert set(task.after) <= {earlier.name for earlier in tasks[:place]}, task.name
        read = {part for part in task.command if part.startswith("f/")} - {str(task.output)}
        written = {str(earlier.output) for earlier in tasks if earlier.name in task.after}
        assert read - {"f/shards/pairs"} <= written | {"f/shards/texts"}, task.name


def test_a_second_stage_begins_with_the_first_one_s_release_and_they_share_the_pairs() -> None:
    commands = {task.name: " ".join(task.command) for task in comparison(Path("f"), ONE, TWO).tasks()}
    assert commands["train one"] == (
        "deepspeed launcher/train.py --recipe quickstart --run_dir f/runs/one --seed 7 --num_steps 10 "
        "--save_every 10 --backbone.path .cache/quickstart/backbone --data.shards f/shards/pairs"
    )
    assert commands["train two-1"].endswith(
        "--recipe first --run_dir f/runs/two-1 --seed 0 --num_steps 5 --save_every 5 --backbone.path "
        ".cache/quickstart/backbone --data.shards f/shards/texts --data.vectors f/vectors/texts-teacher"
    )
    assert "--num_steps 8 " in commands["train two-2"]  # 480 pairs of 640, 64 a step
    assert commands["train two-2"].endswith(
        "--backbone.path f/releases/two-1 --data.shards f/shards/pairs --prompts.start_from f/releases/two-1"
    )
    assert commands["evaluate two"] == (
        "python launcher/evaluate.py f/releases/two-2 --mmeb_eval .cache/quickstart/data/mmeb_eval --mmvp "
        ".cache/quickstart/data/mmvp --captions .cache/quickstart/data/captions --regions sheets "
        "--out f/scores/two.json"
    )


def test_shares_that_are_not_the_whole_are_refused() -> None:
    with pytest.raises(ValueError, match="two: the stages' shares must add up to 1"):
        replace(TWO, stages=TWO.stages[:1])


def test_what_is_done_is_left_out_and_what_was_interrupted_continues(tmp_path: Path) -> None:
    tasks, machine = comparison(tmp_path, ONE, TWO).tasks(), Machine()
    machine.fails_at = "train two-1"
    with pytest.raises(
        RuntimeError, match=r"two-1: exit code 3 of `deepspeed .*`: error: no room; .*same command cont"
    ):
        run_tasks(tasks, tmp_path, code="c", run=machine)
    assert machine.ran == ORDER[: ORDER.index("train two-1") + 1]
    again = Machine()
    seconds = run_tasks(tasks, tmp_path, code="c", run=again)
    assert again.ran == ["data", *ORDER[ORDER.index("train two-1") :]]
    assert again.found["train two-1"] == ["part"], "its run folder is there to be continued"
    assert list(seconds) == ORDER
    last = Machine()
    run_tasks(tasks, tmp_path, code="c", run=last)
    assert last.ran == ["data"], "what knows itself what is done"


def test_a_conversion_that_was_interrupted_begins_anew(tmp_path: Path) -> None:
    """It refuses a folder that exists."""
    tasks, machine = comparison(tmp_path, ONE).tasks(), Machine()
    machine.fails_at = "release one"
    with pytest.raises(RuntimeError):
        run_tasks(tasks, tmp_path, code="c", run=machine)
    again = Machine()
    run_tasks(tasks, tmp_path, code="c", run=again)
    assert again.found["release one"] == []


def test_another_setting_makes_anew_what_depends_on_it_and_other_code_everything(tmp_path: Path) -> None:
    run_tasks(comparison(tmp_path, ONE, TWO).tasks(), tmp_path, code="c", run=Machine())
    first, second = TWO.stages
    changed = replace(TWO, stages=(first, replace(second, settings={"loss.temperature": "0.1"})))
    machine = Machine()
    run_tasks(comparison(tmp_path, ONE, changed).tasks(), tmp_path, code="c", run=machine)
    assert machine.ran == ["data", *ORDER[ORDER.index("train two-2") :]]
    assert machine.found["train two-2"] == [], "the run of the other setting is gone"
    changed = replace(changed, stages=(replace(first, settings={"seed": "1"}), changed.stages[1]))
    machine = Machine()
    run_tasks(comparison(tmp_path, ONE, changed).tasks(), tmp_path, code="c", run=machine)
    assert machine.ran == ["data", *ORDER[ORDER.index("train two-1") :]]
    machine = Machine()
    run_tasks(comparison(tmp_path, ONE, changed).tasks(), tmp_path, code="d", run=machine)
    assert machine.ran == ORDER


def test_an_output_that_somebody_removed_is_made_again(tmp_path: Path) -> None:
    tasks = comparison(tmp_path, ONE).tasks()
    run_tasks(tasks, tmp_path, code="c", run=Machine())
    (tmp_path / "scores/one.json/part").unlink()
    (tmp_path / "scores/one.json").rmdir()
    machine = Machine()
    run_tasks(tasks, tmp_path, code="c", run=machine)
    assert machine.ran == ["data", "evaluate one"]


def test_every_file_of_the_code_is_in_its_digest(tmp_path: Path) -> None:
    (tmp_path / "agff").mkdir()
    (tmp_path / "agff/a.py").write_text("1")
    before = source_digest([tmp_path / "agff"])
    (tmp_path / "agff/a.py").write_text("2")
    assert source_digest([tmp_path / "agff"]) != before
    assert all((ROOT / folder).is_dir() for folder in SOURCES)


# ---------------------------------------------------------------- the table


def scores(**more: Any) -> dict[str, Any]:
    sets = [{"name": name, "score": 12.0, "chance": 0.24} for name in COLUMNS]
    average = {"score": 22.25, "chance": 25.0}
    sheets = [
        {"direction": direction, "similarity": "global", "recall_at_1": score, "chance_at_1": 1.0}
        for direction, score in (("text to image", 4.0), ("image to text", 99.0))
    ]
    captions = [{"name": SHEETS, "scores": sheets}]
    return {"mmeb": {"sets": sets}, "mmvp": {"average": average}, "captions": captions, **more}


GENERATES: Mapping[str, Any] = {
    "caption_quality": [{"name": "C", "scores": [{"cider_d": 0.5, "constant_cider_d": 0.125}]}],
    "regions": [
        {
            "name": "R",
            "scores": [{"direction": "text to region", "recall_at_1": 10.0, "chance_at_1": 0.5}],
        }
    ],
}


def test_the_table_has_scores_factors_and_what_only_one_method_has(tmp_path: Path) -> None:
    compared = comparison(tmp_path, ONE, replace(TWO, stages=(Stage(recipe="first"),)))
    (tmp_path / "scores").mkdir()
    (tmp_path / "scores/one.json").write_text(json.dumps(scores()))
    (tmp_path / "scores/two.json").write_text(json.dumps(scores(**GENERATES)))
    table = table_of(compared, {task.name: 30.0 for task in compared.tasks()})
    table.write(tmp_path)
    assert FamilyTable.read(tmp_path / "measured.json") == table
    assert [entry.minutes for entry in table.entries] == [1.5, 1.5]
    lines = (tmp_path / "measured.md").read_text().splitlines()
    assert lines[0].startswith("| `make family` | steps | text -> image | image -> text | ")
    cells = "12.0 % (50 x) | " * len(COLUMNS)
    assert lines[2] == f"| One stage | 10 | {cells}4.0 % (4 x) | 22.2 % |"
    assert lines[3].startswith("| Two stages | 20 | ")
    assert lines[5] == (
        "Two stages: CIDEr-D of captions of unseen drawings 0.50; of the best of 50 constant captions "
        "0.12; regions of unseen sheets, text to region, R@1 10.0 % (20 x chance)."
    )
    assert lines[-1].startswith("640 pairs a method, one seed, ")
    assert PAIRS in lines[0]
    assert table.summary().startswith(
        "text -> image on the unseen studio, above chance: One stage 50 x; Two stages 50 x (640 pairs"
    )


def test_fused_similarity_is_said_beside_that_of_global_vectors() -> None:
    values = scores()
    sheets = values["captions"][0]["scores"]
    sheets.append({**sheets[0], "similarity": "fused", "recall_at_1": 8.0})
    assert scores_of(values)["sheet by one name"] == (8.0, 1.0)
    assert facts_of(values) == {"sheet by one name, by the global vectors alone": "4.0 %"}


def test_a_model_that_only_embeds_has_no_further_facts() -> None:
    assert facts_of(scores()) == {}
    assert facts_of(scores(caption_quality=[], regions=[])) == {}


def test_the_readmes_have_a_place_for_the_table_and_hold_what_was_measured() -> None:
    """Otherwise: python -m tests.benchmarks.family.report"""
    measured = texts(FamilyTable.read(MEASURED)) if MEASURED.exists() else {}
    for readme in (ROOT / "README.md", ROOT / "tests/README.md"):
        assert PART.findall(readme.read_text()) == [measured.get(readme, "")], readme


def test_agreement_is_of_orders_not_of_values() -> None:
    torch.manual_seed(0)
    teacher_NE = torch.randn(40, 12)
    turned_ND, _ = torch.linalg.qr(torch.randn(12, 12))
    assert agreement(teacher_NE, 3 * teacher_NE @ turned_ND) == pytest.approx(1, abs=1e-4)
    assert abs(agreement(teacher_NE, torch.randn(40, 12))) < 0.1
