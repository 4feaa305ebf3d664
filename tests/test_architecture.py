"""Decisions that must not erode: who imports whom, names, the JSON files, the scripts."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = ("agff", "data_pipeline", "launcher")
SOURCES = sorted(path for package in FLOORS for path in (ROOT / package).rglob("*.py"))
MAY_IMPORT_DEEPSPEED = ("agff/engine.py", "agff/zero3.py", "agff/checkpoint.py", "launcher/")
BATCH_SIZE_KEYS = {"train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(path: Path) -> Iterator[str]:
    """Dotted names of what a file imports; of `from a.b import c` both `a.b` and `a.b.c`, since c may be a
    module."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}:{node.lineno}: relative import; name the package"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def is_within(imported: str, module: str) -> bool:
    return imported == module or imported.startswith(f"{module}.")


COMMANDS = {
    path.stem
    for path in (ROOT / "launcher").glob("*.py")
    if "def main(" in path.read_text() and path.stem != "command_line"
}
"""What a person types; command_line is what they share."""
KNOWN_OF_AGFF = ("batch", "errors", "files", "images")
"""What the data pipeline may know of the learning core."""


def floor(module: str) -> int:
    """0 is the ground; tests stand on the roof."""
    package = module.split(".")[0]
    return FLOORS.index(package) if package in FLOORS else len(FLOORS) * (package == "tests") - 1


def module_of(path: Path) -> str:
    return name_of(path).removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def test_no_arrow_runs_up() -> None:
    wrong = [
        f"{name_of(path)} imports {imported}"
        for path in SOURCES
        for imported in imports(path)
        if floor(imported) > floor(module_of(path))
    ]
    assert wrong == []


def test_no_file_imports_a_command() -> None:
    """`agff VERB` finds them by name."""
    assert {"train", "prepare", "evaluate"} <= COMMANDS
    wrong = [
        f"{name_of(path)} imports {imported}"
        for path in SOURCES
        for imported in imports(path)
        if imported in {f"launcher.{command}" for command in COMMANDS}
    ]
    assert wrong == []


def test_rooms_of_the_launcher_import_nothing_of_its_top() -> None:
    top = {f"launcher.{path.stem}" for path in (ROOT / "launcher").glob("*.py")} - {"launcher.__init__"}
    wrong = [
        f"{name_of(path)} imports {imported}"
        for path in SOURCES
        if name_of(path).startswith("launcher/") and path.parent != ROOT / "launcher"
        for imported in imports(path)
        if imported in top
    ]
    assert wrong == []


def test_no_imports_run_in_a_circle() -> None:
    modules = {module_of(path): path for path in SOURCES}
    graph = {
        module: {name for name in imports(path) if name in modules and name != module}
        for module, path in modules.items()
    }
    graph = {m: {n for n in names if not m.startswith(f"{n}.")} for m, names in graph.items()}  # own package
    while leaves := [module for module, names in graph.items() if not names & graph.keys()]:
        for module in leaves:
            del graph[module]
    assert graph == {}


def test_data_pipeline_knows_little_of_agff() -> None:
    known = {f"agff.{name}" for name in KNOWN_OF_AGFF}
    wrong = [
        f"{name_of(path)} imports {imported}"
        for path in SOURCES
        if name_of(path).startswith("data_pipeline/")
        for imported in imports(path)
        if is_within(imported, "agff") and not any(is_within(imported, name) for name in known)
    ]
    assert wrong == []


ONE_ROAD = {
    "hashlib.file_digest": "agff/files.py",
    "os.fsync": "agff/files.py",
    "fcntl.flock": "agff/files.py",
    "Image.open": "agff/images.py",
}
"""What is done in one file only, so that it is done alike everywhere."""


def test_there_is_one_road_to_each_end() -> None:
    calls = [
        (ast.unparse(node.func), name_of(path))
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
    ]
    assert {(call, file) for call, file in calls if call in ONE_ROAD} == set(ONE_ROAD.items())
    # agff/images.py turns an image by itself and says why
    assert [file for call, file in calls if call.endswith("exif_transpose")] == []


WITHOUT_UNUSED_NAMES = ("data_pipeline/",)


def test_a_public_function_is_used_by_another_file() -> None:
    """What only its own file uses begins with an underscore, what only tests use goes."""
    trees = {name_of(path): ast.parse(path.read_text(encoding="utf-8")) for path in SOURCES}
    names_in = {
        file: {name for node in ast.walk(tree) for name in names_of(node)} for file, tree in trees.items()
    }
    unused = [
        f"{file}: {node.name}"
        for file, tree in trees.items()
        if file.startswith(WITHOUT_UNUSED_NAMES)
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")
        if not any(node.name in names for other, names in names_in.items() if other != file)
    ]
    assert unused == []


def names_of(node: ast.AST) -> Iterator[str]:
    """Names that a node uses."""
    if isinstance(node, ast.Name):
        yield node.id
    elif isinstance(node, ast.Attribute):
        yield node.attr
    elif isinstance(node, ast.ImportFrom):
        yield from (alias.name for alias in node.names)


MOST_LINES = 300


def test_no_file_has_become_an_attic() -> None:
    long = {name_of(path): len(path.read_text().splitlines()) for path in SOURCES}
    assert {name: count for name, count in long.items() if count > MOST_LINES} == {}


def test_deepspeed_is_imported_in_few_places() -> None:
    wrong = [
        name_of(path)
        for path in SOURCES
        if any(is_within(imported, "deepspeed") for imported in imports(path))
        and not name_of(path).startswith(MAY_IMPORT_DEEPSPEED)
    ]
    assert wrong == []


def test_agff_loads_without_deepspeed() -> None:
    code = (
        "import sys; sys.modules['deepspeed'] = None; import agff; agff.load, agff.fused_similarity, "
        "agff.ega_loss"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=120)


def test_no_module_hides_one_of_the_standard_library() -> None:
    # `deepspeed launcher/train.py` puts launcher/ first on sys.path
    names = [path.with_suffix("") for path in SOURCES] + [
        path.parent for path in SOURCES if path.name == "__init__.py"
    ]
    assert [name_of(name) for name in names if name.name in sys.stdlib_module_names] == []


def test_modules_are_named_after_what_they_do() -> None:
    assert [
        name_of(path) for path in SOURCES if path.stem in ("utils", "util", "common", "helpers", "misc")
    ] == []


@pytest.mark.parametrize("path", sorted((ROOT / "ds_configs").glob("*.json")), ids=lambda path: path.name)
def test_deepspeed_json_holds_mechanism_only_and_states_clipping(path: Path) -> None:
    values = json.loads(path.read_text())
    assert "gradient_clipping" in values
    assert BATCH_SIZE_KEYS.isdisjoint(values)


def test_there_are_deepspeed_configurations() -> None:
    assert {path.name for path in (ROOT / "ds_configs").glob("*.json")} >= {
        "zero1.json",
        "zero2.json",
        "zero3.json",
    }


def test_torch_load_says_weights_only() -> None:
    wrong = [
        f"{name_of(path)}:{node.lineno}"
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load"
        if "weights_only" not in [keyword.arg for keyword in node.keywords]
    ]
    assert wrong == []


def test_every_test_folder_is_a_package() -> None:
    # without it, tests/agff would hide agff
    folders = {path.parent for path in (ROOT / "tests").rglob("test_*.py")}
    assert [name_of(folder) for folder in sorted(folders) if not (folder / "__init__.py").exists()] == []


SCRIPTS = [*sorted((ROOT / "slurm").glob("*.sh")), ROOT / ".ci/run"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_script_is_valid_bash(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True, timeout=30)


@pytest.mark.parametrize(
    "script", [path for path in SCRIPTS if path.name != "env.sh"], ids=lambda path: path.name
)
def test_script_stops_at_the_first_error(script: Path) -> None:
    assert "set -euo pipefail" in script.read_text().splitlines()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_every_exported_variable_has_its_reason_on_the_line(script: Path) -> None:
    exports = [line for line in script.read_text().splitlines() if line.startswith("export ")]
    assert [line for line in exports if " # " not in line] == []


def test_ci_calls_the_command_a_person_types() -> None:
    lines = (ROOT / ".ci/run").read_text().splitlines()
    commands = [line for line in lines if line and not line.startswith(("#", "set ", "cd "))]
    assert [command.split(" ||")[0] for command in commands] == ["make install-slurm", "make test"]
    assert "||" not in commands[-1]
