"""Prompts to context: weights, chunks, padding, and what is refused."""

import logging
from dataclasses import replace

import numpy as np
import pytest

from ldm_runtime.conditioning import (
    MAX_CHUNKS,
    encode_conditioning,
    most_chunks,
    open_tokenizer,
)
from ldm_runtime.errors import BundleError, RequestError
from ldm_runtime.requests.request import GenerationRequest
from ldm_runtime.requests.resolution import resolve
from ldm_runtime.testing import TINY_SPEC, FakeEngine, tiny_spec
from ldm_runtime.text import ClipTokenizer, WordPieceTokenizer

LETTERS = ClipTokenizer([])  # every letter is a token, and so is a comma
START, END, PAD = LETTERS.start_id, LETTERS.end_id, 7
MAX_TOKENS, WIDTH = 8, 3
ROOM = MAX_TOKENS - 2
EMBEDDING = np.random.default_rng(0).standard_normal((LETTERS.vocab_size, WIDTH))
PLACES = np.random.default_rng(1).standard_normal((MAX_TOKENS, WIDTH))


def spec(**text_encoder):
    record = replace(TINY_SPEC.networks["text_encoder"], max_tokens=MAX_TOKENS, pad_token_id=PAD)
    return TINY_SPEC.with_networks(text_encoder=replace(record, **text_encoder))


def text_encoder():
    """Every token's output depends on it, on its place and on the tokens before it."""

    def run(inputs):
        seen = np.cumsum(EMBEDDING[inputs["tokens"]], axis=1) + PLACES[: inputs["tokens"].shape[1]]
        return {"context": np.tanh(seen).astype(np.float32)}

    return FakeEngine(run)


def encode(engine=None, model=None, **fields):
    model = model or spec()
    request = resolve(GenerationRequest(**{"prompt": "", "guidance_scale": 3.0, **fields}), model)
    engines = {"text_encoder": engine or text_encoder()}
    conditioning = encode_conditioning(engines.__getitem__, LETTERS, request, model)
    assert conditioning.concat is None
    return conditioning.context


def padded(text, pad=PAD):
    return LETTERS.encode(text, MAX_TOKENS, pad_token_id=pad).ids


def encoded(*texts):
    """What the text encoder itself gives for one chunk of each text: (texts, tokens, width)."""
    return text_encoder().run({"tokens": np.array([padded(text) for text in texts])})["context"]


def token_rows(engine):
    return [tuple(row) for call in engine.calls for row in call["tokens"]]


@pytest.mark.parametrize("literal_prompt", [False, True])
@pytest.mark.parametrize("prompt", ["", "a b, c", "abcdef", "a<|endoftext|>b"])
def test_a_short_prompt_without_weights_is_encoded_as_it_is_in_one_call(prompt, literal_prompt):
    engine = text_encoder()

    context = encode(engine, prompt=prompt, negative_prompt="xy", literal_prompt=literal_prompt)

    assert token_rows(engine) == [padded("xy"), padded(prompt)]
    assert len(engine.calls) == 1
    assert engine.calls[0]["tokens"].dtype == np.int64
    assert context.dtype == np.float32
    np.testing.assert_array_equal(context, encoded("xy", prompt))


def test_without_guidance_only_the_prompt_is_encoded():
    engine = text_encoder()

    context = encode(engine, prompt="ab", negative_prompt="x" * 30, guidance_scale=1.0)

    assert token_rows(engine) == [padded("ab")]
    np.testing.assert_array_equal(context, encoded("ab"))


@pytest.mark.parametrize("pad", [PAD, END])
def test_every_chunk_has_start_end_and_the_padding_of_the_model(pad):
    engine = text_encoder()

    encode(engine, spec(pad_token_id=pad), prompt="a b c d e f g", guidance_scale=1.0)

    (a, *others, f), (g,) = LETTERS.token_ids("a b c d e f"), LETTERS.token_ids("g")
    assert token_rows(engine) == [
        (START, a, *others, f, END),
        (START, g, END, pad, pad, pad, pad, pad),
    ]


@pytest.mark.parametrize(
    ("fields", "least"),
    [
        ({"prompt": "", "guidance_scale": 1.0}, 1),
        ({"prompt": "abcdefghijklm", "negative_prompt": "x"}, 2 * 3),
        ({"prompt": "abcdefghijklm", "negative_prompt": "x", "literal_prompt": True}, 2),
        ({"prompt": "a BREAK b BREAK c"}, 2 * 3),
        ({"prompt": "[abcdefg|b|c]", "negative_prompt": "[x:y:1]"}, 5 * 2),
        ({"prompt": "éééééééé"}, 2 * 3),
    ],
)
def test_chunks_are_guessed_without_a_tokenizer_and_not_too_few(fields, least):
    model, engine = spec(), text_encoder()
    encode(engine, model, num_inference_steps=4, **fields)
    request = resolve(
        GenerationRequest(**{"guidance_scale": 3.0, **fields}, num_inference_steps=4), model
    )

    encoded_chunks = len(token_rows(engine))
    assert encoded_chunks == least
    assert encoded_chunks <= most_chunks(request, model) <= 4 * encoded_chunks


def test_chunks_of_a_request_are_at_most_those_that_each_text_may_have():
    request = resolve(GenerationRequest("a" * 1000, guidance_scale=3.0), spec())

    assert most_chunks(request, spec()) == 2 * MAX_CHUNKS
    without = tiny_spec("class-to-image")
    assert most_chunks(resolve(GenerationRequest(class_label=1), without), without) == 0


def test_weights_multiply_the_context_and_its_mean_is_restored():
    [context] = encode(prompt="a (b:1.5) [c]", guidance_scale=1.0)

    # The parts are tokenized alone, and so would "a b c" be.
    [plain] = encoded("a b c")
    weights = np.array([1, 1, 1.5, 1 / 1.1, 1, 1, 1, 1], dtype=np.float32)[:, None]
    expected = plain * weights * (plain.mean() / (plain * weights).mean())
    np.testing.assert_allclose(context, expected, rtol=1e-5)
    assert context.mean() == pytest.approx(plain.mean(), rel=1e-5)
    assert context.dtype == np.float32
    assert np.abs(context - plain).max() > 0.05


def test_the_negative_prompt_has_weights_of_its_own():
    uncond, cond = encode(prompt="ab", negative_prompt="(x:2)")

    np.testing.assert_array_equal(cond, encoded("ab")[0])
    np.testing.assert_array_equal(uncond, encode(prompt="(x:2)", guidance_scale=1.0)[0])
    assert np.abs(uncond - encoded("x")[0]).max() > 0.05


def test_a_long_prompt_is_encoded_in_chunks_side_by_side():
    [context] = encode(prompt="a b c d e f g h", guidance_scale=1.0)

    assert context.shape == (2 * MAX_TOKENS, WIDTH)
    np.testing.assert_array_equal(context, np.concatenate(encoded("a b c d e f", "g h")))


def test_the_mean_of_each_chunk_is_restored_for_itself():
    [context] = encode(prompt="(a:2) BREAK b BREAK (c:0.5)", guidance_scale=1.0)

    alone = [encode(prompt=text, guidance_scale=1.0)[0] for text in ("(a:2)", "b", "(c:0.5)")]
    np.testing.assert_array_equal(context, np.concatenate(alone))


@pytest.mark.parametrize(
    ("prompt", "negative_prompt", "chunks"),
    [
        ("ab", "x BREAK y", [("x", "ab"), ("y", "")]),
        ("a BREAK b BREAK c", "x", [("x", "a"), ("", "b"), ("", "c")]),
        ("BREAK a", "", [("", ""), ("", "a")]),
    ],
)
def test_the_shorter_prompt_is_filled_up_with_empty_chunks(prompt, negative_prompt, chunks):
    engine = text_encoder()

    context = encode(engine, prompt=prompt, negative_prompt=negative_prompt)

    assert token_rows(engine) == [padded(text) for pair in chunks for text in pair]
    expected = np.concatenate([encoded(*pair) for pair in chunks], axis=1)
    np.testing.assert_array_equal(context, expected)


def test_no_call_has_more_rows_than_one_for_short_prompts():
    engine = text_encoder()

    encode(engine, prompt="a" * 3 * ROOM)

    assert [len(call["tokens"]) for call in engine.calls] == [2, 2, 2]


def test_a_chunk_ends_at_a_comma_that_is_near():
    engine = text_encoder()

    encode(engine, prompt="a b, c d e f", guidance_scale=1.0)

    assert token_rows(engine) == [padded("a b,"), padded("c d e f")]


def test_a_plain_prompt_is_literal():
    [context] = encode(prompt="(a) [", literal_prompt=True, guidance_scale=1.0)

    np.testing.assert_array_equal(context, encoded("(a) [")[0])


def test_a_plain_prompt_is_cut_to_one_chunk_with_a_warning(caplog):
    with caplog.at_level(logging.WARNING):
        context = encode(
            prompt="a b c d e f g BREAK", negative_prompt="x " * 7, literal_prompt=True
        )

    np.testing.assert_array_equal(context, encoded("x x x x x x", "a b c d e f"))
    assert caplog.messages == [
        "negative_prompt is longer than 6 tokens; left out: 'x '",
        "prompt is longer than 6 tokens; left out: 'g BREAK'",
    ]


def test_a_long_prompt_in_chunks_warns_of_nothing(caplog):
    encode(prompt="a" * 5 * ROOM)

    assert not caplog.messages


def test_as_many_chunks_as_allowed_are_encoded_and_one_more_is_refused():
    most = "a " * ROOM * MAX_CHUNKS

    assert encode(prompt=most).shape == (2, MAX_CHUNKS * MAX_TOKENS, WIDTH)
    with pytest.raises(
        RequestError, match=r"negative_prompt: takes 17 chunks of 6 tokens"
    ) as caught:
        encode(negative_prompt=f"{most} b")
    assert caught.value.field == "negative_prompt"


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("(a:99999999)", "prompt: the weight of 'a' is 1e\\+08"),
        ("(" * 101, "prompt: 100 brackets are open at character 100"),
    ],
)
def test_syntax_beyond_its_limits_is_refused_naming_the_field(prompt, message):
    with pytest.raises(RequestError, match=message):
        encode(prompt=prompt)


def test_weights_that_leave_nothing_to_scale_are_refused():
    engine = FakeEngine(lambda inputs: {"context": np.ones((1, 4, WIDTH), dtype=np.float32)})

    with pytest.raises(RequestError, match="prompt: its weights cancel each other"):
        encode(engine, spec(max_tokens=4), prompt="(a:-3)", guidance_scale=1.0)


WORDS = WordPieceTokenizer(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "cat", "##s", ","])


def test_prompts_of_a_bert_model_are_framed_and_padded_its_way():
    engine = text_encoder()
    model = spec(kind="bert", pad_token_id=0)
    request = resolve(GenerationRequest(prompt="Red cats, dog", guidance_scale=3.0), model)

    encode_conditioning(lambda _: engine, WORDS, request, model)

    # The negative prompt is empty; "dog" is unknown.
    assert token_rows(engine) == [(2, 3, 0, 0, 0, 0, 0, 0), (2, 5, 6, 7, 8, 1, 3, 0)]


def test_prompts_of_a_bert_model_have_weights_and_chunks_too():
    engine = text_encoder()
    model = spec(kind="bert", pad_token_id=0)
    request = resolve(GenerationRequest(prompt="(red:1.5) BREAK cats", guidance_scale=1.0), model)

    found = encode_conditioning(lambda _: engine, WORDS, request, model).context

    assert token_rows(engine) == [(2, 5, 3, 0, 0, 0, 0, 0), (2, 6, 7, 3, 0, 0, 0, 0)]
    plain = text_encoder().run({"tokens": np.array([token_rows(engine)[1]])})["context"]
    np.testing.assert_array_equal(found[:, MAX_TOKENS:], plain)
    assert found.shape == (1, 2 * MAX_TOKENS, WIDTH)


@pytest.mark.parametrize(
    ("kind", "lines"),
    [("clip", ["#version: 0.2", "r e"]), ("bert", ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])],
)
def test_each_kind_of_text_encoder_has_its_tokenizer(tmp_path, kind, lines):
    path = tmp_path / "vocabulary"
    path.write_text("\n".join([*lines, ""]))
    other = {"clip": "bert", "bert": "clip"}[kind]

    assert open_tokenizer(path, spec(kind=kind)).token_ids("red")
    with pytest.raises(BundleError, match="export the bundle again"):
        open_tokenizer(path, spec(kind=other))


def test_a_vocabulary_without_a_text_encoder_is_refused(tmp_path):
    with pytest.raises(BundleError, match="this autoencoder model has no text encoder"):
        open_tokenizer(tmp_path / "vocabulary", tiny_spec("autoencoder"))
