"""Matryoshka (arXiv 2205.13147) for vectors of vectors: prefixes of every vector, and of the fine vectors,
that are trained to serve alone (`agff.objectives.nested`)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor
from torch.nn.functional import normalize

from agff.batch import Encoded
from agff.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Truncation:
    """The first `dim` numbers of the global and of the first `num_fine` fine vectors."""

    dim: int
    num_fine: int

    def __call__(self, vectors_NMD: Tensor) -> Tensor:
        """(N, 1 + num_fine, dim) unit vectors of unit vectors; whole vectors stay bit for bit."""
        cut = vectors_NMD[:, : 1 + self.num_fine]
        return cut if self.dim == vectors_NMD.shape[2] else normalize(cut[..., : self.dim], dim=-1)

    def of_encoded(self, encoded: Encoded) -> Encoded:
        """The same with the "embedding" truncated."""
        return {**encoded, "embedding": self(encoded["embedding"])}

    def __str__(self) -> str:
        return f"dim {self.dim} with {self.num_fine} fine vectors"


def check_increasing(name: str, values: Sequence[int], *, least: int) -> None:
    """Raise ConfigError for sizes that do not increase, or that begin below the least."""
    if any(value < least for value in values):
        raise ConfigError(f"{name}={list(values)} must be >= {least}")
    if any(before >= after for before, after in itertools.pairwise(values)):
        raise ConfigError(f"{name}={list(values)} must increase")


@dataclass(frozen=True, kw_only=True)
class Truncations:
    """What a model was trained for beside whole items; part of its release. Each length goes with each number
    of fine vectors."""

    dims: list[int] = field(default_factory=list)
    """Of the vectors, increasing."""
    fine: list[int] = field(default_factory=list)
    """Numbers of fine vectors, increasing; 0 is the global vector alone."""

    def __post_init__(self) -> None:
        check_increasing("nested.dims", self.dims, least=1)
        check_increasing("nested.fine", self.fine, least=0)

    def all(self, *, width: int, num_fine: int) -> list[Truncation]:
        """Every one, whole items first; none where nothing but whole items was trained."""
        dims, counts = {width, *self.dims}, {num_fine, *self.fine}
        found = [
            Truncation(dim=dim, num_fine=count)
            for dim in sorted(dims, reverse=True)
            for count in sorted(counts, reverse=True)
        ]
        return found if len(found) > 1 else []

    def choose(self, dim: int | None, num_fine: int | None, *, like: Sequence[int]) -> Truncation:
        """The one with these sizes; None: whole. like: shape of the whole items, (N, M, D).

        Raises ValueError, with those that were trained, for another one.
        """
        _, num_vectors, width = like
        for name, value, trained in (
            ("dim", dim, {*self.dims, width}),
            ("num_fine", num_fine, {*self.fine, num_vectors - 1}),
        ):
            if value is not None and value not in trained:
                known = ", ".join(map(str, sorted(trained)))
                raise ValueError(f"{name}={value} was not trained; this model was trained for {known}")
        return Truncation(
            dim=width if dim is None else dim, num_fine=num_vectors - 1 if num_fine is None else num_fine
        )


WHOLE_ONLY = Truncations()
