"""The evaluation sets: an unseen studio, an older set of a trained foundry, unseen concepts."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.quickstart import wording
from launcher.quickstart.layouts import (
    BARE_IMAGE,
    IMAGE_TARGET,
    EvalRow,
    EvalSetInfo,
    MetaTask,
    write_eval_index,
    write_eval_set,
    write_file,
)
from launcher.quickstart.questions import questions_of
from launcher.quickstart.render import Drawing
from launcher.quickstart.sheets import Sheet, make_sheets

MAX_CANDIDATES = 500
"""Of the near studio, which has more than a thousand drawings."""
NUM_SHEETS = 300

NOTE = (
    "the quickstart's sets, emoji of 56 px, imitate the formats of MMEB and MMVP-VLM, not their difficulty; "
    "in distribution = the trained foundry's older drawings, out of distribution = a studio or concepts "
    "never seen."
)
_UNSEEN_STUDIO = "concepts trained on, drawn by a studio (fxemoji) that training never saw"
_NEAR_STUDIO = (
    "concepts trained on, drawn by an older set (noto-v1) of a foundry whose newer set (noto) was trained on"
)
_UNSEEN_CONCEPTS = "concepts that training never saw, drawn by a studio (twemoji) that it did see"


_META_TASKS: dict[str, MetaTask] = {
    "t2i": "retrieval",
    "i2t": "retrieval",
    "group": "classification",
    "vqa": "vqa",
    "grounding": "grounding",
}


@dataclass(frozen=True, kw_only=True)
class EvalSet:
    """One set to write."""

    name: str
    kind: str
    """A key of _META_TASKS."""
    drawings: Sequence[Drawing]
    about: str

    @property
    def info(self) -> EvalSetInfo:
        """What sets.json says of it. Only the near studio counts as in distribution."""
        in_distribution = self.about is _NEAR_STUDIO
        return EvalSetInfo(
            meta_task=_META_TASKS[self.kind], in_distribution=in_distribution, about=self.about, note=NOTE
        )


def write_eval_sets(mmeb_eval: Path, drawings: Sequence[Drawing], *, seed: int) -> dict[str, int]:
    """Write every set in MMEB-eval's layout and sets.json; {set: queries}."""
    sets = eval_sets(drawings, seed=seed)
    counts: dict[str, int] = {}
    for eval_set in sets:
        for drawing in eval_set.drawings:
            write_file(mmeb_eval / _image_path(eval_set.name, drawing.file_name), drawing.png)
        sheets = (
            make_sheets(eval_set.drawings, num_sheets=NUM_SHEETS, seed=seed)
            if eval_set.kind == "grounding"
            else []
        )
        for index, sheet in enumerate(sheets):
            write_file(mmeb_eval / _sheet_path(eval_set.name, index), sheet.png())
        rows = _rows(eval_set, sheets)
        write_eval_set(mmeb_eval, eval_set.name, rows)
        counts[eval_set.name] = len(rows)
    write_eval_index(mmeb_eval, {eval_set.name: eval_set.info for eval_set in sets})
    return counts


def eval_sets(drawings: Sequence[Drawing], *, seed: int) -> list[EvalSet]:
    """Which drawings each set is made of."""
    fxemoji = [d for d in drawings if d.studio == "fxemoji" and not d.concept.is_held_out]
    near = [d for d in drawings if d.studio == "noto-v1" and not d.concept.is_held_out]
    near_sample = random.Random(seed).sample(near, min(MAX_CANDIDATES, len(near)))
    unseen = [d for d in drawings if d.studio == "twemoji" and d.concept.is_held_out]
    return [
        EvalSet(name="Emoji_t2i-fxemoji", kind="t2i", drawings=fxemoji, about=_UNSEEN_STUDIO),
        EvalSet(name="Emoji_i2t-fxemoji", kind="i2t", drawings=fxemoji, about=_UNSEEN_STUDIO),
        EvalSet(name="Emoji_t2i-noto-v1", kind="t2i", drawings=near_sample, about=_NEAR_STUDIO),
        EvalSet(name="Emoji_t2i-unseen-concepts", kind="t2i", drawings=unseen, about=_UNSEEN_CONCEPTS),
        EvalSet(name="EmojiGroup-fxemoji", kind="group", drawings=fxemoji, about=_UNSEEN_STUDIO),
        EvalSet(name="EmojiVQA-fxemoji", kind="vqa", drawings=_with_question(fxemoji), about=_UNSEEN_STUDIO),
        EvalSet(
            name="EmojiVQA-noto-v1", kind="vqa", drawings=_with_question(near_sample), about=_NEAR_STUDIO
        ),
        EvalSet(
            name="EmojiVQA-unseen-concepts",
            kind="vqa",
            drawings=_with_question(unseen),
            about=_UNSEEN_CONCEPTS,
        ),
        EvalSet(name="EmojiGrounding-fxemoji", kind="grounding", drawings=fxemoji, about=_UNSEEN_STUDIO),
    ]


def _rows(eval_set: EvalSet, sheets: Sequence[Sheet]) -> list[EvalRow]:
    match eval_set.kind:
        case "t2i":
            return _t2i_rows(eval_set.name, eval_set.drawings)
        case "i2t":
            return _i2t_rows(eval_set.name, eval_set.drawings)
        case "group":
            return _group_rows(eval_set.name, eval_set.drawings)
        case "vqa":
            return _vqa_rows(eval_set.name, eval_set.drawings)
        case _:
            return _grounding_rows(eval_set.name, eval_set.drawings, sheets)


def _t2i_rows(name: str, drawings: Sequence[Drawing]) -> list[EvalRow]:
    """One query a drawing: find it by its name among all of them."""
    paths = [_image_path(name, drawing.file_name) for drawing in drawings]
    return [
        EvalRow(
            qry_text=wording.find_by_name(drawing.concept.text),
            tgt_text=[BARE_IMAGE] * len(paths),
            tgt_img_path=truth_first(paths, path),
        )
        for drawing, path in zip(drawings, paths, strict=True)
    ]


def _i2t_rows(name: str, drawings: Sequence[Drawing]) -> list[EvalRow]:
    """One query a drawing: find its name among those of all of them."""
    names = [drawing.concept.text for drawing in drawings]
    return [_text_row(name, drawing, wording.name_it(), drawing.concept.text, names) for drawing in drawings]


def _group_rows(name: str, drawings: Sequence[Drawing]) -> list[EvalRow]:
    """One query a drawing: its group among all groups."""
    groups = list(dict.fromkeys(drawing.concept.group for drawing in drawings))
    return [
        _text_row(name, drawing, wording.which_group(), drawing.concept.group, groups) for drawing in drawings
    ]


def _vqa_rows(name: str, drawings: Sequence[Drawing]) -> list[EvalRow]:
    """One query a question about a drawing: its answer among the answers to all questions of the set."""
    asked = [(drawing, *pair) for drawing in drawings for pair in questions_of(drawing.concept)]
    answers = list(dict.fromkeys(answer for _, _, answer in asked))
    return [
        _text_row(name, drawing, wording.ask(question), answer, answers)
        for drawing, question, answer in asked
    ]


def _grounding_rows(name: str, drawings: Sequence[Drawing], sheets: Sequence[Sheet]) -> list[EvalRow]:
    """One query a sheet: the drawing asked for among its neighbours on the sheet and all the others."""
    paths = [_image_path(name, drawing.file_name) for drawing in drawings]
    return [
        EvalRow(
            qry_text=wording.crop(sheet.phrase),
            qry_img_path=_sheet_path(name, index),
            tgt_text=[IMAGE_TARGET] * len(paths),
            tgt_img_path=truth_first(paths, _image_path(name, sheet.cells[sheet.truth].file_name)),
        )
        for index, sheet in enumerate(sheets)
    ]


def truth_first(candidates: Sequence[str], truth: str) -> list[str]:
    """The candidates with the truth moved to index 0."""
    return [truth, *(candidate for candidate in candidates if candidate != truth)]


def _with_question(drawings: Sequence[Drawing]) -> list[Drawing]:
    return [drawing for drawing in drawings if questions_of(drawing.concept)]


def _image_path(name: str, file_name: str) -> str:
    return f"images/{name}/{file_name}"


def _sheet_path(name: str, index: int) -> str:
    return _image_path(name, f"sheet_{index:05d}.png")


def _text_row(name: str, drawing: Drawing, query: str, truth: str, candidates: Sequence[str]) -> EvalRow:
    ordered = truth_first(candidates, truth)
    path = _image_path(name, drawing.file_name)
    return EvalRow(qry_text=query, qry_img_path=path, tgt_text=ordered, tgt_img_path=[""] * len(ordered))
