"""Train and judge settings, several at a time, and keep what was found."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import multiprocessing
import random
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from agff.similarity import pattern_shares
from tests.benchmarks.ablation.scenes import ATTRIBUTES, Split, minimal_pairs, retrieval_pool, training_batch
from tests.benchmarks.ablation.settings import Setting
from tests.benchmarks.ablation.tower import Tower
from tests.benchmarks.ablation.variants import is_own_similarity, similarity, training_loss

ROOT = Path(__file__).parents[3]
CODE = (
    *(f"tests/benchmarks/ablation/{name}.py" for name in ("scenes", "tower", "variants", "runs")),
    *(f"agff/{name}.py" for name in ("fused_loss", "losses", "negatives", "similarity")),
    "agff/objectives/contrastive.py",
)
"""What a result depends on beside its setting."""
NUM_EDITS = 3
"""Of each scene in the pool that is searched."""
Measures = dict[str, float]


@dataclass(frozen=True)
class Run:
    """One training."""

    setting: Setting
    seed: int

    @property
    def key(self) -> str:
        """The same for the same setting, seed and code."""
        code = [hashlib.sha256((ROOT / name).read_bytes()).hexdigest() for name in CODE]
        text = json.dumps([dataclasses.asdict(self.setting), self.seed, torch.__version__, *code])
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def all_measures(runs: Sequence[Run], results: Path, *, num_workers: int, what: str) -> dict[Run, Measures]:
    """The measures of every run: those that `results` has, and the others trained now and added to it."""
    runs = list(dict.fromkeys(runs))
    known = _known(results)
    keys = {run: run.key for run in runs}
    found = {run: known[key] for run, key in keys.items() if key in known}
    missing = [run for run in runs if run not in found]
    bar = tqdm(total=len(runs), initial=len(found), desc=what, unit="run", file=sys.stderr)
    if not missing:
        bar.close()
        return found
    results.parent.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(
        num_workers, mp_context=context, initializer=torch.set_num_threads, initargs=(1,)
    )
    with bar, pool, results.open("a", encoding="utf-8") as file:
        futures = {pool.submit(measures_of, run): run for run in missing}
        try:
            for future in as_completed(futures):
                run, measures = futures[future], future.result()
                line = {"key": keys[run], **dataclasses.asdict(run), "measures": measures}
                file.write(json.dumps(line) + "\n")
                file.flush()
                found[run] = measures
                bar.update()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return found


def _known(results: Path) -> dict[str, Measures]:
    if not results.exists():
        return {}
    whole = [text for text in results.read_text(encoding="utf-8").splitlines(True) if text.endswith("\n")]
    return {line["key"]: line["measures"] for line in map(json.loads, whole)}


def measures_of(run: Run) -> Measures:
    """Train, then judge; percentages but for cosines. Deterministic on one thread."""
    start = time.process_time()
    tower = trained(run)
    return {**judged(tower, run.setting), "processor_s": time.process_time() - start}


def trained(run: Run) -> Tower:
    """The tower after all steps. The seed decides weights, scenes and noise, whatever the setting."""
    setting = run.setting
    torch.manual_seed(run.seed)
    tower = Tower(num_fine=setting.num_fine, dim=setting.dim)
    rng, noise = random.Random(run.seed), torch.Generator().manual_seed(run.seed)
    optimizer = torch.optim.AdamW(tower.parameters(), weight_decay=0.01, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        setting.learning_rate,
        total_steps=setting.num_steps + 1,
        pct_start=0.1,
        cycle_momentum=False,
    )
    for _ in range(setting.num_steps):
        captions, images = tower.both(training_batch(rng, num_scenes=setting.num_scenes), noise)
        optimizer.zero_grad()
        training_loss(captions, images, setting).backward()
        optimizer.step()
        schedule.step()
    return tower.eval()


@torch.no_grad()
def judged(tower: Tower, setting: Setting) -> Measures:
    """Every measure. The scenes are the same for every run."""
    measures = {}
    for split in ("validation", "test"):
        measures |= {f"{split}/{name}": value for name, value in _retrieval(tower, setting, split).items()}
    for attribute in ATTRIBUTES:
        for kind, share in _minimal_pairs(tower, setting, attribute).items():
            measures[f"pairs/{kind}/{attribute}"] = share
    return measures


def _retrieval(tower: Tower, setting: Setting, split: Split) -> Measures:
    """Precision@1 of captions in search of their images; a tie is a miss. And what the vectors look like."""
    pool = retrieval_pool(
        random.Random(f"pool {split}"), num_scenes=setting.num_judged, num_edits=NUM_EDITS, split=split
    )
    images = tower.images(pool, torch.Generator().manual_seed(0))
    measures: Measures = {}
    for kind, scenes in {"full": pool.fully_captioned(), "part": pool}.items():
        captions = tower.captions(scenes)[: setting.num_judged]
        measures[kind] = precision_at_1(similarity(captions, images, setting))
        measures[f"{kind}_global"] = precision_at_1(captions[:, 0] @ images[:, 0].T)
        if setting.num_fine > 0 and is_own_similarity(setting):
            own = images[: setting.num_judged]
            measures[f"{kind}_global_share"] = 100 * float(
                pattern_shares(captions, own, beta=setting.beta)[0]
            )
        if setting.num_fine > 1:
            measures[f"{kind}_caption_cosine"] = fine_cosine(captions)
            measures["image_cosine"] = fine_cosine(images)
    return measures


def precision_at_1(similarity_BC: Tensor) -> float:
    """Percentage of rows whose own column, i of row i, is above every other."""
    truth_B = similarity_BC.diagonal().clone()
    others_BC = similarity_BC.clone().fill_diagonal_(-torch.inf)
    return 100 * float((truth_B > others_BC.amax(dim=1)).float().mean())


def fine_cosine(vectors_BMD: Tensor) -> float:
    """Mean cosine between two fine vectors of one item."""
    fine_BKD = vectors_BMD[:, 1:]
    count = fine_BKD.shape[1]
    cosine_BKK = fine_BKD @ fine_BKD.transpose(1, 2)
    return float((cosine_BKK.sum() - cosine_BKK.diagonal(dim1=1, dim2=2).sum()) / len(fine_BKD)) / (
        count * (count - 1)
    )


def _minimal_pairs(tower: Tower, setting: Setting, attribute: str) -> Measures:
    """Percentage of pairs in which both captions pick their image out of the two; chance is 25."""
    rng, noise = random.Random(f"pairs {attribute}"), torch.Generator().manual_seed(0)
    two = minimal_pairs(rng, attribute, num_pairs=setting.num_judged, split="test")
    images = [tower.images(scenes, noise) for scenes in two]
    shares = {}
    for kind in ("full", "part"):
        captions = [tower.captions(s.fully_captioned() if kind == "full" else s) for s in two]
        score = [[similarity(text, image, setting).diagonal() for image in images] for text in captions]
        both_right = (score[0][0] > score[0][1]) & (score[1][1] > score[1][0])
        shares[kind] = 100 * float(both_right.float().mean())
    return shares
