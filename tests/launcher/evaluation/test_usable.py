"""Bad items of every kind: named with set, row and file before the scoring, or left out and counted."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from torch import Tensor

from agff.processor import ItemProcessor, ProcessorConfig
from agff.prompts import PromptConfig
from launcher.command_line import INTERRUPTED
from launcher.evaluate import main
from tests.drawings import tiny_backbone
from tests.launcher.colours import COLOURS, ColourModel, write_benchmarks

IMAGES = "mmeb/images/T2I"
T2I_ROW_0 = "T2I/test.parquet:row 0: "


@pytest.fixture
def benchmarks(tmp_path: Path) -> Path:
    return write_benchmarks(tmp_path)


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> ItemProcessor:
    backbone = tiny_backbone(tmp_path_factory.mktemp("backbone"))
    return ItemProcessor.from_folder(
        backbone, prompts=PromptConfig(num_fine=1), limits=ProcessorConfig(max_tokens=16)
    )


def evaluate(benchmarks: Path, *options: str, load: Callable[[Path], ColourModel]) -> int:
    return main([str(benchmarks / "run"), "--mmeb_eval", str(benchmarks / "mmeb"), *options], load=load)


def findings(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The lines of the one error."""
    _, found, error = capsys.readouterr().err.rpartition("error: ")
    assert found
    return error.splitlines()


def scores(benchmarks: Path) -> dict[str, Any]:
    return json.loads((benchmarks / "run/scores.json").read_text())


def noise(image_format: str) -> bytes:
    file = io.BytesIO()
    Image.effect_noise((90, 60), 80).save(file, image_format)
    return file.getvalue()


def rewrite(table: Path, change: Callable[[list[dict[str, Any]]], None]) -> None:
    rows = pq.read_table(table).to_pylist()
    change(rows)
    pq.write_table(pa.Table.from_pylist(rows), table)


FILES: dict[str, Callable[[Path], object]] = {
    "missing": Path.unlink,
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "empty": lambda path: path.write_bytes(b""),
    "cut JPEG": lambda path: path.write_bytes(noise("JPEG")[:1000]),
    "cut PNG": lambda path: path.write_bytes(noise("PNG")[:2000]),
    "a web page": lambda path: path.write_bytes(b"<html>404</html>"),
}
"""What a download leaves in an image's place."""


@pytest.mark.parametrize("spoil", FILES.values(), ids=FILES)
def test_bad_file_is_named_before_the_model_is_loaded(
    benchmarks: Path, capsys: pytest.CaptureFixture[str], spoil: Callable[[Path], object]
) -> None:
    loaded: list[Path] = []
    for name in ("green", "red"):
        spoil(benchmarks / IMAGES / f"{name}.png")
    assert evaluate(benchmarks, load=lambda path: loaded.append(path) or ColourModel()) == 2
    assert loaded == []
    assert not (benchmarks / "run/scores.json").exists()
    head, *lines, remedy = findings(capsys)
    assert head == "4 findings"  # two images in two sets
    assert {line.split(": ")[0].strip() for line in lines} >= {
        "T2I/test.parquet:row 0",
        "I2T/test.parquet:row 0",
    }
    assert all("green.png" in line or "red.png" in line for line in lines)
    assert "--allow_missing" in remedy


@pytest.mark.parametrize("spoil", FILES.values(), ids=FILES)
def test_bad_file_is_left_out_and_counted_where_allowed(
    benchmarks: Path, capsys: pytest.CaptureFixture[str], spoil: Callable[[Path], object]
) -> None:
    spoil(benchmarks / IMAGES / "green.png")
    assert evaluate(benchmarks, "--allow_missing", load=lambda path: ColourModel()) == 0
    # T2I: the query "green" lost its truth, the two others a candidate; I2T: the green query itself is gone
    left_out = {
        entry["name"]: (
            entry["num_queries"],
            entry["num_queries_left_out"],
            entry["num_candidates_left_out"],
            entry["chance"],
        )
        for entry in scores(benchmarks)["mmeb"]["sets"]
    }
    assert left_out == {"T2I": (2, 1, 2, 50.0), "I2T": (2, 1, 0, pytest.approx(100 / 3))}
    printed = capsys.readouterr()
    assert "left out: T2I/test.parquet:row 0: " in printed.err
    assert "1 of 3 queries of T2I and 2 candidates of its others" in printed.out.replace("\n", " ")
    assert "1 + 2" in printed.out
    assert any("1 of 3 queries of T2I and 2 candidates" in note for note in scores(benchmarks)["notes"])


def thin(benchmarks: Path) -> None:
    Image.new("RGB", (1, 300), COLOURS["red"]).save(benchmarks / IMAGES / "red.png")


def own_token(benchmarks: Path) -> None:
    def change(rows: list[dict[str, Any]]) -> None:
        rows[0]["qry_text"] = "Find red <|image_pad|>\n"

    rewrite(benchmarks / "mmeb/T2I/test.parquet", change)


def large(benchmarks: Path) -> None:
    Image.new("RGB", (400, 400), COLOURS["red"]).save(benchmarks / IMAGES / "red.png")


REFUSED = {
    "thinner than 1:200": (thin, "red.png: the backbone's image processor refuses the image"),
    "the backbone's own token": (own_token, "'Find red <|image_pad|>"),
    "too many tokens": (large, "red.png: image of (400, 400) pixels needs"),
}


@pytest.mark.parametrize(("spoil", "reason"), REFUSED.values(), ids=REFUSED)
def test_item_that_the_processor_refuses_is_named_before_anything_is_encoded(
    benchmarks: Path,
    capsys: pytest.CaptureFixture[str],
    processor: ItemProcessor,
    spoil: Callable[[Path], None],
    reason: str,
) -> None:
    model = ColourModel()
    model.processor.num_tokens = processor.num_tokens
    spoil(benchmarks)
    assert evaluate(benchmarks, load=lambda path: model) == 2
    assert model.encoded == []
    lines = findings(capsys)
    assert any(T2I_ROW_0 in line and reason in line for line in lines)
    assert evaluate(benchmarks, "--allow_missing", load=lambda path: model) == 0
    t2i = scores(benchmarks)["mmeb"]["sets"][-1]
    assert (t2i["name"], t2i["num_queries"], t2i["num_queries_left_out"]) == ("T2I", 2, 1)


def test_ten_missing_images_are_ten_lines_and_one_exit_code(
    benchmarks: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [f"T2I/gone {number}.png" for number in range(10)]

    def change(rows: list[dict[str, Any]]) -> None:
        rows[1]["tgt_img_path"] += names

    rewrite(benchmarks / "mmeb/T2I/test.parquet", change)
    assert evaluate(benchmarks, load=lambda path: ColourModel()) == 2
    _, *lines, _ = findings(capsys)
    assert [
        name for name, line in zip(names, lines, strict=True) if f"row 1: image '{name}' not found" in line
    ] == names


def test_a_wrong_folder_prints_a_hundred_lines_and_the_number_of_the_others(
    benchmarks: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def change(rows: list[dict[str, Any]]) -> None:
        rows[1]["tgt_img_path"] += [f"T2I/gone {number}.png" for number in range(123)]

    rewrite(benchmarks / "mmeb/T2I/test.parquet", change)
    assert evaluate(benchmarks, load=lambda path: ColourModel()) == 2
    head, *lines, more, _ = findings(capsys)
    assert (head, len(lines), more.strip()) == ("123 findings", 100, "and 23 more")


def test_findings_of_all_tables_are_listed_together(
    benchmarks: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("T2I", "I2T"):
        (benchmarks / f"mmeb/{name}/test.parquet").rename(
            benchmarks / f"mmeb/{name}/test-00000-of-00002.parquet"
        )
    assert evaluate(benchmarks, "--allow_missing", load=lambda path: ColourModel()) == 2
    text = "\n".join(findings(capsys))
    assert text.count("1 of 2 parts missing") == 2


def test_set_of_which_nothing_remains_is_named_and_the_others_are_scored(
    benchmarks: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rewrite(
        benchmarks / "mmeb/T2I/test.parquet",
        lambda rows: [row.update(tgt_img_path=["x", "y", "z"]) for row in rows],
    )
    assert evaluate(benchmarks, "--allow_missing", load=lambda path: ColourModel()) == 0
    assert [entry["name"] for entry in scores(benchmarks)["mmeb"]["sets"]] == ["I2T"]
    assert "Note: T2I is not scored: nothing remains of it" in capsys.readouterr().out
    for name in COLOURS:
        (benchmarks / IMAGES / f"{name}.png").unlink()
    assert evaluate(benchmarks, "--allow_missing", load=lambda path: ColourModel()) == 2
    assert findings(capsys)[0] == "nothing to score"


def damage(benchmarks: Path) -> None:
    """T2I's only: a PNG whole at both ends with a wrong byte in the middle."""
    content = bytearray(noise("PNG"))
    content[len(content) // 2] ^= 255
    (benchmarks / IMAGES / "late.png").write_bytes(content)
    rewrite(benchmarks / "mmeb/T2I/test.parquet", lambda rows: rows[1]["tgt_img_path"].append("T2I/late.png"))


@pytest.mark.parametrize("order", [("T2I", "I2T"), ("I2T", "T2I")])
def test_damage_found_late_costs_its_own_set_only(
    benchmarks: Path, capsys: pytest.CaptureFixture[str], order: Sequence[str]
) -> None:
    damage(benchmarks)
    path = benchmarks / "mmeb/sets.json"
    listed = json.loads(path.read_text())
    path.write_text(json.dumps({name: listed[name] for name in order}))
    mmvp = ("--mmvp", str(benchmarks / "mmvp"))
    assert evaluate(benchmarks, *mmvp, load=lambda path: ColourModel()) == 2
    printed = capsys.readouterr()
    assert [entry["name"] for entry in scores(benchmarks)["mmeb"]["sets"]] == ["I2T"]
    assert scores(benchmarks)["mmvp"]["average"]["score"] == 100
    assert "\nI2T  " in printed.out
    error = printed.err[printed.err.index("error: ") :]
    assert error.startswith("error: T2I/test.parquet:row 1: ")
    assert "late.png" in error
    assert "--allow_missing). The other sets are scored and written." in error

    assert evaluate(benchmarks, "--allow_missing", load=lambda path: ColourModel()) == 0
    by_name = {entry["name"]: entry for entry in scores(benchmarks)["mmeb"]["sets"]}
    assert (by_name["T2I"]["score"], by_name["T2I"]["num_candidates_left_out"]) == (100, 1)


def test_killed_evaluation_keeps_its_finished_sets(benchmarks: Path) -> None:
    class Killed(ColourModel):
        def encode_inputs(self, inputs: Any) -> Tensor:
            if any("Find" in item.text for item in inputs["items"]):
                raise KeyboardInterrupt
            return super().encode_inputs(inputs)

    assert evaluate(benchmarks, load=lambda path: Killed()) == INTERRUPTED
    assert [entry["name"] for entry in scores(benchmarks)["mmeb"]["sets"]] == ["I2T"]


def test_pairs_with_bad_items_are_left_out_and_counted(
    benchmarks: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (benchmarks / "mmvp/MLLM_VLM Images/Colour/3.png").unlink()
    arguments = [str(benchmarks / "run"), "--mmvp", str(benchmarks / "mmvp")]
    assert main(arguments, load=lambda path: ColourModel()) == 2
    assert "Questions.csv:line 4: image 'Colour/3.jpg' not found" in findings(capsys)[0]
    assert main([*arguments, "--allow_missing"], load=lambda path: ColourModel()) == 0
    average = scores(benchmarks)["mmvp"]["average"]
    assert (average["num_pairs"], average["num_pairs_left_out"], average["score"]) == (1, 1, 100)
    assert "1 of 2 pairs of MMVP." in capsys.readouterr().out.replace("\n", " ")


def test_images_in_the_table_are_scored_as_their_files_are(benchmarks: Path) -> None:
    assert evaluate(benchmarks, load=lambda path: ColourModel({"green": "red"})) == 0
    expected = scores(benchmarks)["mmeb"]
    table = benchmarks / "mmeb/T2I/test.parquet"

    def embed(rows: list[dict[str, Any]]) -> None:
        for row in rows:
            row["tgt_img_path"] = [
                {"bytes": (benchmarks / "mmeb/images" / name).read_bytes(), "path": name}
                for name in row["tgt_img_path"]
            ]

    rewrite(table, embed)
    assert evaluate(benchmarks, load=lambda path: ColourModel({"green": "red"})) == 0
    embedded = scores(benchmarks)["mmeb"]
    assert [_without_date(entry) for entry in embedded["sets"]] == [
        _without_date(entry) for entry in expected["sets"]
    ]


@pytest.mark.parametrize("content", [b"", b"nothing", noise("PNG")[:2000]], ids=["empty", "text", "cut"])
def test_bad_bytes_in_the_table_are_named(
    benchmarks: Path, capsys: pytest.CaptureFixture[str], content: bytes
) -> None:
    def embed(rows: list[dict[str, Any]]) -> None:
        for row in rows:
            row["tgt_img_path"] = [{"bytes": None, "path": name} for name in row["tgt_img_path"]]
        rows[0]["tgt_img_path"][1] = {"bytes": content, "path": "inside.png"}

    rewrite(benchmarks / "mmeb/T2I/test.parquet", embed)
    assert evaluate(benchmarks, load=lambda path: ColourModel()) == 2
    (line, _) = findings(capsys)
    assert line.startswith(f"{T2I_ROW_0}inside.png: is")


def _without_date(entry: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in entry.items() if name != "date"}
