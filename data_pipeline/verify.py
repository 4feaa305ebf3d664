"""Is everything there, and as it was written? Shard by shard after conversion, subset by subset before it."""

from __future__ import annotations

import functools
import os
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from agff.errors import DataError
from agff.files import sha256_of
from data_pipeline.decode import decode
from data_pipeline.manifest import (
    Manifest,
    Shard,
    file_problem,
    read_index,
    write_index,
    write_manifest,
)
from data_pipeline.reader import NOT_A_RECORD, PAIR_ROLES, RawImage, RawSample, parse_sample, roles_of
from data_pipeline.regions import all_sides, content_id, scaled_box
from data_pipeline.storage import LocalFolder


@dataclass(frozen=True, kw_only=True)
class _ShardContent:
    """What the headers of a tar say, as far as it can be read."""

    keys: list[str]
    samples: list[tuple[int, int]]
    """(offset, size) of each sample."""
    problems: list[str]


def _scan_shard(path: Path) -> _ShardContent:
    """Walk the members of a shard. Members that no sample may have, and keys that appear twice, are
    problems."""
    keys: list[str] = []
    samples: list[tuple[int, int]] = []
    problems: list[str] = []
    try:
        with tarfile.open(path, mode="r:") as tar:
            for member in tar:
                key, _, name = member.name.partition(".")
                if not member.isreg() or "/" in member.name or not key or not name:
                    problems.append(f"{path.name}:{member.name}: not a plain member `<key>.<name>`")
                    continue
                end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                if keys and keys[-1] == key:
                    samples[-1] = (samples[-1][0], end - samples[-1][0])
                else:
                    keys.append(key)
                    samples.append((member.offset, end - member.offset))
    except (tarfile.TarError, OSError, UnicodeError) as error:
        problems.append(f"{path.name}: not a whole tar file after {len(keys)} samples: {error}")
    problems += [
        f"{path.name}:{key}: {count} samples have this key"
        for key, count in Counter(keys).items()
        if count > 1
    ]
    return _ShardContent(keys=keys, samples=samples, problems=problems)


def _check_shard(
    folder: LocalFolder,
    source: str,
    shard: Shard,
    *,
    indexed: Sequence[tuple[int, int]] | None,
    name_of_hash: Mapping[str, str],
    deep: bool,
) -> list[str]:
    """One line for each thing that is wrong with one shard; of a changed shard also which samples changed.

    indexed: (offset, size) of its samples in the index; None when the index itself is unreadable.
    name_of_hash: `SOURCE/shard.tar` by SHA-256, to recognise a shard that took another one's place.
    deep: decode every image too.
    """
    path = folder.local_path(source, shard)
    whole = file_problem(folder, source, shard, hashes=True)
    if not path.is_file():
        return [str(whole)]
    problems = [whole + _identity(path, name_of_hash)] if whole else []
    content = _scan_shard(path)
    problems += content.problems
    if len(content.samples) != shard.num_samples:
        problems.append(f"{path.name}: {len(content.samples)} samples, the manifest says {shard.num_samples}")
    if indexed is not None:
        problems += _index_problems(path.name, content, indexed)
    if whole or deep:
        problems += _sample_problems(path, shard, content, deep=deep)
    return problems


def _indexed_samples(folder: LocalFolder, manifest: Manifest, source: str) -> list[list[tuple[int, int]]]:
    """(offset, size) of the samples of each shard, from the index. Raises DataError when it cannot be
    read."""
    index = read_index(folder, source, manifest.sources[source])
    samples: list[list[tuple[int, int]]] = [[] for _ in manifest.sources[source].shards]
    for shard, offset, size in zip(
        *(index.column(name).to_pylist() for name in ("shard", "offset", "size")), strict=True
    ):
        if not 0 <= shard < len(samples):
            raise DataError(f"{source}/index.arrow: it names shard {shard}, there are {len(samples)}")
        samples[shard].append((offset, size))
    return samples


def _identity(path: Path, name_of_hash: Mapping[str, str]) -> str:
    name = name_of_hash.get(sha256_of(path))
    return f" (these are the bytes of {name})" if name else ""


def _index_problems(shard: str, content: _ShardContent, indexed: Sequence[tuple[int, int]]) -> list[str]:
    problems = []
    if len(indexed) != len(content.samples):
        problems.append(f"{shard}: {len(content.samples)} samples, the index has {len(indexed)}")
    for number, (found, expected) in enumerate(zip(content.samples, indexed, strict=False)):
        if found != expected:
            problems.append(
                f"{shard}:{content.keys[number]}: is at byte {found[0]:,} with {found[1]:,} bytes, the "
                f"index says {expected[0]:,} and {expected[1]:,}"
            )
            break  # what follows is shifted too
    return problems


def _sample_problems(path: Path, shard: Shard, content: _ShardContent, *, deep: bool) -> list[str]:
    problems = []
    with path.open("rb") as file:

        def read_range(offset: int, size: int) -> bytes:
            if offset < 0 or not 0 < size <= shard.size_bytes:
                raise DataError(f"{path.name}: bytes {offset:,} to {offset + size:,} are not in the shard")
            return os.pread(file.fileno(), size, offset)

        for offset, size in content.samples:
            try:
                sample = parse_sample(read_range(offset, size), path.name, read_range)
                problems += [
                    f"{sample.address}: text or image of the {role} is not what was written"
                    for role in _changed_roles(sample)
                ]
                needed = ("query",) if "regions" in sample.record else PAIR_ROLES
                if missing := [role for role in needed if role not in sample.record]:
                    problems.append(f"{sample.address}: the {missing[0]} is missing")
                elif deep:
                    decode(sample)
            except DataError as error:
                problems.append(str(error))
    return problems


def _changed_roles(sample: RawSample) -> list[str]:
    """Roles whose text, image or box is not that of its content id."""
    try:
        sides = [
            *((role, sample.record[role]) for role in roles_of(sample.record)),
            *all_sides(sample.record),
        ]
    except (LookupError, *NOT_A_RECORD):
        return ["regions"]
    return list(dict.fromkeys(role for role, side in sides if _is_changed(sample.images.get(role), side)))


def _is_changed(image: RawImage | None, side: Mapping[str, Any]) -> bool:
    try:
        box = scaled_box(side, side["size"]) if "box" in side else None
        return content_id(str(side["text"]), image.content if image else None, box) != side["id"]
    except (LookupError, *NOT_A_RECORD):
        return True


def _is_shard_name(name: str) -> bool:
    """Whether a file name is one that prepare gives to shards."""
    return re.fullmatch(r".*-\d{5,}\.tar", name) is not None


def check_folder(
    folder: LocalFolder, manifest: Manifest, *, deep: bool, processes: int | None = None
) -> list[str]:
    """Every finding about a folder of shards, in the order of its sources and shards; empty when all is
    well."""
    name_of_hash = {
        shard.sha256: f"{name}/{shard.name}"
        for name, source in manifest.sources.items()
        for shard in source.shards
    }
    checks: list[Callable[[], list[str]]] = []
    problems: list[str] = []
    for name, source in sorted(manifest.sources.items()):
        known = {shard.name for shard in source.shards}
        for path in sorted(folder.path.glob(f"{name}/*")):
            if _is_shard_name(path.name) and path.name not in known:
                problems.append(
                    f"{path}: the manifest does not know this shard; remove it, or restore its manifest"
                )
        indexed: Sequence[Any] = [None] * len(source.shards)
        if problem := file_problem(folder, name, source.index, hashes=True):
            problems.append(problem)
        else:
            try:
                indexed = _indexed_samples(folder, manifest, name)
            except DataError as error:  # an index and a manifest of two conversions
                problems.append(str(error))
        checks += [
            functools.partial(
                _check_shard, folder, name, shard, indexed=samples, name_of_hash=name_of_hash, deep=deep
            )
            for shard, samples in zip(source.shards, indexed, strict=True)
        ]
    return problems + [problem for found in in_parallel(checks, processes, "shard") for problem in found]


def repair_indexes(folder: LocalFolder, manifest: Manifest) -> tuple[Manifest, list[str]]:
    """Write the index of each source whose index is missing or not the manifest's.

    The manifest afterwards, and the sources whose index was written. Raises DataError, before anything is
    written, that names every damaged shard of such a source.
    """
    names = [
        name
        for name, source in sorted(manifest.sources.items())
        if file_problem(folder, name, source.index, hashes=True)
    ]
    shards = [(name, shard) for name in names for shard in manifest.sources[name].shards]
    found = (
        file_problem(folder, name, shard, hashes=True)
        for name, shard in tqdm(shards, desc="shards of damaged indexes", unit="shard", disable=not shards)
    )
    if damaged := [problem for problem in found if problem]:
        raise DataError(
            f"the index of {', '.join(names)} can be rebuilt from undamaged shards only:\n"
            + "\n".join(damaged)
        )
    sources = dict(manifest.sources)
    for name in names:
        contents = (_scan_shard(folder.local_path(name, shard)) for shard in sources[name].shards)
        index = write_index(folder.path / name, (content.samples for content in contents))
        sources[name] = replace(sources[name], index=index)
    repaired = replace(manifest, sources=sources)
    if repaired != manifest:
        write_manifest(folder.path, repaired)
    return repaired, names


def in_parallel(checks: Sequence[Callable[[], Any]], processes: int | None, unit: str) -> Iterator[Any]:
    """Results in the order of the checks, with a progress bar. Raises DataError when a process dies."""
    with (
        ProcessPoolExecutor(processes) as pool,
        tqdm(total=len(checks), desc="verify", unit=unit, disable=not checks) as bar,
    ):
        futures = [pool.submit(check) for check in checks]
        for _ in as_completed(futures):
            bar.update()
        try:
            results = [future.result() for future in futures]
        except BrokenExecutor as error:
            raise DataError(
                f"a checker died ({error}); if it was killed for memory, lower --processes and check again"
            ) from None
    yield from results
