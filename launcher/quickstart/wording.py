"""The instructions of training and evaluation; short, for the small vocabulary has 4 to 5 tokens a word."""

from __future__ import annotations

from collections.abc import Sequence

from launcher.quickstart.layouts import image_query

MAX_KEYWORDS = 4


def find_by_name(name: str) -> str:
    """Text -> image: the name alone, as it is the target of image -> text; see layouts.BARE_IMAGE."""
    return name


def find_by_keywords(keywords: Sequence[str]) -> str:
    """Keywords -> image, worded as MMVP-VLM asks: "a photo of ..."."""
    return f"a photo of {', '.join(keywords[:MAX_KEYWORDS])}\n"


def name_it() -> str:
    """Image -> name."""
    return image_query("Name it.")


def which_group() -> str:
    """Image -> group."""
    return image_query("Which group?")


def ask(question: str) -> str:
    """Image + question -> answer."""
    return image_query(question)


def crop(phrase: str) -> str:
    """Sheet + phrase -> the drawing it names."""
    return image_query(f"Crop {phrase}")
