"""The work of all ranks: the negatives of every row of some subsets."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from agff.embedder import Embedder
from agff.errors import ConfigError
from agff.files import sha256_of
from data_pipeline.convert import rows_of_sources
from data_pipeline.corpora.corpus import CorpusItem
from data_pipeline.corpora.pairs import SIDES, PairItems, pair_items
from data_pipeline.layouts.mmeb_train import MmebTrain
from data_pipeline.work_blocks import BLOCKS_FOLDER, WorkBlocks
from launcher.embedding.corpus_vectors import HowToEncode, describe, settings_of_work, write_corpus_vectors
from launcher.embedding.vectors_folder import REJECTED_FILE, VectorsFolder
from launcher.mining.candidates import Candidates, candidates_of
from launcher.mining.ranking import best_candidates
from launcher.mining.rules import MiningRules, choose
from launcher.run.meeting import from_first_rank, together
from launcher.run.ranks import RankInfo

FORMAT = 1
MINING_FILE = "mining.json"
"""What was mined, by which rules, and what was left out; written last."""
QUERIES = 1024
"""Rows of a block: the unit of work. Fixed, as is a block of candidates, so that all similarities have the
same bits on any number of ranks."""


@dataclass(frozen=True, kw_only=True)
class Mining:
    """A model, loaded, and what it is to mine."""

    embedder: Embedder
    model: Path
    layout: MmebTrain
    rows: Mapping[str, int]
    """Of each subset."""
    rules: MiningRules
    how: HowToEncode
    out: Path

    @property
    def work(self) -> WorkBlocks:
        """Where the blocks are."""
        return WorkBlocks(self.out, settings_file=MINING_FILE)

    def settings(self) -> dict[str, Any]:
        """What decides the negatives, the bytes of the images aside. Reads the tables."""
        tables = {
            name: {"rows": count, "sha256": [sha256_of(path) for path in self.layout.tables(name)]}
            for name, count in self.rows.items()
        }
        values = {
            "format": FORMAT,
            "weights_sha256": self.embedder.weights_sha256,
            "settings": settings_of_work(self.embedder, self.how),
            "fusion": asdict(self.embedder.fusion),
            "rules": asdict(self.rules),
            "split": self.layout.split,
            "subsets": tables,
        }
        return dict(json.loads(json.dumps(values)))

    def blocks(self, subset: str) -> dict[str, range]:
        """Rows of each block by its name."""
        count = self.rows[subset]
        return {
            f"{subset}-{start:09d}": range(start, min(start + QUERIES, count))
            for start in range(0, count, QUERIES)
        }

    def pairs(self, subset: str) -> PairItems:
        """The items of a subset."""
        rows = self.layout.rows(subset, start=0, stop=self.rows[subset])
        folder = self.layout.root / subset
        tables = [sha256_of(path) for path in self.layout.tables(subset)]
        return pair_items(subset, rows, sides=SIDES, folder=folder, images=self.layout.root, tables=tables)


def chosen_rows(layout: MmebTrain, subsets: Sequence[str] | None, rules: MiningRules) -> dict[str, int]:
    """Rows of each subset. Raises DataError for tables that cannot be read, ConfigError, with a line for
    each, for subsets that have too few candidates."""
    rows = rows_of_sources(layout, subsets, None)
    findings = []
    for name, count in rows.items():
        found = pair_items(
            name,
            layout.rows(name, start=0, stop=count),
            sides=("target",),
            folder=layout.root,
            images=layout.root,
            tables=(),
        )
        num_targets = sum(isinstance(entry, CorpusItem) for entry in found.entries)
        if num_targets - 1 < rules.num_negatives + rules.skip_ranks:
            findings.append(
                f"{layout.root / name}: {num_targets} different targets, so at most "
                f"{max(num_targets - 1, 0)} negatives a query"
            )
    if findings:
        raise ConfigError(
            "\n".join(findings)
            + f"\n--num_negatives {rules.num_negatives} behind --skip_ranks {rules.skip_ranks} are more; "
            "lower them, or name the other subsets with --subsets"
        )
    return rows


def mine_subset(mining: Mining, subset: str, rank: RankInfo, device: torch.device) -> None:
    """Write the subset's blocks that are missing. Collective: every rank must call it. Raises AgffError on
    all ranks."""
    blocks, work = mining.blocks(subset), mining.work
    missing = from_first_rank(lambda: work.missing(list(blocks)))
    if not missing:
        return
    pairs = from_first_rank(lambda: mining.pairs(subset))
    folder = mining.out / BLOCKS_FOLDER / f"vectors-{subset}"
    description = from_first_rank(
        lambda: describe(
            mining.embedder, pairs, mining.how, model=mining.model, location=str(mining.layout.root)
        )
    )
    write_corpus_vectors(
        mining.embedder, pairs, folder, description, mining.how, rank, title=f"encode {subset}"
    )

    candidates = from_first_rank(lambda: candidates_of(pairs, _vector_of(pairs, folder)))

    def write() -> None:
        vectors = VectorsFolder(folder)
        for name in missing[rank.rank :: rank.world_size]:
            note = _negatives(mining, vectors, candidates, blocks[name], device)
            work.write(name, note, b"")

    together(write)
    from_first_rank(lambda: shutil.rmtree(folder))


def _vector_of(pairs: PairItems, folder: Path) -> dict[int, int]:
    """Entry of the pairs -> its row among the vectors; rejected ones have none."""
    lines = (folder / REJECTED_FILE).read_text(encoding="ascii").splitlines()
    rejected = {json.loads(line)["item"] for line in lines}
    usable = (place for place in range(pairs.num_items) if place not in rejected)
    return {place: row for row, place in enumerate(usable)}


def _negatives(
    mining: Mining, vectors: VectorsFolder, candidates: Candidates, block: range, device: torch.device
) -> dict[str, Any]:
    """{"negatives": {row of the table: [rows whose targets they are]}, "similarity", "positive", "dropped"}
    of the rows of a block."""
    own = [place for place, row in enumerate(candidates.rows) if row in block]
    found: dict[str, Any] = {"negatives": {}, "similarity": {}, "positive": {}, "dropped": {}}
    if not own:
        return found
    answers = [candidates.answers[place] for place in own]
    ranked = best_candidates(
        vectors.vectors[candidates.query[own]],
        vectors.vectors,
        candidates.vectors,
        positive_B=candidates.positive[own],
        excluded=answers,
        num_ranks=mining.rules.max_rank,
        beta=mining.embedder.fusion.beta,
        device=device,
    )
    num_answers = [len(each) for each in answers]
    allowed_B = len(candidates.vectors) - torch.tensor(num_answers)
    chosen = choose(ranked, mining.rules, num_allowed_B=allowed_B)
    found["dropped"] = {**chosen.dropped, "content": sum(num_answers) - len(own)}
    rows = zip(
        own,
        chosen.index_BK.tolist(),
        chosen.similarity_BK.tolist(),
        ranked.positive_B.tolist(),
        strict=True,
    )
    for place, indexes, similarities, positive in rows:
        row = candidates.rows[place]
        kept = [(index, x) for index, x in zip(indexes, similarities, strict=True) if index >= 0]
        found["negatives"][row] = [int(candidates.first_row[index]) for index, _ in kept]
        found["similarity"][row] = [x for _, x in kept]
        found["positive"][row] = positive
    return found
