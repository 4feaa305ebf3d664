"""What a person types: recipe, dotted overrides, DeepSpeed file."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest

import launcher.embed
import launcher.evaluate
import launcher.mine
from agff.errors import ConfigError
from launcher.cli import main
from launcher.command_line import DEEPSPEED_CONFIGS, RECIPES, exit_code_of, parse_train_arguments
from launcher.run.config import run_config_of
from launcher.run.typed_values import setting_names


def test_without_arguments_the_quickstart_runs_under_zero3() -> None:
    arguments = parse_train_arguments([])
    assert arguments.config.name == "quickstart"
    assert arguments.deepspeed.name == "zero3.json"


@pytest.mark.parametrize("recipe", sorted(path.stem for path in RECIPES.glob("*.yaml")))
def test_a_recipe_names_its_deepspeed_file_and_the_command_line_wins(recipe: str) -> None:
    arguments = parse_train_arguments(["--recipe", recipe])
    expected = "zero2" if arguments.config.backbone.lora else "zero3"
    assert arguments.deepspeed == DEEPSPEED_CONFIGS / f"{expected}.json"
    assert parse_train_arguments(["--recipe", recipe, "--deepspeed", "zero1"]).deepspeed.stem == "zero1"


def test_a_deepspeed_file_of_a_recipe_is_relative_to_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As backbone.path and data.shards are."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").mkdir()
    (tmp_path / "mine.json").touch()
    text = (RECIPES / "quickstart.yaml").read_text()
    Path("recipes/own.yaml").write_text(text.replace("deepspeed: zero3", "deepspeed: mine.json"))
    assert (
        parse_train_arguments(["--recipe", "recipes/own.yaml"]).deepspeed.resolve() == tmp_path / "mine.json"
    )


@pytest.mark.parametrize("order", [0, 1])
def test_overrides_win_over_the_recipe_wherever_it_is_given(order: int) -> None:
    pairs = [["--recipe", "quickstart"], ["--loss.temperature", "0.5"]]
    argv = [word for pair in (pairs if order else reversed(pairs)) for word in pair]
    assert parse_train_arguments(argv).config.loss.temperature == 0.5


@pytest.mark.parametrize(
    ("argv", "setting", "expected"),
    [
        (["--name=7"], "name", "7"),
        (["--name", "off"], "name", "off"),
        (["--run_dir", "null"], "run_dir", None),
        (["--run_dir", "2026-01-01"], "run_dir", "2026-01-01"),
        (["--log_samples", "true"], "log_samples", True),
        (["--optimizer.learning_rate", "5e-5"], "optimizer.learning_rate", 5e-5),
        (["--optimizer.learning_rate=1"], "optimizer.learning_rate", 1.0),
        (["--data.weights", "{A: 1, yes: 2.5}"], "data.weights", {"A": 1.0, "yes": 2.5}),
        (["--data.weights", "null"], "data.weights", None),
        (["--data.weights", "{A: 1}", "--data.weights.B", "2"], "data.weights", {"A": 1.0, "B": 2.0}),
        (["--data.caps", "12"], "data.caps", 12),
        (["--data.caps", "{A: 12}"], "data.caps", {"A": 12}),
        (["--backbone.lora.rank", "4"], "backbone.lora.rank", 4),
        (["--backbone.lora", "{rank: 4}", "--backbone.lora", "null"], "backbone.lora", None),
        (["--loss", "{width: 0.2}"], "loss.temperature", 0.07),
        (["--loss", "{width: 0.2}"], "loss.width", 0.2),
        (["--num_steps", "30", "--num_steps", "40"], "num_steps", 40),
    ],
)
def test_text_of_an_override_becomes_its_value(argv: list[str], setting: str, expected: object) -> None:
    found: object = parse_train_arguments(argv).config
    for part in setting.split("."):
        found = getattr(found, part)
    assert (found, type(found)) == (expected, type(expected))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--loss.temprature", "1"], "^--loss.temprature: unknown; did you mean --loss.temperature"),
        (["--learning_rate", "1"], "^--learning_rate: unknown; did you mean --optimizer.learning_rate"),
        (["--zzz", "1"], "^--zzz: unknown; --help lists all settings"),
        (["--seed", "1", "2"], "'2' follows no option; write --NAME VALUE"),
        (["--log_samples"], "--log_samples needs a value, for example --log_samples true"),
        (["--log_samples", "--seed", "1"], "--log_samples needs a value"),
        (["--loss.temperature", "0"], r"loss.temperature=0.0 must be > 0"),
        (["--loss.temperature", "warm"], "^--loss.temperature: expected a number, found the text 'warm'"),
        (["--loss.temperature", ".nan"], "^--loss.temperature: expected a number, .* it must be finite"),
        (
            ["--num_steps", "0100"],
            "^--num_steps: expected a whole number, found the text '0100'; other readers",
        ),
        (["--num_steps", "1:30"], "^--num_steps: expected a whole number, found the text '1:30'"),
        (["--num_steps", "8.0"], "^--num_steps: expected a whole number, found the number 8.0"),
        (["--log_samples", "yes"], "^--log_samples: expected true or false, .*; write true or false"),
        (["--data.weights", "{A: 1, A: 2}"], "^--data.weights: .*A is given twice"),
        (["--data.weights", "{A: x}"], "^--data.weights.A: expected a number, found the text 'x'"),
        (["--data.caps", "3", "--data.caps.A", "2"], "^--data.caps.A: caps is the number 3 and has no A"),
        (["--loss.beta", "0.1"], "^--loss.beta: is called fusion.beta now"),
        (["--fusion.beta", "-1"], r"fusion.beta=-1.0 must be > 0"),
        (["--loss.amplification", "-1"], "loss.amplification=-1.0 must be >= 0"),
        (["--prompts.num_fine", "-1"], "prompts.num_fine=-1 must be >= 0"),
        (["--prompts.tokens_per_prompt", "5"], "must be 1, 2, 3 or 4"),
        (["--batch.chunk_size", "0"], "batch.chunk_size=0 must be >= 1"),
        (["--num_steps", "0"], "num_steps=0 must be >= 1"),
        (["--recipe", "nothing"], "--recipe nothing: no such file; give a file or one of .*quickstart"),
        (
            ["--deepspeed", "zero9"],
            "--deepspeed zero9: no such file; give a file or one of zero1, zero2, zero3",
        ),
        (["--deepspeed", "absent.json"], "--deepspeed absent.json: no such file"),
        (
            ["--deepspeed", "null"],
            "names a DeepSpeed configuration; write deepspeed: zero2 .* one of zero1, zero2",
        ),
        (["--backbone.lora.rank", "0"], "backbone.lora.rank=0 must be >= 1"),
        (
            ["--processor.min_pixels", "9", "--processor.max_pixels", "4"],
            "min_pixels=9 must be <= processor.max_pixels=4",
        ),
    ],
)
def test_wrong_settings_are_one_clear_message(argv: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        parse_train_arguments(argv)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("argv", "findings"),
    [
        (
            ["--lose.width", "1", "--sed", "1", "--seed", "x"],
            ["--lose.width: unknown", "--sed: unknown", "--seed: expected"],
        ),
        (
            ["--seed", "x", "--data.weights", "{A: y}", "--fusion.beta", "0", "--batch.chunk_size", "0"],
            ["--seed: expected", "--data.weights.A: expected", "fusion.beta=0.0", "batch.chunk_size=0"],
        ),
    ],
)
def test_all_findings_of_one_command_are_listed(argv: list[str], findings: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_train_arguments(argv)
    title, *lines = str(caught.value).splitlines()
    assert title == f"{len(findings)} problems:"
    assert sorted(line.strip()[:9] for line in lines) == sorted(finding[:9] for finding in findings)
    assert [finding for finding in findings if finding not in str(caught.value)] == []


def test_a_file_without_suffix_and_names_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine").write_text((RECIPES / "quickstart.yaml").read_text() + "run_dir: here\n")
    arguments = parse_train_arguments(["--recipe", "mine", "--deepspeed", "zero2"])
    assert arguments.config.run_dir == "here"
    assert arguments.deepspeed.name == "zero2.json"
    assert arguments.deepspeed.is_file()


def test_help_explains_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    output = capsys.readouterr().out
    assert [name for name in setting_names(run_config_of("contrastive")) if f"--{name} " not in output] == []
    assert "Optimizer steps of the whole run" in output


@pytest.mark.parametrize(
    ("command", "work", "arguments"),
    [
        (launcher.evaluate, "run", ["model"]),
        (launcher.embed, "embed_on_this_rank", ["model", "input", "out"]),
        (launcher.mine, "mine_on_this_rank", ["model", "mmeb", "out"]),
    ],
    ids=["evaluate", "embed", "mine"],
)
def test_a_mistake_of_ours_is_said_at_once_with_its_rank(
    command: ModuleType,
    work: str,
    arguments: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Each command on ranks ends by `exit_code_of`, which does not wait for the others."""

    def fails(*arguments: object) -> None:
        raise RuntimeError("the roof fell in")

    monkeypatch.setattr(command, work, fails)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert command.main(arguments) == 1
    printed = capsys.readouterr().err
    assert "error on rank 0 (" in printed
    assert "RuntimeError: the roof fell in" in printed


def test_ctrl_c_says_that_the_same_command_continues(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def waits() -> int:
        raise KeyboardInterrupt

    monkeypatch.delenv("RANK", raising=False)
    assert exit_code_of(waits) == 130
    assert capsys.readouterr().err == "\ninterrupted; the same command continues from what is on disk\n"
