"""What is on disk of a backbone: a Hugging Face folder, its weights and what must not lie beside them.

No weights are loaded here and no process group is needed: all of it can be asked before any rank waits.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import shlex
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from agff.checkpoint_folder import checkpoint_folder, complete_steps
from agff.errors import CheckpointError, ConfigError
from agff.files import hashing_bar, sha256_of
from agff.lazy_tensor import LazyTensor, TorchFile, of_safetensors

ADAPTER_FILE = "adapter_config.json"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
HEAD_FILE = "head.safetensors"
"""Beside the backbone of a release: the head that makes the embeddings, where the objective has one."""


def check_backbone_folder(folder: Path) -> None:
    """Raise ConfigError unless the folder exists, has a model's configuration and no adapter beside or among
    its weights.

    One beside them would be loaded by transformers unasked, and the weights under it frozen; one among them
    would be left out. A stage that begins with a new adapter needs the earlier one merged.
    """
    if not folder.is_dir():
        raise ConfigError(
            f"{folder}: no such folder; backbone.path is a local folder{_did_you_mean(folder)}. A model of "
            f"the hub is downloaded first: hf download REPOSITORY --local-dir {shlex.quote(str(folder))}"
        )
    if (run := _run_of(folder)) is not None:
        raise ConfigError(
            f"{folder}: a run folder or a part of one, no backbone: the weights of that stage are in a ZeRO "
            f"checkpoint, and its adapter, if it has one, is not merged. {_convert(run)}"
        )
    if (folder / ADAPTER_FILE).exists():
        raise ConfigError(_adapter_message(folder))
    if found := [name for name in ADAPTER_WEIGHTS if (folder / name).exists()]:
        raise ConfigError(
            f"{folder}: weights of an adapter ({found[0]}) without its {ADAPTER_FILE} lie here, so the stage "
            "that they are of is not merged, and cannot be from here; move them away if the folder is meant "
            f"without them. {_convert()}"
        )
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"{folder}: not a backbone folder (config.json is missing); give the folder that holds the "
            "model's config.json, weights, tokenizer and image processor as backbone.path"
        )
    if adapted := _adapter_tensors(folder):
        raise ConfigError(
            f"{folder}: {len(adapted)} of its weights are of an adapter, {', '.join(adapted[:2])}: the stage "
            f"that they are of is not merged. {_convert()}"
        )


def _run_of(folder: Path) -> Path | None:
    """The run whose folder, checkpoints or checkpoint this is."""
    whole = folder.absolute()
    parts = {whole: whole, whole.parent: checkpoint_folder(whole.parent)}
    parts[whole.parent.parent] = checkpoint_folder(whole.parent.parent) / whole.name
    return next((run for run, part in parts.items() if part == whole and complete_steps(run)), None)


def _convert(run: Path | None = None) -> str:
    of = shlex.quote(str(run)) if run else "RUN"
    return (
        f"A run of this project is merged by launcher/convert_checkpoint.py {of} OUT: then give OUT as "
        "backbone.path"
    )


def _adapter_tensors(folder: Path) -> list[str]:
    """Names of the weights that are an adapter's; [] where there are none or a file cannot be read, which
    loading says. Raises ConfigError for an index that names others than those beside it."""
    paths = _named_weight_files(folder)
    try:
        with ExitStack() as opened:
            return sorted(name for _, _, name in _parts(paths, opened) if ".lora_" in name)
    except ConfigError:
        return []


def backbone_sha256(folder: Path) -> str:
    """Fingerprint of the backbone's weights: SHA-256, in hexadecimal digits, of the name, dtype, shape and
    SHA-256 of every tensor, sorted by name.

    It is of the tensors, not of the files: the same weights in other shards have the same one. Every byte is
    read, once, by several threads (1.2 GB/s each with the processor's SHA instructions), with a progress bar
    where that takes long. It is not kept by size and time of the files: copying programs preserve both, and
    the bytes are read anyway when the model is loaded next. Of a `pytorch_model.bin`, a pickle, the file's
    bytes count. Raises ConfigError for weights that are absent or cannot be read.
    """
    paths = _weight_files(folder)
    num_threads = min(16, len(os.sched_getaffinity(0)))
    with (
        ExitStack() as opened,
        ThreadPoolExecutor(num_threads) as pool,
        hashing_bar(f"hash {folder.name}", sum(path.stat().st_size for path in paths), is_shown=True) as bar,
    ):
        lines = []
        for line, size in pool.map(_line_of, _parts(paths, opened)):
            lines.append(line)
            bar.update(size)
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def lazy_tensors(folder: Path) -> dict[str, LazyTensor]:
    """All weights of the folder by their names in its files, to be read one by one. Raises ConfigError."""
    found: dict[str, LazyTensor] = {}
    for path in _weight_files(folder):
        try:
            if path.suffix == ".safetensors":
                found |= of_safetensors(path)
            else:
                found |= {name: stored.lazy for name, stored in TorchFile(path).content.items()}
        except (OSError, SafetensorError, CheckpointError) as error:
            raise ConfigError(f"{path}: cannot read the weights: {error}; download the file again") from None
    return found


def language_model_head(folder: Path, model_config: Any) -> torch.Tensor:
    """(vocabulary, H) weights that turn a state into the next token's logits, which a backbone goes without.

    Where the folder's weights have none: those of the head of the release that the folder is a part of, or
    the embedding, where the configuration says that it is both. Raises ConfigError where there is none.
    """
    if (found := _tensor_named(_weight_files(folder), "lm_head.weight")) is not None:
        return found
    released = folder.parent / HEAD_FILE
    if released.is_file() and (found := _tensor_named([released], "lm_head.weight")) is not None:
        return found
    if model_config.tie_word_embeddings:
        found = _tensor_named(_weight_files(folder), "embed_tokens.weight")
    if found is None:
        raise ConfigError(
            f"{folder}: no language-model head here (lm_head.weight), and the configuration does not tie it "
            "to the embedding (tie_word_embeddings): an objective that generates starts from a whole model, "
            "or from a release that has such a head"
        )
    return found


def _tensor_named(paths: list[Path], ending: str) -> torch.Tensor | None:
    """The tensor whose name ends so; None where there is none."""
    with ExitStack() as opened:
        for path, file, name in _parts(paths, opened):
            if file is None:
                weights = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
                if name := next((each for each in weights if each.endswith(ending)), ""):
                    return weights[name].clone()
            elif name.endswith(ending):
                return file.get_tensor(name)
    return None


def _weight_files(folder: Path) -> list[Path]:
    """The files that transformers loads the weights from. Raises ConfigError where there are none."""
    if found := _named_weight_files(folder):
        return found
    raise ConfigError(
        f"{folder}: no weights here (neither model.safetensors nor its index); download the folder again"
    )


def _named_weight_files(folder: Path) -> list[Path]:
    """In transformers' own order of preference; [] where there are none. Raises ConfigError for an index that
    names others than those beside it."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return [folder / name]
        if (index := folder / f"{name}.index.json").is_file():
            return _shards(index)
    return []


def _shards(index: Path) -> list[Path]:
    try:
        names = {*json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
        outside = [name for name in names if Path(name).is_absolute() or ".." in Path(name).parts]
        paths = sorted(index.parent / name for name in names)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{index}: not an index of weights ({error!r}); download it again") from None
    if outside:
        raise ConfigError(
            f"{index}: names weights outside of its folder, {min(outside)!r}; download it again, from a "
            "source that you trust"
        )
    if missing := [str(path) for path in paths if not path.is_file()]:
        raise ConfigError(
            "\n".join(f"{path}: missing, {index.name} names it" for path in missing)
            + f"\n{index.parent}: {len(missing)} of {len(paths)} files of weights missing; download them"
        )
    return paths


def _parts(paths: list[Path], opened: ExitStack) -> Iterator[tuple[Path, Any, str]]:
    """(file, opened file, tensor) of all tensors; a file that is a pickle is one part."""
    for path in paths:
        if path.suffix != ".safetensors":
            yield path, None, ""
            continue
        try:
            file = opened.enter_context(safe_open(path, "pt"))
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"{path}: cannot read the weights: {error}; download the file again") from None
        for name in file.keys():  # noqa: SIM118  # no mapping
            yield path, file, name


def _line_of(part: tuple[Path, Any, str]) -> tuple[str, int]:
    """What the fingerprint says of one tensor, and its size in bytes."""
    path, file, name = part
    if file is None:
        return f"{path.name} {sha256_of(path)}", path.stat().st_size
    tensor = file.get_tensor(name)
    digest = hashlib.sha256(tensor.reshape(-1).view(torch.uint8).numpy()).hexdigest()
    return f"{name} {tensor.dtype} {list(tensor.shape)} {digest}", tensor.nbytes


def _did_you_mean(folder: Path) -> str:
    """`; there is ...` with the folders whose names are like the first one of the path that is absent."""
    present = next(parent for parent in (*folder.absolute().parents,) if parent.is_dir())
    absent = folder.absolute().parts[len(present.parts)]
    try:
        siblings = [path.name for path in present.iterdir() if path.is_dir()]
    except OSError:
        return ""
    near = difflib.get_close_matches(absent, siblings, n=3)
    return f"; did you mean {' or '.join(str(present / name) for name in near)}?" if near else ""


MERGE = (
    "import shutil, sys, peft, transformers as t; base, adapter, out = sys.argv[1:]; "
    "model = peft.PeftModel.from_pretrained(t.{model_class}.from_pretrained(base), adapter); "
    'weights = shutil.ignore_patterns("*.safetensors*", "*.bin*", "adapter_*"); '
    "shutil.copytree(base, out, ignore=weights); model.merge_and_unload().save_pretrained(out)"
)
"""Python that writes a backbone folder with the adapter merged into its weights."""


def _adapter_message(folder: Path) -> str:
    try:
        values = json.loads((folder / ADAPTER_FILE).read_text())
        model_class = (values.get("auto_mapping") or {}).get("base_model_class") or ""
        base = values.get("base_model_name_or_path") or "BASE"
    except (OSError, ValueError, AttributeError):
        model_class, base = "", "BASE"
    if not str(model_class).isidentifier():  # saved for a task, as by most trainers: with the head
        model_class = "AutoModelForImageTextToText"
    adapter, merged = f"{folder}-adapter", f"{folder}-merged"
    code = MERGE.format(model_class=model_class)
    try:
        _weight_files(folder)
    except ConfigError:
        command = shlex.join(["python", "-c", code, str(base), str(folder), merged])
        return (
            f"{folder}: an adapter ({ADAPTER_FILE}) without a backbone; backbone.path is a whole model. Give "
            f"{base}, or merge the adapter and give {merged}: {command}\n{_convert()}"
        )
    move = f"mkdir {shlex.quote(adapter)} && mv {shlex.quote(str(folder))}/adapter_* {shlex.quote(adapter)}"
    command = shlex.join(["python", "-c", code, str(folder), adapter, merged])
    return (
        f"{folder}: an adapter ({ADAPTER_FILE}) lies beside the backbone, so its stage is not merged; "
        f"transformers would load it and freeze the weights under it. {_convert()}\nOf another "
        f"program's: move it away: {move}\nThen the folder is the backbone without it; for the "
        f"backbone with it give {merged}, made by\n{command}"
    )
