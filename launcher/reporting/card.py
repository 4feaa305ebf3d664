"""The scores on a release's card.

The card is no part of what a release's contract has hashes of, so it may be written again. An evaluation
whose scores go into the release's own scores.json puts them between the marks of the card, too; whatever a
person wrote around them stays, and so does a card without the marks.
"""

from __future__ import annotations

from pathlib import Path

from agff.contract import CARD_FILE, CONTRACT_FILE
from agff.files import write_text
from agff.model_card import code, with_scores
from launcher.evaluation.scores_file import Results
from launcher.reporting.cells import Row, Section
from launcher.reporting.sections import sections_of


def refresh_card(model: Path, scores_file: Path, results: Results) -> None:
    """Write the scores into the card of the model, where that is a release and the file of scores its own.
    Raises OSError."""
    card = model / CARD_FILE
    is_release = (model / CONTRACT_FILE).is_file() and card.is_file()
    if not is_release or scores_file.resolve() != (model / "scores.json").resolve():
        return
    try:
        old = card.read_bytes().decode("utf-8")  # line ends as they are
    except UnicodeDecodeError:
        return
    new = with_scores(old, scores_text(results))
    if new is not None and new != old:
        write_text(card, new)


def scores_text(results: Results) -> str:
    """A table for each kind of set, in Markdown; equal scores give an equal text."""
    notes = [f"{code(note)}\n" for note in results.notes]
    tables = [_table(section) for section in sections_of([results])]
    return "\n".join([*tables, *notes])


def _table(section: Section) -> str:
    lines = [
        f"**{section.title}.** {section.sentence}\n",
        f"| {section.what} | | score{section.unit} | standard error | {section.chance_name} |",
        "|---|---|---:|---:|---:|",
        *(_line(row, section) for row in section.rows),
    ]
    return "\n".join(lines) + "\n"


def _line(row: Row, section: Section) -> str:
    [cell] = row.cells
    assert cell is not None, "a row of one model has its score"
    numbers = (cell.score, cell.error, cell.chance)
    shown = ("" if number is None else section.number % number for number in numbers)
    return f"| {code(row.name)} | {code(row.facts)} | {' | '.join(shown)} |"
