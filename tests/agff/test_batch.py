from __future__ import annotations

import pytest
import torch
from PIL import Image

from agff.batch import MMEB_TEXTS, Batch, Item, TextRule, instructed_text, text_problem, without_placeholder
from agff.errors import ConfigError, DataError

IMAGE = Image.new("RGB", (56, 56), "red")
WHAT = "<|image_1|>\nWhat is it?\n"


@pytest.mark.parametrize(
    ("text", "complete"),
    [
        ("", "<|image_1|>\nRepresent the given image.\n"),
        (" \n", "<|image_1|>\nRepresent the given image.\n"),
        ("What is it?", WHAT),
        ("What is it?\n", WHAT),
        ("\n What is it?\n\n", WHAT),
        (WHAT, WHAT),
        ("a <|image_1|> b", "a <|image_1|> b"),
        ("<|image_1|>\n", "<|image_1|>\n"),
        ("{text}", "<|image_1|>\n{text}\n"),
    ],
)
def test_the_text_beside_an_image(text: str, complete: str) -> None:
    assert MMEB_TEXTS.beside_image(text) == complete
    assert MMEB_TEXTS.beside_image(complete) == complete


def test_instructions_follow_the_same_rule() -> None:
    for is_query in (True, False):
        assert instructed_text("What is it?", "", is_query=is_query, has_image=True) == WHAT
        assert instructed_text("<|image_1|> What", " is it?\n", is_query=is_query, has_image=True) == WHAT
        assert instructed_text("", "", is_query=is_query, has_image=True) == MMEB_TEXTS.image_alone
    assert instructed_text("Find:", "a dog", is_query=True, has_image=False) == "Find: a dog\n"
    assert instructed_text("Find:", "a dog", is_query=False, has_image=False) == "a dog"
    assert instructed_text("", "", is_query=True, has_image=False) == ""


def test_a_text_whose_image_is_absent_keeps_the_line_break_that_ends_an_instruction() -> None:
    assert without_placeholder("<|image_1|>\nFind: a dog\n") == "Find: a dog\n"
    assert without_placeholder("see <|image_1|> here\n") == "see  here\n"
    assert without_placeholder("a dog") == "a dog"


def test_a_release_may_have_another_rule() -> None:
    rule = TextRule(image_alone="<|image_1|>", image_with_text="{text}: <|image_1|>")
    assert rule.beside_image("") == "<|image_1|>"
    assert rule.beside_image("this\n") == "this: <|image_1|>"
    for wrong in ("no place {text}", "<|image_1|><|image_1|> {text}", "<|image_1|>", 3):
        with pytest.raises(ConfigError, match=r"^texts.image_with_text="):
            TextRule(image_with_text=wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"^texts.image_alone='x' must be a text with <\|image_1\|> once"):
        TextRule(image_alone="x")


@pytest.mark.parametrize(
    ("text", "has_image", "problem"),
    [
        (
            "no place",
            True,
            "<|image_1|> appears 0 times in text 'no place'; beside an image it must appear once",
        ),
        ("<|image_1|> <|image_1|>", True, "<|image_1|> appears 2 times in text"),
        (
            "<|image_1|> a",
            False,
            "appears 1 times in text '<|image_1|> a'; without an image it must not appear",
        ),
        ("bad \ud83d", False, r"text 'bad \ud83d' holds half a surrogate pair at character 4"),
        (5, False, "a text must be a str, found int 5"),
        (None, False, "a text must be a str, found NoneType None"),
        (b"a", False, "a text must be a str, found bytes b'a'"),
        (["a"], True, "a text must be a str, found list ['a']"),
    ],
)
def test_what_is_no_text_of_an_item(text: object, has_image: bool, problem: str) -> None:
    assert problem in str(text_problem(text, has_image=has_image))
    for address, start in (("s.tar:k: query", "s.tar:k: query: "), ("", "")):
        with pytest.raises(DataError) as caught:
            Item(text=text, image=IMAGE if has_image else None, address=address)  # type: ignore[arg-type]
        assert str(caught.value) == start + str(text_problem(text, has_image=has_image))


def test_items_are_equal_wherever_they_come_from() -> None:
    assert Item(text="a", address="here") == Item(text="a", address="there")


def test_gradients_of_a_row_that_items_share_are_summed_in_the_same_order_every_time() -> None:
    """Else a resumed run would not be that of the first time, bit for bit."""
    num_pairs, generator = 2048, torch.Generator().manual_seed(0)
    ids_B = torch.arange(num_pairs)
    row_of_item_R = torch.randint(0, 40, (2 * num_pairs,), generator=generator)
    batch = Batch(
        chunks=(),
        row_of_item_R=row_of_item_R,
        query_ids_B=ids_B,
        target_ids_B=ids_B,
        negative_ids_N=ids_B[:0],
        addresses=("",) * num_pairs,
        filler={},
    )
    rows = torch.randn(40, 2, 512, generator=generator, requires_grad=True)
    weights = torch.randn(2 * num_pairs, 2, 512, generator=generator)
    found, num_threads = [], torch.get_num_threads()
    torch.set_num_threads(2)  # with one there is one order
    for _ in range(10):
        query, target, negative = (side["embedding"] for side in batch.split({"embedding": rows}))
        assert negative.shape == (0, 2, 512)
        items = torch.cat([query, target])
        assert torch.equal(items, rows[row_of_item_R])
        found += torch.autograd.grad((items * weights).sum(), rows)
    torch.set_num_threads(num_threads)
    assert all(torch.equal(gradient, found[0]) for gradient in found)
    expected = torch.zeros(40, 2, 512, dtype=torch.float64)
    for row, weight in zip(row_of_item_R.tolist(), weights, strict=True):
        expected[row] += weight
    torch.testing.assert_close(found[0].double(), expected, rtol=1e-5, atol=1e-4)
