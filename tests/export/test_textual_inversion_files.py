"""Textual inversions as trainers save them with torch: pickles with a `ParameterDict`."""

import collections

import numpy as np
import pytest
import torch

from ldm_export.checkpoint.checkpoint import open_checkpoint
from ldm_export.errors import CheckpointError
from ldm_runtime.inputs.textual_inversion import read_learned_words
from ldm_runtime.specs.networks import TextEncoderSpec
from ldm_runtime.testing import TINY_SPEC

WIDTH = TINY_SPEC.network(TextEncoderSpec).width


def of_today(values):
    return torch.nn.ParameterDict({"*": values})


def before_1_12(values):
    """A `ParameterDict` with the attributes that it had in torch 1.11 and before."""
    made = of_today(values)
    attributes = vars(made)
    del attributes["_keys"]
    attributes["_parameters"] = collections.OrderedDict(attributes["_parameters"])
    return made


@pytest.mark.parametrize("of_archive", [True, False])
@pytest.mark.parametrize("parameters_of", [of_today, before_1_12])
@pytest.mark.filterwarnings("ignore:Couldn't retrieve source code:UserWarning")
def test_a_parameter_dict_of_the_original_trainer_is_an_embedding(
    parameters_of, of_archive, tmp_path
):
    values = torch.randn(3, WIDTH)
    path = tmp_path / "embeddings.pt"
    saved = {"string_to_token": {"*": torch.tensor(265)}, "string_to_param": parameters_of(values)}
    torch.save(saved, path, _use_new_zipfile_serialization=of_archive)

    [found] = read_learned_words({"<cat>": path}, TINY_SPEC)

    np.testing.assert_array_equal(found.vectors["text_encoder"], values.numpy())
    with pytest.raises(CheckpointError, match="is a textual inversion embedding and not a model"):
        open_checkpoint(path)


def test_a_parameter_dict_without_parameters_is_one_sentence(tmp_path):
    path = tmp_path / "embeddings.pt"
    torch.save({"string_to_param": torch.nn.ParameterDict()}, path)

    with pytest.raises(ValueError, match=r"embeddings\.pt holds 0 tensors \(none\)"):
        read_learned_words({"<cat>": path}, TINY_SPEC)


def test_two_words_of_a_parameter_dict_are_too_many_for_one_text_encoder(tmp_path):
    path = tmp_path / "embeddings.pt"
    two = torch.nn.ParameterDict({name: torch.ones(1, WIDTH) for name in ("*", "@")})
    torch.save({"string_to_param": two}, path)

    with pytest.raises(ValueError, match=r"holds 2 tensors \(\* 1x8, @ 1x8\)"):
        read_learned_words({"<cat>": path}, TINY_SPEC)


def test_a_parameter_dict_alone_is_named_as_what_it_is(tmp_path):
    path = tmp_path / "embeddings.pt"
    torch.save(torch.nn.ParameterDict(), path)

    with pytest.raises(CheckpointError, match=r"torch\.nn\.modules\.container\.ParameterDict"):
        open_checkpoint(path)
