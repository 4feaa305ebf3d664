"""UniME's first stage (arXiv 2504.17432): the student compares the texts of a batch as its teacher does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from agff.batch import Batch, Encoded
from agff.collectives import all_gather_rows, rank
from agff.errors import ConfigError
from agff.objectives.objective import Objective, ObjectiveResult
from agff.similarity import FusionConfig, fused_similarity

Direction = Literal["teacher_student", "student_teacher"]

BLOCK_ELEMENTS = 2**23
"""Pairs of vectors compared at once, 32 MiB in float32: what the loss keeps beside its gradients."""


def distillation_loss(
    student_ND: Tensor,
    teacher_NE: Tensor,
    *,
    temperature: float,
    direction: Direction = "teacher_student",
    diagonal: bool = False,
) -> Tensor:
    """Scalar: mean over own rows i of KL(first || second) between the two models' softmax_j(x_i . x_j /
    temperature), in nats.

    The columns j are the rows of all ranks, so the ranks' mean is the loss of the global batch (its gradient:
    `all_gather_rows`). Rows of unit length compare cosines; they are taken as they are. float32 or better
    inside. No gradient reaches the teacher.

    The structure is UniME's (arXiv 2504.17432, section 3.1: textual discriminative knowledge distillation);
    direction and diagonal are ours, the paper does not give them.

    temperature: > 0, of both softmaxes.
    direction: "teacher_student" is KL(teacher || student).
    diagonal: False leaves j = i out, which at a small temperature hides everything else. The only row of all
        ranks then has the loss 0.

    Collective where there is a process group: every rank must call it, with the same N. Raises ValueError.
    """
    if student_ND.ndim != 2 or teacher_NE.ndim != 2 or len(student_ND) != len(teacher_NE):
        raise ValueError(
            f"expected (N, D) and (N, E), got {tuple(student_ND.shape)} and {tuple(teacher_NE.shape)}"
        )
    own_N = torch.arange(len(student_ND), device=student_ND.device) + rank() * len(student_ND)
    ids_N = torch.full_like(own_N, -1) if diagonal else own_N
    found = _compare(
        student_ND[:, None],
        teacher_NE,
        ids_N,
        temperature=temperature,
        direction=direction,
        diagonal=diagonal,
        beta=1.0,  # one vector: nothing is fused
    )
    return found.loss_N.mean()


def rank_correlation(first_NC: Tensor, second_NC: Tensor, kept_NC: Tensor) -> Tensor:
    """(N,) Spearman's correlation of each row's kept similarities: whether both models put the same first.

    1: the same order, 0: unrelated. NaN where fewer than two are kept. Equal values count as if the one of
    the lower index were smaller. No gradient.
    """
    with torch.no_grad():
        rank_2NC = torch.stack([_ranks(first_NC, kept_NC), _ranks(second_NC, kept_NC)])
        num_kept_N = kept_NC.sum(dim=1)
        # ranks of n values are 0 .. n - 1: mean (n - 1) / 2, sum of squared deviations n (n^2 - 1) / 12
        centred_2NC = (rank_2NC - (num_kept_N[:, None] - 1) / 2).masked_fill(~kept_NC, 0)
        return centred_2NC.prod(dim=0).sum(dim=1) * 12 / (num_kept_N * (num_kept_N**2 - 1))


@dataclass(frozen=True, kw_only=True)
class Distillation(Objective):
    """KL between the teacher's and the student's comparisons of all texts of the global batch (README,
    Method).

    Both sides of a pair are items of the batch: its 2 B texts on each rank, the queries and then the targets,
    are the rows, those of all ranks the columns. That a pair belongs together is not used. A text that occurs
    several times is as many rows and columns; columns with the row's own text are the row itself, so that
    `diagonal` keeps or leaves out all of them. Explicit negatives have no teacher's vector and do not count:
    with_negatives: false saves their encoding.

    The student's similarity is the fused one, the teacher's the cosine of its vectors
    (batch.pair_data["query_teacher"] and ["target_teacher"], (B, E)).
    """

    needs_vectors: ClassVar[bool] = True

    temperature: float = 0.05
    """Divides both models' similarities; the paper gives none, 0.05 is E5-V's."""
    direction: Direction = "teacher_student"
    """KL(teacher || student), or the other way round."""
    diagonal: bool = False
    """Compare each text with itself too; at a small temperature that hides everything else."""

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise ConfigError(f"loss.temperature={self.temperature} must be > 0")
        if self.direction not in get_args(Direction):
            raise ConfigError(
                f"loss.direction={self.direction!r} must be one of {', '.join(get_args(Direction))}"
            )

    def __call__(
        self, query: Encoded, target: Encoded, negative: Encoded, batch: Batch, fusion: FusionConfig
    ) -> ObjectiveResult:
        """See Objective."""
        teacher_NE = torch.cat([batch.pair_data["query_teacher"], batch.pair_data["target_teacher"]])
        found = _compare(
            torch.cat([query["embedding"], target["embedding"]]),
            functional.normalize(_at_least_float32(teacher_NE), dim=-1),
            torch.cat([batch.query_ids_B, batch.target_ids_B]),
            temperature=self.temperature,
            direction=self.direction,
            diagonal=self.diagonal,
            beta=fusion.beta,
        )
        return ObjectiveResult(
            loss=found.loss_N.mean(),
            metrics={
                "teacher/rank_correlation": found.correlation_N.nan_to_num().mean(),
                "teacher/same_nearest": found.same_nearest_N.mean(),
            },
            pair_loss_B=found.loss_N.detach().view(2, -1).mean(dim=0),
        )


@dataclass(frozen=True, kw_only=True)
class _Compared:
    loss_N: Tensor
    correlation_N: Tensor
    """Without gradient, and so is the next."""
    same_nearest_N: Tensor
    """1 where both models find the same text the most similar one, else 0."""


def _compare(
    student_NMD: Tensor,
    teacher_NE: Tensor,
    ids_N: Tensor,
    *,
    temperature: float,
    direction: Direction,
    diagonal: bool,
    beta: float,
) -> _Compared:
    """Own rows against the rows of all ranks, block of rows by block of rows: a block's pairs of vectors are
    computed again in the backward pass and not kept. ids_N: content ids."""
    if temperature <= 0:
        raise ValueError(f"temperature={temperature} must be > 0")
    if direction not in get_args(Direction):
        raise ValueError(f"direction={direction!r} must be one of {', '.join(get_args(Direction))}")
    student_NMD, teacher_NE = _at_least_float32(student_NMD), _at_least_float32(teacher_NE.detach())
    student_CMD, teacher_CE, ids_C = map(all_gather_rows, (student_NMD, teacher_NE, ids_N))

    def rows(student_nMD: Tensor, student_CMD: Tensor, part: slice) -> tuple[Tensor, ...]:
        kept_nC = (ids_N[part, None] != ids_C) | diagonal
        student_nC = fused_similarity(student_nMD, student_CMD, beta=beta)
        teacher_nC = teacher_NE[part] @ teacher_CE.T
        loss_n = _kl(teacher_nC, student_nC, kept_nC, temperature, direction)
        return loss_n, *_agreement(teacher_nC, student_nC.detach(), kept_nC)

    size = max(1, BLOCK_ELEMENTS // (len(ids_C) * student_NMD.shape[1] ** 2))
    parts = [slice(start, start + size) for start in range(0, len(ids_N), size)]
    with torch.autocast(student_NMD.device.type, enabled=False):
        blocks = [_recomputed(rows, student_NMD[part], student_CMD, part) for part in parts]
    loss_N, correlation_N, same_nearest_N = (torch.cat(each) for each in zip(*blocks, strict=True))
    return _Compared(loss_N=loss_N, correlation_N=correlation_N, same_nearest_N=same_nearest_N)


def _recomputed(function: Callable[..., tuple[Tensor, ...]], *arguments: object) -> tuple[Tensor, ...]:
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)


def _kl(
    teacher_NC: Tensor, student_NC: Tensor, kept_NC: Tensor, temperature: float, direction: Direction
) -> Tensor:
    """(N,) KL of the softmaxes over the kept columns; 0 in a row without any."""
    # finite, so that 0 * log 0 is 0, and a row without columns is two equal softmaxes
    lowest = torch.finfo(student_NC.dtype).min / 2
    teacher_log_NC, student_log_NC = (
        (x.to(student_NC.dtype) / temperature).masked_fill(~kept_NC, lowest).log_softmax(dim=1)
        for x in (teacher_NC, student_NC)
    )
    first, second = teacher_log_NC, student_log_NC
    if direction == "student_teacher":
        first, second = second, first
    return functional.kl_div(second, first, reduction="none", log_target=True).sum(dim=1)


def _agreement(teacher_NC: Tensor, student_NC: Tensor, kept_NC: Tensor) -> tuple[Tensor, Tensor]:
    nearest_2N = [x.masked_fill(~kept_NC, -torch.inf).argmax(dim=1) for x in (teacher_NC, student_NC)]
    same_nearest_N = (nearest_2N[0] == nearest_2N[1]).to(torch.float32)
    return rank_correlation(teacher_NC, student_NC, kept_NC).to(torch.float32), same_nearest_N


def _ranks(value_NC: Tensor, kept_NC: Tensor) -> Tensor:
    """(N, C) float64 places of the kept values in their row, from 0 on; those of the others are behind."""
    order_NC = value_NC.masked_fill(~kept_NC, torch.inf).argsort(dim=1, stable=True)
    places_C = torch.arange(value_NC.shape[1], dtype=torch.float64, device=value_NC.device)
    return torch.empty_like(order_NC, dtype=torch.float64).scatter_(1, order_NC, places_C.expand_as(order_NC))


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
