"""Are the files that a run reads whole: shards, configuration, checkpoints? Nothing is hashed."""

from __future__ import annotations

import contextlib
import logging
import re
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
        from agff.checkpoint_folder import STATE_FILE, checkpoint_folder, complete_steps
        from launcher.run.config_file import CONFIG_FILE, DEEPSPEED_FILE, read_run_config, stored_deepspeed

    if not run.is_dir():
        return [
            Finding("error", "run", f"{run}: no such folder", "give the folder of a run; ls runs shows them")
        ]
    findings = []
    try:
        read_run_config(run)
        stored_deepspeed(run)
    except Exception as error:
        remedy = f"restore {CONFIG_FILE} and {DEEPSPEED_FILE} from a copy, or choose another --run_dir"
        findings.append(
            Finding("error", "run", f"{run}: its configuration cannot be read: {one_line(error)}", remedy)
        )
    steps = complete_steps(run)
    step = steps[0] if steps else None
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
        older = steps[1] if steps[1:] else 0
        findings += _check_checkpoint(run, step, f"the run then continues from step {older}")
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
    from agff.checkpoint_folder import (
        STATE_FILE,
        check_checkpoint,
        checkpoint_folder,
        checkpoint_name,
        read_state,
    )

    folder = checkpoint_folder(run) / checkpoint_name(step)
    remedy = f"restore it from a copy, or set the checkpoint aside: mv {folder} {folder}.damaged; {otherwise}"
    problems = [problem.partition("; ")[0] for problem in check_checkpoint(run, step, hashes=False)]
    if not problems and "data_plan" not in read_state(run, step):
        found = f"{folder / STATE_FILE}: data_plan missing, an older version wrote it; it cannot be continued"
        remedy = "convert or evaluate it, or train into another --run_dir"
        return [Finding("warning", "run", found, remedy)]
    return _shortened([Finding("error", "run", problem, remedy) for problem in problems], f"ls -l {folder}")


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
