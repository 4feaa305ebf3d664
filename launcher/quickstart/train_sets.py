"""The training subsets: the four meta-tasks over the trained studios, without the held-out concepts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from launcher.quickstart import wording
from launcher.quickstart.concepts import STUDIOS
from launcher.quickstart.layouts import (
    BARE_IMAGE,
    IMAGE_TARGET,
    MetaTask,
    TrainRow,
    link_or_copy,
    train_image_path,
    write_file,
    write_train_index,
    write_train_subset,
)
from launcher.quickstart.questions import questions_of
from launcher.quickstart.render import Drawing
from launcher.quickstart.sheets import make_sheets

GROUNDING = "EmojiGrounding"
SUBSETS: dict[str, MetaTask] = {
    "EmojiGroup": "classification",
    "Emoji_t2i": "retrieval",
    "Emoji_i2t": "retrieval",
    "EmojiKeywords_t2i": "retrieval",
    "EmojiVQA": "vqa",
    GROUNDING: "grounding",
}
NUM_SHEETS = 4000
_TRAINED_STUDIOS = frozenset(studio.name for studio in STUDIOS if studio.role == "train")


def is_trained_on(drawing: Drawing) -> bool:
    """Whether training may see this drawing: neither its studio nor its concept is held out."""
    return drawing.studio in _TRAINED_STUDIOS and not drawing.concept.is_held_out


def write_train_sets(mmeb: Path, drawings: Sequence[Drawing], *, seed: int) -> dict[str, int]:
    """Write every subset in MMEB-train's layout, without held-out drawings; {subset: rows}."""
    trained = [drawing for drawing in drawings if is_trained_on(drawing)]
    by_subset = {subset: _rows(subset, trained) for subset in SUBSETS if subset != GROUNDING}
    for subset, rows in by_subset.items():
        _place_images(mmeb, subset, rows, trained)
        write_train_subset(mmeb, subset, rows, with_negatives=False)
    by_subset[GROUNDING] = _write_grounding(mmeb, trained, seed=seed)
    write_train_index(mmeb, SUBSETS)
    return {subset: len(rows) for subset, rows in by_subset.items()}


def _rows(subset: str, drawings: Sequence[Drawing]) -> list[TrainRow]:
    """The rows of a subset whose images are single drawings."""
    return [row for drawing in drawings for row in _rows_of(subset, drawing)]


def _rows_of(subset: str, drawing: Drawing) -> list[TrainRow]:
    concept, path = drawing.concept, train_image_path(subset, drawing.file_name)
    match subset:
        case "EmojiGroup":
            return [TrainRow(qry=wording.which_group(), qry_image_path=path, pos_text=concept.group)]
        case "Emoji_t2i":
            return [
                TrainRow(qry=wording.find_by_name(concept.text), pos_text=BARE_IMAGE, pos_image_path=path)
            ]
        case "Emoji_i2t":
            return [TrainRow(qry=wording.name_it(), qry_image_path=path, pos_text=concept.text)]
        case "EmojiKeywords_t2i" if concept.keywords:
            qry = wording.find_by_keywords(concept.keywords)
            return [TrainRow(qry=qry, pos_text=IMAGE_TARGET, pos_image_path=path)]
        case "EmojiVQA":
            return [
                TrainRow(qry=wording.ask(question), qry_image_path=path, pos_text=answer)
                for question, answer in questions_of(concept)
            ]
    return []


def _place_images(mmeb: Path, subset: str, rows: Sequence[TrainRow], drawings: Sequence[Drawing]) -> None:
    """The images the rows name: a folder for each subset, as in MMEB, of hard links to one copy."""
    used = {row.qry_image_path or row.pos_image_path for row in rows}
    first = next(iter(SUBSETS))
    for drawing in drawings:
        original = mmeb / train_image_path(first, drawing.file_name)
        path = train_image_path(subset, drawing.file_name)
        if subset == first:
            write_file(original, drawing.png)
        elif path in used:
            link_or_copy(original, mmeb / path)


def _write_grounding(mmeb: Path, drawings: Sequence[Drawing], *, seed: int) -> list[TrainRow]:
    rows: list[TrainRow] = []
    for index, sheet in enumerate(make_sheets(drawings, num_sheets=NUM_SHEETS, seed=seed)):
        truth, distractor = sheet.cells[sheet.truth], sheet.distractor
        row = TrainRow(
            qry=wording.crop(sheet.phrase),
            qry_image_path=train_image_path(GROUNDING, f"sheet_{index:05d}.png"),
            pos_text=IMAGE_TARGET,
            pos_image_path=train_image_path(GROUNDING, truth.file_name),
            neg_text=IMAGE_TARGET,
            neg_image_path=train_image_path(GROUNDING, distractor.file_name),
        )
        write_file(mmeb / row.qry_image_path, sheet.png())
        for drawing in (truth, distractor):
            path = mmeb / train_image_path(GROUNDING, drawing.file_name)
            if not path.exists():
                write_file(path, drawing.png)
        rows.append(row)
    write_train_subset(mmeb, GROUNDING, rows, with_negatives=True)
    return rows
