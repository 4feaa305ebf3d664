"""The soft tokens of a run: how many, and what they begin as."""

from __future__ import annotations

from dataclasses import dataclass

from agff.prompts import PromptConfig


@dataclass(frozen=True, kw_only=True)
class RunPrompts(PromptConfig):
    """The prompts of the model, and where its training takes them from."""

    start_from: str | None = None
    """Release of an earlier stage whose soft tokens training begins with, and whose head where the objective
    is the same and has one in its release; null: made of the embeddings of short texts."""

    @property
    def of_model(self) -> PromptConfig:
        """What a release stores of it."""
        return PromptConfig(num_fine=self.num_fine, tokens_per_prompt=self.tokens_per_prompt)
