"""CIDEr-D (Vedantam, Zitnick, Parikh 2015, arXiv 1411.5726, section 6): how much a caption says what people
said of the same image, in words that few other images share.

For n = 1 ... 4 a caption is a vector over its n-grams, g_k = count_k * log(I / max(1, df_k)): of I images
df_k have n-gram k in a reference. Of a caption c and the references r_1 ... r_m of its image

    penalty_j = exp(-(words in c - words in r_j)^2 / (2 * 6^2))
    CIDEr-D   = 10 * mean_n mean_j  penalty_j * min(g(c), g(r_j)) . g(r_j) / (|g(c)| |g(r_j)|)

so a caption of four words or more that equals its only reference scores 10, one of three words 7.5 and one of
two 5: they have no longer n-grams. `min` is by component (clipping: to repeat a word is no gain); where a
norm is 0 the term is 0.

Words: `words_of`. The published implementation takes the Penn Treebank tokenizer of Stanford's CoreNLP, in
Java, and drops punctuation. Here a regular expression does it. It differs in abbreviations (`U.S.` loses
its last dot), in signs such as `$`, `%` and `&` (dropped here, words there), and in `cannot` and `gonna` (one
word here, two there).
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

MAX_N = 4
SIGMA = 6.0
"""Width of the length penalty, in words."""
SCALE = 10.0

_WORD = re.compile(r"[^\W_]+(?:[-'.,/][^\W_]+)*")
_CONTRACTION = re.compile(r"(?<=.)(n't|'(?:s|re|ve|ll|d|m))$")

NGram = tuple[str, ...]


def words_of(caption: str) -> list[str]:
    """Lower-case words without punctuation; hyphens stay inside of a word (`t-shirt`), contractions are two
    words (`do n't`, `man 's`)."""
    words: list[str] = []
    for word in _WORD.findall(caption.lower().replace("’", "'")):  # noqa: RUF001
        words += [part for part in _CONTRACTION.sub(r" \1", word).split()]
    return words


@dataclass(frozen=True, kw_only=True)
class _Vector:
    weights: tuple[dict[NGram, float], ...]
    """Per n, {n-gram: count * log(I / df)}."""
    norms: tuple[float, ...]
    num_words: int


class CiderD:
    """CIDEr-D against fixed references, whose document frequencies are counted once."""

    def __init__(self, references: Sequence[Sequence[str]]) -> None:
        """references: per image at least one caption. Raises ValueError for fewer than two images: every
        n-gram then occurs in all images and weighs nothing."""
        if len(references) < 2 or not all(references):
            raise ValueError(f"{len(references)} images; CIDEr-D needs two, and references of each")
        counts = [[_ngrams(words_of(reference)) for reference in of_image] for of_image in references]
        self._document_frequency = Counter(
            ngram for of_image in counts for ngram in {ngram for count in of_image for ngram in count}
        )
        self._log_num_images = math.log(len(references))
        self._references = [[self._vector(count) for count in of_image] for of_image in counts]

    def scores(self, captions: Sequence[str]) -> list[float]:
        """The score of each image's caption, in [0, 10]; their mean is the score of a model."""
        if len(captions) != len(self._references):
            raise ValueError(f"{len(captions)} captions for {len(self._references)} images")
        return [
            self._score(self._vector(_ngrams(words_of(caption))), references)
            for caption, references in zip(captions, self._references, strict=True)
        ]

    def constant_score(self, caption: str) -> float:
        """The mean score of one caption said of every image."""
        vector = self._vector(_ngrams(words_of(caption)))
        scores = (self._score(vector, references) for references in self._references)
        return math.fsum(scores) / len(self._references)

    def _vector(self, counts: Counter[NGram]) -> _Vector:
        weights: tuple[dict[NGram, float], ...] = tuple({} for _ in range(MAX_N))
        for ngram, count in counts.items():
            idf = self._log_num_images - math.log(max(1, self._document_frequency[ngram]))
            weights[len(ngram) - 1][ngram] = count * idf
        return _Vector(
            weights=weights,
            norms=tuple(math.sqrt(math.fsum(weight**2 for weight in of_n.values())) for of_n in weights),
            num_words=sum(count for ngram, count in counts.items() if len(ngram) == 1),
        )

    @staticmethod
    def _score(caption: _Vector, references: Sequence[_Vector]) -> float:
        similarities = [_similarity(caption, reference) for reference in references]
        return SCALE * math.fsum(similarities) / len(references)


def _similarity(caption: _Vector, reference: _Vector) -> float:
    """The mean over n, with the length penalty."""
    cosines = 0.0
    for of_caption, of_reference, norm, reference_norm in zip(
        caption.weights, reference.weights, caption.norms, reference.norms, strict=True
    ):
        if norm > 0 and reference_norm > 0:
            shared = math.fsum(
                min(weight, of_reference[ngram]) * of_reference[ngram]
                for ngram, weight in of_caption.items()
                if ngram in of_reference
            )
            cosines += shared / (norm * reference_norm)
    difference = caption.num_words - reference.num_words
    return math.exp(-(difference**2) / (2 * SIGMA**2)) * cosines / MAX_N


def _ngrams(words: Sequence[str]) -> Counter[NGram]:
    return Counter(
        tuple(words[start : start + n]) for n in range(1, MAX_N + 1) for start in range(len(words) - n + 1)
    )
