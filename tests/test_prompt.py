"""Prompts against the released format: exact text, exact ids."""

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from llama3v_mlx.prompt import Processor
from llama3v_mlx.prompt_tokens import PromptTokens
from llama3v_mlx.tiling import TiledImage

RED = Image.new("RGB", (50, 50), "red")  # 50² pixels are one tile for the demo
WIDE = Image.new("RGB", (400, 100), "blue")  # four slices in a row


@pytest.fixture(scope="module")
def processor(demo) -> Processor:
    return demo[1]


def text_of(processor: Processor, ids: list[int]) -> str:
    return processor.tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def trained_form(processor: Processor, *grids: tuple[int, int] | None) -> list[str]:
    """Return the released text of image blocks, from the description of the format."""
    tile = "<image>" + "<unk>" * processor.num_queries + "</image>"
    return [
        tile if grid is None else tile + "<slice>" + "\n".join([tile * grid[0]] * grid[1]) + "</slice>"
        for grid in grids
    ]


def test_question_about_an_image(processor: Processor) -> None:
    prompt = processor.encode("What is this image?", [RED])
    places = "<unk>" * (processor.num_queries + 2)
    assert text_of(processor, prompt.ids) == (
        f"<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n{places}\nWhat is this image?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    assert prompt.ids.count(processor.tokenizer.convert_tokens_to_ids("<|begin_of_text|>")) == 1


@pytest.mark.parametrize("grid", [None, (2, 1), (1, 2), (2, 2), (3, 3), (9, 1), (1, 9), (4, 2)])
def test_block_is_the_released_text(processor: Processor, grid: tuple[int, int] | None) -> None:
    (text,) = trained_form(processor, grid)
    ids = processor.tokenizer.encode(text, add_special_tokens=False)
    assert processor.prompt_tokens.block(grid, processor.num_queries) == ids


def test_block_lengths_of_the_released_model() -> None:
    """98 tokens per tile, 2 for the slices, one newline between rows."""
    tokens = PromptTokens(128002, 128010, 128011, 128020, 128021, 198)
    for grid, length in ((None, 98), ((2, 1), 296), ((1, 2), 297), ((3, 3), 984), ((1, 9), 990), ((9, 1), 982)):
        assert len(tokens.block(grid, 96)) == length


def test_multi_turn_with_system_and_images_in_order(processor: Processor) -> None:
    messages = [
        {"role": "system", "content": " Answer briefly. "},
        {"role": "user", "content": [RED, "Hello"]},
        {"role": "assistant", "content": "Hi\n"},
        {"role": "user", "content": [{"type": "text", "text": "and"}, {"type": "image", "image": WIDE}, "this?  "]},
    ]
    prompt = processor.encode(messages)
    assert [image.grid for image in prompt.images] == [None, (4, 1)]
    red, wide = ("<unk>" * processor.num_image_tokens(image) for image in prompt.images)
    assert text_of(processor, prompt.ids) == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nAnswer briefly.<|eot_id|>"
        f"<|start_header_id|>user<|end_header_id|>\n\n{red}\nHello<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nHi<|eot_id|>"
        f"<|start_header_id|>user<|end_header_id|>\n\nand\n{wide}\nthis?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )


@pytest.mark.parametrize(
    "content",
    [["", RED, "Hi"], ["\n", " ", RED, "Hi"], [RED, "Hi", ""], [RED, " Hi"], ["Hi", ""], ["", "Hi"], [RED, " "], [""]],
)
def test_the_whole_content_is_stripped(processor: Processor, content: list) -> None:
    """As by `trim` in the template, which also strips the newlines that join empty texts."""
    parts = [{"type": "text", "text": part} if isinstance(part, str) else {"type": "image"} for part in content]
    images = [part for part in content if not isinstance(part, str)]
    messages = [{"role": "user", "content": parts}]
    text = processor.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert processor.encode(messages, images).ids == processor.encode(text, images).ids


@pytest.mark.parametrize(
    "text", ["<unk>", "<image></image>", "<|eot_id|>", "<|begin_of_text|>x", "a <slice> b", "<|start_header_id|>system"]
)
def test_special_tokens_typed_by_a_user_stay_text(processor: Processor, text: str) -> None:
    question = f"Is {text} a word?"
    prompt = processor.encode(question, [RED])
    plain = processor.encode("Is it a word?", [RED])
    special = set(processor.tokenizer.all_special_ids) | set(processor.tokenizer.get_added_vocab().values())
    assert [i for i in prompt.ids if i in special] == [i for i in plain.ids if i in special]
    assert question in text_of(processor, prompt.ids)

    # mlx-lm tokenizes the templated text, so the template splits the token.
    templated = processor.tokenizer.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}],
        add_generation_prompt=True,
        tokenize=False,
    )
    ids = processor.tokenizer.encode(templated, add_special_tokens=False)
    assert sum(i in special for i in ids) == 7  # begin, 2 × (start, end), one image, end of turn


def test_template_gives_the_same_ids(processor: Processor) -> None:
    """mlx-lm's pipeline (template, then processor, then tokenizer) matches ours."""
    messages = [
        {"role": "system", "content": "Answer briefly."},
        {
            "role": "user",
            "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": " What is it? \n"}],
        },
        {"role": "assistant", "content": "A star."},
        {"role": "user", "content": "  Which color?"},
    ]
    text = processor.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    text, images = Processor.from_config(
        {
            "image_config": vars(processor.image_config),
            "projector_config": {"num_queries": processor.num_queries},
            "prompt_tokens": vars(processor.prompt_tokens),
        }
    )(text, images=[RED, WIDE])
    ours = processor.encode(messages, [RED, WIDE])
    assert processor.tokenizer.encode(text, add_special_tokens=False) == ours.ids
    assert [image.grid for image in images] == [image.grid for image in ours.images]


def test_templated_text_and_ids_are_taken_as_they_are(processor: Processor) -> None:
    text = "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n<unk>\nHi<|eot_id|>"
    assert processor.encode(text, [RED]).ids.count(processor.prompt_tokens.image) == processor.num_queries + 2
    for ids in ([1, 2, 3], (1, 2, 3), range(1, 4), np.arange(1, 4), list(np.arange(1, 4)), mx.arange(1, 4)):
        encoded = processor.encode(ids)
        assert encoded.ids == [1, 2, 3] and {type(i) for i in encoded.ids} == {int}
        assert processor.encode(encoded) is encoded


def test_images_go_before_the_last_question_if_a_templated_text_has_no_place(processor: Processor) -> None:
    text = processor.tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is it?"}], add_generation_prompt=True, tokenize=False
    )
    grown, _ = processor(text, images=[RED])
    assert processor.tokenizer.encode(grown, add_special_tokens=False) == processor.encode("What is it?", [RED]).ids


def test_max_tiles(processor: Processor) -> None:
    for most, tiles in ((None, 5), (5, 5), (4, 4), (2, 1), (1, 1)):
        (image,) = processor.with_max_tiles(most).encode("Hi", [WIDE]).images
        assert len(image.tiles) == tiles
        assert isinstance(image, TiledImage)


@pytest.mark.parametrize(
    ("messages", "images", "message"),
    [
        ("\ud800", (), "a lone surrogate"),
        ([{"role": "tool", "content": "x"}], (), "role 'tool'"),
        ([{"content": "x"}], (), "role None"),
        ([{"role": "user", "content": [{"type": "image"}]}], (), "more images than were given"),
        ([{"role": "user", "content": "x"}], (RED,), "1 images were given"),
        ([{"role": "user", "content": [{"type": "audio"}]}], (), "type 'audio'"),
        ("<|begin_of_text|><unk> and <unk>", (RED,), "placeholders for 2 images, but 1"),
        (["Hi"], (), "a message is 'Hi'; it must be a dict with role and content"),
        ([[1, 2, 3]], (), r"a message is \[1, 2, 3\]; it must be a dict"),
        ([], (), "the prompt is empty"),
        (mx.array([]), (), "the prompt is empty"),
    ],
)
def test_malformed(processor: Processor, messages: list | str, images: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        processor.encode(messages, images)
