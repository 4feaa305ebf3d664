"""The one rule by which instruction, text and image become an item's text: in training data, in evaluation
sets, in `encode`."""

from __future__ import annotations

from dataclasses import dataclass

from agff.batch import IMAGE_PLACEHOLDER
from agff.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class TextRule:
    """What is written around what the caller gives. A release carries its own.

    A text that holds the placeholder is complete and stays as it is, and so does a text without an image:
    MMEB's queries without one end in a line break (`Find a photo of a dog\\n`), its targets do not (`a dog`),
    and only the caller knows which of the two a text is.
    """

    image_alone: str = f"{IMAGE_PLACEHOLDER}\nRepresent the given image.\n"
    """The text of an image that has none: that of MMEB's targets."""
    image_with_text: str = f"{IMAGE_PLACEHOLDER}\n{{text}}\n"
    """`{text}` is replaced by the text, without the blanks and line breaks around it."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not isinstance(value, str) or value.count(IMAGE_PLACEHOLDER) != 1:
                raise ConfigError(f"texts.{name}={value!r} must be a text with {IMAGE_PLACEHOLDER} once")
        if self.image_with_text.count("{text}") != 1:
            raise ConfigError(f"texts.image_with_text={self.image_with_text!r} must hold {{text}} once")

    def beside_image(self, text: str) -> str:
        """The complete text of an item with an image."""
        if IMAGE_PLACEHOLDER in text:
            return text
        content = text.strip()
        return self.image_with_text.replace("{text}", content) if content else self.image_alone


MMEB_TEXTS = TextRule()
"""The rule of MMEB's own texts, and of everything that is converted into shards."""


def instructed_text(instruction: str, text: str, *, is_query: bool, has_image: bool) -> str:
    """Instruction and text as one, as MMEB's complete texts have them; a target without an image is its bare
    text."""
    if not is_query and not has_image:
        return text
    parts = (part.replace(IMAGE_PLACEHOLDER, "").strip() for part in (instruction, text))
    content = " ".join(part for part in parts if part)
    if has_image:
        return MMEB_TEXTS.beside_image(content)
    return f"{content}\n" if content else ""


def without_placeholder(text: str) -> str:
    """A text whose item turned out to have no image, as WebQA's queries: the rest of it stays as it is."""
    return text.replace(f"{IMAGE_PLACEHOLDER}\n", "").replace(IMAGE_PLACEHOLDER, "")
