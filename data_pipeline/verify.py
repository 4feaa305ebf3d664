"""Is everything there, and as it was written? Shard by shard after conversion, subset by subset before it."""

from __future__ import annotations

import hashlib
import os
import re
import tarfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from agff.errors import DataError
from data_pipeline.decode import decode, decode_image
from data_pipeline.manifest import Manifest, Shard, file_problem, read_index
from data_pipeline.mmeb import Pair, read_pairs
from data_pipeline.reader import NOT_A_RECORD, ROLES, RawSample, parse_sample
from data_pipeline.shards import content_id
from data_pipeline.storage import LocalFolder


@dataclass(frozen=True, kw_only=True)
class ShardContent:
    """What the headers of a tar say, as far as it can be read."""

    keys: list[str]
    samples: list[tuple[int, int]]
    """(offset, size) of each sample."""
    problems: list[str]


def scan_shard(path: Path) -> ShardContent:
    """Walk the members of a shard. Members that no sample may have, and keys that stand twice, are
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
    return ShardContent(keys=keys, samples=samples, problems=problems)


def check_shard(
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
    content = scan_shard(path)
    problems += content.problems
    if len(content.samples) != shard.num_samples:
        problems.append(f"{path.name}: {len(content.samples)} samples, the manifest says {shard.num_samples}")
    if indexed is not None:
        problems += _index_problems(path.name, content, indexed)
    if whole or deep:
        problems += _sample_problems(path, shard, content, deep=deep)
    return problems


def indexed_samples(folder: LocalFolder, manifest: Manifest, source: str) -> list[list[tuple[int, int]]]:
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


@dataclass(frozen=True, kw_only=True)
class SubsetCheck:
    """An MMEB subset before conversion."""

    num_rows: int
    num_images: int
    """Distinct image files that the rows name."""
    problems: list[str]


def check_subset(root: Path, subset: str, *, split: str, num_rows: int, deep: bool) -> SubsetCheck:
    """Which images are absent, which rows cannot be used. deep: decode every image too."""
    rows_of_image: Counter[str] = Counter()
    problems = []
    for number, pair in enumerate(read_pairs(root, subset, split=split, start=0, stop=num_rows)):
        if isinstance(pair, Pair):
            sides = (pair.query, pair.target, pair.negative)
            rows_of_image.update({str(side.image.relative_to(root)) for side in sides if side and side.image})
        else:
            problems.append(f"{subset}: row {number}: {pair}")
    names_in: dict[str, set[str]] = {}
    missing: dict[str, list[str]] = {}
    wanted: Counter[str] = Counter()
    for image in rows_of_image:
        parent, name = os.path.split(image)
        wanted[parent] += 1
        if parent not in names_in:
            names_in[parent] = _names_in(root / parent)
        if name not in names_in[parent]:
            missing.setdefault(parent, []).append(image)
        elif deep:
            problems += _image_problem(root, subset, image)
    for parent, images in sorted(missing.items()):
        if len(images) == wanted[parent] > 1:
            problems.append(
                f"{subset}: {parent}: all {len(images):,} images are missing; unpack this subset's archive "
                "there"
            )
        else:
            problems += [
                f"{subset}: {image} is missing ({rows_of_image[image]} rows)" for image in sorted(images)
            ]
    return SubsetCheck(num_rows=num_rows, num_images=len(rows_of_image), problems=problems)


def _identity(path: Path, name_of_hash: Mapping[str, str]) -> str:
    with path.open("rb") as file:
        name = name_of_hash.get(hashlib.file_digest(file, "sha256").hexdigest())
    return f" (these are the bytes of {name})" if name else ""


def _index_problems(shard: str, content: ShardContent, indexed: Sequence[tuple[int, int]]) -> list[str]:
    problems = []
    if len(indexed) != len(content.samples):
        problems.append(f"{shard}: {len(content.samples)} samples, the index has {len(indexed)}")
    for number, (found, expected) in enumerate(zip(content.samples, indexed, strict=False)):
        if found != expected:
            problems.append(
                f"{shard}:{content.keys[number]}: stands at byte {found[0]:,} with {found[1]:,} bytes, the "
                f"index says {expected[0]:,} and {expected[1]:,}"
            )
            break  # what follows is shifted too
    return problems


def _sample_problems(path: Path, shard: Shard, content: ShardContent, *, deep: bool) -> list[str]:
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
                    for role in ROLES
                    if role in sample.record and _is_changed(sample, role)
                ]
                if missing := [role for role in ROLES[:2] if role not in sample.record]:
                    problems.append(f"{sample.address}: the {missing[0]} is missing")
                elif deep:
                    decode(sample)
            except DataError as error:
                problems.append(str(error))
    return problems


def _is_changed(sample: RawSample, role: str) -> bool:
    image = sample.images.get(role)
    try:
        side = sample.record[role]
        return content_id(str(side["text"]), image.content if image else None) != side["id"]
    except (KeyError, *NOT_A_RECORD):
        return True


def _names_in(folder: Path) -> set[str]:
    try:
        return {entry.name for entry in os.scandir(folder) if entry.is_file()}
    except OSError:
        return set()


def _image_problem(root: Path, subset: str, image: str) -> list[str]:
    try:
        decode_image((root / image).read_bytes(), f"{subset}: {image}")
    except DataError as error:
        return [str(error)]
    except OSError as error:
        return [f"{subset}: {image}: cannot read it: {error}"]
    return []


def is_shard_name(name: str) -> bool:
    """Whether a file name is one that prepare gives to shards."""
    return re.fullmatch(r".*-\d{5,}\.tar", name) is not None
