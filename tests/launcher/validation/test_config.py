"""Settings of a validation that do not fit together are refused when the recipe is read."""

from __future__ import annotations

import pytest

from agff.errors import ConfigError
from launcher.command_line import parse_train_arguments

SETS = ["--validation.mmvp", "sets"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--validate_every", "5"], "validate_every=5, and validation names nothing to score; name "),
        (["--validate_every", "0", *SETS], "validate_every=0 must be >= 1"),
        (["--keep_best", "mmvp", *SETS], "keep_best=mmvp needs scores, and validate_every is null"),
        (
            ["--validate_every", "30", "--save_every", "20", "--keep_best", "mmvp", *SETS],
            "validate_every=30 is not a multiple of save_every=20, and keep_best=mmvp keeps checkpoints of "
            "validated steps; use 20 or 40, or save_every=",
        ),
        (
            ["--validate_every", "7", "--save_every", "20", "--keep_best", "mmvp", *SETS],
            "keeps checkpoints of validated steps; use 20, or save_every=",
        ),
        (["--validation.max_queries", "0", *SETS], "validation.max_queries=0 must be >= 1"),
        (
            ["--validation.max_queries", "5", *SETS],
            "validation.max_queries=5 is about validation.mmeb_eval and validation.shards: name that too",
        ),
        (
            ["--validation.sources", "[A]"],
            r"validation.sources=\['A'\] is about validation.shards: name that",
        ),
        (["--validation.vectors", "v"], "validation.vectors=v is about validation.shards: name that too"),
        (["--validation.mmeb_images", "i"], "mmeb_images=i is about validation.mmeb_eval: name that too"),
        (["--validation.caption_images", "i"], "caption_images=i is about validation.captions: name that"),
    ],
)
def test_what_does_not_fit_is_refused(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_train_arguments(arguments)


def test_without_keep_best_any_steps_may_be_validated() -> None:
    config = parse_train_arguments(["--validate_every", "30", "--save_every", "20", *SETS]).config
    assert (config.validate_every, config.keep_best) == (30, None)


def test_a_list_of_names_may_be_given_on_the_command_line() -> None:
    config = parse_train_arguments(["--validation.shards", "s", "--validation.sources", "[A, B]"]).config
    assert config.validation.sources == ["A", "B"]
