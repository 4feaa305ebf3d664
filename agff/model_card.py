"""The model card of a release: what the model is, how it is used, where it comes from."""

from __future__ import annotations

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


def model_card(contract: Contract) -> str:
    """README.md of a release, in Markdown."""
    facts = "\n".join(f"| {name} | {value} |" for name, value in contract.origin.items())
    return f"""# A multimodal embedding model

{" ".join([*_objective(contract), _vectors(contract)])}

    import agff
    model = agff.load("this folder")
    a = model.encode(["a red heart"])
    b = model.encode([{{"image": "picture.jpg", "text": "Represent the given image."}}])
    model.similarity(a, b)
{_regions_and_captions(contract)}
| origin | |
|---|---|
{facts}

{_shorter(contract)}{how_to_load(contract)}\
Scores are in scores.json once launcher/evaluate.py has been run on this folder.
"""


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
