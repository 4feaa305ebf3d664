"""The commands of the comparison, in order, and what each of them depends on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.benchmarks.family.methods import QUICKSTART, Method, Stage

SHARDS = {
    "pairs": ("--mmeb", f"{QUICKSTART}/data/mmeb"),
    "texts": ("--mmeb", f"{QUICKSTART}/family/texts/train"),
    "held_out_texts": ("--mmeb", f"{QUICKSTART}/family/texts/held_out"),
    "regions": (
        *("--regions", f"{QUICKSTART}/family/regions/train/EmojiRegions/regions.json"),
        *("--source", "EmojiRegions"),
    ),
}
"""Name -> what prepare.py makes them of."""
TEACHER = QUICKSTART / "teacher"


@dataclass(frozen=True, kw_only=True)
class Task:
    """One command."""

    name: str
    command: tuple[str, ...]
    output: Path | None = None
    """What it writes; removed when another command, or other code, wrote it. None: the command itself knows
    what is done, and is run every time."""
    after: tuple[str, ...] = ()
    """Tasks whose results it reads."""
    resumes: bool = True
    """Continues what it left when it was interrupted; else that is removed."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The methods, on how many pairs, and where everything goes."""

    methods: tuple[Method, ...]
    num_pairs: int
    """Of each method in all its stages."""
    folder: Path
    batch_size_of: Callable[[str], int]
    """Pairs of a step, of a recipe."""
    seed: int = 0

    def tasks(self) -> list[Task]:
        """Data first, then method after method. A task comes behind those that it reads."""
        data = Task(name="data", command=("python", "launcher/quickstart_data.py", "--family"))
        tasks = [data, *map(self._prepare, self._shards())]
        if self._has_teacher:
            tasks += [
                self._embed("texts", "teacher", TEACHER),
                self._embed("held_out_texts", "teacher", TEACHER),
            ]
        for method in self.methods:
            tasks += self.tasks_of(method)
        return tasks

    def release(self, method: Method, number: int = -1) -> Path:
        """Of a stage; by default of the last one."""
        return self.folder / "releases" / _stage_name(method, number % len(method.stages))

    def read_texts(self, method: Method) -> dict[str, Path]:
        """When -> the vectors that its model made of the held-out texts: after the stage that learned of the
        teacher, and at the end; of a method that was never taught, what there is to compare with. Empty
        without a teacher."""
        if not self._has_teacher:
            return {}
        taught = [number for number, stage in enumerate(method.stages[:-1]) if stage.is_taught]
        stages = {f"after stage {number + 1}": number for number in taught}
        return {
            when: self.vectors("held_out_texts", _stage_name(method, number))
            for when, number in {**stages, "at the end": len(method.stages) - 1}.items()
        }

    @property
    def _has_teacher(self) -> bool:
        return any(stage.is_taught for method in self.methods for stage in method.stages)

    def vectors(self, shards: str, model: str) -> Path:
        """What `model`, the teacher or a stage, made of these shards."""
        return self.folder / "vectors" / f"{shards}-{model}"

    def steps(self, stage: Stage) -> int:
        """Of one stage."""
        return round(self.num_pairs * stage.share / self.batch_size_of(stage.recipe))

    def _shards(self) -> list[str]:
        used = {stage.shards for method in self.methods for stage in method.stages}
        return [name for name in SHARDS if name in used or (name == "held_out_texts" and "texts" in used)]

    def _prepare(self, name: str) -> Task:
        out = self._shards_folder(name)
        command = ("python", "launcher/prepare.py", *SHARDS[name], "--out", str(out))
        return Task(name=f"shards of {name}", command=command, output=out, after=("data",))

    def _shards_folder(self, name: str) -> Path:
        return self.folder / "shards" / name

    def _embed(self, shards: str, model: str, folder: Path, after: tuple[str, ...] = ("data",)) -> Task:
        out = self.vectors(shards, model)
        command = ("python", "launcher/embed.py", str(folder), str(self._shards_folder(shards)), str(out))
        return Task(
            name=f"vectors of {shards} by {model}",
            command=command,
            output=out,
            after=(f"shards of {shards}", *after),
        )

    def tasks_of(self, method: Method) -> Iterator[Task]:
        """Its trainings, releases and scores."""
        for number, stage in enumerate(method.stages):
            name, run = _stage_name(method, number), self.folder / "runs" / _stage_name(method, number)
            release, before = self.release(method, number), _stage_name(method, number - 1)
            after = [f"shards of {stage.shards}"]
            after += [f"vectors of {stage.shards} by teacher"] if stage.is_taught else []
            after += [f"release {before}"] if number else []
            yield Task(
                name=f"train {name}",
                command=self._train(method, number, run),
                output=run,
                after=tuple(after),
            )
            yield Task(
                name=f"release {name}",
                command=("python", "launcher/convert_checkpoint.py", str(run), str(release)),
                output=release,
                after=(f"train {name}",),
                resumes=False,
            )
            if self.vectors("held_out_texts", name) in self.read_texts(method).values():
                yield self._embed("held_out_texts", name, release, after=(f"release {name}",))
        yield self._evaluate(method)

    def _train(self, method: Method, number: int, run: Path) -> tuple[str, ...]:
        stage = method.stages[number]
        steps = self.steps(stage)
        first = QUICKSTART / "backbone" if number == 0 else self.release(method, number - 1)
        settings = {
            "run_dir": run,
            "seed": self.seed,
            "num_steps": steps,
            "save_every": steps,
            "backbone.path": first,
            "data.shards": self._shards_folder(stage.shards),
            **({"prompts.start_from": first} if number else {}),
            **({"data.vectors": self.vectors(stage.shards, "teacher")} if stage.is_taught else {}),
            **stage.settings,
        }
        overrides = [part for key, value in settings.items() for part in (f"--{key}", str(value))]
        return ("deepspeed", "launcher/train.py", "--recipe", stage.recipe, *overrides)

    def _evaluate(self, method: Method) -> Task:
        data = QUICKSTART / "data"
        sets = {name: data / name for name in ("mmeb_eval", "mmvp", "captions")} | dict(method.sets)
        options = [part for name, folder in sets.items() for part in (f"--{name}", str(folder))]
        release, scores = self.release(method), self.scores(method)
        return Task(
            name=f"evaluate {method.name}",
            command=("python", "launcher/evaluate.py", str(release), *options, "--out", str(scores)),
            output=scores,
            after=(f"release {_stage_name(method, len(method.stages) - 1)}",),
        )

    def scores(self, method: Method) -> Path:
        """What evaluate.py wrote."""
        return self.folder / "scores" / f"{method.name}.json"


def _stage_name(method: Method, number: int) -> str:
    return method.name if len(method.stages) == 1 else f"{method.name}-{number + 1}"
