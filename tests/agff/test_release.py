"""A release reproduces the model, refuses another one, and each damaged file of it has its own message."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import math
import re
import shutil
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from agff import contract
from agff.backbone import BackboneConfig, LoraConfig, choose_trainable, load_backbone
from agff.batch import Encoded, ModelInputs
from agff.contract import CONTRACT_FILE, FORMAT, Contract, fingerprints, read_contract, write_contract
from agff.embedder import Embedder
from agff.embedding_model import EmbeddingModel
from agff.errors import CheckpointError
from agff.lazy_tensor import of_tensor
from agff.model_card import TRAINED_BY, model_card
from agff.nested import Truncations
from agff.objectives import OBJECTIVES
from agff.objectives.contrastive import Contrastive
from agff.objectives.objective import Head, Objective
from agff.processor import ItemProcessor, ProcessorConfig
from agff.prompts import PromptConfig
from agff.release import MIN_COSINE, check_golden, golden_items, load
from agff.release_writer import save_release
from agff.similarity import FusionConfig
from tests.drawings import tiny_backbone

PROMPTS = PromptConfig(num_fine=2)


class Projection(Head):
    """Makes the embeddings itself, of another width."""

    is_released = True

    def __init__(self, hidden_size: int, width: int) -> None:
        super().__init__()
        self.project = nn.Linear(hidden_size, width, bias=False)

    def forward(self, states: Sequence[Tensor], inputs: ModelInputs, embedding_BMD: Tensor) -> Encoded:
        projected = self.project(embedding_BMD.to(self.project.weight.dtype))
        return {"embedding": nn.functional.normalize(projected.float(), dim=-1)}


@dataclass(frozen=True, kw_only=True)
class Projected(Contrastive):
    shared_width: int = 12

    def build_head(self, backbone_config: Any) -> Head:
        return Projection(backbone_config.get_text_config().hidden_size, self.shared_width)


def embedder(backbone: Path, *, lora: bool = False, objective: Objective | None = None) -> Embedder:
    """Weights large enough that every layer has its say: a vision block turns the vectors by 12 degrees."""
    torch.manual_seed(0)
    chosen = BackboneConfig(path=str(backbone), lora=LoraConfig(rank=2) if lora else None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = load_backbone(backbone, dtype=torch.float32, attention="sdpa")
        head = objective.build_head(base.config) if objective else None
        model = EmbeddingModel(choose_trainable(base, chosen), PROMPTS, head)
    torch.nn.init.normal_(model.prompted_embedding.vectors, std=0.05)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and "embed_tokens" not in name:
            torch.nn.init.normal_(parameter, std=0.1)
    processor = ItemProcessor.from_folder(backbone, prompts=PROMPTS, limits=ProcessorConfig())
    return Embedder(model, processor, FusionConfig(), objective=objective)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_backbone(tmp_path_factory.mktemp("release") / "backbone")


@pytest.fixture(scope="module")
def release(backbone: Path) -> Path:
    save_release(embedder(backbone), backbone.parent / "float32", origin={"step": 4})
    return backbone.parent / "float32"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_a_release_makes_the_vectors_of_the_model(
    backbone: Path, tmp_path: Path, lora: bool, dtype: torch.dtype
) -> None:
    trained = embedder(backbone, lora=lora)
    items = ["one red circle", *golden_items().values()]
    expected = trained.encode(items)
    save_release(trained, tmp_path / "release", origin={}, dtype=dtype)
    released = load(tmp_path / "release")
    assert released.model.backbone.dtype == dtype
    # float32: merged adapters sum in another order; bfloat16 has 8 bits of each weight and sum
    cosine = torch.cosine_similarity(released.encode(items), expected, dim=-1).min().item()
    assert cosine > (1 - 1e-6 if dtype == torch.float32 else 0.999)


def test_soft_tokens_in_the_vocabulary_are_not_rounded_to_the_backbones_format(
    backbone: Path, tmp_path: Path
) -> None:
    """Under LoRA the table is the backbone folder's, and published ones are in bfloat16."""
    trained = embedder(backbone)
    weights = {name: of_tensor(parameter) for name, parameter in trained.model.named_parameters()}
    [table] = [name for name in weights if name.endswith("embed_tokens.base.weight")]
    weights[table] = of_tensor(weights[table].read().bfloat16())
    save_release(trained, tmp_path, origin={}, weights=weights)
    released = load_file(tmp_path / "backbone/model.safetensors")
    [found] = [weight for name, weight in released.items() if name.endswith("embed_tokens.weight")]
    ids = json.loads((tmp_path / "1_MultiVectorMask/config.json").read_text())["keep_only_token_ids"]
    assert torch.equal(found[ids], trained.model.prompted_embedding.vectors)
    assert torch.equal(found[: min(ids)], weights[table].read().float()[: min(ids)])


def test_a_release_gives_the_truncations_it_was_trained_for(backbone: Path, tmp_path: Path) -> None:
    trained = embedder(backbone)
    trained.truncations = Truncations(dims=[8, 16], fine=[0, 1])
    items = list(golden_items().values())
    whole_NMD = trained.encode(items)
    save_release(trained, tmp_path / "release", origin={})
    assert "`dim` of 8, 16 and `num_fine` of 0, 1" in (tmp_path / "release" / "README.md").read_text()
    released = load(tmp_path / "release")
    assert released.truncations == Truncations(dims=[8, 16], fine=[0, 1])
    for dim, num_fine in itertools.product([None, 8, 16, 32], [None, 0, 1, 2]):
        found = released.encode(items, dim=dim, num_fine=num_fine)
        by_hand = whole_NMD[:, : 3 if num_fine is None else 1 + num_fine, : 32 if dim is None else dim]
        by_hand = by_hand / by_hand.norm(dim=-1, keepdim=True)
        torch.testing.assert_close(found, by_hand)
        assert released.encode([], dim=dim, num_fine=num_fine).shape == (0, *found.shape[1:])
    with pytest.raises(ValueError, match=r"dim=12 was not trained; this model was trained for 8, 16, 32$"):
        released.encode(items, dim=12)
    with pytest.raises(ValueError, match=r"num_fine=3 was not trained; this model was trained for 0, 1, 2$"):
        released.encode(items, num_fine=3)
    with pytest.raises(ValueError, match=r"num_fine=0 was not trained; this model was trained for 2$"):
        embedder(backbone).encode(items, num_fine=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_head_that_makes_the_embeddings_is_part_of_the_release(
    backbone: Path, tmp_path: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(OBJECTIVES, "projected", Projected)
    trained = embedder(backbone, objective=Projected(shared_width=10))
    expected = trained.encode(list(golden_items().values()))
    assert expected.shape == (3, 3, 10)
    save_release(trained, tmp_path / "release", origin={}, dtype=dtype)
    released = load(tmp_path / "release")
    assert released.objective == Projected(shared_width=10)
    found = released.encode(list(golden_items().values()))
    assert torch.cosine_similarity(found, expected, dim=-1).min() > 0.999
    assert released.encode([]).shape == (0, 3, 10)
    loaded = load(tmp_path / "release", check=False)
    assert loaded.model.head is not None
    torch.nn.init.normal_(next(loaded.model.head.parameters()))
    with pytest.raises(CheckpointError, match="does not reproduce its golden vectors"):
        check_golden(loaded, tmp_path / "release", dtype=str(dtype).removeprefix("torch."))
    save_file({"projekt.weight": torch.zeros(10, 16)}, tmp_path / "release" / "head.safetensors")
    with pytest.raises(CheckpointError, match=r"head.safetensors: project.weight is missing, must be .* ab"):
        load(tmp_path / "release", check=False)
    monkeypatch.delitem(OBJECTIVES, "projected")
    with pytest.raises(CheckpointError, match="objective=projected is not one of contrastive"):
        load(tmp_path / "release", check=False)


@pytest.mark.parametrize(
    ("num_fine", "objective", "says"),
    [
        (
            2,
            None,
            ["One global and 2 fine-grained vectors an item, compared by a log-sum-exp", "(beta 0.05)"],
        ),
        (0, None, ["One vector an item, compared by the cosine."]),
        (0, "mm_gem", ["One vector an item", "model.encode_regions(", "model.caption("]),
    ],
)
def test_the_card_describes_the_model_that_was_trained(
    release: Path, num_fine: int, objective: str | None, says: list[str]
) -> None:
    """Whatever it was trained with, the origin says."""
    contract = dataclasses.replace(
        read_contract(release),
        prompts=PromptConfig(num_fine=num_fine),
        objective=objective,
        objective_settings=dataclasses.asdict(OBJECTIVES[objective]()) if objective else {},
        origin={"objective": "mac"},
    )
    card = model_card(contract)
    assert all(text in card for text in says)
    assert "| `objective` | `mac` |" in card
    assert ("model.caption(" in card) == (objective == "mm_gem")
    assert "EGA" not in card


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_card_says_what_each_objective_trains(release: Path, name: str) -> None:
    """Also of those whose head is not released, so that the origin alone knows them."""
    assert TRAINED_BY.keys() == OBJECTIVES.keys()
    card = model_card(dataclasses.replace(read_contract(release), origin={"objective": name}))
    assert [each for each, sentence in TRAINED_BY.items() if sentence in card] == [name]


PARTS = {"decoder layer": "backbone.language_model.layers.1.", "vision block": "backbone.visual.blocks.0."}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("part", [*PARTS, "prompts"])
def test_another_layer_is_refused(backbone: Path, tmp_path: Path, part: str, dtype: str) -> None:
    """One layer of the loaded model has other weights of the same size, as of another checkpoint."""
    save_release(embedder(backbone), tmp_path / "release", origin={}, dtype=getattr(torch, dtype))
    loaded = load(tmp_path / "release", check=False)
    assert check_golden(loaded, tmp_path / "release", dtype=dtype) >= MIN_COSINE[dtype]
    prefix = PARTS.get(part, "backbone.language_model.embed_tokens.vectors")
    changed = [parameter for name, parameter in loaded.model.named_parameters() if name.startswith(prefix)]
    assert changed
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in changed:
            parameter.copy_(parameter.flatten()[torch.randperm(parameter.numel())].view_as(parameter))
    with pytest.raises(CheckpointError, match="does not reproduce its golden vectors: cosine") as caught:
        check_golden(loaded, tmp_path / "release", dtype=dtype)
    assert f"at least {MIN_COSINE[dtype]} in {dtype}" in str(caught.value)
    assert ("of a text" in str(caught.value)) == (part != "vision block"), "a text has no image"


def test_vectors_that_are_no_numbers_are_refused(release: Path) -> None:
    loaded = load(release)
    with torch.no_grad():
        loaded.model.prompted_embedding.vectors[0] = torch.nan
    with pytest.raises(
        CheckpointError, match="cosine nan of a text, nan of an image, nan of an image with a"
    ):
        check_golden(loaded, release, dtype="float32")


def test_a_turn_of_twenty_degrees_is_refused_and_one_of_half_a_degree_is_not(release: Path) -> None:
    """In the golden vectors themselves; the old bound, 0.05 a component, let the first one pass."""

    def turned(degrees: float) -> Embedder:
        class Turned(Embedder):
            def encode(self, *arguments: Any, **options: Any) -> torch.Tensor:
                found = super().encode(*arguments, **options)
                other = torch.randn(found.shape, generator=torch.Generator().manual_seed(0))
                other -= (other * found).sum(dim=-1, keepdim=True) * found
                angle = torch.deg2rad(torch.tensor(degrees))
                return found * angle.cos() + torch.nn.functional.normalize(other, dim=-1) * angle.sin()

        loaded = load(release)
        return Turned(loaded.model, loaded.processor, loaded.fusion)

    for dtype in MIN_COSINE:
        assert check_golden(turned(0.5), release, dtype=dtype) > 0.9999
        with pytest.raises(CheckpointError, match=r"cosine 0\.9396"):
            check_golden(turned(20), release, dtype=dtype)


# ------------------------------------------------------------------ damaged files

FILES = [
    CONTRACT_FILE,
    "README.md",
    "backbone/chat_template.jinja",
    "backbone/config.json",
    "backbone/model.safetensors",
    "backbone/preprocessor_config.json",
    "backbone/tokenizer.json",
    "backbone/tokenizer_config.json",
    "golden.safetensors",
    "prompts.safetensors",
]
FOR_OTHERS = [
    "1_MultiVectorMask/config.json",
    "2_Normalize/config.json",
    "backbone/1_Pooling/config.json",
    "backbone/2_Normalize/config.json",
    "backbone/config_sentence_transformers.json",
    "backbone/modules.json",
    "backbone/sentence_bert_config.json",
    "config_sentence_transformers.json",
    "modules.json",
]
"""What other libraries read of it: compared like the rest, and not read here."""


def other_type(path: Path) -> None:
    """Whole and readable, but something else."""
    if path.suffix == ".safetensors":
        save_file({"other": torch.zeros(3, dtype=torch.int64)}, path)
    else:
        path.write_text("[1, 2]")


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "missing": Path.unlink,
    "empty": lambda path: path.write_bytes(b""),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "garbage": lambda path: path.write_bytes(bytes(range(256)) * (path.stat().st_size // 256 + 1)),
    "other type": other_type,
}


def test_the_files_of_a_release_are_known(release: Path) -> None:
    found = {path.relative_to(release).as_posix() for path in release.rglob("*") if path.is_file()}
    assert found == {*FILES, *FOR_OTHERS}
    assert set(read_contract(release).files) == found - {CONTRACT_FILE, "README.md"}


def test_a_release_with_a_head_says_that_no_other_library_loads_it(
    backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its states are not its vectors, so nothing there may look as if they were."""
    monkeypatch.setitem(OBJECTIVES, "projected", Projected)
    trained = embedder(backbone, objective=Projected(shared_width=10))
    save_release(trained, tmp_path, origin={})
    found = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert not found & {*FOR_OTHERS, "backbone/chat_template.jinja"}
    tokenizer = (tmp_path / "backbone/tokenizer.json").read_text()
    assert "agff_prompt" not in tokenizer
    assert (
        "The head of projected makes the vectors, and no other library has it"
        in (tmp_path / "README.md").read_text()
    )


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_named(release: Path, tmp_path: Path, name: str, damage: str) -> None:
    shutil.copytree(release, tmp_path / "release")
    DAMAGES[damage](tmp_path / "release" / name)
    if name == "README.md":
        load(tmp_path / "release")
        return
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path / "release")
    assert str(caught.value).startswith(str(tmp_path / "release")), "the address comes first"
    assert name in str(caught.value)
    assert "convert" in str(caught.value), "and what to do last"
    with contextlib.suppress(CheckpointError):  # nor may a library's own error come through unlooked
        load(tmp_path / "release", check=False)


def test_all_damaged_files_are_listed(release: Path, tmp_path: Path) -> None:
    shutil.copytree(release, tmp_path / "release")
    for name in read_contract(release).files:
        DAMAGES["empty"](tmp_path / "release" / name)
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path / "release")
    lines = str(caught.value).splitlines()
    assert [line.partition(": found 0 bytes")[0] for line in lines[:-1]] == [
        str(tmp_path / "release" / name) for name in read_contract(release).files
    ]


def test_large_files_are_compared_by_size(
    release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contract, "MAX_HASHED_BYTES", 0)
    shutil.copytree(release, tmp_path / "release")
    weights = tmp_path / "release/backbone/model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-40_000] + bytes(40_000))
    with pytest.raises(CheckpointError, match="does not reproduce its golden vectors"):
        load(tmp_path / "release")
    weights.write_bytes(content[:-1])
    with pytest.raises(
        CheckpointError, match=rf"found {len(content) - 1} bytes, written were {len(content)}"
    ):
        load(tmp_path / "release")


def edited(release: Path, out: Path, edit: Callable[[dict[str, Any]], Any]) -> Path:
    shutil.copytree(release, out)
    values = json.loads((out / CONTRACT_FILE).read_text())
    edit(values)
    (out / CONTRACT_FILE).write_text(json.dumps(values))
    return out


def leaves(values: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    if not isinstance(values, dict) or not values:
        return [path]
    own = [path] if path else []
    return own + [leaf for name, value in values.items() for leaf in leaves(value, (*path, name))]


def test_each_value_of_the_contract_is_checked(release: Path, tmp_path: Path) -> None:
    """Absent, or of another type: each is named, and nothing falls back to a default."""
    values = json.loads((release / CONTRACT_FILE).read_text())
    free = ("origin", "files", "versions")  # mappings whose keys the release chooses
    tried = 0
    for path in leaves(values):
        if len(path) > 1 and path[0] in free:
            continue
        for change in ("absent", "other type"):

            def edit(values: dict[str, Any], path: Any = path, change: str = change) -> None:
                for name in path[:-1]:
                    values = values[name]
                if change == "absent":
                    del values[path[-1]]
                else:
                    values[path[-1]] = ["?"]

            with pytest.raises(CheckpointError) as caught:
                read_contract(edited(release, tmp_path / f"{tried}", edit))
            assert ".".join(path) in str(caught.value)
            assert CONTRACT_FILE in str(caught.value)
            tried += 1
    assert tried > 20


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda values: values.update(dtype="float33"), "dtype=\"float33\" must be 'float32' or 'bfloat16'"),
        (lambda values: values["prompts"].update(num_fine=True), "prompts.num_fine=true must be int"),
        (lambda values: values["prompts"].update(num_fine="2"), 'prompts.num_fine="2" must be int'),
        (lambda values: values["fusion"].update(beta=math.nan), "fusion.beta=NaN must be float"),
        (lambda values: values["nested"].update(dims=[8, 8]), "nested.dims=[8, 8] must increase"),
        (lambda values: values["nested"].update(fine=[0.5]), "nested.fine=[0.5] must be list[int]"),
        (lambda values: values["prompts"].update(num_fine=-1), "prompts.num_fine=-1 must be >= 0"),
        (lambda values: values["prompts"].update(num_fine=3), "`vectors` is torch.float32 [3, 32], must be"),
        (lambda values: values.update(more=1), "more unknown to this version"),
        (lambda values: values.update(format=FORMAT + 1), f"format {FORMAT + 1} is newer than {FORMAT}"),
        (lambda values: values.update(format=1), f"format 1 is older than {FORMAT}.*convert the checkpoint"),
        (lambda values: values.update(format="2"), f"`format` must be the number {FORMAT}"),
    ],
)
def test_a_contract_that_cannot_be_kept(
    release: Path, tmp_path: Path, edit: Callable[[dict[str, Any]], Any], says: str
) -> None:
    pattern = says if ".*" in says else re.escape(says)
    with pytest.raises(CheckpointError, match=pattern):
        load(edited(release, tmp_path / "release", edit))


def test_what_is_no_release(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no release here \(agff_config.json is missing\); make"):
        load(tmp_path)
    with pytest.raises(CheckpointError, match="absent: no such folder"):
        load(tmp_path / "absent")


def test_weights_of_another_shape_are_named(release: Path, tmp_path: Path) -> None:
    """With hashes that fit: as a release that somebody put together from two."""
    shutil.copytree(release, tmp_path / "release")
    path = tmp_path / "release/backbone/model.safetensors"
    weights = load_file(path)
    name = next(name for name in weights if name.endswith("layers.1.mlp.up_proj.weight"))
    weights[name] = weights[name][:-1].contiguous()
    save_file(weights, path, metadata={"format": "pt"})
    values = {**vars(read_contract(release)), "files": {}}
    (tmp_path / "release" / CONTRACT_FILE).unlink()
    values["files"] = fingerprints(tmp_path / "release")
    write_contract(tmp_path / "release", Contract(**values))
    with pytest.raises(CheckpointError, match=r"backbone: .*convert the checkpoint again"):
        load(tmp_path / "release")
