"""The folder of an adapter, as peft writes and reads it."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import torch

from agff.backbone_folder import ADAPTER_FILE, ADAPTER_WEIGHTS, backbone_sha256
from agff.embedding_model import EmbeddingModel
from agff.errors import CheckpointError, ConfigError
from agff.lazy_tensor import LazyTensor, of_safetensors
from agff.release_parts import ReleaseParts, lora_config, plain_backbone
from agff.release_weights import WrittenWeights, write_weights

ADAPTER_FOLDER = "adapter"
"""In a release."""
HUB_CACHE = re.compile(r"models--([^/]+)--([^/]+)/snapshots/")
PUBLISHED = {
    "Qwen": re.compile(r"Qwen(2|2\.5|3)-VL-[0-9]+B(-A[0-9]+B)?(-Instruct|-Thinking)?"),
    "llava-hf": re.compile(r"llava-onevision-qwen2-[0-9.]+b-(ov|si)(-chat)?-hf"),
}
"""What models are called on the hub, by their publisher."""


def hub_name(folder: Path) -> str | None:
    """The name on the hub of the model in a local folder, as far as the folder's own name says it: a part of
    the hub's cache, or called as the model is there. None where it does not."""
    if match := HUB_CACHE.search(f"{folder.absolute().as_posix()}/"):
        return f"{match[1]}/{match[2]}"
    for publisher, names in PUBLISHED.items():
        if names.fullmatch(folder.name):
            return f"{publisher}/{folder.name}"
    return None


def write_adapter(
    folder: Path, model: EmbeddingModel, parts: ReleaseParts, *, dtype: torch.dtype, base_model: str | None
) -> WrittenWeights:
    """Write it. base_model: the hub's name of the backbone."""
    folder.mkdir()
    config = copy.deepcopy(lora_config(model))
    config.base_model_name_or_path = base_model
    config.inference_mode = True
    backbone = plain_backbone(model)
    config.auto_mapping = {
        "base_model_class": type(backbone).__name__,
        "parent_library": type(backbone).__module__,
    }
    config.save_pretrained(folder)
    stem = ADAPTER_WEIGHTS[0].removesuffix(".safetensors")
    return write_weights(folder, parts.adapter, dtype=dtype, stem=stem)


def base_folder(base_model: str | None, given: Path | None) -> Path:
    """The local folder of an adapter's backbone: `given`, or that of the hub's name where it has been
    downloaded. Nothing is downloaded here. Raises ConfigError."""
    if given is not None:
        return given
    if base_model is not None:
        if Path(base_model).is_dir():
            return Path(base_model)
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        try:
            return Path(snapshot_download(base_model, local_files_only=True))
        except (LocalEntryNotFoundError, ValueError, OSError):
            pass
    named = base_model or "the backbone that it was trained on"
    download = f"; hf download {base_model} --local-dir FOLDER fetches it" if base_model else ""
    raise ConfigError(
        f"the release holds an adapter alone, and {named} is not on this machine where it can be found: pass "
        f'its folder, agff.load(..., backbone="FOLDER"){download}'
    )


def check_base(folder: Path, expected: Any) -> None:
    """Raise CheckpointError when the weights in the backbone folder are not those of the fingerprint, where
    there is one."""
    if re.fullmatch("[0-9a-f]{64}", str(expected)) and (found := backbone_sha256(folder)) != expected:
        raise CheckpointError(
            f"{folder}: these weights (sha256 {found:.12}...) are not those that the adapter was trained on "
            f"({expected:.12}...), and together they would be another model; give the folder of those"
        )


def released_adapter(folder: Path) -> tuple[dict[str, LazyTensor], float]:
    """(its weights by the names that they have in a model, what B A is multiplied with)."""
    config = json.loads((folder / ADAPTER_FILE).read_text(encoding="utf-8"))
    weights = of_safetensors(folder / ADAPTER_WEIGHTS[0])
    named = {name.replace(".weight", ".default.weight"): lazy for name, lazy in weights.items()}
    return named, config["lora_alpha"] / config["r"]


def with_adapter(backbone: Any, folder: Path) -> Any:
    """The backbone with the adapter in `folder` merged into it. Raises CheckpointError when weights of the
    adapter are missing or of no layer, ConfigError where peft is absent."""
    try:
        import peft
    except ImportError:
        raise ConfigError(
            "the release holds an adapter alone, and peft is not installed: pip install peft"
        ) from None
    if not (folder / ADAPTER_FILE).is_file():
        raise CheckpointError(f"{folder / ADAPTER_FILE}: missing")
    config = peft.LoraConfig.from_pretrained(str(folder))
    model = peft.get_peft_model(backbone, config, autocast_adapter_dtype=False)
    weights = peft.utils.save_and_load.load_peft_weights(str(folder), device="cpu")
    result: Any = peft.set_peft_model_state_dict(model, weights)
    missing = [name for name in result.missing_keys if ".lora_" in name]
    if unapplied := [*missing, *result.unexpected_keys]:
        raise CheckpointError(
            f"{folder}: {len(unapplied)} weights are missing or of no layer of the backbone, "
            f"{', '.join(unapplied[:3])}"
        )
    return model.merge_and_unload()
