"""What the family's other objectives learn from beside MMEB's pairs: texts alone, and described regions; and
what they are judged by."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from launcher.quickstart import wording
from launcher.quickstart.concepts import Concept
from launcher.quickstart.eval_sets import NOTE
from launcher.quickstart.layouts import BARE_IMAGE, TrainRow, write_file, write_train_subset
from launcher.quickstart.render import Drawing
from launcher.quickstart.sheets import make_sheets
from launcher.quickstart.train_sets import is_trained_on

TEXTS, REGIONS, CAPTIONS = "EmojiTexts", "EmojiRegions", "EmojiCaptions"
"""Two sources, also the names of their sets, and a set."""
TRAIN, HELD_OUT = "train", "held_out"
NUM_SHEETS = {TRAIN: 2000, HELD_OUT: 300}
"""Of regions; the held-out ones are drawn by the unseen studio."""


def write_family_sets(folder: Path, drawings: Sequence[Drawing], *, seed: int) -> dict[str, dict[str, int]]:
    """{part: {set: rows, sheets or drawings}} of what is written, each in train and held_out:

    texts/     MMEB-train's layout
    regions/   <SET>/regions.json, a list of {image, regions: [{box, phrase}]}, and <SET>/images/
    captions/  held out only, in Flickr30k's layout: <SET>/test-*.parquet with image and text
    """
    trained = [drawing for drawing in drawings if is_trained_on(drawing)]
    unseen = [d for d in drawings if d.studio == "fxemoji" and not d.concept.is_held_out]
    concepts = list({drawing.concept.name: drawing.concept for drawing in drawings}.values())
    return {
        **{
            f"texts/{part}": {TEXTS: _write_texts(folder / "texts" / part, chosen)}
            for part, chosen in (
                (TRAIN, [concept for concept in concepts if not concept.is_held_out]),
                (HELD_OUT, [concept for concept in concepts if concept.is_held_out]),
            )
        },
        **{
            f"regions/{part}": {
                REGIONS: _write_regions(folder / "regions" / part / REGIONS, chosen, NUM_SHEETS[part], seed)
            }
            for part, chosen in ((TRAIN, trained), (HELD_OUT, unseen))
        },
        f"captions/{HELD_OUT}": {
            CAPTIONS: _write_captions(folder / "captions" / HELD_OUT / CAPTIONS, unseen)
        },
    }


def _write_texts(folder: Path, concepts: Sequence[Concept]) -> int:
    rows = [row for concept in concepts for row in _text_rows(concept)]
    write_train_subset(folder, TEXTS, rows, with_negatives=False)
    return len(rows)


def _text_rows(concept: Concept) -> list[TrainRow]:
    """The name with the keywords, worded as training asks for drawings; and one half of the keywords with the
    other."""
    if not concept.keywords:
        return []
    first, second = concept.keywords[::2], concept.keywords[1::2]
    rows = [TrainRow(qry=wording.find_by_name(concept.text), pos_text=_keywords(concept.keywords))]
    return rows + [TrainRow(qry=_keywords(first), pos_text=_keywords(second))] * bool(second)


def _keywords(words: Sequence[str]) -> str:
    return wording.find_by_keywords(words).strip()


def _write_regions(folder: Path, drawings: Sequence[Drawing], num_sheets: int, seed: int) -> int:
    """Sheets of four drawings; each cell is a region, its phrase the name of what is drawn."""
    images = []
    sheets = make_sheets(drawings, num_sheets=num_sheets, seed=seed)
    for index, sheet in enumerate(sheets):
        name = f"images/sheet_{index:05d}.png"
        write_file(folder / name, sheet.png())
        regions = [{"box": box, "phrase": cell.concept.text} for cell, box in sheet.boxes()]
        images.append({"image": name, "regions": regions})
    (folder / "regions.json").write_text(json.dumps(images, ensure_ascii=False) + "\n", encoding="utf-8")
    return len(sheets)


def _write_captions(folder: Path, drawings: Sequence[Drawing]) -> int:
    """Drawings of the unseen studio, each with its name."""
    for drawing in drawings:
        write_file(folder / "images" / drawing.file_name, drawing.png)
    images = pa.array([drawing.file_name for drawing in drawings], pa.string())
    texts = pa.array([[drawing.concept.text] for drawing in drawings], pa.list_(pa.string()))
    pq.write_table(pa.table({"image": images, "text": texts}), folder / "test-00000-of-00001.parquet")
    described = {"image_text": BARE_IMAGE, "note": NOTE}
    (folder / "caption_set.json").write_text(json.dumps(described) + "\n", encoding="utf-8")
    return len(drawings)
