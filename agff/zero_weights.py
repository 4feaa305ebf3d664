"""The weights of a DeepSpeed checkpoint, tensor by tensor: of ZeRO-1, 2 and 3, and of a universal one. No
DeepSpeed, no process group; nothing is read but the partitions of the float32 masters."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from agff.errors import CheckpointError
from agff.lazy_tensor import LazyTensor, Piece, StoredTensor, TorchFile, elements, of_pieces

OTHER_VERSION = "it was written by a DeepSpeed that this version does not know (requirements.txt)"


class ZeroWeights:
    """What the model's parameters were when a checkpoint was saved."""

    def __init__(self, folder: Path) -> None:
        """Raises CheckpointError when the folder is no checkpoint of ZeRO's or a file of it cannot be
        read."""
        if not folder.is_dir():
            raise CheckpointError(f"{folder}: no such folder; name one that ds_to_universal has made")
        self.folder = folder
        self._pieces: list[Piece] = []
        self.tensors = self._universal() if (folder / "zero").is_dir() else self._partitioned()
        """Trainable parameters in float32, and those frozen ones that the checkpoint holds as they are there,
        by the names that they have in the model."""

    @property
    def pieces(self) -> Sequence[Piece]:
        """Where they lie, to look for damage (`damaged_records`)."""
        return self._pieces

    @property
    def step(self) -> int:
        """Steps that DeepSpeed had counted."""
        models = _by_rank(self.folder, "*_model_states.pt")
        steps = TorchFile(models[0]).content.get("global_steps") if models else None
        if type(steps) is not int:
            raise CheckpointError(
                f"{self.folder}: has no *_model_states.pt that says its step (global_steps)"
            )
        return steps

    def _tensor(self, shape: Sequence[int], pieces: Sequence[Piece]) -> LazyTensor:
        self._pieces.extend(pieces)
        return of_pieces(torch.Size(shape), pieces)

    def _partitioned(self) -> dict[str, LazyTensor]:
        optimizers = [TorchFile(path).content for path in _by_rank(self.folder, "*_optim_states.pt")]
        models = [TorchFile(path).content for path in _by_rank(self.folder, "*_model_states.pt")]
        if not optimizers or not models:
            raise CheckpointError(
                f"{self.folder}: no checkpoint of ZeRO 1, 2 or 3 ({len(optimizers)} files *_optim_states.pt, "
                f"{len(models)} *_model_states.pt)"
            )
        try:
            states = [optimizer["optimizer_state_dict"] for optimizer in optimizers]
            counts = states[0]["partition_count"]
            num_ranks = max(counts) if isinstance(counts, list) else counts
            if num_ranks != len(states):
                raise CheckpointError(
                    f"{self.folder}: has the partitions of {len(states)} of {num_ranks} ranks; copy the "
                    "missing files *_optim_states.pt there"
                )
            read = self._stage_3 if states[0]["zero_stage"] == 3 else self._stage_1_or_2
            return read(states, models)
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise CheckpointError(f"{self.folder}: cannot be read ({error!r}); {OTHER_VERSION}") from None

    def _stage_1_or_2(self, states: Sequence[Any], models: Sequence[Any]) -> dict[str, LazyTensor]:
        """Each group is one flat tensor, cut in as many partitions as there are ranks."""
        found = {}
        paddings = states[0].get("param_alignment_paddings")
        for group, shapes in enumerate(models[0]["param_shapes"]):
            partitions = [state["single_partition_of_fp32_groups"][group].piece for state in states]
            start = 0
            for index, (name, shape) in enumerate(shapes.items()):
                found[name] = self._tensor(shape, elements(partitions, start, math.prod(shape)))
                start += math.prod(shape) + (paddings[group][index] if paddings is not None else 0)
        frozen: Mapping[str, StoredTensor] = models[0].get("frozen_param_fragments") or {}
        for name, stored in frozen.items():
            found[name] = self._tensor(stored.shape, [stored.piece])
        return found

    def _stage_3(self, states: Sequence[Any], models: Sequence[Any]) -> dict[str, LazyTensor]:
        """Each parameter is cut in as many partitions as there are ranks; a rank's lie one behind the
        other."""
        found, start = {}, 0
        own = [[flat.piece for flat in state["fp32_flat_groups"]] for state in states]
        for name, shape in (item for shapes in models[0]["param_shapes"] for item in shapes.items()):
            size = math.ceil(math.prod(shape) / len(states))
            pieces = [piece for partitions in own for piece in elements(partitions, start, size)]
            found[name] = self._tensor(shape, pieces)
            start += size
        for name, shape in (models[0].get("frozen_param_shapes") or {}).items():
            fragments = [model["frozen_param_fragments"].get(name) for model in models]
            if all(fragments):  # else they were left out
                found[name] = self._tensor(shape, [fragment.piece for fragment in fragments])
        return found

    def _universal(self) -> dict[str, LazyTensor]:
        """A folder for each parameter. Of ZeRO-3 it holds a flat tensor, and the files of the model hold its
        shape."""
        found, models = {}, _by_rank(self.folder, "*_model_states.pt")
        groups = TorchFile(models[0]).content.get("param_shapes") if models else None
        shapes = {name: shape for group in groups or () for name, shape in group.items()}
        for path in sorted((self.folder / "zero").glob("*/fp32.pt")):
            content = TorchFile(path).content
            stored = content["param"] if isinstance(content, dict) and "param" in content else content
            if not isinstance(stored, StoredTensor):
                raise CheckpointError(f"{path}: holds no parameter; {OTHER_VERSION}")
            shape = shapes.get(path.parent.name, stored.shape)
            found[path.parent.name] = self._tensor(shape, elements([stored.piece], 0, math.prod(shape)))
        if not found:
            raise CheckpointError(f"{self.folder / 'zero'}: holds no parameter (NAME/fp32.pt)")
        return found


def _by_rank(folder: Path, pattern: str) -> list[Path]:
    def numbers(path: Path) -> list[int]:
        return [int(number) for number in re.findall(r"\d+", path.name)]

    return sorted(folder.glob(pattern), key=numbers)
