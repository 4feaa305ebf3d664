"""Which pairs of a global batch may act as negatives."""

from __future__ import annotations

import torch
from torch import Tensor

from agff.batch import NO_CONTENT


def negative_mask(
    row_ids_B: Tensor, positive_ids_B: Tensor, candidate_ids_C: Tensor, partner_ids_C: Tensor
) -> Tensor:
    """(B, C) True where candidate j may act as a negative of row i. All arguments are content ids.

    Two pairs of a global batch often share a target (a class name, an answer) or a query (one image with
    several captions); then each one's positive is the other's positive too. A candidate with the content of
    row i's positive, or whose own partner has the content of row i, is not a negative.

    positive_ids_B: of each row's positive. partner_ids_C: of the row that each candidate is the positive of;
    NO_CONTENT for an explicit hard negative, which is nobody's positive. candidate_ids_C: NO_CONTENT where
    there is no candidate.
    """
    excluded_BC = positive_ids_B[:, None] == candidate_ids_C[None, :]
    excluded_BC |= row_ids_B[:, None] == partner_ids_C[None, :]
    excluded_BC |= candidate_ids_C == NO_CONTENT
    return excluded_BC.logical_not_()


def hardest_negative_mask(
    similarity_BC: Tensor,
    positive_index_B: Tensor,
    *,
    margin: float | None,
    num_hardest: int | None,
    negative_mask_BC: Tensor | None = None,
) -> Tensor:
    """(B, C) True where candidate j acts as a negative of row i: false negatives out, hardest in (UniME,
    arXiv 2504.17432; this mask on logits is our definition).

    A candidate more than `margin` above the positive is taken for a false negative and dropped; of the others
    exactly the `num_hardest` most similar stay, the lower index first where equal. Where fewer survive, all
    of them stay and none is repeated, so a row may be left with none. No gradient.

    margin: in units of the similarity, of either sign; None: no filter. With the fused similarity S those are
        units of S, and S_ii < 1 even for two equal items (their fine vectors differ from each other): a
        candidate can be as far above S_ii as that leaves room.
    num_hardest: >= 1; None: all survivors.
    negative_mask_BC: True = may act as a negative; None: every candidate. The positive never does.
    A similarity that is not a number stays, so that the loss shows it.
    """
    if num_hardest is not None and num_hardest < 1:
        raise ValueError(f"num_hardest={num_hardest} must be >= 1; None keeps all negatives")
    if similarity_BC.ndim != 2 or positive_index_B.shape != similarity_BC.shape[:1]:
        raise ValueError(
            f"expected (B, C) and (B,), got {tuple(similarity_BC.shape)} and {tuple(positive_index_B.shape)}"
        )
    if negative_mask_BC is not None and negative_mask_BC.shape != similarity_BC.shape:
        raise ValueError(f"mask {tuple(negative_mask_BC.shape)} does not fit {tuple(similarity_BC.shape)}")
    with torch.no_grad():
        similarity_BC = similarity_BC.to(torch.promote_types(similarity_BC.dtype, torch.float32))
        positive_index_B1 = positive_index_B[:, None]
        if negative_mask_BC is None:
            negative_mask_BC = torch.ones_like(similarity_BC, dtype=torch.bool)
        kept_BC = negative_mask_BC.scatter(1, positive_index_B1, False)
        if margin is not None:
            kept_BC &= ~(similarity_BC > similarity_BC.gather(1, positive_index_B1) + margin)
        if num_hardest is not None and num_hardest < similarity_BC.shape[1]:
            kept_BC &= _largest(similarity_BC.masked_fill(~kept_BC, -torch.inf), num_hardest)
        return kept_BC


def _largest(values_BC: Tensor, count: int) -> Tensor:
    """(B, C) True at the `count` largest values of a row, the lower index first where equal.

    From the value of the last that is in: `topk` alone leaves open which of equal values it takes. NaN
    counts as the largest.
    """
    last_B1 = values_BC.topk(count, dim=1).values[:, -1:]
    above_BC = ~(values_BC <= last_B1)
    equal_BC = values_BC == last_B1
    missing_B1 = count - above_BC.sum(dim=1, keepdim=True)
    return above_BC | (equal_BC & (equal_BC.cumsum(dim=1, dtype=torch.int32) <= missing_B1))
