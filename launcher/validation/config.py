"""What a run is validated on: the recipe's section `validation`."""

from __future__ import annotations

from dataclasses import dataclass, field

from agff.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    """Evaluation sets in the layouts that launcher/evaluate.py reads, and held-out shards; any of them."""

    mmeb_eval: str | None = None
    """Folder in MMEB-eval's layout."""
    mmeb_images: str | None = None
    """Where its images are; null: its images/, then itself."""
    mmvp: str | None = None
    """Folder in MMVP-VLM's layout."""
    captions: str | None = None
    """Folder of caption sets, or of such folders."""
    caption_images: str | None = None
    """Where their images are; null: beside the tables."""
    shards: str | None = None
    """Held-out pairs: a folder, or URL, written by launcher/prepare.py. None of its shards may be one that
    the run trains on; equal pairs in different shards are not noticed."""
    sources: list[str] = field(default_factory=list)
    """Sources of these shards that are scored; none named: all."""
    vectors: str | None = None
    """Folder of the teacher's vectors of these shards, for an objective that learns from them."""
    max_queries: int | None = None
    """Queries of each MMEB set, and pairs of each held-out source, at most; null: all."""

    def __post_init__(self) -> None:
        if self.max_queries is not None and self.max_queries < 1:
            raise ConfigError(f"validation.max_queries={self.max_queries} must be >= 1")
        for name, owners in (
            ("mmeb_images", ("mmeb_eval",)),
            ("caption_images", ("captions",)),
            ("sources", ("shards",)),
            ("vectors", ("shards",)),
            ("max_queries", ("mmeb_eval", "shards")),
        ):
            if getattr(self, name) not in (None, []) and not any(getattr(self, owner) for owner in owners):
                raise ConfigError(
                    f"validation.{name}={getattr(self, name)} is about "
                    f"{' and '.join(f'validation.{owner}' for owner in owners)}: name that too"
                )

    @property
    def names_something(self) -> bool:
        """Whether there is anything to score."""
        return any((self.mmeb_eval, self.mmvp, self.captions, self.shards))

    def check(self, *, validate_every: int | None, keep_best: str | None, save_every: int) -> None:
        """Raise ConfigError for settings of the run that do not fit together."""
        if validate_every is None:
            if keep_best is not None:
                raise ConfigError(
                    f"keep_best={keep_best} needs scores, and validate_every is null; give the steps between "
                    "validations"
                )
            return
        if not self.names_something:
            raise ConfigError(
                f"validate_every={validate_every}, and validation names nothing to score; name "
                "validation.mmeb_eval, validation.mmvp, validation.captions or validation.shards"
            )
        if keep_best is not None and validate_every % save_every:
            lower = validate_every // save_every * save_every
            nearest = " or ".join(str(steps) for steps in (lower, lower + save_every) if steps)
            raise ConfigError(
                f"validate_every={validate_every} is not a multiple of save_every={save_every}, and "
                f"keep_best={keep_best} keeps checkpoints of validated steps; use {nearest}, "
                f"or save_every={validate_every}"
            )
