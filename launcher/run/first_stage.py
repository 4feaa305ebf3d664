"""What a run takes from the release of an earlier stage: its backbone (backbone.path), its soft tokens
and its head (prompts.start_from)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig

from agff.backbone_folder import HEAD_FILE
from agff.contract import CONTRACT_FILE, CONVERT_AGAIN, Contract, check_files, read_contract
from agff.embedding_model import EmbeddingModel
from agff.errors import CheckpointError, ConfigError
from agff.release_files import PROMPTS_FILE, fill_head, read_tensor
from launcher.run.config import RunConfig

Shape = list[int]


def backbone_folder(path: str) -> Path:
    """The Hugging Face folder that backbone.path names: `path` itself, or `backbone` in it where it is a
    release."""
    folder = Path(path)
    return folder / "backbone" if (folder / CONTRACT_FILE).is_file() else folder


def check_first_stage(config: RunConfig) -> None:
    """Are the releases that a run begins from whole, and do their soft tokens and head fit it? Loads no
    weights.

    Raises CheckpointError for a release that is damaged or none, ConfigError, with both shapes, for soft
    tokens or a head of other shapes. The prompts of a release that is only the backbone need not fit.
    """
    backbone, start_from = Path(config.backbone.path), config.prompts.start_from
    if (backbone / CONTRACT_FILE).is_file():
        check_files(backbone, read_contract(backbone))
    if start_from is None:
        return
    release = Path(start_from)
    contract = read_contract(release)
    if release != backbone:
        check_files(release, contract)
    _check_soft_tokens(config, release, contract)
    if _continues_head(config, contract):
        _check_head(config, release)


def start_from_first_stage(model: EmbeddingModel, config: RunConfig) -> None:
    """Fill in the soft tokens, and the head where the objective is the same, of prompts.start_from; the rest
    of the model stays. Not a collective: the parameters must be whole, as they are before the engine."""
    assert config.prompts.start_from is not None
    release = Path(config.prompts.start_from)
    vectors = model.prompted_embedding.vectors
    vectors.data.copy_(read_tensor(release / PROMPTS_FILE, "vectors", vectors.shape))
    if model.head is not None and _continues_head(config, read_contract(release)):
        fill_head(model.head, release / HEAD_FILE)


def first_stage_row(config: RunConfig) -> dict[str, str]:
    """A line of the start-up table, where there is a first stage to begin from."""
    if config.prompts.start_from is None:
        return {}
    head = " and the head" * _continues_head(config, read_contract(Path(config.prompts.start_from)))
    return {"begins with": f"the soft tokens{head} of {config.prompts.start_from}"}


def _continues_head(config: RunConfig, contract: Contract) -> bool:
    """A contract names an objective only where its head is in the release."""
    return contract.objective == config.objective


def _check_soft_tokens(config: RunConfig, release: Path, contract: Contract) -> None:
    width = _backbone_config(config).get_text_config().hidden_size
    there = {"num_fine": contract.prompts.num_fine, "tokens_per_prompt": contract.prompts.tokens_per_prompt}
    here = {"num_fine": config.prompts.num_fine, "tokens_per_prompt": config.prompts.tokens_per_prompt}
    found, wanted = _shapes(release / PROMPTS_FILE).get("vectors"), [config.prompts.num_tokens, width]
    if there == here and found == wanted:
        return
    differs = ", ".join(f"prompts.{name}={there[name]}" for name in there if there[name] != here[name])
    raise ConfigError(
        f"prompts.start_from={release}: its soft tokens are {found} ({_named(there)}), those of this run "
        f"{wanted} ({_named(here)}); "
        + (f"set {differs}" if differs else "begin from a release whose backbone is as wide")
        + ", or leave prompts.start_from null: the backbone may come from that release all the same"
    )


def _named(values: dict[str, int]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def _check_head(config: RunConfig, release: Path) -> None:
    with torch.device("meta"):
        head = config.loss.build_head(_backbone_config(config))
    wanted = {name: list(tensor.shape) for name, tensor in head.state_dict().items()} if head else {}
    found = _shapes(release / HEAD_FILE)
    if different := [
        f"{name} is {found.get(name, 'absent')} there, {wanted.get(name, 'absent')} here"
        for name in sorted(found.keys() | wanted.keys())
        if found.get(name) != wanted.get(name)
    ]:
        raise ConfigError(
            f"prompts.start_from={release}: its head has other shapes than the one of this run: "
            f"{'; '.join(different)}; give the settings of `loss` and the backbone that it was trained with "
            "(agff_config.json there), or leave prompts.start_from null"
        )


def _shapes(path: Path) -> dict[str, Shape]:
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118  # no mapping
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}; {CONVERT_AGAIN}") from None


def _backbone_config(config: RunConfig) -> Any:
    return AutoConfig.from_pretrained(backbone_folder(config.backbone.path), local_files_only=True)
