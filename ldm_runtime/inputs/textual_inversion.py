"""Textual inversions: files of learned embeddings, each of which a word of a prompt stands for.

The formats are those of AUTOMATIC1111's web UI (`string_to_param` in a pickle), of the original
trainer and InvokeAI (the same, in a `torch.nn.ParameterDict`), of kohya's trainers
(`emb_params`; `clip_l` and `clip_g` for SDXL) and of diffusers (the token itself;
`text_encoders_0` and `text_encoders_1` for SDXL). Pickles are interpreted and run nothing, see
`tensor_files.pickle_reader`. Not read are embeddings that the web UI hid in a PNG.

Source: `modules/textual_inversion/textual_inversion.py` of AUTOMATIC1111/stable-diffusion-webui
1.10, which reads `_parameters` as well, and `loaders/textual_inversion.py` of diffusers 0.35.
"""

import hashlib
from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from ldm_runtime.inputs.reading import NamedBytes, read_bytes
from ldm_runtime.specs.model import ModelSpec
from ldm_runtime.specs.networks import TextEncoderSpec
from ldm_runtime.tensor_files.errors import FormatError
from ldm_runtime.tensor_files.lazy_tensors import open_tensors
from ldm_runtime.tensor_files.pickle_reader import PickleContents
from ldm_runtime.tensor_files.tensor_extent import TensorExtent, check_name
from ldm_runtime.tensor_files.torch_records import ParameterDictRecord, TensorRecord
from ldm_runtime.tensor_files.torch_state_dict import FindTensor
from ldm_runtime.text import LearnedWord

#: Most bytes of a file: fifty times what the longest word of SDXL needs.
_MAX_BYTES = 32 << 20
_WANTED = "give a textual inversion as .pt, .bin or .safetensors"
_BRACKETS = frozenset("()[]\\")  # the syntax of a prompt
#: The kind of text encoder that a tensor is for, by its name in files for SDXL, which has two.
_KINDS: tuple[Mapping[str, str], ...] = (
    MappingProxyType({"clip_l": "clip", "clip_g": "openclip"}),
    MappingProxyType({"text_encoders_0": "clip", "text_encoders_1": "openclip"}),
)

Float32Array = npt.NDArray[np.float32]
Encoders = Mapping[str, TextEncoderSpec]


def read_learned_words(files: Mapping[str, object], spec: ModelSpec) -> tuple[LearnedWord, ...]:
    """Return the words of textual inversions for a model.

    Args:
        files: A path, a `data:` URL or the bytes of a file for each word.
        spec: The model.

    Raises:
        ValueError: In one sentence, which word cannot be used or which file cannot be read or is
            for another model.
    """
    encoders = {
        name: network
        for name, network in spec.networks.items()
        if isinstance(network, TextEncoderSpec) and network.learned_dim is not None
    }
    if files and not encoders:
        raise ValueError(
            f"this {spec.task} bundle has no text encoder of CLIP, which textual inversions are "
            "for; leave them out"
        )
    _check_words(files)
    return tuple(_read(word, file, encoders) for word, file in files.items())


def _check_words(words: Mapping[str, object]) -> None:
    folded: set[str] = set()
    for word in words:
        if not word or word != " ".join(word.split()) or not word.isprintable():
            raise ValueError(f"{word!r} is not a word; give one without white space around it")
        if not _BRACKETS.isdisjoint(word):
            raise ValueError(
                f"{word!r} has a bracket or a backslash, which prompts use for weights; rename it"
            )
        if word.lower() in folded:
            raise ValueError(f"{word!r} is there twice, case aside; rename one of them")
        folded.add(word.lower())


def _read(word: str, file: object, encoders: Encoders) -> LearnedWord:
    if not isinstance(file, (bytes, bytearray, memoryview, str)) and not hasattr(
        file, "__fspath__"
    ):
        raise ValueError(
            f"{word!r} has a {type(file).__name__}; give a path or the bytes of a file"
        )
    named = read_bytes(file, _MAX_BYTES)
    try:
        lazy, _ = open_tensors(np.frombuffer(named.data, np.uint8), _pickled_extents, _WANTED)
        tensors = {name: tensor.numpy() for name, tensor in lazy.items()}
        vectors = {
            name: _checked(tensors[key], name, encoders[name])
            for name, key in _keys_of(tensors, encoders).items()
        }
    except FormatError as error:
        raise ValueError(f"{named.name} {error}") from error
    _check_lengths(named, vectors)
    return LearnedWord(
        text=word,
        vectors=MappingProxyType(vectors),
        sha256=hashlib.sha256(named.data).hexdigest(),
    )


def _pickled_extents(pickled: PickleContents, find: FindTensor) -> Mapping[str, TensorExtent]:
    root = pickled.root
    level = root.get("string_to_param", root) if isinstance(root, dict) else None
    if isinstance(level, ParameterDictRecord):
        level = level.parameters
    if not isinstance(level, Mapping):
        raise FormatError(
            "holds no plain dict of tensors; load it with the program that wrote it and save it "
            "again"
        )
    return {
        check_name(name): find(value)
        for name, value in level.items()
        if isinstance(value, TensorRecord)
    }


def _keys_of(tensors: Mapping[str, npt.NDArray[np.generic]], encoders: Encoders) -> dict[str, str]:
    """Return the name of the tensor for each text encoder; SDXL's refiner has the second alone.

    Raises:
        FormatError: The file has others, or too many.
    """
    kinds = next((each for each in _KINDS if each.keys() == tensors.keys()), None)
    if kinds is None:
        keys = dict(zip(encoders, tensors, strict=False))
    else:
        by_kind = {kind: key for key, kind in kinds.items()}
        keys = {name: by_kind[each.kind] for name, each in encoders.items() if each.kind in by_kind}
    is_refiner = kinds is not None and [each.kind for each in encoders.values()] == ["openclip"]
    if is_refiner or len(tensors) == len(encoders) == len(set(keys.values())):
        return keys
    found = ", ".join(f"{key} {_shape(array)}" for key, array in list(tensors.items())[:4])
    wanted = " and ".join(f"{each.width}" for each in encoders.values())
    raise FormatError(
        f"holds {len(tensors)} tensors ({found or 'none'}), and this bundle takes one for each of "
        f"its text encoders, with vectors of {wanted} numbers; give an embedding for this model"
    )


def _checked(array: npt.NDArray[np.generic], name: str, encoder: TextEncoderSpec) -> Float32Array:
    """Return vectors (n, width) in float32.

    Raises:
        FormatError: They are not numbers of that width, or too many for a prompt.
    """
    if array.dtype.kind != "f" or not 1 <= array.ndim <= 2 or 0 in array.shape:
        raise FormatError(
            f"holds {array.dtype} of shape {_shape(array)}; an embedding is floating-point "
            "numbers, a vector per row"
        )
    if array.shape[-1] != encoder.width:
        raise FormatError(
            f"holds vectors of {array.shape[-1]} numbers, and the {name} of this bundle takes "
            f"{encoder.width}; give an embedding that was trained for this model"
        )
    with np.errstate(over="ignore"):  # float64 beyond float32 becomes infinite
        vectors = np.atleast_2d(array).astype(np.float32)
    if not np.isfinite(vectors).all():
        raise FormatError("holds numbers that are not finite; its training failed")
    room = encoder.max_tokens - 2
    if len(vectors) > room:
        raise FormatError(f"holds {len(vectors)} vectors, more than the {room} tokens of a prompt")
    vectors.flags.writeable = False
    return vectors


def _check_lengths(named: NamedBytes, vectors: Mapping[str, Float32Array]) -> None:
    lengths = {len(each) for each in vectors.values()}
    if len(lengths) != 1:
        listed = " and ".join(f"{len(each)} for {name}" for name, each in vectors.items())
        raise ValueError(f"{named.name} holds {listed}; both take the same number of vectors")


def _shape(array: npt.NDArray[np.generic]) -> str:
    return "x".join(map(str, array.shape)) or "()"
