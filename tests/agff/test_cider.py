"""CIDEr-D against a published example, against the definition as slow loops, and its properties."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import pytest

from agff.cider import CiderD, words_of

PUBLISHED = (
    ["a man is speaking", "rain falls"],
    [
        ["a man speaks.", "someone speaks.", "a man is speaking while a bird is chirping in the background"],
        ["rain is falling hard on a surface"],
    ],
)
"""The worked example in the README of aac-metrics, which states equality with the published implementation
(github.com/Labbeti/aac-metrics, `cider_d`: 1.3641 and 0.5587)."""


def test_published_example() -> None:
    captions, references = PUBLISHED
    scores = CiderD(references).scores(captions)
    assert scores == pytest.approx([1.3641, 0.5587], abs=5e-5)
    assert sum(scores) / 2 == pytest.approx(0.9614, abs=5e-5)


def slow_scores(captions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """The definition, word for word; captions are words joined by blanks."""

    def ngrams(text: str, n: int) -> list[str]:
        words = text.split()
        return [" ".join(words[i : i + n]) for i in range(len(words)) if i + n <= len(words)]

    scores = []
    for caption, own in zip(captions, references, strict=True):
        total = 0.0
        for n in (1, 2, 3, 4):
            for reference in own:
                weights = {}
                for ngram in {*ngrams(caption, n), *ngrams(reference, n)}:
                    df = sum(any(ngram in ngrams(r, n) for r in others) for others in references)
                    idf = math.log(len(references) / max(1, df))
                    weights[ngram] = (
                        ngrams(caption, n).count(ngram) * idf,
                        ngrams(reference, n).count(ngram) * idf,
                    )
                dot = sum(min(c, r) * r for c, r in weights.values())
                norms = [math.sqrt(sum(pair[side] ** 2 for pair in weights.values())) for side in (0, 1)]
                gap = len(caption.split()) - len(reference.split())
                if norms[0] and norms[1]:
                    total += dot / (norms[0] * norms[1]) * math.exp(-(gap**2) / 72) / len(own)
        scores.append(10 * total / 4)
    return scores


def random_captions(rng: random.Random, count: int) -> list[str]:
    words = ["a", "red", "big", "cat", "dog", "sits", "on", "the", "mat", "and", "runs"]
    return [" ".join(rng.choices(words, k=rng.randint(1, 9))) for _ in range(count)]


@pytest.mark.parametrize("seed", range(5))
def test_scores_equal_the_definition(seed: int) -> None:
    rng = random.Random(seed)
    references = [random_captions(rng, rng.randint(1, 4)) for _ in range(12)]
    captions = random_captions(rng, 12)
    captions[0] = references[0][0]
    scores = CiderD(references).scores(captions)
    assert max(scores) > 1
    assert scores == pytest.approx(slow_scores(captions, references), rel=1e-12, abs=1e-12)


def test_caption_equal_to_its_only_reference_scores_ten_and_less_where_it_is_short() -> None:
    references = [["one two three four five"], ["six seven eight"], ["nine ten"], ["eleven"]]
    scores = CiderD(references).scores([of_image[0] for of_image in references])
    assert scores == pytest.approx([10, 7.5, 5, 2.5])


def test_words_of_every_image_weigh_nothing() -> None:
    assert CiderD([["a photo"], ["a photo"]]).scores(["a photo", "a photo"]) == [0, 0]


def test_order_of_references_and_punctuation_and_case_do_not_matter() -> None:
    captions, references = PUBLISHED
    expected = CiderD(references).scores(captions)
    turned = CiderD([list(reversed(of_image)) for of_image in references])
    loud = [f"{caption.upper()}!" for caption in captions]
    assert turned.scores(captions) == pytest.approx(expected, rel=1e-12)
    assert turned.scores(loud) == pytest.approx(expected, rel=1e-12)


def test_repeating_a_word_is_no_gain() -> None:
    judge = CiderD([["a cat sits on the mat"], ["a dog runs"]])
    plain, repeated = judge.scores(["a cat sits on the mat", ""])[0], judge.scores(["cat " * 6, ""])[0]
    assert repeated < 0.2 * plain


def test_constant_score_is_the_mean_over_all_images() -> None:
    captions, references = PUBLISHED
    judge = CiderD(references)
    for caption in captions:
        scores = judge.scores([caption, caption])
        assert judge.constant_score(caption) == pytest.approx(sum(scores) / 2, rel=1e-12)


def test_empty_caption_scores_zero() -> None:
    assert CiderD([["a cat"], ["a dog"]]).scores(["", "..."]) == [0, 0]


@pytest.mark.parametrize("references", [[["a cat"]], [["a cat"], []], []], ids=["one", "without", "none"])
def test_too_few_references_are_refused(references: list[list[str]]) -> None:
    with pytest.raises(ValueError, match="CIDEr-D needs two, and references of each"):
        CiderD(references)


def test_captions_of_other_images_are_refused() -> None:
    with pytest.raises(ValueError, match="1 captions for 2 images"):
        CiderD([["a"], ["b"]]).scores(["a"])


@pytest.mark.parametrize(
    ("caption", "words"),
    [
        ("A man's T-shirt, don't!", ["a", "man", "'s", "t-shirt", "do", "n't"]),
        ("“Café” at 3.5 km/h (two)…", ["café", "at", "3.5", "km/h", "two"]),
        ("", []),
    ],
)
def test_words(caption: str, words: list[str]) -> None:
    assert words_of(caption) == words
