"""What scores.json keeps of each kind of score, and files from before a kind was known."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from agff.errors import ConfigError
from launcher.evaluation.judged import KINDS, JudgedScore
from launcher.evaluation.scores_file import ScoresFile, settings_of
from tests.launcher.colours import ColourModel

EXAMPLE = {str: "text", int: 3, float: 2.5}


def score_of(kind: str) -> JudgedScore:
    """A score with a value in each field."""
    hints = get_type_hints(KINDS[kind])
    values: dict[str, Any] = {
        field.name: EXAMPLE[hints[field.name]] for field in dataclasses.fields(KINDS[kind])
    }
    return KINDS[kind](**values)


def scores_file(path: Path) -> ScoresFile:
    settings = settings_of(ColourModel(), max_queries=None, similarity="fused")
    return ScoresFile(path, model="m", weights_sha256="w", settings=settings)


def test_every_kind_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "scores.json"
    for kind in KINDS:
        scores_file(path).add_judged(kind, "S", [score_of(kind), score_of(kind)], note=f"note of {kind}")
    results, _ = scores_file(path).results()
    assert {kind: entry.scores for (kind, _), entry in results.judged.items()} == {
        kind: (score_of(kind), score_of(kind)) for kind in KINDS
    }
    assert [f"note of {kind}" in results.notes for kind in KINDS] == [True] * len(KINDS)
    assert results.names == ["S"] * len(KINDS)


def test_file_from_before_a_kind_was_known_is_read(tmp_path: Path) -> None:
    path = tmp_path / "scores.json"
    scores_file(path).add_judged("captions", "S", [score_of("captions")], note=None)
    values = json.loads(path.read_text())
    for kind in KINDS:
        del values[kind]
    path.write_text(json.dumps(values))
    scores_file(path).add_judged("regions", "R", [score_of("regions")], note=None)
    results, _ = scores_file(path).results()
    assert list(results.judged) == [("regions", "R")]


@pytest.mark.parametrize("kind", KINDS)
def test_value_of_another_type_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "scores.json"
    scores_file(path).add_judged(kind, "S", [score_of(kind)], note=None)
    values = json.loads(path.read_text())
    field = dataclasses.fields(KINDS[kind])[0].name
    values[kind][0]["scores"][0][field] = [1]
    path.write_text(json.dumps(values))
    with pytest.raises(ConfigError, match="not a file of scores as this version writes it"):
        scores_file(path).results()
