"""RefCOCO's pickle is read without running any of it."""

from __future__ import annotations

import collections
import fractions
import json
import os
import pickle
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from agff.errors import DataError
from data_pipeline.layouts.refcoco import _read_pickle, refcoco_rows
from data_pipeline.layouts.training_rows import Region, RegionRow

INSTANCES = {
    "images": [
        {"id": 7, "file_name": "COCO_train2014_7.jpg", "width": 640, "height": 480},
        {"id": 9, "file_name": "COCO_train2014_9.jpg", "width": 100, "height": 50},
    ],
    "annotations": [
        {"id": 1, "image_id": 7, "bbox": [10.5, 20.0, 30.0, 40.25], "category_id": 1},
        {"id": 2, "image_id": 9, "bbox": [0, 0, 100, 50], "category_id": 1},
    ],
}


def ref(number: int, ann: int, image: int, *sentences: str, split: str = "train") -> dict[str, Any]:
    return {
        "ref_id": number,
        "ann_id": ann,
        "image_id": image,
        "split": split,
        "category_id": 1,
        "file_name": f"COCO_train2014_{image}_{ann}.jpg",
        "sent_ids": list(range(len(sentences))),
        "sentences": [
            {"sent_id": n, "sent": text, "raw": text, "tokens": text.split()}
            for n, text in enumerate(sentences)
        ],
    }


REFS = [
    ref(0, 1, 7, "the left man", "man in größe"),
    ref(1, 2, 9, "all of it", split="testA"),
    ref(2, 1, 7, "him"),
    ref(3, 2, 9, "the table"),
    ref(4, 2, 9, "not for training", split="val"),
]


def write_refs(folder: Path, refs: Any, name: str, instances: Any = INSTANCES) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / name
    if path.suffix == ".p":
        path.write_bytes(pickle.dumps(refs, protocol=2))
    elif path.suffix == ".json":
        path.write_text(json.dumps(refs))
    else:
        pq.write_table(pa.Table.from_pylist(refs), path)
    (folder / "instances.json").write_text(json.dumps(instances))
    return path


@pytest.mark.parametrize("name", ["refs(unc).p", "refs.json", "refs.parquet"])
def test_every_sentence_of_the_training_split_is_a_region_of_its_image(tmp_path: Path, name: str) -> None:
    rows = refcoco_rows(write_refs(tmp_path / "refcoco", REFS, name), tmp_path / "train2014", "train")
    man = (10.5, 20.0, 40.5, 60.25)
    assert rows == (
        RegionRow(
            image=tmp_path / "train2014/COCO_train2014_7.jpg",
            regions=tuple(Region(box=man, phrase=p) for p in ("the left man", "man in größe", "him")),
            size=(640, 480),
        ),
        RegionRow(
            image=tmp_path / "train2014/COCO_train2014_9.jpg",
            regions=(Region(box=(0.0, 0.0, 100.0, 50.0), phrase="the table"),),
            size=(100, 50),
        ),
    )


def test_a_pickle_of_python_2_is_read(tmp_path: Path) -> None:
    # dumped there with protocol 0: [{'sent': 'gr\xc3\xb6\xc3\x9fe', u'id': 3L}]
    (tmp_path / "refs.p").write_bytes(
        b"(lp0\n(dp1\nS'sent'\np2\nS'gr\\xc3\\xb6\\xc3\\x9fe'\np3\nsVid\np4\nL3L\nsa."
    )
    assert _read_pickle(tmp_path / "refs.p") == [{"sent": "größe", "id": 3}]


class Malicious:
    def __reduce__(self) -> Any:
        return os.system, ("touch RAN",)


def by_opcode(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n.".encode()


PICKLES: dict[str, tuple[bytes, str]] = {
    **{
        f"a call, protocol {protocol}": (pickle.dumps([Malicious()], protocol), r"asks for \w+.system, which")
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1)
    },
    "a builtin": (by_opcode("builtins", "eval"), "asks for builtins.eval, which could run any program"),
    "a harmless class": (pickle.dumps(fractions.Fraction(1, 2)), "asks for fractions.Fraction"),
    "an ordered dict": (pickle.dumps(collections.OrderedDict(a=1)), "asks for collections.OrderedDict"),
    "an old instance": (b"(ios\nsystem\n.", "asks for os.system"),
    "a registered extension": (b"\x80\x02\x82\x01.", "not a readable pickle: unregistered extension code 1"),
    "a persistent id": (b"Pfile\n.", "refers to 'file' outside of itself"),
    "a call of a text": (b"S'a'\n(tR.", "not a readable pickle"),
    "a state for a list": (b"](lb.", "not a readable pickle"),
    "cut short": (pickle.dumps(REFS)[:50], "not a readable pickle"),
    "empty": (b"", "not a readable pickle"),
    "no pickle": (b"<html>", "not a readable pickle"),
}


@pytest.mark.parametrize("case", PICKLES)
def test_a_pickle_that_asks_for_anything_with_a_name_is_refused_and_nothing_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    monkeypatch.chdir(tmp_path)
    content, message = PICKLES[case]
    (tmp_path / "refs.p").write_bytes(content)
    with pytest.raises(DataError, match=rf"refs.p: .*{message}"):
        _read_pickle(tmp_path / "refs.p")
    assert not (tmp_path / "RAN").exists()


def test_references_that_do_not_fit_are_named(tmp_path: Path) -> None:
    refs = [
        ref(0, 1, 7, "good", ""),
        ref(1, 5, 7, "no such annotation"),
        ref(2, 2, 7, "of another image"),
        ref(3, 2, 8, "no such image"),
        ref(4, 1, 7),
    ]
    instances = {
        **INSTANCES,
        "annotations": [*INSTANCES["annotations"], {"id": 3, "image_id": 8, "bbox": [0, 0, 1, 1]}],
    }
    refs[3]["ann_id"] = 3
    row, other = refcoco_rows(write_refs(tmp_path / "a", refs, "refs.p", instances), tmp_path, "train")
    assert isinstance(row, RegionRow)
    assert row.regions[1:] == (
        "reference 0: phrase '' must be a text that is not empty",
        "reference 1: instances.json has no annotation 5",
        "reference 2: annotation 2 is of image 9, not of 7",
        "reference 4: has no sentence",
    )
    assert other == "instances.json has no image 8"


@pytest.mark.parametrize(
    ("refs", "instances", "message"),
    [
        ({"refs": REFS}, INSTANCES, "must hold a list of references, found dict"),
        ([{"ref_id": 1}], INSTANCES, "reference 0 must have ann_id, image_id, split, sentences; found"),
        ([{**REFS[0], "image_id": [1]}], INSTANCES, "reference 0 must have"),
        (REFS, {"images": []}, "not COCO's images and annotations: KeyError"),
        (
            REFS,
            {"images": [], "annotations": [{"id": 1, "bbox": [1, 2]}]},
            "not COCO's images and annotations",
        ),
    ],
)
def test_files_of_another_kind_are_refused(tmp_path: Path, refs: Any, instances: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        refcoco_rows(write_refs(tmp_path / "a", refs, "refs.p", instances), tmp_path, "train")
    (tmp_path / "a/instances.json").unlink()
    if refs is REFS:
        with pytest.raises(DataError, match=r"instances.json: cannot read it: No such file"):
            refcoco_rows(tmp_path / "a/refs.p", tmp_path, "train")


def test_a_reference_nested_too_deeply_is_refused(tmp_path: Path) -> None:
    path = write_refs(tmp_path, [REFS[0]], "refs(unc).p")
    path.write_bytes(b"\x80\x02]" + b"]" * 100_000 + b"a" * 100_000 + b".")
    with pytest.raises(DataError, match=r"reference 0 must have ann_id, .*; found \[\["):
        refcoco_rows(path, tmp_path, "train")
