"""The command line of a run, `--recipe FILE` and dotted overrides: what train and preview share."""

from __future__ import annotations

import argparse
import itertools
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch.distributed as dist

from agff.errors import AgffError, ConfigError
from agff.objectives import OBJECTIVES
from launcher.run.config import RunConfig, run_config_of
from launcher.run.config_file import hint_of, read_recipe
from launcher.run.typed_values import expected, is_optional, setting_names

RECIPES = Path(__file__).parent / "recipes"
DEEPSPEED_CONFIGS = Path(__file__).parent.parent / "ds_configs"
INTERRUPTED = 128 + signal.SIGINT
"""Exit code after Ctrl-C."""

DESCRIPTION = """
Train a multimodal embedding model with AGFF-Embed and EGA under DeepSpeed ZeRO.

A run is one recipe (a YAML file), which names its DeepSpeed JSON. Every setting of the recipe can be
overridden by its dotted name, for example --deepspeed zero2 --loss.temperature 0.05. Without --recipe the
quickstart runs, on a laptop too. A run that was interrupted continues from its newest checkpoint when the
same command is given again.
"""


class RecipeParser(argparse.ArgumentParser):
    """The options of a command that takes a recipe and dotted overrides; made by `recipe_parser`."""

    def error(self, message: str) -> NoReturn:
        """Raise it as ConfigError, so that only rank 0 prints it."""
        raise ConfigError(f"{message}; every setting and its meaning: agff {self.prog} --help")


@dataclass(frozen=True, kw_only=True)
class TrainArguments:
    """What the command line of `train` said."""

    config: RunConfig
    deepspeed: Path
    dry_run: bool


def parse_train_arguments(argv: Sequence[str]) -> TrainArguments:
    """Read recipe and overrides. Raises ConfigError for anything unknown or malformed; `--help` exits."""
    parser = recipe_parser("train", DESCRIPTION)
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # set by the deepspeed launcher
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check everything, print the start-up table and stop before the first step",
    )
    config, own = parse_recipe(parser, argv)
    where = "--deepspeed" if _is_given("deepspeed", argv) else f"{own.recipe}: deepspeed"
    deepspeed = _deepspeed_file(config.deepspeed, where)
    return TrainArguments(config=config, deepspeed=deepspeed, dry_run=own.dry_run)


def recipe_parser(command: str, description: str) -> RecipeParser:
    """Takes `--recipe`; the command adds options of its own, and `parse_recipe` the settings of a run."""
    parser = RecipeParser(prog=command, description=description, add_help=False, allow_abbrev=False)
    parser.add_argument(
        "--recipe", default="quickstart", help="YAML file, or the name of one in launcher/recipes"
    )
    return parser


def parse_recipe(parser: RecipeParser, argv: Sequence[str]) -> tuple[RunConfig, argparse.Namespace]:
    """The recipe with its dotted overrides, and the command's own options. `--help` exits.

    What the parser does not know must be settings. Raises one ConfigError that lists all that are wrong.
    """
    if {"-h", "--help"} & set(argv):
        words = [word for argument in argv for word in argument.split("=", maxsplit=1)]
        named = [after for option, after in itertools.pairwise(words) if option == "--objective"]
        _print_help(parser, next((name for name in named if name in OBJECTIVES), "contrastive"))
    own, rest = parser.parse_known_args(argv)
    recipe = _file_of("--recipe", own.recipe, RECIPES, ".yaml")
    return read_recipe(recipe, list(_overrides(rest))), own


def report(error: AgffError) -> int:
    """Print the error; return the exit code, 2.

    What all ranks share is printed by rank 0 alone. Before the ranks have met nobody knows whether they share
    it, so the first rank of each machine prints: a folder may be missing on one machine only. After that each
    rank that has one of its own.
    """
    rank, is_first_here = os.environ.get("RANK", "0"), os.environ.get("LOCAL_RANK", "0") == "0"
    if rank == "0":
        sys.stderr.write(f"error: {error}\n")
    elif not error.on_all_ranks and (is_first_here or dist.is_initialized()):
        # below the progress bar
        sys.stderr.write(f"\nerror on rank {rank} ({socket.gethostname()}): {error}\n")
    return 2


def exit_code_of(work: Callable[[], int]) -> int:
    """What it returns, or that of its error, which is printed: 2 for one that the user can fix,
    INTERRUPTED for Ctrl-C, else 1."""
    try:
        return work()
    except AgffError as error:
        return _leave(report(error), with_others=error.on_all_ranks)
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            sys.stderr.write("\ninterrupted; the same command continues from what is on disk\n")
        return _leave(INTERRUPTED, with_others=False)
    except Exception:  # a mistake of ours or a broken machine: say at once whose words these are
        words = (
            f"error on rank {os.environ.get('RANK', '0')} ({socket.gethostname()}):\n{traceback.format_exc()}"
        )
        sys.stderr.write(f"\n{words}")  # below the progress bar
        return _leave(1, with_others=False)


def _leave(code: int, *, with_others: bool) -> int:
    """The exit code; or the end of this process, when the others still wait for it.

    Leaving the process group in good order may wait for them, as long as `collective_timeout_s`; the launcher
    ends them when this process ends.
    """
    if dist.is_initialized() and not with_others:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    if dist.is_initialized():
        dist.destroy_process_group()
    return code


def _print_help(parser: RecipeParser, objective: str) -> NoReturn:
    """The command's options, and every setting with its meaning, type and default; of the losses, that of the
    objective."""
    import jsonargparse

    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    full = jsonargparse.ArgumentParser(
        prog=parser.prog, description=parser.description, usage="%(prog)s [OPTION | --SETTING VALUE] ...",
        parents=[parser],
    )  # fmt: skip
    full.add_class_arguments(RunConfig, fail_untyped=True, sub_configs=False, skip={"loss"})
    full.add_class_arguments(OBJECTIVES[objective], "loss", fail_untyped=True, sub_configs=False)
    cls = run_config_of(objective)
    for name in setting_names(cls):  # a section that may be null is one option to jsonargparse
        if "." in name and is_optional(hint_of(name.rpartition(".")[0], cls)):
            full.add_argument(f"--{name}", help=f"(type: {expected(hint_of(name, cls))})")
    full.print_help()
    raise SystemExit(0)


def _overrides(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(dotted name, text) of `--NAME TEXT` and `--NAME=TEXT`. Raises ConfigError."""
    rest = iter(arguments)
    for argument in rest:
        name, has_text, text = argument.removeprefix("--").partition("=")
        if not argument.startswith("--") or not name:
            raise ConfigError(f"{argument!r} follows no option; write --NAME VALUE")
        if not has_text:
            following = next(rest, None)
            if following is None or following.startswith("--"):
                raise ConfigError(f"--{name} needs a value, for example --{name} true")
            text = following
        yield name, text


def _is_given(name: str, argv: Sequence[str]) -> bool:
    return any(argument.partition("=")[0] == f"--{name}" for argument in argv)


def _deepspeed_file(value: str | None, where: str) -> Path:
    """What the recipe or the command line chose. Raises ConfigError when neither did."""
    if value is None:
        raise ConfigError(
            "neither the recipe nor the command line names a DeepSpeed configuration; write deepspeed: zero2 "
            "into the recipe, or give --deepspeed zero2: a file, or one of "
            + _names(DEEPSPEED_CONFIGS, ".json")
        )
    return _file_of(where, value, DEEPSPEED_CONFIGS, ".json")


def _names(folder: Path, suffix: str) -> str:
    return ", ".join(sorted(file.stem for file in folder.glob(f"*{suffix}")))


def _file_of(option: str, value: str, folder: Path, suffix: str) -> Path:
    """A file, or the name of one of ours. Raises ConfigError."""
    path = Path(value) if Path(value).suffix or Path(value).is_file() else folder / f"{value}{suffix}"
    if not path.is_file():
        raise ConfigError(f"{option} {value}: no such file; give a file or one of {_names(folder, suffix)}")
    return path
