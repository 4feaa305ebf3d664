"""scores.json: set by set, beside the scores of other sets, never mixed with those of other weights."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import json
import threading
from pathlib import Path
from typing import Any

import pytest

from agff.errors import ConfigError
from agff.nested import Truncation
from agff.processor import ProcessorConfig
from agff.scoring import MmvpReport, SetScore, mmvp_report, set_score
from agff.similarity import FusionConfig
from launcher.evaluation.scores_file import ScoresFile, check_place, settings_of
from tests.launcher.colours import ColourModel

SETTINGS = settings_of(ColourModel(), max_queries=None, similarity="fused")


def score_of(name: str, *, hits: int, meta_task: str = "vqa") -> SetScore:
    flags = [True] * hits + [False] * (10 - hits)
    return set_score(name, meta_task=meta_task, in_distribution=True, hits=flags, num_candidates=[4] * 10)


def mmvp(*hits: bool) -> MmvpReport:
    return mmvp_report(["Colour"] * len(hits), hits)


def scores_file(path: Path, *, weights: str = "w", settings: dict[str, Any] = SETTINGS) -> ScoresFile:
    return ScoresFile(path, model="m", weights_sha256=weights, settings=settings)


def scores_in(values: dict[str, Any]) -> dict[str, float]:
    return {entry["name"]: entry["score"] for entry in values["mmeb"]["sets"]}


def test_sets_are_kept_beside_each_other_and_means_follow(tmp_path: Path) -> None:
    path = tmp_path / "scores.json"
    scores_file(path).add_set(score_of("A", hits=2), note="imitates")
    scores_file(path).add_set(score_of("B", hits=4, meta_task="retrieval"), note=None)
    scores_file(path).add_mmvp(mmvp(True, False))
    values = json.loads(path.read_text())
    assert scores_in(values) == {"A": 20, "B": 40}
    assert {mean["name"]: mean["score"] for mean in values["mmeb"]["meta_tasks"]} == {
        "vqa": 20,
        "retrieval": 40,
    }
    assert (values["mmeb"]["overall"]["score"], values["mmvp"]["average"]["score"]) == (30, 50)
    assert (values["num_mmeb_queries"], values["num_mmvp_pairs"], values["notes"]) == (20, 2, ["imitates"])

    scores_file(path).add_set(score_of("A", hits=6), note=None)
    values = json.loads(path.read_text())
    assert scores_in(values) == {"A": 60, "B": 40}
    assert values["mmeb"]["overall"]["score"] == 50
    assert values["mmvp"]["average"]["score"] == 50
    assert values["other"] == []


def test_scores_of_truncations_are_kept_set_by_set(tmp_path: Path) -> None:
    path = tmp_path / "scores.json"
    whole, short = Truncation(dim=8, num_fine=2), Truncation(dim=4, num_fine=0)
    scores_file(path).add_set(score_of("A", hits=2), note=None)
    scores_file(path).add_truncated({whole: {"A": 20.0}, short: {"A": 10.0}})
    scores_file(path).add_truncated({whole: {"MMVP": 50.0}, short: {"MMVP": 0.0}})
    scores_file(path).add_truncated({whole: {"A": 20.0}, short: {"A": 15.0}})
    scores_file(path).add_truncated({})
    assert json.loads(path.read_text())["truncations"] == [
        {"dim": 8, "num_fine": 2, "scores": {"A": 20.0, "MMVP": 50.0}},
        {"dim": 4, "num_fine": 0, "scores": {"A": 15.0, "MMVP": 0.0}},
    ]
    results, _ = scores_file(path).results()
    assert results.truncated == {whole: {"A": 20.0, "MMVP": 50.0}, short: {"A": 15.0, "MMVP": 0.0}}


def all_settings() -> dict[str, dict[str, Any]]:
    """Each setting that a score depends on -> the settings with another value of it."""
    changed = {
        "max_queries": settings_of(ColourModel(), max_queries=10, similarity="fused"),
        "similarity": settings_of(ColourModel(), max_queries=None, similarity="global"),
    }
    for field in dataclasses.fields(ProcessorConfig):
        model = ColourModel()
        model.processor.limits = dataclasses.replace(ProcessorConfig(), **{field.name: 1000})
        changed[f"processor.{field.name}"] = settings_of(model, max_queries=None, similarity="fused")
    for field in dataclasses.fields(FusionConfig):
        model = ColourModel()
        model.fusion = dataclasses.replace(model.fusion, **{field.name: 0.3})
        changed[f"fusion.{field.name}"] = settings_of(model, max_queries=None, similarity="fused")
    return changed


OTHERS = {"weights": ("v", SETTINGS), **{name: ("w", changed) for name, changed in all_settings().items()}}


@pytest.mark.parametrize(("weights", "settings"), OTHERS.values(), ids=OTHERS)
def test_scores_of_other_weights_and_settings_are_never_mixed(
    tmp_path: Path, weights: str, settings: dict[str, Any]
) -> None:
    path = tmp_path / "scores.json"
    first, other = scores_file(path), scores_file(path, weights=weights, settings=settings)
    first.add_set(score_of("A", hits=2), note=None)
    other.add_set(score_of("B", hits=4), note=None)
    values = json.loads(path.read_text())
    assert (scores_in(values), values["mmeb"]["overall"]["score"]) == ({"B": 40}, 40)
    assert [scores_in(entry) for entry in values["other"]] == [{"A": 20}]
    assert (list(other.results()[0].sets), other.results()[1]) == (["B"], 1)

    first.add_mmvp(mmvp(True))  # the first weights again: beside what they scored before
    values = json.loads(path.read_text())
    assert (scores_in(values), values["mmvp"]["average"]["score"]) == ({"A": 20}, 100)
    assert [scores_in(entry) for entry in values["other"]] == [{"B": 40}]


def test_evaluations_at_the_same_time_lose_no_score(tmp_path: Path) -> None:
    path = tmp_path / "scores.json"
    names = [f"S{number}" for number in range(8)]
    threads = [
        threading.Thread(
            target=scores_file(path).add_set, args=(score_of(name, hits=1),), kwargs={"note": None}
        )
        for name in names
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(scores_in(json.loads(path.read_text()))) == names


def test_what_was_left_out_is_in_the_file_and_its_notes(tmp_path: Path) -> None:
    score = dataclasses.replace(score_of("A", hits=2), num_queries_left_out=3, num_candidates_left_out=7)
    file = scores_file(tmp_path / "scores.json", settings={**SETTINGS, "max_queries": 13})
    file.add_set(score, note=None)
    file.add_mmvp(mmvp_report(["a"], [True], left_out=["a", "b"]))
    values = json.loads(file.path.read_text())
    (entry,) = values["mmeb"]["sets"]
    assert (entry["num_queries_left_out"], entry["num_candidates_left_out"]) == (3, 7)
    assert values["mmvp"]["patterns"][0]["num_pairs_left_out"] == 1
    reason = "because items are missing, unreadable or refused (--allow_missing)"
    assert values["notes"] == [
        "only the first 13 queries of each MMEB set were read.",
        f"left out, {reason}: 3 of 13 queries of A and 7 candidates of its others.",
        f"left out, {reason}: 2 of 3 pairs of MMVP.",
    ]


def _file_with(**changes: Any) -> str:
    entry = {**dataclasses.asdict(score_of("A", hits=1)), "note": None, "date": "d"}
    values = {
        "weights_sha256": "w",
        "settings": SETTINGS,
        "mmeb": {"sets": [entry]},
        "mmvp": None,
        "truncations": [],
        "other": [],
    }
    return json.dumps({**values, **changes})


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        "3",
        _file_with(other=None),
        _file_with(settings=None),
        _file_with(truncations=None),
        _file_with(truncations=[{"dim": 8, "num_fine": "0", "scores": {}}]),
        _file_with(truncations=[{"dim": 8, "num_fine": 0, "scores": {"A": None}}]),
        _file_with(mmeb={"sets": [{"name": "A", "score": 3.0}]}),
        _file_with().replace('"score": 10.0', '"score": "10.0"'),
        _file_with().replace('"num_queries": 10', '"num_queries": true'),
        json.dumps({"mmeb": None, "mmvp": None, "weights_sha256": None, "max_queries": None}),
        "\udcff",
    ],
)
def test_file_of_something_else_is_refused_and_stays(tmp_path: Path, content: str) -> None:
    path = tmp_path / "scores.json"
    path.write_text(content, errors="surrogateescape")
    before = path.read_bytes()
    with pytest.raises(ConfigError, match=r"scores.json: not a file of scores as this version writes it"):
        check_place(path)
    with pytest.raises(ConfigError, match=r"scores.json: not a file of scores"):
        scores_file(path).add_mmvp(mmvp(True))
    assert path.read_bytes() == before


def test_file_from_before_truncations_were_scored_is_read(tmp_path: Path) -> None:
    path = tmp_path / "scores.json"
    values = json.loads(_file_with())
    del values["truncations"]
    path.write_text(json.dumps(values))
    scores_file(path).add_mmvp(mmvp(True))
    results, num_others = scores_file(path).results()
    assert (list(results.names), num_others) == (["A", "MMVP"], 0)


def test_file_of_our_own_is_accepted(tmp_path: Path) -> None:
    path = tmp_path / "scores.json"
    path.write_text(_file_with())
    check_place(path)


def test_place_is_tried_and_left_as_it_was(tmp_path: Path) -> None:
    check_place(tmp_path / "new" / "scores.json")
    assert list((tmp_path / "new").iterdir()) == []
    (tmp_path / "file").touch()
    (tmp_path / "folder" / "scores.json").mkdir(parents=True)
    for path in (
        tmp_path / "file" / "scores.json",
        tmp_path / "folder" / "scores.json",
        Path("/proc/scores.json"),
    ):
        with pytest.raises(ConfigError, match=rf"{path}: scores cannot be written there: .*\(--out\)"):
            check_place(path)


def test_file_system_without_locks_is_found_before_the_scoring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.raises(ConfigError, match=r"scores cannot be written there: No locks available; .*--out"):
        check_place(tmp_path / "scores.json")
    assert not list(tmp_path.iterdir())
