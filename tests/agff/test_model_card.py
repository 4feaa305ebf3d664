"""The card of a release: what the hub reads, and values that stay values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import metadata_load

from agff.batch import TextRule
from agff.contract import Contract
from agff.model_card import SCORES, code, model_card, with_scores
from agff.nested import Truncations
from agff.processor import ProcessorConfig
from agff.prompts import PromptConfig
from agff.similarity import FusionConfig

NASTY = "a`b|c\n---\nlicense: mit\n# <script> \\| *x* [y](z) {{ a }} ' \" : é"


def card_of(origin: dict[str, Any], *, files: tuple[str, ...] = ()) -> str:
    return model_card(
        Contract(
            prompts=PromptConfig(num_fine=4),
            processor=ProcessorConfig(max_tokens=77),
            fusion=FusionConfig(beta=0.05),
            nested=Truncations(),
            texts=TextRule(),
            objective=None,
            objective_settings={},
            pooling="last",
            dtype="float32",
            weights="whole",
            base_model=None,
            versions={"torch": "2"},
            origin=origin,
            files=dict.fromkeys(files, "1 bytes, sha256 0"),
        )
    )


def front_matter(card: str, folder: Path) -> dict[str, Any]:
    (folder / "README.md").write_text(card, encoding="utf-8")
    found = metadata_load(folder / "README.md")
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("licence", "expected"),
    [
        ("apache-2.0", {"license": "apache-2.0"}),
        ("Apache License (LICENSE)", {"license": "other", "license_name": "Apache License (LICENSE)"}),
        (NASTY, {"license": "other", "license_name": NASTY}),
        ("not recorded", {}),
        (None, {}),
        (3, {}),
    ],
)
def test_front_matter_has_the_licence_of_the_backbone(
    tmp_path: Path, licence: object, expected: dict[str, str]
) -> None:
    found = front_matter(card_of({"backbone_license": licence}), tmp_path)
    assert {name: value for name, value in found.items() if name.startswith("license")} == expected
    assert (found["pipeline_tag"], found["library_name"]) == ("feature-extraction", "agff")


def test_other_libraries_are_named_where_the_release_has_their_files(tmp_path: Path) -> None:
    alone = card_of({"backbone": "Qwen2-VL-2B"})
    assert "peft" not in alone
    assert "base_model" not in front_matter(alone, tmp_path)
    card = card_of({"base_model": "Qwen/Qwen2-VL-2B"}, files=("modules.json", "adapter/adapter_config.json"))
    found = front_matter(card, tmp_path)
    assert (found["library_name"], found["base_model"]) == ("sentence-transformers", "Qwen/Qwen2-VL-2B")
    assert "sentence-transformers" in found["tags"]
    assert 'PeftModel.from_pretrained(backbone, "this folder/adapter")' in card
    assert "public backbone `Qwen/Qwen2-VL-2B`" in card


def test_settings_data_and_licence_are_on_the_card() -> None:
    origin = {
        "run": "mine",
        "settings": {"loss.temperature": 0.02},
        "data": {"Emoji": {"samples": 7, "shards": "f00d"}},
        "backbone_license": "mit",
    }
    card = card_of(origin)
    for line in (
        "| `loss.temperature` | `0.02` |",
        "| `processor.max_tokens` | `77` |",
        "| `fusion.beta` | `0.05` |",
        "| `run` | `mine` |",
        "| `Emoji` | `7` | `f00d` |",
    ):
        assert f"\n{line}\n" in card
    assert "weights derive: `mit`." in card
    assert "min_pixels" not in card, "what is not set"


def test_nothing_in_a_value_leaves_its_cell(tmp_path: Path) -> None:
    plain = {name: "x" for name in ("run", "backbone", "backbone_license", "base_model")}
    origin: dict[str, Any] = {**plain, "settings": {"a": "x"}, "data": {"x": {"samples": "x", "shards": "x"}}}
    nasty: dict[str, Any] = {
        **dict.fromkeys(plain, NASTY),
        "settings": {"a": NASTY},
        "data": {NASTY: {"samples": NASTY, "shards": NASTY}},
    }

    def body(card: str) -> list[str]:
        return card.split("\n# A multimodal", 1)[1].splitlines()

    lines, expected = body(card_of(nasty)), body(card_of(origin))
    assert [line.replace(code(NASTY), code("x")) for line in lines] == expected
    assert code(NASTY).count("`") == 2
    assert front_matter(card_of(nasty), tmp_path)["license"] == "other"


def test_scores_are_put_between_the_marks_only() -> None:
    card = card_of({})
    scored = with_scores(card, "| a table |\n\n")
    assert scored is not None
    before, after = card.split(SCORES[0])[0], card.split(SCORES[1])[1]
    assert scored == f"{before}{SCORES[0]}\n| a table |\n{SCORES[1]}{after}"
    assert with_scores(scored, "| a table |") == scored
    assert with_scores("# a card of a person", "x") is None
    assert with_scores(f"# half {SCORES[0]}", "x") is None


def test_marks_within_the_scores_end_nothing() -> None:
    """A set may be called like a mark; and a person may write of one within a line."""
    card = card_of({}).replace("# A multimodal", f"Between {SCORES[0]} and {SCORES[1]}.\n\n# A multimodal")
    once = with_scores(card, f"| {code(SCORES[1])} | 1.0 |")
    assert once is not None
    assert with_scores(once, "new") == with_scores(card, "new")
    assert f"Between {SCORES[0]} and" in once
    windows = card_of({}).replace("\n", "\r\n")
    assert with_scores(windows, "new") == with_scores(card_of({}), "new").replace("\n", "\r\n")
