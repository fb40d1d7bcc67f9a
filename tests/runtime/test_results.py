import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm_runtime import Generator
from ldm_runtime.errors import RequestError
from ldm_runtime.pipeline.file_names import is_folder, pattern_paths, save_numbered
from ldm_runtime.pipeline.image_files import read_metadata


@pytest.fixture(scope="module")
def generator(tiny_bundle):
    with Generator(tiny_bundle, threads=1) as generator:
        yield generator


@pytest.fixture(scope="module")
def one(generator):
    return generator(prompt="red", seed=7)


@pytest.fixture(scope="module")
def three(generator):
    return generator(prompt="red", seed=7, num_images=3)


def test_a_result_is_a_sequence_of_its_images(three):
    assert len(three) == 3
    assert list(three) == three.images
    assert three[2] is three.images[2]
    assert three.image is three.images[0]
    assert (three.seed, three.seeds) == (7, [7, 8, 9])


def test_images_of_a_variation_share_their_seed(generator):
    result = generator(prompt="red", seed=7, variation_strength=0.5, num_images=2)

    assert result.seeds == [7, 7]


def test_a_result_is_shown_in_one_line(one, three):
    seconds = f"{one.timings['total']:.1f} s"

    assert repr(one) == f"Result: 1 image of 16x16, seed 7, ddim 4 steps, {seconds}"
    assert "3 images of 16x16, seeds 7 to 9, ddim 4 steps" in repr(three)


def test_a_result_that_sampled_nothing_says_nothing_of_sampling(bundle_of):
    with Generator(bundle_of("autoencoder"), threads=1) as generator:
        result = generator(image=np.zeros((16, 16, 3), dtype=np.uint8))

    assert repr(result) == f"Result: 1 image of 16x16, {result.timings['total']:.1f} s"


def test_a_notebook_shows_the_image(one):
    with Image.open(io.BytesIO(one._repr_png_())) as shown:
        np.testing.assert_array_equal(shown, one.image)


def test_a_notebook_shows_several_images_side_by_side(three):
    with Image.open(io.BytesIO(three._repr_png_())) as shown:
        pixels = np.asarray(shown)

    np.testing.assert_array_equal(pixels[:16, 16:], three.images[1])
    np.testing.assert_array_equal(pixels[16:, :16], three.images[2])
    assert (pixels[16:, 16:] == 255).all()


def test_metadata_without_an_index_is_that_of_the_first_image(three):
    assert three.metadata() == three.metadata(0) != three.metadata(1)


def test_saving_makes_missing_folders(one, tmp_path):
    one.save(tmp_path / "new/folder/a.png")

    assert read_metadata(tmp_path / "new/folder/a.png") == one.metadata()


def test_saving_one_of_several_images_asks_which(three, tmp_path):
    with pytest.raises(RequestError, match=r"index: this result has 3 images; .*save_all"):
        three.save(tmp_path / "a.png")
    assert not list(tmp_path.iterdir())

    three.save(tmp_path / "a.png", 2)

    assert read_metadata(tmp_path / "a.png")["request"]["seed"] == 9


def test_all_images_go_into_a_folder_under_the_next_free_numbers(three, tmp_path):
    folder = tmp_path / "new/out"

    first, second = three.save_all(folder), three.save_all(str(folder))

    names = [f"{number:04d}-seed{seed}.png" for number, seed in enumerate([7, 8, 9] * 2)]
    assert [path.name for path in first + second] == names
    assert [read_metadata(path)["request"]["seed"] for path in second] == [7, 8, 9]


def test_all_images_get_the_names_of_a_pattern(three, tmp_path):
    paths = three.save_all(tmp_path / "new" / "{index:03d}-{seed}.png")

    assert paths == [tmp_path / "new" / name for name in ("000-7.png", "001-8.png", "002-9.png")]
    assert read_metadata(paths[1]) == three.metadata(1)


def test_a_single_image_needs_no_placeholder(one, tmp_path):
    assert one.save_all(tmp_path / "a.png") == [tmp_path / "a.png"]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("a.png", r"several of 3 images one name; put \{index\}"),
        ("{seed}/{{index}}.png", "several of 3 images"),
        ("{number}.png", r"has the placeholder \{number\}; give \{index\} and \{seed\}"),
        ("{index.real}.png", r"has the placeholder \{index\.real\}"),
        ("{}.png", r"has the placeholder \{\}"),
        ("{index!r}.png", "has the placeholder"),
        ("{index:{seed}}.png", "has the placeholder"),
        ("{index.png", "is not a valid pattern"),
        ("{index:s}.png", "is not a valid pattern"),
        ("{index}{seed:c}.png", r"has the placeholder \{seed:c\}, .*; write \{seed\}"),
        ("{index:>4c}.png", r"has the placeholder \{index:>4c\}, .*; write \{index\}"),
    ],
)
def test_a_pattern_that_cannot_name_every_image_is_refused(pattern, message):
    with pytest.raises(RequestError, match=f"path: '.*' .*{message}"):
        pattern_paths(pattern, [9_999_999_999, 7, 7])


def test_two_braces_stand_for_one():
    assert pattern_paths("{{a}}-{index}.png", [7]) == [Path("{a}-0.png")]


def test_names_tell_folders_from_files(tmp_path):
    (tmp_path / "a.png").mkdir()

    folders = (tmp_path, tmp_path / "a.png", "out", "out/v1.2", "new.png/", tmp_path / "none")
    files = ("a.png", "out/A.JPG", "b.tiff", "{seed}", "{index}/a.png")

    assert [is_folder(each) for each in (*folders, *files)] == [True] * 6 + [False] * 5


def test_a_number_that_another_process_takes_is_left_to_it(tmp_path):
    def save(path):
        if path.name == "0000-seed7.png" and not path.exists():
            path.write_text("theirs")
            raise FileExistsError
        path.write_text("ours")

    assert save_numbered(tmp_path, 7, save).name == "0001-seed7.png"
    assert (tmp_path / "0000-seed7.png").read_text() == "theirs"
