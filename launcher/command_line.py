"""The command line of a run, `--recipe FILE` and dotted overrides: what train and preview share."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NoReturn

import jsonargparse
import torch.distributed as dist

from agff.errors import AgffError, ConfigError
from launcher.run.config import RunConfig

RECIPES = Path(__file__).parent / "recipes"
DEEPSPEED_CONFIGS = Path(__file__).parent.parent / "ds_configs"

DESCRIPTION = """
Train a multimodal embedding model with AGFF-Embed and EGA under DeepSpeed ZeRO.

A run is one recipe (a YAML file) and one DeepSpeed JSON. Every setting of the recipe can be overridden by its
dotted name, for example --loss.temperature 0.05 --batch.global_batch_size 2048. Without --recipe the
quickstart runs, on a laptop too. A run that was interrupted continues from its newest checkpoint when the
same command is given again.
"""


class _Parser(jsonargparse.ArgumentParser):
    """Reports a wrong setting as one ConfigError, so that only rank 0 prints it."""

    def error(self, message: str, *args: Any, **kwargs: Any) -> NoReturn:
        text = " ".join(line.strip() for line in message.splitlines() if line.strip())
        command = "preview" if self.prog == "preview" else "train"
        raise ConfigError(f"{text}; every setting and its meaning: launcher/{command}.py --help")

    def read(self, parse: Callable[[], jsonargparse.Namespace]) -> jsonargparse.Namespace:
        """Add the settings of RunConfig, parse, and build their dataclasses, whose own checks raise
        ConfigError."""
        self.add_class_arguments(RunConfig, fail_untyped=True, sub_configs=False)
        try:
            return self.instantiate(parse())
        except ValueError as error:
            if isinstance(
                error.__cause__, ConfigError
            ):  # the check of an optional group, wrapped by the library
                raise error.__cause__ from None
            raise ConfigError(str(error)) from None


@dataclass(frozen=True, kw_only=True)
class TrainArguments:
    """What the command line of `train` said."""

    config: RunConfig
    deepspeed: Path
    dry_run: bool


def parse_train_arguments(argv: Sequence[str]) -> TrainArguments:
    """Read recipe and overrides. Raises ConfigError for anything unknown or malformed; `--help` exits."""
    parser = recipe_parser("train", DESCRIPTION)
    parser.add_argument(
        "--deepspeed",
        type=Path,
        default=DEEPSPEED_CONFIGS / "zero3.json",
        help="DeepSpeed JSON: mechanism only",
    )
    parser.add_argument("--local_rank", type=int, help="set by the deepspeed launcher; not for people")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check everything, print the start-up table and stop before the first step",
    )
    config, own = parse_recipe(parser, argv)
    return TrainArguments(config=config, deepspeed=own.deepspeed, dry_run=own.dry_run)


def recipe_parser(command: str, description: str) -> _Parser:
    """Takes `--recipe`; the command adds options of its own, and `parse_recipe` the settings of a run."""
    parser = _Parser(prog=command, description=description, allow_abbrev=False)
    parser.add_argument(
        "--recipe",
        action="config",
        help="YAML file, or the name of one in launcher/recipes (default: quickstart)",
    )
    return parser


def parse_recipe(parser: _Parser, argv: Sequence[str]) -> tuple[RunConfig, jsonargparse.Namespace]:
    """The recipe with its dotted overrides, and the command's own options. Raises ConfigError."""
    parsed = parser.read(lambda: parser.parse_args(_with_recipe(argv)))
    return _run_config(parsed), parsed


def config_from_values(values: dict[str, Any]) -> RunConfig:
    """The RunConfig that `as_dict` turned into plain values."""
    parser = _Parser()
    return _run_config(parser.read(lambda: parser.parse_object(values)))


def _run_config(parsed: jsonargparse.Namespace) -> RunConfig:
    return RunConfig(**{field.name: parsed[field.name] for field in fields(RunConfig)})


def report(error: AgffError) -> int:
    """Print the error; return the exit code, 2.

    What all ranks share is said by rank 0 alone. Before the ranks have met nobody knows whether they share
    it, so the first rank of each machine speaks: a folder may be missing on one machine only. After that each
    rank that has one of its own.
    """
    rank, is_first_here = os.environ.get("RANK", "0"), os.environ.get("LOCAL_RANK", "0") == "0"
    if rank == "0":
        sys.stderr.write(f"error: {error}\n")
    elif not error.on_all_ranks and (is_first_here or dist.is_initialized()):
        sys.stderr.write(
            f"\nerror on rank {rank} ({socket.gethostname()}): {error}\n"
        )  # below the progress bar
    return 2


def _with_recipe(argv: Sequence[str]) -> list[str]:
    """The arguments with the recipe first, as a path, so that overrides win wherever it stood."""
    rest, recipe = [], "quickstart"
    arguments = iter(argv)
    for argument in arguments:
        if argument == "--recipe":
            recipe = next(arguments, "")
        elif argument.startswith("--recipe="):
            recipe = argument.partition("=")[2]
        else:
            rest.append(argument)
    path = Path(recipe)
    if not path.suffix:
        path = RECIPES / f"{recipe}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in RECIPES.glob("*.yaml")))
        raise ConfigError(f"--recipe {recipe}: no such recipe; give a YAML file or one of {known}")
    return ["--recipe", str(path), *rest]
