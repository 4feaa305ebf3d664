"""The ablation's scenes, variants and report are what they say; two tiny trainings show that it runs."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from agff.losses import info_nce
from agff.similarity import fused_similarity
from tests.benchmarks.ablation import runs as runs_module
from tests.benchmarks.ablation.__main__ import first_runs
from tests.benchmarks.ablation.report import SEEDS, Difference, best_on_validation, markdown, tuned
from tests.benchmarks.ablation.runs import Run, all_measures, measures_of, precision_at_1, trained
from tests.benchmarks.ablation.scenes import (
    ABSENT,
    ATTRIBUTES,
    Scenes,
    bitmaps,
    looks,
    minimal_pairs,
    retrieval_pool,
    split_of,
    training_batch,
)
from tests.benchmarks.ablation.settings import AGFF, FACTORS, TUNED, VARIANTS, WIDE, Setting
from tests.benchmarks.ablation.tower import Tower
from tests.benchmarks.ablation.variants import similarity, training_loss, varied_similarity

TINY = Setting(num_fine=2, dim=4, num_steps=3, num_scenes=4, num_judged=6)


@pytest.fixture(autouse=True)
def _one_thread() -> object:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def things_of(scenes: Scenes) -> list[list[tuple[int, ...]]]:
    return [[tuple(thing) for thing in scene.tolist() if thing[0] != ABSENT] for scene in scenes.things]


def num_different_values(before: Scenes, after: Scenes) -> list[int]:
    assert np.array_equal(before.present, after.present)
    return (before.things != after.things).sum(axis=(1, 2)).tolist()


def test_every_colour_and_shape_has_one_pair_in_each_held_out_split() -> None:
    splits = [[split_of(colour, shape) for shape in range(8)] for colour in range(8)]
    for line in [*splits, *zip(*splits, strict=True)]:
        assert sorted(line) == ["test", *["train"] * 6, "validation"]


def test_no_object_is_another_one_turned() -> None:
    turned = {np.rot90(bitmap, turns).tobytes() for bitmap in bitmaps() for turns in range(4)}
    assert len(turned) == ATTRIBUTES["shape"] * ATTRIBUTES["orientation"]
    drawn = looks().flatten(0, -2)
    assert len(drawn.unique(dim=0)) == math.prod(ATTRIBUTES.values()) // ATTRIBUTES["place"]


@pytest.mark.parametrize("seed", range(5))
def test_training_never_sees_a_held_out_combination(seed: int) -> None:
    scenes = things_of(training_batch(random.Random(seed), num_scenes=64))
    assert {split_of(*thing[:2]) for scene in scenes for thing in scene} == {"train"}


@pytest.mark.parametrize("seed", range(5))
def test_an_edit_of_training_changes_one_attribute_of_a_named_object(seed: int) -> None:
    batch = training_batch(random.Random(seed), num_scenes=64)
    before, after = (Scenes(batch.things[half], batch.named[half]) for half in (slice(64), slice(64, 128)))
    assert num_different_values(before, after) == [1] * 64
    changed = (before.things != after.things).any(axis=2)
    assert (changed <= before.named).all()
    assert np.array_equal(before.named, after.named)


@pytest.mark.parametrize("attribute", ATTRIBUTES)
def test_a_minimal_pair_differs_in_that_attribute_alone(attribute: str) -> None:
    before, after = minimal_pairs(random.Random(0), attribute, num_pairs=40, split="test")
    assert num_different_values(before, after) == [1] * 40
    axis = list(ATTRIBUTES).index(attribute)
    assert (before.things[:, 0, axis] != after.things[:, 0, axis]).all()


def fits(caption: list[tuple[int, ...]], scene: list[tuple[int, ...]]) -> bool:
    return set(caption) <= set(scene)


def captions_of(scenes: Scenes) -> list[list[tuple[int, ...]]]:
    things = things_of(scenes)
    return [scene[: int(n.sum())] for scene, n in zip(things, scenes.named, strict=True)]


@pytest.mark.parametrize(
    "scenes",
    [
        training_batch(random.Random(0), num_scenes=64),
        retrieval_pool(random.Random(0), num_scenes=64, num_edits=3, split="test"),
        retrieval_pool(random.Random(0), num_scenes=64, num_edits=3, split="validation"),
    ],
    ids=["training", "test", "validation"],
)
def test_a_caption_fits_its_own_scene_alone(scenes: Scenes) -> None:
    images = things_of(scenes)
    for captions in (captions_of(scenes), captions_of(scenes.fully_captioned())):
        fitting = [[i for i, image in enumerate(images) if fits(caption, image)] for caption in captions]
        assert fitting == [[i] for i in range(len(images))]


def test_objects_of_a_scene_are_in_different_places_and_2_to_4() -> None:
    pool = retrieval_pool(random.Random(0), num_scenes=64, num_edits=3, split="test")
    for scene in things_of(pool) + things_of(training_batch(random.Random(1), num_scenes=64)):
        assert 2 <= len(scene) <= 4
        assert len({thing[-1] for thing in scene}) == len(scene)


@pytest.mark.parametrize("split", ["validation", "test"])
def test_the_named_object_of_a_judged_scene_is_held_out(split: str) -> None:
    pool = things_of(retrieval_pool(random.Random(0), num_scenes=64, num_edits=0, split=split))
    assert {split_of(*scene[0][:2]) for scene in pool} == {split}
    assert {split_of(*thing[:2]) for scene in pool for thing in scene[1:]} == {"train"}


def test_scenes_with_too_few_objects_left_are_an_error() -> None:
    with pytest.raises(ValueError, match="too few are left of split test"):
        retrieval_pool(random.Random(0), num_scenes=8 * 3 * 4 * 9 + 1, num_edits=0, split="test")


def test_the_global_vector_is_the_same_whatever_k() -> None:
    """As in the project's model; so K = 0 is the same tower without fine prompts."""
    scenes = training_batch(random.Random(0), num_scenes=4)
    torch.manual_seed(0)
    many = Tower(num_fine=3, dim=4)
    one = Tower(num_fine=0, dim=4)
    one.load_state_dict({**many.state_dict(), "prompts_MH": many.prompts_MH[:1]})
    torch.testing.assert_close(many.captions(scenes)[:, :1], one.captions(scenes))


def test_a_caption_says_nothing_of_what_it_does_not_name() -> None:
    pool = retrieval_pool(random.Random(0), num_scenes=4, num_edits=0, split="test")
    alone = Scenes(np.where(pool.named[..., None], pool.things, ABSENT), pool.named)
    tower = Tower(num_fine=1, dim=4)
    torch.testing.assert_close(tower.captions(pool), tower.captions(alone))


def vectors(count: int, seed: int) -> Tensor:
    drawn = torch.randn(count, 4, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.nn.functional.normalize(drawn, dim=-1)


def test_the_varied_similarity_without_variation_is_the_projects() -> None:
    ours = varied_similarity(
        vectors(5, 0), vectors(6, 1), beta=0.05, outer_beta=0.05, aligned=False, global_weight=0.25
    )
    torch.testing.assert_close(ours, fused_similarity(vectors(5, 0), vectors(6, 1), beta=0.05))


def test_variations_equal_loops() -> None:
    query, target, beta, outer, weight = vectors(3, 0), vectors(3, 1), 0.05, 0.2, 0.4
    ours = varied_similarity(query, target, beta=beta, outer_beta=outer, aligned=True, global_weight=weight)
    for i in range(3):
        for j in range(3):
            pair = (query[i] @ target[j].T).tolist()

            def softly(values: list[float]) -> float:
                return beta * math.log(sum(math.exp(value / beta) for value in values) / len(values))

            patterns = [
                softly([row[0] for row in pair[1:]]),
                softly(pair[0][1:]),
                softly([pair[m][m] for m in (1, 2, 3)]),
            ]
            total = weight * math.exp(pair[0][0] / outer)
            total += sum((1 - weight) / 3 * math.exp(pattern / outer) for pattern in patterns)
            assert float(ours[i, j]) == pytest.approx(outer * math.log(total))


def test_the_objective_and_the_varied_road_compute_the_same_loss() -> None:
    """The first is taken where nothing varies, so a difference between the two is the variation's alone."""
    caption, image = vectors(6, 0), vectors(6, 1)
    scores = similarity(caption, image, AGFF)
    positive = torch.arange(6)
    both = [info_nce(side, positive, temperature=AGFF.temperature).mean() for side in (scores, scores.T)]
    torch.testing.assert_close(training_loss(caption, image, AGFF), (both[0] + both[1]) / 2)


def test_llaves_weights_sharpen_the_negatives_without_gradient() -> None:
    """logit of a negative: s / tau + 9 s, the second without gradient; of the positive: s / tau."""
    setting = replace(Setting(num_fine=0), hardness_weight=9.0)
    caption, image = vectors(5, 0)[:, :1].requires_grad_(), vectors(5, 1)[:, :1]
    scores = caption[:, 0] @ image[:, 0].T
    logits = scores / setting.temperature + 9 * (scores * (1 - torch.eye(5))).detach()
    wanted = -(logits.log_softmax(1).diagonal().mean() + logits.log_softmax(0).diagonal().mean()) / 2
    ours = training_loss(caption, image, setting)
    torch.testing.assert_close(ours, wanted)
    gradients = [torch.autograd.grad(loss, caption, retain_graph=True)[0] for loss in (ours, wanted)]
    torch.testing.assert_close(*gradients)


def test_a_nested_loss_on_the_global_vectors_is_the_loss_of_one_vector() -> None:
    caption, image = vectors(5, 0), vectors(5, 1)
    nested = training_loss(caption, image, replace(AGFF, nested_global=3.0))
    alone = training_loss(caption[:, :1], image[:, :1], replace(AGFF, num_fine=0))
    torch.testing.assert_close(nested, (training_loss(caption, image, AGFF) + 3 * alone) / 4)


def test_equal_floats_are_equal_and_families_have_equally_many_tries() -> None:
    assert WIDE.dim == AGFF.dim * (1 + AGFF.num_fine)
    assert {len(of_family) for of_family in TUNED.values()} == {9}
    assert all(len(set(of_family.values())) == 9 for of_family in TUNED.values())


def test_a_tie_is_a_miss() -> None:
    assert precision_at_1(torch.tensor([[1.0, 1.0], [0.0, 2.0]])) == 50.0


def test_a_random_similarity_is_at_chance() -> None:
    """1 of 50, with 4 standard errors of 2,000 rows."""
    generator = torch.Generator().manual_seed(0)
    shares = [precision_at_1(torch.rand(50, 50, generator=generator)) for _ in range(40)]
    chance = 100 / 50
    assert abs(sum(shares) / 40 - chance) < 4 * math.sqrt(chance * (100 - chance) / 2000)


def test_the_t_interval_equals_a_worked_example() -> None:
    """Differences 1, 2, 6: mean 3, s.d. sqrt(7), t(0.975, 2) = 4.303."""
    found = Difference.of([11.0, 22.0, 36.0], [10.0, 20.0, 30.0])
    assert found.mean == pytest.approx(3)
    assert found.half_width == pytest.approx(4.303 * math.sqrt(7 / 3))
    assert str(found) == "+3.0 ± 6.6"


def test_the_best_setting_is_chosen_without_the_test_split() -> None:
    tried = {"a": TINY, "b": replace(TINY, beta=0.1)}
    values = {"a": (10.0, 99.0), "b": (20.0, 1.0)}
    found = {
        Run(setting, 0): {
            "validation/full": values[name][0],
            "validation/part": 0.0,
            "test/full": values[name][1],
            "test/part": 99.0,
        }
        for name, setting in tried.items()
    }
    assert best_on_validation(tried, found, [0]) == "b"


def test_two_trainings_of_a_seed_are_equal_and_another_seed_differs() -> None:
    first, again, other = (measures_of(Run(TINY, seed)) for seed in (0, 0, 1))
    del first["processor_s"], again["processor_s"]
    assert first == again
    weights = [trained(Run(TINY, seed)).pixels.weight for seed in (0, 0, 1)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert other.keys() - {"processor_s"} == first.keys()


def test_found_results_are_kept_unless_setting_seed_or_code_differ(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results, run = tmp_path / "results.jsonl", Run(TINY, 0)
    first = all_measures([run], results, num_workers=1, what="runs")
    with results.open("a") as file:
        file.write('{"key": "cut short')
    assert all_measures([run, run], results, num_workers=1, what="runs") == first
    assert json.loads(results.read_text().splitlines()[0])["seed"] == 0
    others = {Run(TINY, 1).key, Run(replace(TINY, beta=0.1), 0).key}
    monkeypatch.setattr(runs_module, "CODE", runs_module.CODE[1:])
    assert len({run.key, *others}) == 3
    assert run.key not in results.read_text()


def test_the_report_holds_every_setting_and_says_what_it_does_not_show() -> None:
    names = ("full", "part", "full_global", "part_global")
    measures = {f"{split}/{name}": 1.0 for split in ("validation", "test") for name in names}
    measures |= {f"pairs/{kind}/{attribute}": 1.0 for kind in ("full", "part") for attribute in ATTRIBUTES}
    found = dict.fromkeys(first_runs(), measures)
    best = tuned(found, TUNED, [0, 1, 2])
    found |= {Run(setting, seed): measures for setting in best.values() for seed in SEEDS}
    report = markdown(found, best, origin="today", command="make ablation")
    for name in (*FACTORS, *VARIANTS, *best, *(name for tried in TUNED.values() for name in tried)):
        assert f"| {name} " in report
    assert "does not" in report
