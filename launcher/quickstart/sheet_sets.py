"""Sheets of four drawings that are found by naming one of the four: what fine vectors are for.

Written as caption sets, a sheet and its four names. A name is on one sheet of a set only, so that the sheet
is the one right answer.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from launcher.quickstart import wording
from launcher.quickstart.eval_sets import NOTE
from launcher.quickstart.layouts import BARE_IMAGE, write_file
from launcher.quickstart.render import Drawing
from launcher.quickstart.sheets import Sheet
from launcher.quickstart.train_sets import is_trained_on

NUM_SHEETS = 100
"""Of each set, so that chance is the same; fewer where there are fewer drawings."""
TRAINED_STUDIO, UNSEEN_STUDIO = "twemoji", "fxemoji"


def write_sheet_sets(captions: Path, drawings: Sequence[Drawing], *, seed: int) -> dict[str, int]:
    """Write the sets in the layout of data_pipeline/layouts/caption_tables.py; {set: sheets}.

    One is of drawings that training saw, one by a studio that it never saw; the concepts of both were trained
    on, and no sheet was ever a target.
    """
    sets = {
        f"EmojiSheets-{TRAINED_STUDIO}": [
            d for d in drawings if d.studio == TRAINED_STUDIO and is_trained_on(d)
        ],
        f"EmojiSheets-{UNSEEN_STUDIO}": [
            d for d in drawings if d.studio == UNSEEN_STUDIO and not d.concept.is_held_out
        ],
    }
    return {name: _write(captions / name, sheets_of(chosen, seed=seed)) for name, chosen in sets.items()}


def sheets_of(drawings: Sequence[Drawing], *, seed: int) -> list[Sheet]:
    """At most NUM_SHEETS sheets, no drawing twice."""
    count = min(NUM_SHEETS, len(drawings) // 4)
    chosen = random.Random(seed).sample(drawings, 4 * count)
    return [
        Sheet(cells=(chosen[i], chosen[i + 1], chosen[i + 2], chosen[i + 3]), truth=0, by_position=False)
        for i in range(0, 4 * count, 4)
    ]


def _write(folder: Path, sheets: Sequence[Sheet]) -> int:
    files = [f"sheet_{index:05d}.png" for index in range(len(sheets))]
    for file, sheet in zip(files, sheets, strict=True):
        write_file(folder / "images" / file, sheet.png())
    names = [[wording.find_by_name(cell.concept.text) for cell in sheet.cells] for sheet in sheets]
    table = pa.table({"image": pa.array(files, pa.string()), "text": pa.array(names, pa.list_(pa.string()))})
    pq.write_table(table, folder / "test-00000-of-00001.parquet")
    described = {"image_text": BARE_IMAGE, "note": NOTE}
    (folder / "caption_set.json").write_text(json.dumps(described) + "\n", encoding="utf-8")
    return len(sheets)
