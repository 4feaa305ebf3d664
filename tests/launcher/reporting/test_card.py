"""The scores on a release's card: its own alone, and nothing else of it changes."""

from __future__ import annotations

from pathlib import Path

import pytest

from agff.contract import CONTRACT_FILE
from agff.model_card import SCORES
from launcher.reporting.card import refresh_card, scores_text
from tests.launcher.reporting.results import results_of

CARD = f"# Mine\r\n\nwords of my own\n{SCORES[0]}\nold\n{SCORES[1]}\n\nand more\n"


@pytest.fixture
def release(tmp_path: Path) -> Path:
    (tmp_path / CONTRACT_FILE).write_text("{}")
    (tmp_path / "README.md").write_bytes(CARD.encode())
    return tmp_path


def test_scores_go_between_the_marks_and_the_rest_stays(release: Path) -> None:
    for score in (20.0, 20.0, 30.0):
        refresh_card(release, release / "scores.json", results_of(score))
        card = (release / "README.md").read_bytes().decode()
        before, after = CARD.split("old")
        assert card == before + scores_text(results_of(score)).strip() + after
        assert f"| `A` | `VQA, in distribution, 100 queries` | {score:.1f} | " in card
    assert {path.name for path in release.iterdir()} == {CONTRACT_FILE, "README.md"}


@pytest.mark.parametrize("case", ["another file", "a run", "no marks", "no card", "not UTF-8"])
def test_every_other_card_stays(release: Path, case: str) -> None:
    out = release / ("s.json" if case == "another file" else "scores.json")
    if case == "a run":
        (release / CONTRACT_FILE).unlink()
    elif case == "no marks":
        (release / "README.md").write_text("# Mine\n<!-- scores -->")
    elif case == "no card":
        (release / "README.md").unlink()
    elif case == "not UTF-8":
        (release / "README.md").write_bytes(CARD.encode() + b"\xff")
    before = {path.name: path.read_bytes() for path in release.iterdir()}
    refresh_card(release, out, results_of())
    assert {path.name: path.read_bytes() for path in release.iterdir()} == before


def test_every_kind_of_score_and_every_note_is_on_the_card() -> None:
    text = scores_text(results_of())
    for shown in ("`mean of all sets`", "`average`", "Flickr30k", "swap_att", "Scenes", "| 0.310 | "):
        assert shown in text
    assert "`these <b>imitate</b> the format.`" in text
    assert scores_text(results_of()) == text
    assert "2026" not in text
