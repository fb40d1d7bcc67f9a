"""Depth maps in requests, and what the UNet is fed of them."""

import base64
import io

import numpy as np
import pytest
from PIL import Image

from ldm_runtime.conditioning import encode_conditioning, open_tokenizer
from ldm_runtime.errors import RequestError
from ldm_runtime.inputs.depth_maps import DepthMap
from ldm_runtime.requests.request import GenerationRequest
from ldm_runtime.requests.resolution import resolve
from ldm_runtime.requests.resolved import EstimatedDepth, GivenDepth, NoDepth
from ldm_runtime.testing import FakeEngine, tiny_networks, tiny_spec, write_tiny_bundle

TASK = "depth-to-image"
RNG = np.random.default_rng(5)
DEPTH = RNG.integers(0, 256, (24, 32), dtype=np.uint8)
PICTURE = RNG.integers(0, 256, (24, 32, 3), dtype=np.uint8)


def encoded(image, format="PNG"):
    file = io.BytesIO()
    image.save(file, format=format)
    return file.getvalue()


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    bundle = tmp_path_factory.mktemp("depth") / "engines"
    write_tiny_bundle(bundle, TASK)
    (vocabulary,) = (bundle / "tokenizer").iterdir()
    return open_tokenizer(vocabulary, tiny_spec(TASK))


@pytest.fixture
def concat_of(tokenizer):
    """Returns the channels of a request's depth, and the engines that were asked for them."""

    def encode(**fields):
        spec, asked = tiny_spec(TASK), {}

        def network(name):
            asked[name] = FakeEngine(tiny_networks(TASK)[name])
            return asked[name]

        request = resolve(GenerationRequest("red", **fields), spec)
        return encode_conditioning(network, tokenizer, request, spec).concat, asked

    return encode


# --- what is read ---------------------------------------------------------------------------------


def test_files_arrays_and_images_are_the_same_map(tmp_path):
    gray = Image.fromarray(DEPTH)
    path = tmp_path / "depth.png"
    path.write_bytes(encoded(gray))
    url = f"data:image/png;base64,{base64.b64encode(encoded(gray)).decode()}"
    coloured = encoded(gray.convert("RGB"))
    arrays = (DEPTH, DEPTH.astype(np.float64), DEPTH[None], npy(DEPTH.astype(np.int32)))

    read = [DepthMap.read(each) for each in (path, encoded(gray), gray, url, coloured, *arrays)]

    assert {*read} == {DepthMap(DEPTH)}
    assert read[0].source == str(path)
    assert read[0].size == (32, 24)
    assert read[0].values.dtype == np.float32


def test_sixteen_bits_keep_all_their_steps():
    fine = np.arange(60_000, 60_012, dtype=np.uint16).reshape(3, 4)

    np.testing.assert_array_equal(DepthMap.read(encoded(Image.fromarray(fine))).values, fine)


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        (3, "3 is not a depth map; give a path"),
        (np.zeros((2, 2, 3)), "the array is of float64 and shape (2, 2, 3); a depth map is"),
        (np.zeros((2, 2), dtype=bool), "the array is of bool and shape (2, 2); a depth map is"),
        (np.array([[0.0, np.nan]]), "the depth in row 0, column 1 is NaN, infinite or too large"),
        (np.array([[1e39]]), "the depth in row 0, column 0 is NaN, infinite or too large"),
        (encoded(Image.fromarray(PICTURE)), "the data is in colours; a depth map is gray"),
        (b"depth", "the data is neither a .npy file nor a readable image"),
    ],
)
def test_what_is_not_a_depth_map_is_refused_in_one_sentence(value, sentence):
    with pytest.raises(ValueError, match=r"^[^\n]{1,500}$") as caught:
        DepthMap.read(value)

    assert str(caught.value).startswith(sentence)


# --- what a request is ----------------------------------------------------------------------------


def test_a_map_goes_before_the_depth_of_the_image():
    spec = tiny_spec(TASK)

    both = resolve(GenerationRequest("red", image=PICTURE, depth_map=DEPTH), spec)
    image = resolve(GenerationRequest("red", image=PICTURE), spec)
    other = resolve(GenerationRequest("red", image=PICTURE), tiny_spec("text-to-image"))

    assert both.depth == GivenDepth(depth_map=DepthMap(DEPTH))
    assert (image.depth, other.depth) == (EstimatedDepth(), NoDepth())
    assert both.as_request().depth_map == DepthMap(DEPTH)
    assert image.as_request().depth_map is None


def test_a_map_keeps_its_size_unless_there_is_an_image_or_another_is_asked_for():
    def size(**fields):
        request = resolve(GenerationRequest("red", **fields), tiny_spec(TASK))
        return request.height, request.width

    assert size(depth_map=DEPTH) == (24, 32)
    assert size(depth_map=DEPTH, height=16) == (16, 32)
    assert size(depth_map=DEPTH, image=PICTURE[:20]) == (20, 32)


def test_strength_is_of_the_image_and_a_map_alone_starts_from_noise():
    spec = tiny_spec(TASK)
    image = resolve(GenerationRequest("red", image=PICTURE, num_inference_steps=10), spec)
    depth = resolve(GenerationRequest("red", depth_map=DEPTH, num_inference_steps=10), spec)

    assert (image.passes[0].strength, image.passes[0].steps) == (0.8, range(2, 10))
    assert (depth.passes[0].strength, depth.passes[0].steps) == (1.0, range(10))
    with pytest.raises(RequestError, match="strength: means nothing without an image"):
        resolve(GenerationRequest("red", depth_map=DEPTH, strength=0.5), spec)


def test_neither_map_nor_image_is_a_sentence_that_names_both():
    with pytest.raises(RequestError, match=r"image: this bundle is .*: give image or depth_map$"):
        resolve(GenerationRequest("red"), tiny_spec(TASK))


def test_a_bundle_without_a_depth_estimator_asks_for_a_map():
    spec = tiny_spec(TASK).with_networks(depth_estimator=None)

    assert resolve(GenerationRequest("red", depth_map=DEPTH), spec).depth
    with pytest.raises(RequestError, match=r"^depth_map: is missing, .*; give the depth of the"):
        resolve(GenerationRequest("red", image=PICTURE), spec)


# --- what the UNet is fed -------------------------------------------------------------------------


def test_depth_goes_from_minus_one_to_one_whatever_its_unit(concat_of):
    concat, asked = concat_of(depth_map=DEPTH)
    metres, _ = concat_of(depth_map=7.5 * DEPTH.astype(np.float64) - 300)

    assert concat.shape == (1, 1, 12, 16)
    assert concat.dtype == np.float32
    assert (concat.min(), concat.max()) == (-1, 1)
    np.testing.assert_allclose(metres, concat, atol=1e-5)
    assert {*asked} == {"text_encoder"}


def test_of_an_image_alone_the_depth_is_estimated_in_the_size_of_the_estimator(concat_of):
    concat, asked = concat_of(image=PICTURE)

    (call,) = asked["depth_estimator"].calls
    seen = Image.fromarray(PICTURE).resize((16, 16), Image.Resampling.BICUBIC)
    expected = np.asarray(seen).transpose(2, 0, 1)[None] / np.float32(127.5) - 1
    np.testing.assert_allclose(call["image"], expected, atol=1e-6)
    depth = tiny_networks(TASK)["depth_estimator"](call)["depth"][0]
    given, _ = concat_of(image=PICTURE, depth_map=depth)
    np.testing.assert_array_equal(concat, given)


def test_a_size_that_the_unet_cannot_halve_is_padded_by_the_edge_of_the_depth(concat_of):
    concat, _ = concat_of(image=PICTURE[:22, :30], depth_map=DEPTH)

    assert concat.shape == (1, 1, 12, 16)
    np.testing.assert_array_equal(concat[..., 11, :], concat[..., 10, :])
    np.testing.assert_array_equal(concat[..., 15], concat[..., 14])


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"depth_map": np.full((4, 4), 7)}, "depth_map: is 7 everywhere; give one whose"),
        (
            {"image": np.full((24, 32, 3), 9, dtype=np.uint8)},
            "depth_map: estimated from the image is ",
        ),
    ],
)
def test_depth_that_is_the_same_everywhere_is_refused(concat_of, fields, sentence):
    with pytest.raises(RequestError) as caught:
        concat_of(**fields)

    assert str(caught.value).startswith(sentence)
