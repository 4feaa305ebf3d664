"""Are the files that a run reads whole: shards, configuration, checkpoints? Nothing is hashed."""

from __future__ import annotations

import contextlib
import json
import logging
import re
import zipfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from launcher.checks.finding import Finding, from_message, one_line

MOST_LINES = 50
"""Findings about single files, per folder; the rest are counted."""


def check_shards(location: str) -> list[Finding]:
    """Can the manifest be read, and is each of its files there with its size? Nothing is fetched."""
    from agff.errors import AgffError
    from data_pipeline.manifest import check_files, read_manifest, stored_files
    from data_pipeline.remote import CacheConfig, open_folder
    from data_pipeline.storage import LocalFolder

    try:
        folder = open_folder(location, CacheConfig())
        manifest = read_manifest(folder)
        if isinstance(folder, LocalFolder):
            problems = check_files(folder, manifest, part=0, num_parts=1, hashes=False)
        else:
            sizes = {f"{name}/{file.name}": file.size_bytes for name, file in stored_files(manifest)}
            problems = _remote_problems(folder.location, sizes)
    except AgffError as error:
        return [from_message("shards", str(error))]
    findings = [from_message("shards", problem) for problem in problems]
    samples = sum(source.num_samples for source in manifest.sources.values())
    shards = sum(len(source.shards) for source in manifest.sources.values())
    found = f"{folder.location}: {len(manifest.sources)} sources, {shards:,} shards, {samples:,} samples"
    return _shortened(findings, f"launcher/verify.py {location}") or [Finding("ok", "shards", found)]


def _remote_problems(location: str, sizes: Mapping[str, int]) -> list[str]:
    import fsspec

    filesystem, root = fsspec.core.url_to_fs(location)

    def problem(name: str) -> str | None:
        remedy = "copy it there again from where it was prepared"
        try:
            found = filesystem.info(f"{root}/{name}")["size"]
        except FileNotFoundError:
            return f"{location}/{name}: missing; {remedy}"
        except Exception as error:
            return f"{location}/{name}: cannot be reached: {error!r}; fix the connection or the credentials"
        if found not in (None, sizes[name]):  # a web server may not say
            return f"{location}/{name}: {found:,} bytes, the manifest says {sizes[name]:,}; {remedy}"
        return None

    with ThreadPoolExecutor(16) as pool:
        return [text for text in pool.map(problem, sizes) if text]


def check_run(run: Path) -> list[Finding]:
    """Configuration and newest checkpoint of a run can be read."""
    with _deepspeed_is_quiet():
        from agff.checkpoint_folder import STATE_FILE, checkpoint_folder, latest_step
        from launcher.run.folder import CONFIG_FILE, DEEPSPEED_FILE, read_run_config

    if not run.is_dir():
        return [
            Finding("error", "run", f"{run}: no such folder", "give the folder of a run; ls runs shows them")
        ]
    findings = []
    try:
        read_run_config(run)
        json.loads((run / DEEPSPEED_FILE).read_text())
    except Exception as error:
        remedy = f"restore {CONFIG_FILE} and {DEEPSPEED_FILE} from a copy, or choose another --run_dir"
        findings.append(
            Finding("error", "run", f"{run}: its configuration cannot be read: {one_line(error)}", remedy)
        )
    step = latest_step(run)
    folders = sorted(
        path for path in checkpoint_folder(run).glob("step-*") if re.fullmatch(r"step-\d+", path.name)
    )
    for folder in folders:
        if step is None or int(folder.name.removeprefix("step-")) > step:
            goes_on = (
                "the run would start from step 0"
                if step is None
                else f"the run would continue from step {step}"
            )
            found = f"{folder}: {STATE_FILE} is missing, so this checkpoint does not count: {goes_on}"
            remedy = (
                f"restore {STATE_FILE} from a copy, or set the folder aside: mv {folder} {folder}.damaged"
            )
            findings.append(Finding("error" if step is None else "warning", "run", found, remedy))
    if step is not None:
        older = [
            f.name for f in folders if (f / STATE_FILE).exists() and int(f.name.removeprefix("step-")) < step
        ]
        findings += _check_checkpoint(
            run, step, f"the run then continues from {older[-1] if older else 'the beginning'}"
        )
    if left := sorted(
        path.name for pattern in ("*.partial", "*.universal") for path in checkpoint_folder(run).glob(pattern)
    ):
        found = (
            f"{checkpoint_folder(run)}: {', '.join(left)} left by a killed save (or one at work); the next "
            "start removes it"
        )
        findings.append(Finding("ok", "run", found))
    if all(finding.state == "ok" for finding in findings):
        found = (
            f"{run}: no checkpoint yet" if step is None else f"{run}: checkpoint of step {step} is complete"
        )
        findings.insert(0, Finding("ok", "run", found))
    return findings


def _check_checkpoint(run: Path, step: int, otherwise: str) -> list[Finding]:
    from agff.checkpoint_folder import STATE_FILE, checkpoint_folder, read_state
    from agff.errors import CheckpointError

    folder = checkpoint_folder(run) / f"step-{step:06d}"
    remedy = f"restore it from a copy, or set the checkpoint aside: mv {folder} {folder}.damaged; {otherwise}"
    problems, findings = [], []
    num_ranks, expected = 0, dict[str, str]()
    try:
        state = read_state(run, step)
        num_ranks = state["world_size"]
        if state["step"] != step:
            problems.append(f"{folder / STATE_FILE}: is of step {state['step']}")
        expected = dict(state.get("files", {}))
        if absent := [key for key in ("data_plan", "files") if key not in state]:
            found = (
                f"{folder / STATE_FILE}: {' and '.join(absent)} missing, an older version wrote it; it "
                "cannot be continued"
            )
            findings.append(
                Finding("warning", "run", found, "convert or evaluate it, or train into another --run_dir")
            )
    except CheckpointError as error:
        problems.append(str(error))
    except (ValueError, TypeError) as error:
        problems.append(f"{folder / STATE_FILE}: cannot be read: files: {error!r}")
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} | set(expected)
    problems += [
        text for name in sorted(files) if (text := _file_problem(folder / name, expected.get(name, "")))
    ]
    names = [Path(name).name for name in files]
    for rank in range(num_ranks):
        for pattern in (rf"random-{rank:05d}\.pt", rf".*zero_pp_rank_{rank}_mp_rank_\d+_optim_states\.pt"):
            if not any(re.fullmatch(pattern, name) for name in names):
                problems.append(
                    f"{folder}: a file of rank {rank} is missing ({pattern}); {num_ranks} ranks saved it"
                )
    if num_ranks and not any(name.endswith("model_states.pt") for name in names):
        problems.append(f"{folder}: the model's parameters are missing (*model_states.pt)")
    return findings + _shortened(
        [Finding("error", "run", problem, remedy) for problem in problems], f"ls -l {folder}"
    )


def _file_problem(path: Path, written: str) -> str | None:
    """What is wrong with a file of a checkpoint. Its size and its end are looked at, not its hash: it may
    have gigabytes."""
    size = re.match(r"(\d+) bytes", written)
    try:
        with path.open("rb") as file:
            is_empty = not file.read(1)
        found = path.stat().st_size
        if is_empty:
            return f"{path}: empty"
        if size and found != int(size[1]):
            return f"{path}: {found:,} bytes, it was written with {int(size[1]):,}"
        if path.suffix == ".pt" and not zipfile.is_zipfile(path):
            return f"{path}: {found:,} bytes, cut off or damaged: not a file that torch.save wrote"
    except FileNotFoundError:
        return f"{path}: missing"
    except OSError as error:
        return f"{path}: cannot be read: {error}"
    return None


@contextlib.contextmanager
def _deepspeed_is_quiet() -> Iterator[None]:
    """While it is imported: it logs, to stdout, that it found no accelerator."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _shortened(findings: list[Finding], all_of_them: str) -> list[Finding]:
    if len(findings) <= MOST_LINES:
        return findings
    rest = Finding(
        "error", findings[0].subject, f"{len(findings) - MOST_LINES} more of the kind", all_of_them
    )
    return [*findings[:MOST_LINES], rest]
