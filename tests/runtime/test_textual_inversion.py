import dataclasses
import hashlib
import json
import logging

import numpy as np
import pytest

from ldm_runtime import Generator
from ldm_runtime.conditioning import encode_conditioning, open_tokenizer
from ldm_runtime.errors import RequestError
from ldm_runtime.inputs.textual_inversion import read_learned_words
from ldm_runtime.pipeline.image_files import read_metadata
from ldm_runtime.requests.request import GenerationRequest
from ldm_runtime.requests.resolution import resolve
from ldm_runtime.specs.networks import TextEncoderSpec
from ldm_runtime.testing import TINY_SPEC, FakeEngine, text_encoder_spec, tiny_networks, tiny_spec
from ldm_runtime.text import ClipTokenizer, LearnedWord

WIDTH = TINY_SPEC.network(TextEncoderSpec).width
VOCABULARY = TINY_SPEC.network(TextEncoderSpec).vocab_size
LETTERS = ClipTokenizer([])
_TYPES = {"float32": "F32", "float16": "F16", "float64": "F64", "int64": "I64"}


def safetensors(**tensors):
    """The bytes of a file of tensors; names may be given as a dictionary."""
    header, data = {}, b""
    for name, array in tensors.items():
        raw = np.ascontiguousarray(array).tobytes()
        header[name] = {
            "dtype": _TYPES[str(array.dtype)],
            "shape": list(array.shape),
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def vectors(count, width=WIDTH, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal((count, width)).astype(dtype)


def word(text, count=1):
    return LearnedWord(text=text, vectors={"text_encoder": vectors(count)}, sha256=text)


def ids_of(text, *words):
    """Token ids as text: learned ones as numbers from 0, all others as their letters."""
    tokenizer = ClipTokenizer([], words)
    return [each - LETTERS.vocab_size for each in tokenizer.token_ids(text)]


def inputs_of(prompt, words, spec=TINY_SPEC, **fields):
    """The inputs of the text encoder for a prompt without guidance, one call per chunk."""
    engine = FakeEngine(tiny_networks()["text_encoder"])
    request = resolve(GenerationRequest(prompt, guidance_scale=1.0, **fields), spec)
    tokenizer = ClipTokenizer([], words)
    encode_conditioning(lambda _: engine, tokenizer, request, spec)
    return engine.calls


# --- words in prompts -----------------------------------------------------------------------------


def test_a_learned_word_takes_as_many_ids_as_it_has_vectors():
    cat, toy = word("<cat>", 2), word("<toy>")

    found = ids_of("<toy><cat>", cat, toy)

    assert found == [2, 0, 1]


@pytest.mark.parametrize("text", ["easy", "EASY", "(easy)", "easy,", "x easy", "easy2", "easy_x"])
def test_a_word_is_found_in_any_case_and_between_anything_but_letters(text):
    assert 0 in ids_of(text, word("easy"))


@pytest.mark.parametrize("text", ["uneasy", "easyx", "éasy easyé"])
def test_a_word_is_not_found_in_longer_words(text):
    assert all(each < 0 for each in ids_of(text, word("easy")))


def test_of_two_words_the_longer_is_found():
    assert ids_of("bad hands", word("bad"), word("bad hands")) == [1]


def test_what_is_around_a_word_has_the_ids_it_always_has():
    plain = [*LETTERS.token_ids("a photo of "), *LETTERS.token_ids(", red")]

    found = ClipTokenizer([], [word("<cat>")]).token_ids("a photo of <cat>, red")

    assert [each for each in found if each != LETTERS.vocab_size] == plain


def test_the_text_that_is_cut_begins_at_the_word_that_does_not_fit():
    encoding = ClipTokenizer([], [word("<cat>", 3)]).encode("a <cat> b", 5)

    assert encoding.ids[1:4] == (
        *LETTERS.token_ids("a"),
        LETTERS.vocab_size,
        LETTERS.vocab_size + 1,
    )
    assert encoding.cut == "<cat> b"


# --- inputs of the text encoder -------------------------------------------------------------------


@pytest.mark.parametrize("literal", [False, True])
def test_vectors_stand_where_the_word_does(literal):
    cat, toy = (
        word("<cat>", 2),
        dataclasses.replace(word("<toy>"), vectors={"text_encoder": vectors(1, seed=5)}),
    )

    [call] = inputs_of("a <toy> <cat>", [cat, toy], literal_prompt=literal)

    expected = np.zeros((1, 16, WIDTH), dtype=np.float32)
    expected[0, 2] = toy.vectors["text_encoder"]
    expected[0, 3:5] = cat.vectors["text_encoder"]
    np.testing.assert_array_equal(call["learned_embeddings"], expected)
    np.testing.assert_array_equal(np.flatnonzero(call["tokens"] == VOCABULARY), [2, 3, 4])
    assert call["tokens"].max() == VOCABULARY


def test_a_word_is_not_parted_by_the_end_of_a_chunk():
    calls = inputs_of("a b c d e f g h i j k <cat>", [word("<cat>", 4)])

    assert [(call["tokens"] == VOCABULARY).sum() for call in calls] == [0, 4]


@pytest.mark.parametrize("names", [("clip_g", "clip_l"), ("text_encoders_1", "text_encoders_0")])
def test_each_text_encoder_has_its_own_vectors(names):
    first = dataclasses.replace(TINY_SPEC.network(TextEncoderSpec), width=4)
    second = dataclasses.replace(first, kind="openclip", pad_token_id=0)
    spec = TINY_SPEC.with_networks(text_encoder=first, text_encoder_2=second)
    tensors = {name: vectors(2, 4, seed=seed) for seed, name in enumerate(names, start=1)}
    words = read_learned_words({"<cat>": safetensors(**tensors)}, spec)
    engines = {
        name: FakeEngine(lambda inputs: {"context": inputs["learned_embeddings"]})
        for name in ("text_encoder", "text_encoder_2")
    }
    request = resolve(GenerationRequest("<cat>", guidance_scale=1.0), spec)

    context = encode_conditioning(
        engines.__getitem__, ClipTokenizer([], words), request, spec
    ).context

    both = np.concatenate([vectors(2, 4, seed=2), vectors(2, 4, seed=1)], axis=1)
    np.testing.assert_array_equal(context[0, 1:3], both)


def test_prompts_skip_layers_of_every_sample():
    engine = FakeEngine(tiny_networks()["text_encoder"])
    request = resolve(GenerationRequest("red", guidance_scale=2.0, clip_skip=1), TINY_SPEC)

    encode_conditioning(lambda _: engine, LETTERS, request, TINY_SPEC)

    np.testing.assert_array_equal(engine.calls[0]["clip_skip"], [1, 1])


# --- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("name", ["emb_params", "*", "<cat>"])
def test_one_tensor_of_any_name_is_an_embedding(name, dtype):
    array = vectors(3, dtype=dtype)

    [found] = read_learned_words({"<cat>": safetensors(**{name: array})}, TINY_SPEC)

    np.testing.assert_array_equal(found.vectors["text_encoder"], array.astype(np.float32))
    assert (found.text, found.num_tokens) == ("<cat>", 3)


def test_a_vector_without_rows_is_one_token():
    [found] = read_learned_words({"cat": safetensors(cat=vectors(1)[0])}, TINY_SPEC)

    assert found.num_tokens == 1


CASES = {
    "another model": (
        safetensors(emb_params=vectors(2, 1024)),
        "holds vectors of 1024 numbers, and the text_encoder of this bundle takes 8; give an "
        "embedding that was trained for this model",
    ),
    "SDXL": (
        safetensors(clip_l=vectors(2, 8), clip_g=vectors(2, 12)),
        r"holds 2 tensors \(clip_l 2x8, clip_g 2x12\), and this bundle takes one",
    ),
    "too long": (safetensors(emb_params=vectors(15)), "holds 15 vectors, more than the 14 tokens"),
    "integers": (safetensors(a=np.ones((1, 8), dtype=np.int64)), "holds int64 of shape 1x8"),
    "a matrix too many": (safetensors(a=vectors(8).reshape(2, 4, 8)), "float32 of shape 2x4x8"),
    "not finite": (safetensors(a=vectors(1) * np.float32(np.nan)), "numbers that are not finite"),
    "a picture": (b"\x89PNG\r\n\x1a\n" + bytes(100), "is neither a torch nor a safetensors file"),
    "cut off": (safetensors(a=vectors(1))[:-4], "ends 4 bytes early"),
    "nothing": (b"", "is neither"),
    "a number": (3, "'cat' has a int; give a path or the bytes of a file"),
    "no file": ("nowhere/cat.pt", "nowhere/cat.pt cannot be read"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_file_that_is_no_embedding_for_the_model_is_one_sentence(case):
    file, reason = CASES[case]

    with pytest.raises(ValueError, match=rf"^[^\n]*{reason}[^\n]*$"):
        read_learned_words({"cat": file}, TINY_SPEC)


def test_text_encoders_take_equally_many_vectors():
    record = text_encoder_spec(kind="openclip", width=8)
    spec = TINY_SPEC.with_networks(text_encoder_2=record)
    file = safetensors(clip_l=vectors(2), clip_g=vectors(3))

    with pytest.raises(ValueError, match="2 for text_encoder and 3 for text_encoder_2; both take"):
        read_learned_words({"cat": file}, spec)


SDXL_NAMES = [("clip_l", "clip_g"), ("text_encoders_0", "text_encoders_1")]


@pytest.mark.parametrize("names", SDXL_NAMES)
def test_a_refiner_takes_its_part_of_a_file_for_sdxl(names):
    record = dataclasses.replace(TINY_SPEC.network(TextEncoderSpec), kind="openclip")
    spec = TINY_SPEC.with_networks(text_encoder=record)
    first, second = vectors(2, 12), vectors(2, seed=1)
    tensors = dict(zip(names, (first, second), strict=True))

    [found] = read_learned_words({"cat": safetensors(**tensors)}, spec)

    np.testing.assert_array_equal(found.vectors["text_encoder"], second)


@pytest.mark.parametrize("names", SDXL_NAMES)
def test_a_model_with_the_first_text_encoder_alone_takes_no_file_for_sdxl(names):
    tensors = dict(zip(names, (vectors(2), vectors(2, 12)), strict=True))

    with pytest.raises(ValueError, match=r"holds 2 tensors .*, and this bundle takes one for each"):
        read_learned_words({"cat": safetensors(**tensors)}, TINY_SPEC)


@pytest.mark.parametrize("name", ["", " cat", "a  b", "a\nb", "(cat)", "a[b"])
def test_what_no_prompt_can_say_is_not_a_word(name):
    with pytest.raises(ValueError, match=r"is not a word|a bracket or a backslash"):
        read_learned_words({name: safetensors(a=vectors(1))}, TINY_SPEC)


def test_words_that_differ_in_case_alone_are_refused():
    file = safetensors(a=vectors(1))

    with pytest.raises(ValueError, match="'CAT' is there twice"):
        read_learned_words({"cat": file, "CAT": file}, TINY_SPEC)


@pytest.mark.parametrize("task", ["layout-to-image", "class-to-image"])
def test_models_without_clip_take_none(task):
    with pytest.raises(ValueError, match="has no text encoder of CLIP"):
        read_learned_words({"cat": safetensors(a=vectors(1))}, tiny_spec(task))


def test_the_vocabulary_of_a_bundle_opens_with_words(tmp_path):
    path = tmp_path / "merges.txt"
    path.write_text("#version: 0.2\nr e\n")
    words = read_learned_words({"cat": safetensors(a=vectors(1))}, TINY_SPEC)

    tokenizer = open_tokenizer(path, TINY_SPEC, words)

    assert tokenizer.token_ids("cat") == (tokenizer.vocab_size,)


# --- generating -----------------------------------------------------------------------------------


def test_a_generator_knows_its_words_and_says_which_it_used(tiny_bundle, tmp_path):
    file = tmp_path / "cat.safetensors"
    file.write_bytes(safetensors(emb_params=vectors(2)))
    with Generator(tiny_bundle, textual_inversions={"cat": file}) as generator:
        used, unused = generator("red Cat", seed=1), generator("red", seed=1)
    with Generator(tiny_bundle) as generator:
        without, plain = generator("red Cat", seed=1), generator("red", seed=1)

    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert used.textual_inversions == {"cat": digest}
    assert used.metadata()["textual_inversions"] == {"cat": digest}
    assert (used.latents != without.latents).any()
    np.testing.assert_array_equal(unused.latents, plain.latents)
    assert unused.metadata() == plain.metadata()
    path = tmp_path / "a.png"
    used.save(path)
    assert read_metadata(path)["textual_inversions"] == {"cat": digest}


def test_the_layers_that_a_prompt_skips_change_the_image(tiny_bundle):
    with Generator(tiny_bundle) as generator:
        images = [generator("red", seed=1, clip_skip=skip) for skip in (0, 1)]
        with pytest.raises(RequestError, match="clip_skip: is 2, but one layer is left after 1"):
            generator("red", clip_skip=2)

    assert (images[0].latents != images[1].latents).any()
    assert images[1].metadata()["request"]["clip_skip"] == 1


def test_a_text_encoder_of_bert_skips_no_layers():
    record = dataclasses.replace(TINY_SPEC.network(TextEncoderSpec), kind="bert")

    with pytest.raises(RequestError, match="clip_skip: is 1, but this bundle's text encoder skips"):
        resolve(GenerationRequest("red", clip_skip=1), TINY_SPEC.with_networks(text_encoder=record))


def test_a_word_that_cannot_be_used_is_an_error_of_that_argument(tiny_bundle):
    with pytest.raises(RequestError, match=r"textual_inversions: .* cannot be read"):
        Generator(tiny_bundle, textual_inversions={"cat": "nowhere.pt"})


def test_a_word_that_the_refiner_cannot_use_is_an_error_that_names_it(tiny_bundle, bundle_of):
    words = {"cat": safetensors(emb_params=vectors(2))}

    with pytest.raises(
        RequestError,
        match=r"^textual_inversions: the refiner: this class-to-image bundle has no text encoder",
    ):
        Generator(tiny_bundle, refiner=bundle_of("class-to-image"), textual_inversions=words)


def test_the_command_line_takes_words_and_warns_where_they_are_missing(
    tiny_bundle, tmp_path, monkeypatch, caplog
):
    from ldm_runtime.cli import main

    monkeypatch.chdir(tmp_path)
    (tmp_path / "cat.safetensors").write_bytes(safetensors(emb_params=vectors(2)))
    where = ["--bundle", str(tiny_bundle)]
    flag = "--textual-inversion"
    assert main(["generate", "red cat", *where, flag, "cat.safetensors", "-o", "a.png"]) == 0
    with caplog.at_level(logging.WARNING):
        assert main(["generate", "--like", "a.png", *where, "-o", "b.png"]) == 0
    assert "with a textual inversion 'cat'" in caplog.text
    caplog.clear()
    named = [flag, "cat=cat.safetensors"]
    with caplog.at_level(logging.WARNING):
        assert main(["generate", "--like", "a.png", *where, *named, "-o", "c.png"]) == 0
    assert not caplog.messages
    assert (tmp_path / "c.png").read_bytes() == (tmp_path / "a.png").read_bytes()
    assert main(["generate", "red", *where, *named, *named]) == 2
