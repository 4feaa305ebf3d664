"""Which pairs of a global batch may act as negatives."""

from __future__ import annotations

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
