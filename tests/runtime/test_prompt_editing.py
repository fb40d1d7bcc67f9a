"""Prompts that change between steps: their syntax, the steps that see them, and the images.

The schedules up to `OWN` are those that AUTOMATIC1111's web UI 1.10 documents in its own tests
(`get_learned_conditioning_prompt_schedules` in `modules/prompt_parser.py`, commit 28bd8e1).
"""

import numpy as np
import pytest
from PIL import Image

from ldm_runtime import GenerationRequest, Generator
from ldm_runtime.cli import main
from ldm_runtime.conditioning import encode_conditioning
from ldm_runtime.errors import RequestError
from ldm_runtime.pipeline.image_files import read_metadata
from ldm_runtime.pipeline.sampling import sample_latents
from ldm_runtime.requests.advice import advice
from ldm_runtime.requests.resolution import resolve
from ldm_runtime.requests.scheduled_prompts import count_characters, scheduled_prompts
from ldm_runtime.samplers import SAMPLERS
from ldm_runtime.testing import TINY_SPEC, FakeEngine, tiny_networks
from ldm_runtime.text import ClipTokenizer
from ldm_runtime.text.prompt_editing import count_texts, prompt_schedule
from ldm_runtime.text.prompts import MAX_OPEN_BRACKETS

LANDSCAPE = (
    "fantasy landscape with a [mountain:lake:0.25] and [an oak:a christmas tree:0.75]"
    "[ in foreground::0.6][ in background:0.25] [shoddy:masterful:0.5]"
)
IN_TURN = [(step, ["male", "female"][step % 2]) for step in range(1, 11)]
DOCUMENTED = {
    "test": [(10, "test")],
    "a [b:3]": [(3, "a "), (10, "a b")],
    "a [b: 3]": [(3, "a "), (10, "a b")],
    "a [[[b]]:2]": [(2, "a "), (10, "a [[b]]")],
    "[(a:2):3]": [(3, ""), (10, "(a:2)")],
    "a [b : c : 1] d": [(1, "a b  d"), (10, "a  c  d")],
    "a[b:[c:d:2]:1]e": [(1, "abe"), (2, "ace"), (10, "ade")],
    "a [unbalanced": [(10, "a [unbalanced")],
    "a [b:.5] c": [(5, "a  c"), (10, "a b c")],
    "((a][:b:c [d:3]": [(3, "((a][:b:c "), (10, "((a][:b:c d")],
    "[a|(b:1.1)]": [(step, ["(b:1.1)", "a"][step % 2]) for step in range(1, 11)],
    "[fe|]male": IN_TURN,
    "[fe|||]male": [(step, "female" if step % 4 == 1 else "male") for step in range(1, 11)],
}
OWN = {
    # Bits of the grammar, each alone.
    "[a::3]": [(3, "a"), (10, "")],
    "[:a:3]": [(3, ""), (10, "a")],
    "[a:b:0]": [(10, "b")],
    "[a:b:-2]": [(10, "b")],
    "[a:b:1e-1]": [(10, "b")],
    "[a:b:99]": [(10, "a")],
    "[a:b:1.0]": [(10, "a")],
    "[a:b: 3 ]": [(3, "a"), (10, "b")],
    "[[a|b]:c:2]": [(1, "a"), (2, "b"), *((step, "c") for step in range(3, 11))],
    "([a:b:3]:1.3)": [(3, "(a:1.3)"), (10, "(b:1.3)")],
    "[[a:b:3]": [(3, "[a"), (10, "[b")],
    r"[a\:b:c\|d:3]": [(3, r"a\:b"), (10, r"c\|d")],
    # What is not well-formed stays as it is.
    **{
        text: [(10, text)]
        for text in (
            *("[a]", "[a:b]", "[a:b:c:3]", "[a:b:three]", "[a:b:3", "a:b:3]", "[a|b", "a | b"),
            *("(a|b)", "[(a|b):c:3]", "[a|b:3]", "[a)b:c:3]", "[a(b:c:3]", "[[a:b]:c:3]"),
            *(r"\[a:b:3]", r"\[a|b\]", "[a:b:3\\", "12:30", "", "a [{b|d{:.5] c"),
        )
    },
}


@pytest.mark.parametrize(("prompt", "expected"), [*DOCUMENTED.items(), *OWN.items()])
def test_a_prompt_has_the_texts_of_the_web_ui_over_ten_steps(prompt, expected):
    assert list(prompt_schedule(prompt, 10)) == expected


def test_the_example_of_the_web_ui_over_a_hundred_steps():
    texts = dict(prompt_schedule(LANDSCAPE, 100))

    begin = "fantasy landscape with a"
    assert texts == {
        25: f"{begin} mountain and an oak in foreground shoddy",
        50: f"{begin} lake and an oak in foreground in background shoddy",
        60: f"{begin} lake and an oak in foreground in background masterful",
        75: f"{begin} lake and an oak in background masterful",
        100: f"{begin} lake and a christmas tree in background masterful",
    }


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a [b:.5] c", [(10, "a b c")]),
        ("a [b:1.5] c", [(5, "a  c"), (10, "a b c")]),
        ("a [b:13] c", [(3, "a  c"), (10, "a b c")]),
        ("a [b:3] c", [(10, "a b c")]),
    ],
)
def test_numbers_count_on_in_a_second_pass_and_its_shares_begin_at_one(prompt, expected):
    """The first two are the web UI's own; 1.5 is half of the second pass."""
    assert list(prompt_schedule(prompt, 10, earlier_steps=10)) == expected


def test_brackets_nest_as_deep_as_weights_do_and_no_deeper():
    deep = "[" * MAX_OPEN_BRACKETS + "a" + ":2]" * MAX_OPEN_BRACKETS

    assert list(prompt_schedule(deep, 4)) == [(2, ""), (4, "a")]
    with pytest.raises(ValueError, match="100 brackets are open at character 100"):
        prompt_schedule("[" + deep, 4)
    with pytest.raises(RequestError, match="negative_prompt: 100 brackets are open"):
        resolved(negative_prompt="[" + deep)


def test_the_length_of_a_prompt_costs_no_more_than_time():
    prompt = "[a:b:2] [c|d] (e:1.2) ] ) : | " * 10_000

    first, *_ = prompt_schedule(prompt, 4)

    assert first == (1, "a c (e:1.2) ] ) : | " * 10_000)


def resolved(**fields):
    defaults = {"prompt": "a", "num_inference_steps": 10, "schedule": "trailing"}
    return resolve(GenerationRequest(**defaults | fields), TINY_SPEC)


def seen(**fields):
    return [(each.first_step, *(text for _, text in each.texts)) for each in scheduled(**fields)]


def scheduled(**fields):
    return scheduled_prompts(resolved(**fields))


IMAGE = np.zeros((16, 16, 3), dtype=np.uint8)


def test_each_prompt_has_texts_of_its_own():
    found = seen(prompt="a[b:4]", negative_prompt="[c:d:0.4] [e:8]")

    assert found == [(1, "c ", "a"), (5, "d ", "ab"), (9, "d e", "ab")]
    assert seen(prompt="[a:b:2]", negative_prompt="[c|d]", guidance_scale=1) == [(1, "a"), (3, "b")]


def test_texts_that_do_not_change_are_one():
    assert seen(prompt="[a:a:3] [b::0]", guidance_scale=1) == [(1, "a ")]
    assert seen(prompt="a", hires_scale=2.0) == [(1, "", "a")]


def test_literal_prompts_are_not_edited():
    assert seen(prompt="[a:b:3]", literal_prompt=True) == [(1, "", "[a:b:3]")]


def test_the_first_step_from_an_image_is_step_one_of_as_many_as_the_schedule_has():
    """The web UI counts so: shares are of the steps that are asked for, not of those made."""
    fields = {"image": IMAGE, "strength": 0.5, "guidance_scale": 1}

    assert seen(prompt="[a:b:0.3]", **fields) == [(1, "a"), (4, "b")]
    assert seen(prompt="[a:b:2]", **fields) == [(1, "a"), (3, "b")]
    assert seen(prompt="[a:b:0.5]", **fields) == [(1, "a")]


def test_the_second_pass_goes_on_counting():
    fields = {"hires_scale": 2.0, "hires_strength": 0.4, "guidance_scale": 1}

    assert seen(prompt="[a:b:0.5]", **fields) == [(1, "a"), (6, "b")]
    assert seen(prompt="[a:b:1.5]", **fields) == [(1, "a"), (13, "b")]
    assert seen(prompt="[a:b:11]", **fields) == [(1, "a"), (12, "b")]
    assert seen(prompt="[a|b|c]", **fields)[8:] == [
        *((9, "c"), (10, "a"), (12, "b"), (13, "c"), (14, "a"))
    ]


def calls_of(**fields):
    """Return the batch sizes of the text encoder's calls, and the context of every UNet call."""
    request = resolved(**fields)
    engines = {name: FakeEngine(network) for name, network in tiny_networks().items()}
    conditioning = encode_conditioning(engines.__getitem__, ClipTokenizer([]), request, TINY_SPEC)
    list(sample_latents(engines["unet"], conditioning, request, TINY_SPEC))
    contexts = [call["context"] for call in engines["unet"].calls]
    return [len(call["tokens"]) for call in engines["text_encoder"].calls], contexts


def contexts_of(**fields):
    return calls_of(**fields)[1]


def test_every_step_sees_what_a_request_with_its_text_sees():
    found = contexts_of(prompt="[a|b c]", negative_prompt="[:x:2]", num_inference_steps=4)

    for context, prompt, negative in zip(found, ("a", "b c") * 2, ["", "", "x", "x"], strict=True):
        expected, *_ = contexts_of(prompt=prompt, negative_prompt=negative)
        np.testing.assert_array_equal(context, expected)


def test_every_text_is_encoded_once_in_calls_as_large_as_ever():
    assert calls_of(prompt="[a|b]", num_inference_steps=10)[0] == [2, 1]
    assert calls_of(prompt="[a|b|c]", negative_prompt="[x:y:5]")[0] == [2, 2, 1]
    assert calls_of(prompt="[a|b|c]", guidance_scale=1)[0] == [1, 1, 1]


def test_texts_that_no_step_sees_are_not_encoded():
    assert calls_of(prompt="[a:b:0.5]", denoising_end=0.5)[0] == [2]


def test_a_short_text_is_filled_up_to_the_chunks_of_the_longest():
    found = contexts_of(prompt="[a:b BREAK c:1]", num_inference_steps=2)

    assert [context.shape[1] for context in found] == [32, 32]
    alone = [contexts_of(prompt=text)[0] for text in ("a", "")]
    np.testing.assert_array_equal(found[0], np.concatenate(alone, axis=1))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_call_of_a_step_sees_its_text(sampler):
    """A sampler may call the UNet twice in a step, also at the noise level of the next one."""
    count = SAMPLERS[sampler].calls_per_step
    plain = contexts_of(prompt="a", sampler=sampler, num_inference_steps=6)
    edited = contexts_of(prompt="[a:b:2]", sampler=sampler, num_inference_steps=6)

    before = [np.array_equal(each, plain[0]) for each in edited]
    assert before == sorted(before, reverse=True)
    assert sum(before) == (3 if sampler == "plms" else 2 * count)
    assert len(edited) == len(plain)


@pytest.fixture(scope="module")
def generator(tiny_bundle):
    with Generator(tiny_bundle, threads=1) as generator:
        yield generator


def pixels(result):
    return [image.tobytes() for image in result.images]


COMMON = {"seed": 3, "num_inference_steps": 6, "schedule": "trailing"}


@pytest.mark.parametrize("prompt", ["[a red:a red:0.5]", "a [red|red]", "[a red::99]", "[a red:0]"])
def test_an_edit_that_changes_nothing_gives_the_same_bits(generator, prompt):
    plain = generator(prompt="a red", **COMMON)

    assert pixels(generator(prompt=prompt, **COMMON)) == pixels(plain)


def test_an_edit_gives_the_image_of_two_runs_one_after_the_other(generator):
    first = generator(prompt="a red", denoising_end=0.5, **COMMON)
    second = generator(prompt="blue", denoising_start=0.5, latents=first.latents, **COMMON)

    assert pixels(generator(prompt="[a red:blue:3]", **COMMON)) == pixels(second)
    assert pixels(generator(prompt="blue", **COMMON)) != pixels(second)


def test_a_run_that_goes_on_from_another_goes_on_in_its_prompts(generator):
    prompt = "[a red|blue|[green:gray:5]]"
    first = generator(prompt=prompt, denoising_end=0.7, **COMMON)
    second = generator(prompt=prompt, denoising_start=0.7, latents=first.latents, **COMMON)

    assert pixels(generator(prompt=prompt, **COMMON)) == pixels(second)


def test_a_second_pass_has_texts_of_its_own(generator):
    fields = {**COMMON, "hires_scale": 2.0, "hires_strength": 0.5}
    results = [
        pixels(generator(prompt=prompt, **fields))
        for prompt in ("a red", "[a red:blue:1.0]", "[a red:blue:7]", "[a red:blue:1.34]")
    ]

    assert results[2] == results[3]
    assert len({*map(tuple, results)}) == 3


def test_requests_with_different_schedules_share_calls(generator):
    prompts = ["[a red:blue:2]", "a red", "[a red|blue]", "[a red|blue BREAK green]"]
    requests = [GenerationRequest(prompt, **COMMON) for prompt in prompts]

    together = list(generator.run_many(requests))

    assert list(map(pixels, together)) == [pixels(generator.generate(each)) for each in requests]


def test_an_image_records_the_prompt_as_it_was_typed_and_is_made_again_from_it(generator, tmp_path):
    prompt = "a [red|blue] [square:circle:0.5]"
    result = generator(prompt=prompt, negative_prompt="[x::2]", **COMMON)

    result.save(tmp_path / "image.png")
    recorded = read_metadata(tmp_path / "image.png")["request"]

    assert (recorded["prompt"], recorded["negative_prompt"]) == (prompt, "[x::2]")
    assert pixels(generator(**recorded)) == pixels(result)


def test_the_command_line_takes_them_and_repeats_them(generator, tiny_bundle, tmp_path):
    paths = tmp_path / "one.png", tmp_path / "two.png"
    where = ["--bundle", str(tiny_bundle), "-o"]

    flags = ["-s", "3", "--steps", "6", "--schedule", "trailing"]
    assert main(["generate", "[a red:blue:3]", *flags, *where, str(paths[0])]) == 0
    assert main(["generate", "--like", str(paths[0]), *where, str(paths[1])]) == 0

    images = [np.asarray(Image.open(path)).tobytes() for path in paths]
    assert images == pixels(generator(prompt="[a red:blue:3]", **COMMON)) * 2


@pytest.mark.parametrize("num_steps", [1, 7, 10])
@pytest.mark.parametrize("prompt", [*DOCUMENTED, *OWN, "[a:b:3] [c|d]", "[c|d] [a:b:99]"])
def test_texts_are_counted_as_they_are_scheduled(prompt, num_steps):
    assert count_texts(prompt, num_steps) == len(prompt_schedule(prompt, num_steps))


def test_texts_that_would_take_hours_to_make_are_counted():
    assert count_texts("[a|b]" * 6_000 + "[[c|d]:e:5]" * 100, 100_000) == 100_000


def test_characters_of_prompts_are_those_of_all_their_texts():
    prompts = {"prompt": "[a|b] c", "negative_prompt": "[x:yz:2]"}

    assert count_characters(GenerationRequest(**prompts), 10) == {
        "prompt": 10 * len(prompts["prompt"]),
        "negative_prompt": 2 * len(prompts["negative_prompt"]),
    }
    literal = GenerationRequest(**prompts, literal_prompt=True)
    assert count_characters(literal, 10) == {name: len(text) for name, text in prompts.items()}
    assert count_characters(GenerationRequest(), 10) == {"prompt": 0, "negative_prompt": 0}


def test_a_prompt_that_cannot_be_counted_is_named():
    request = GenerationRequest("a", negative_prompt="[" * (MAX_OPEN_BRACKETS + 1))

    with pytest.raises(RequestError, match="negative_prompt: 100 brackets are open"):
        count_characters(request, 10)


def test_what_is_not_well_formed_is_said():
    request = resolved(prompt="[a:b:c:5] [a|b:3]")

    assert [sentence.partition(" is not read")[0] for sentence in advice(request, TINY_SPEC)] == [
        "prompt: prompt editing such as '[a:b:c:5]'",
        "prompt: alternation such as '[a|b:3]'",
    ]
