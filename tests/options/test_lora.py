"""LoRAs as text: strengths, names, block weights; paths with colons; the tags of prompts as A1111 reads them."""

from __future__ import annotations

import pytest

from hires.errors import RequestError
from hires.options.lora import BLOCK_LISTS, BLOCKS, LoraRef, parse_lora, parse_lora_tag

ONES = ",".join("1" * 12)
TWELVE = (1.0,) * 12


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("a/b.safetensors", LoraRef("a/b.safetensors")),
        ("a/b.safetensors:0.8", LoraRef("a/b.safetensors", 0.8)),
        ("a/b.safetensors:0.8:0.5", LoraRef("a/b.safetensors", 0.8, 0.5)),
        ("C:/b.safetensors", LoraRef("C:/b.safetensors")),
        (r"C:\b.safetensors:0.8:0", LoraRef(r"C:\b.safetensors", 0.8, 0.0)),
        ("1:2:3:4", LoraRef("1:2", 3.0, 4.0)),
        ("a:te=0.5", LoraRef("a", 1.0, 0.5)),
        ("a:unet=0.5", LoraRef("a", 0.5, 1.0)),
        ("a:0.7:unet=0.5", LoraRef("a", 0.5, 0.7)),
        ("a:0.7:te=0.5:unet=2", LoraRef("a", 2.0, 0.5)),
        (f"a:0.8:lbw={ONES}", LoraRef("a", 0.8, None, TWELVE)),
        (f"C:/a:0.8:0.5:lbw={ONES}", LoraRef("C:/a", 0.8, 0.5, TWELVE)),
        ("a=b:c=d", LoraRef("a=b:c=d")),
        ("a:-1", LoraRef("a", -1.0)),
    ],
)
def test_a_path_and_how_strongly(text: str, wanted: LoraRef) -> None:
    assert parse_lora(text) == wanted
    assert parse_lora(str(wanted)) == wanted, "and back"


def test_a_path_that_ends_like_a_strength_is_read_back() -> None:
    for ref in (LoraRef("a:1", 0.5), LoraRef("a:1", 0.5, None, TWELVE), LoraRef("a", 1 / 3, 0.1 + 0.2)):
        again = parse_lora(str(ref))
        assert (again.path, again.scale, again.text_strength, again.blocks) == (
            ref.path,
            ref.scale,
            ref.text_strength,
            ref.blocks,
        )
    assert str(LoraRef("x", 2.0)) == "x:2"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a:nan", "give a scale from -100 to 100"),
        ("a:0.5:inf", "give a scale from -100 to 100"),
        ("a:1e9", "give a scale from -100 to 100"),
        ("a:te=x", "te says 'x'; give a number"),
        ("a:lbw=1,0,1", r"lbw has 3 block weights; give 12 or 20 \(SDXL\), 17 or 26 \(SD1.5\)"),
        ("a:lbw=OUTALL", "lbw=OUTALL: give the weights as numbers"),
        (f"a:lbw=R,{ONES}", "lbw=R: a random weight is not supported"),
        (f"a:lbw={ONES[:-1]}nan", "lbw takes weights from -100 to 100"),
        ("a:0.5:dyn=8", "dyn= is not supported"),
        ("a:start=5", "start= is not supported"),
        ("a:unet=1:unet=2", "gives unet= twice"),
        ("a:0.8:0.5:unet=0.3", "gives both strengths and unet= too"),
        ("a:lbw=", "lbw=: give the weights as numbers"),
    ],
)
def test_what_is_no_strength_is_refused(text: str, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        parse_lora(text)


def test_numbers_of_any_size_and_blocks_that_are_none_are_refused() -> None:
    for value in (10**400, -(10**5000), float("nan")):
        with pytest.raises(RequestError, match="give a scale from -100 to 100"):
            LoraRef("a", value)
        with pytest.raises(RequestError, match="lbw takes weights"):
            LoraRef("a", 1.0, None, (value,) * 12)
    with pytest.raises(RequestError, match="lbw is 5"):
        LoraRef("a", 1.0, None, 5)  # type: ignore[arg-type]


def test_numbers_that_only_python_reads_belong_to_the_path() -> None:
    assert parse_lora("a:1_0") == LoraRef("a:1_0")
    assert parse_lora("a:٨") == LoraRef("a:٨")


def test_lists_of_block_weights_spread_to_their_blocks() -> None:
    for count, order in BLOCK_LISTS.items():
        ref = LoraRef("a", 0.5, 0.2, tuple(float(i) for i in range(1, count + 1)))
        assert len(order) == count and ref.block_weights.keys() == set(BLOCKS)
        assert {name: weight for name, weight in ref.block_weights.items() if weight} == {
            n: i for i, n in enumerate(order, start=1)
        }
        assert ref.text_strength == 0.2, "BASE weighs the text towers"
        assert ref.strength(order[1]) == 1.0 and ref.strength(None) == 0.5
    assert LoraRef("a", 0.5, 0.2, (0.0,) * 12).text_strength == 0
    assert LoraRef("a", 0.5).strength("IN04") == 0.5


@pytest.mark.parametrize(
    ("inside", "wanted", "left"),
    [
        ("style", LoraRef("style"), ()),
        ("style:0.8", LoraRef("style", 0.8), ()),
        ("style:0.8:0.5", LoraRef("style", 0.5, 0.8), ()),
        ("style:te=0.2", LoraRef("style", 0.2), ()),
        ("style:unet=0.2", LoraRef("style", 0.2, 1.0), ()),
        ("style:0.8:te=0:unet=0.3", LoraRef("style", 0.3, 0.0), ()),
        (f"style:1:lbw={ONES}", LoraRef("style", 1.0, None, TWELVE), ()),
        (f"style:1:{ONES}", LoraRef("style", 1.0, None, TWELVE), ()),
        ("style:1:1:8", LoraRef("style"), ("8",)),
        ("style:1:dyn=8:start=3", LoraRef("style"), ("dyn=8", "start=3")),
    ],
)
def test_a_tag_is_read_as_a1111_does(inside: str, wanted: LoraRef, left: tuple[str, ...]) -> None:
    assert parse_lora_tag(inside) == (wanted, left)


@pytest.mark.parametrize("inside", ["style:x", "style:1e5", "style:unet=", f"style:lbw={ONES},1"])
def test_a_tag_of_no_numbers_is_refused(inside: str) -> None:
    with pytest.raises(RequestError, match="loras style"):
        parse_lora_tag(inside)
