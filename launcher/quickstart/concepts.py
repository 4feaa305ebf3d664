"""What is drawn (Unicode's emoji without skin tones), who draws it (seven studios), what is held out."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from launcher.quickstart.fetch import Package

HELD_OUT_ONE_IN = 10
"""One concept in ten is drawn by no studio in the training data."""

NAMES = Package(
    name="unicode-emoji-json",
    version="0.9.0",
    sha256="ae7efacb55533385bf8767d613dbd36c71226669759d95919a6e9059f5e4c401",
)
KEYWORDS = Package(
    name="cldr-annotations-full",
    version="48.2.0",
    sha256="28576e51225deb51e3ddd734b0f824a0079682cb5d8c27faa9f68149317a14d1",
)


@dataclass(frozen=True, kw_only=True)
class Concept:
    """One emoji, whoever draws it."""

    emoji: str
    name: str
    """Unicode's short name."""
    group: str
    keywords: tuple[str, ...]
    """CLDR's English keywords, without the name itself; may be empty."""

    @property
    def text(self) -> str:
        """The name with plain quotes: typographic ones cost the small vocabulary two or three tokens each."""
        return self.name.translate(_PLAIN_QUOTES)

    @property
    def hexcode(self) -> str:
        """Code points joined by `-`, variation selectors left out; unique, and safe in a file name."""
        return "-".join(f"{ord(char):x}" for char in self.emoji if ord(char) != 0xFE0F)

    @property
    def is_held_out(self) -> bool:
        """Whether training never sees this concept: a fixed tenth, by hash of the name."""
        digest = hashlib.sha256(f"concept:{self.name}".encode()).digest()
        return int.from_bytes(digest[:8], "big") % HELD_OUT_ONE_IN == 0


@dataclass(frozen=True, kw_only=True)
class Studio:
    """One foundry's set of drawings."""

    name: str
    package: Package
    role: Literal["train", "near", "held-out"]
    """`near` is never trained on but was drawn by a foundry whose newer set is."""


def _studio(name: str, version: str, role: Literal["train", "near", "held-out"], sha256: str) -> Studio:
    package = Package(name=f"@iconify-json/{name}", version=version, sha256=sha256)
    return Studio(name=name, package=package, role=role)


STUDIOS = (
    _studio("noto", "1.2.9", "train", "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad"),
    _studio("twemoji", "1.2.5", "train", "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7"),
    _studio(
        "openmoji", "1.2.29", "train", "03181e2c156cab35cf4a62f1f7886bd971d59212e75ac3f189d5a4cae3930fc5"
    ),
    _studio(
        "fluent-emoji-flat",
        "1.2.6",
        "train",
        "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
    ),
    _studio("emojione", "1.2.3", "train", "26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e"),
    _studio(
        "fxemoji", "1.2.2", "held-out", "f3e72b3c59d05e1db03b7e308d55c0d05bd7ba3f625a90da1b79313c12858eef"
    ),
    _studio("noto-v1", "1.2.5", "near", "2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37"),
)


def load_concepts(names: Mapping[str, Any], annotations: Mapping[str, Any]) -> list[Concept]:
    """Every concept in Unicode's order.

    names: {emoji: {name, group}}; annotations: {emoji: {default: keywords}}.
    """
    return [
        Concept(
            emoji=emoji,
            name=entry["name"],
            group=entry["group"],
            keywords=_keywords(entry["name"], annotations.get(emoji.replace("\ufe0f", ""), {})),
        )
        for emoji, entry in names.items()
    ]


def match_studio(
    concepts: Sequence[Concept], icon_names: set[str], icon_by_hexcode: Mapping[str, str]
) -> dict[str, str]:
    """{concept name: icon name} for what this studio draws.

    icon_by_hexcode: the studio's own table; where a studio has none (it is empty), icons are found by the
    slug of the concept's name, with and then without hyphens.
    """
    by_hexcode = {_plain_hexcode(code): icon for code, icon in icon_by_hexcode.items()}
    matched: dict[str, str] = {}
    for concept in concepts:
        slug = slug_of(concept.name)
        candidates = [by_hexcode.get(concept.hexcode, "")] if by_hexcode else [slug, slug.replace("-", "")]
        icon = next((name for name in candidates if name in icon_names), None)
        if icon is not None:
            matched[concept.name] = icon
    return matched


def slug_of(name: str) -> str:
    """A name as icon sets spell it: lower case, ASCII, words joined by hyphens, apostrophes dropped."""
    ascii_name = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    return re.sub(r"[^a-z0-9]+", "-", ascii_name.lower()).strip("-")


_PLAIN_QUOTES = str.maketrans({"’": "'", "‘": "'", "“": '"', "”": '"'})  # noqa: RUF001


def _plain_hexcode(code: str) -> str:
    return "-".join(part.lstrip("0") for part in code.lower().split("-") if part != "fe0f")


def _keywords(name: str, annotation: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(word for word in annotation.get("default", ()) if word.lower() != name.lower())
