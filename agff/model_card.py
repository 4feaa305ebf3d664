"""The model card of a release: what the model is, how it is used, where it comes from."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import PurePosixPath
from typing import Any

from huggingface_hub import ModelCardData

from agff.backbone_folder import ADAPTER_FILE
from agff.contract import Contract, released_objective
from agff.ecosystem_files import how_to_load

TRAINED_BY = {
    "contrastive": "Trained to find each query's target among all others of a batch.",
    "distillation": "Trained on texts alone, to find similar what a teacher of texts finds similar (UniME).",
    "mac": "Trained to align images and captions, by their vectors and by their tokens (FAM's MAC).",
    "mm_gem": (
        "Trained to embed images, regions and texts in one space, and to say what an image or a region shows "
        "(MM-GEM)."
    ),
    "vein": (
        "Trained to find each query's target, and so that an image's masked tokens can be rebuilt from its "
        "vector (FAM's VEIN); what rebuilt them is not part of it."
    ),
}
"""One sentence for each of agff.objectives.OBJECTIVES."""


SCORES = ("<!-- scores -->", "<!-- end of scores -->")
"""Lines around the part of a card that an evaluation writes."""
_NO_SCORES = "Not scored yet: `python launcher/evaluate.py` with this folder writes them here."
_LICENSE_ID = re.compile(r"[a-z0-9][a-z0-9.+-]*")


def model_card(contract: Contract) -> str:
    """README.md of a release, in Markdown, with the front matter that the Hugging Face hub reads; its scores
    come later (`with_scores`)."""
    return f"""---
{_front_matter(contract)}
---

# A multimodal embedding model

{" ".join([*_objective(contract), _vectors(contract)])}

## How to load it

    import agff
    model = agff.load("this folder")
    a = model.encode(["a red heart"])
    b = model.encode([{{"image": "picture.jpg", "text": "Represent the given image."}}])
    model.similarity(a, b)
{_regions_and_captions(contract)}
{how_to_load(contract)}{_adapter(contract)}{_shorter(contract)}## Scores

{SCORES[0]}
{_NO_SCORES}
{SCORES[1]}

## Settings

{_table(("of the model", ""), _model_settings(contract))}

{_training(contract)}## Where it comes from

{_table(("origin", ""), _origin(contract))}

{_data(contract)}{_licence(contract)}
"""


def with_scores(card: str, scores: str) -> str | None:
    """The card with another text between its SCORES lines; None where it has not these lines, as one that a
    person wrote."""
    lines = card.splitlines(keepends=True)
    found = [line.rstrip("\r\n") for line in lines]
    try:
        start = found.index(SCORES[0]) + 1
        end = found.index(SCORES[1], start)
    except ValueError:
        return None
    line_end = lines[start - 1].removeprefix(SCORES[0])
    written = [f"{line}{line_end}" for line in scores.strip().splitlines()]
    return "".join([*lines[:start], *written, *lines[end:]])


def code(value: object) -> str:
    """A value as Markdown that nothing in it can leave, in a table too."""
    text = " ".join(str(value).split()).replace("`", "'")
    text = re.sub(r"\\*\|", r"\\|", text)  # a backslash before would escape the one that hides the bar
    return f"`{text}`" if text else ""


def _front_matter(contract: Contract) -> str:
    licence = contract.origin.get("backbone_license")
    is_known = isinstance(licence, str) and licence != "not recorded"
    is_id = is_known and _LICENSE_ID.fullmatch(str(licence)) is not None
    loads_elsewhere = "modules.json" in contract.files
    return ModelCardData(
        license=str(licence) if is_id else "other" if is_known else None,
        license_name=str(licence) if is_known and not is_id else None,
        base_model=contract.origin.get("base_model"),
        tags=["agff-embed", "multimodal", "image-text", "embedding"]
        + ["sentence-transformers"] * loads_elsewhere,
        pipeline_tag="feature-extraction",
        library_name="sentence-transformers" if loads_elsewhere else "agff",
    ).to_yaml()


def _adapter(contract: Contract) -> str:
    """How peft loads the adapter, where the release has one."""
    found = [PurePosixPath(name) for name in contract.files]
    folders = [name.parent for name in found if name.name == ADAPTER_FILE]
    if not folders:
        return ""
    base = contract.origin.get("base_model") or contract.origin.get("backbone")
    return f"""The adapter alone, on the public backbone {code(base)}, with peft:

    from peft import PeftModel
    PeftModel.from_pretrained(backbone, "this folder/{folders[0]}")

"""


def _model_settings(contract: Contract) -> dict[str, object]:
    return {
        "vectors of an item": f"1 global, {contract.prompts.num_fine} fine-grained",
        "soft tokens of a prompt": contract.prompts.tokens_per_prompt,
        **dict(_flat({"processor": asdict(contract.processor), "fusion": asdict(contract.fusion)})),
        "texts.image_alone": json.dumps(contract.texts.image_alone, ensure_ascii=False),
        "texts.image_with_text": json.dumps(contract.texts.image_with_text, ensure_ascii=False),
        "pooling": contract.pooling,
        "dtype": contract.dtype,
        **{f"written with {name}": version for name, version in contract.versions.items()},
    }


def _training(contract: Contract) -> str:
    settings = contract.origin.get("settings")
    if not isinstance(settings, Mapping) or not settings:
        return ""
    return _table(("of its training", ""), settings) + "\n\n"


def _origin(contract: Contract) -> dict[str, object]:
    """What is one value; tables of their own have the rest."""
    return {name: value for name, value in contract.origin.items() if not isinstance(value, Mapping)}


def _data(contract: Contract) -> str:
    """A row for each source of shards."""
    data = contract.origin.get("data")
    if not isinstance(data, Mapping) or not data:
        return ""
    rows = "\n".join(
        f"| {code(name)} | {code(source.get('samples', ''))} | {code(source.get('shards', ''))} |"
        for name, source in data.items()
        if isinstance(source, Mapping)
    )
    return f"""| trained on | pairs | fingerprint of the shards (SHA-256) |
|---|---|---|
{rows}

"""


def _licence(contract: Contract) -> str:
    licence = contract.origin.get("backbone_license")
    said = "not recorded" if licence in (None, "not recorded") else code(licence)
    return (
        f"Licence of the backbone, from which these weights derive: {said}. That of the training data is not "
        "recorded here."
    )


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, object]]:
    """(dotted name, value) of what is set."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        elif value is not None:
            yield prefix + name, value


def _table(head: tuple[str, str], rows: Mapping[str, object]) -> str:
    lines = [f"| {head[0]} | {head[1]} |", "|---|---|"]
    return "\n".join([*lines, *(f"| {code(name)} | {code(value)} |" for name, value in rows.items())])


def _objective(contract: Contract) -> list[str]:
    """What it was trained for last, where the origin says it: only a head that is released is in the rest of
    the contract."""
    name = contract.origin.get("objective", contract.objective)
    return [TRAINED_BY[name]] if name in TRAINED_BY else []


def _vectors(contract: Contract) -> str:
    if not contract.prompts.num_fine:
        return "One vector an item, compared by the cosine."
    return (
        f"One global and {contract.prompts.num_fine} fine-grained vectors an item, compared by a log-sum-exp "
        f"of four global/fine similarities (beta {contract.fusion.beta})."
    )


def _regions_and_captions(contract: Contract) -> str:
    """Further lines of the example, where the head makes both."""
    objective = released_objective(contract)
    if objective is None or objective.image_cells is None:
        return ""
    return """    c = model.encode_regions({"image": "picture.jpg"}, [(0, 0, 50, 40)])
    model.similarity(a, c)
    model.caption({"image": "picture.jpg"})
    model.caption({"image": "picture.jpg"}, [(0, 0, 50, 40)], max_tokens=64, num_beams=4)

A box is x0, y0, x1, y1 in pixels of the upright image. A caption is greedy unless `num_beams` says otherwise.
"""


def _shorter(contract: Contract) -> str:
    """The truncations, where there are any."""
    choices = [
        f"`{name}` of {', '.join(map(str, values))}"
        for name, values in (("dim", contract.nested.dims), ("num_fine", contract.nested.fine))
        if values
    ]
    return (
        f"Shorter embeddings, trained to serve alone: `encode(items, ...)` takes {' and '.join(choices)}.\n\n"
        * bool(choices)
    )
