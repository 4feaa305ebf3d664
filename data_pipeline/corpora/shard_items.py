"""Every query or target of a folder of shards, in the order of sources, samples and sides."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from agff.errors import ConfigError, DataError
from data_pipeline.corpora.corpus import CorpusItem, Unusable, fingerprint_of
from data_pipeline.layouts.eval_items import EmbeddedImage
from data_pipeline.manifest import Manifest, read_manifest
from data_pipeline.reader import RawSample, ShardReader
from data_pipeline.remote import CacheConfig, open_folder


@dataclass(frozen=True, kw_only=True)
class ShardItems:
    """Id: `SOURCE/SHARD.tar:KEY:SIDE`. A side that several samples share is there several times."""

    location: str
    sources: tuple[str, ...]
    counts: tuple[int, ...]
    """Samples of each source."""
    sides: tuple[str, ...]
    shards: tuple[str, ...]
    """Fingerprint of each source."""

    @property
    def num_items(self) -> int:
        """See Corpus."""
        return sum(self.counts) * len(self.sides)

    @property
    def fingerprint(self) -> str:
        """See Corpus."""
        return fingerprint_of("shards", self.sources, self.shards, self.sides)

    def read(self, start: int, stop: int) -> Iterator[CorpusItem | Unusable]:
        """See Corpus."""
        folder = open_folder(self.location, CacheConfig())
        reader = ShardReader(folder, read_manifest(folder))
        ends = list(itertools.accumulate(self.counts))
        raw: tuple[int, RawSample | DataError] = (-1, DataError(""))
        for number in range(start, min(stop, self.num_items)):
            sample, side = divmod(number, len(self.sides))
            place = bisect.bisect_right(ends, sample)
            source, row = self.sources[place], sample - (ends[place] - self.counts[place])
            if raw[0] != sample:  # both sides of a sample lie together
                raw = (sample, _read(reader, source, row))
            yield _item(source, row, self.sides[side], raw[1])


def shard_items(
    location: str, manifest: Manifest, *, sources: Sequence[str], sides: Sequence[str]
) -> ShardItems:
    """Of these sources. Raises ConfigError for one whose samples have no fixed sides, and where nothing is
    left."""
    regions = [name for name in sources if manifest.sources[name].num_regions]
    if regions:
        raise ConfigError(
            f"{location}: {', '.join(regions)}: images with regions, of which each step draws another, are "
            "no items; name the other sources (--sources)"
        )
    counts = tuple(manifest.sources[name].num_samples for name in sources)
    if not sum(counts):
        raise DataError(f"{location}: no samples in {', '.join(sources)}")
    return ShardItems(
        location=location,
        sources=tuple(sources),
        counts=counts,
        sides=tuple(sides),
        shards=tuple(manifest.sources[name].fingerprint for name in sources),
    )


def _read(reader: ShardReader, source: str, sample: int) -> RawSample | DataError:
    try:
        return reader.read(source, sample)
    except DataError as error:
        return error


def _item(source: str, sample: int, side: str, raw: RawSample | DataError) -> CorpusItem | Unusable:
    if isinstance(raw, DataError):
        return Unusable(id=f"{source}/{sample}:{side}", reason=str(raw))
    name = f"{source}/{raw.address}:{side}"
    try:
        text = raw.record[side]["text"]
        if not isinstance(text, str):
            raise TypeError(f"text {text!r:.60}")
    except (LookupError, TypeError) as error:
        return Unusable(id=name, reason=f"{raw.address}.json: {side}: not a side of a sample: {error!r}")
    if (image := raw.images.get(side)) is None:
        return CorpusItem(id=name, text=text)
    found = EmbeddedImage(image.content, name=image.address)
    return CorpusItem(id=name, text=text, image=found, image_name=f"{source}/{image.address}")
