"""What images, segmentation maps and embeddings have in common as fields of a request."""

import copy
import hashlib
import pickle
from dataclasses import asdict, dataclass

import numpy as np
import pytest

from ldm_runtime.inputs.depth_maps import DepthMap
from ldm_runtime.inputs.embeddings import Embeddings
from ldm_runtime.inputs.images import InputImage
from ldm_runtime.inputs.initial_latents import InitialLatents
from ldm_runtime.inputs.segmentation import SegmentationMap

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(256, size=(4, 6, 3), dtype=np.uint8)
IDS = RNG.integers(256, size=(6, 9), dtype=np.uint8)
VECTORS = RNG.standard_normal((3, 8), dtype=np.float32)
DEPTHS = RNG.standard_normal((5, 7), dtype=np.float32)
LATENTS = RNG.standard_normal((2, 4, 3, 5), dtype=np.float32)

#: A class, values that it takes, and the attribute that gives them back.
KINDS = [
    (InputImage, PIXELS, "pixels"),
    (SegmentationMap, IDS, "ids"),
    (Embeddings, VECTORS, "values"),
    (DepthMap, DEPTHS, "values"),
    (InitialLatents, LATENTS, "values"),
]
every_kind = pytest.mark.parametrize(
    ("kind", "values", "name"), KINDS, ids=[kind.__name__ for kind, *_ in KINDS]
)


@every_kind
def test_it_cannot_be_changed(kind, values, name):
    mine = values.copy()
    frozen = kind(mine)

    mine[:] = 0

    np.testing.assert_array_equal(getattr(frozen, name), values)
    with pytest.raises(ValueError, match="read-only"):
        getattr(frozen, name)[0, 0] = 1
    with pytest.raises(ValueError, match="WRITEABLE"):
        getattr(frozen, name).setflags(write=True)
    with pytest.raises(AttributeError):
        setattr(frozen, name, mine)


@every_kind
def test_it_is_equal_by_its_values_and_shape_wherever_it_was_read_from(kind, values, name):
    frozen, other = kind(values, source="a.file"), values.copy()
    other.flat[-1] = 3 if other.flat[-1] != 3 else 4
    turned = np.ascontiguousarray(np.swapaxes(values, 0, 1))

    assert frozen == kind(np.asfortranarray(values))
    assert hash(frozen) == hash(kind(values))
    for different in (other, turned):
        assert frozen != kind(different)
        assert frozen.sha256 != kind(different).sha256
    assert frozen != "a.file"
    assert all(frozen != each(theirs) for each, theirs, _ in KINDS if each is not kind)


@pytest.mark.parametrize(
    ("frozen", "data"),
    [
        (InputImage(PIXELS), b"P6\n6 4\n255\n" + PIXELS.tobytes()),
        (SegmentationMap(IDS), b"P5\n9 6\n255\n" + IDS.tobytes()),
        (DepthMap(DEPTHS), b"Pf\n7 5\n-1.0\n" + DEPTHS.astype("<f4").tobytes()),
        (Embeddings(VECTORS), b"3 8\n" + VECTORS.astype("<f4").tobytes()),
    ],
)
def test_its_hash_is_that_of_a_file_that_other_programs_can_write(frozen, data):
    assert frozen.sha256 == hashlib.sha256(data).hexdigest()


@every_kind
def test_a_record_that_holds_one_can_be_copied_and_taken_apart(kind, values, name):
    @dataclass(frozen=True)
    class Record:
        field: object

    record = Record(kind(values, source="a.file"))

    assert asdict(record)["field"] is record.field
    assert copy.deepcopy(record) == record
    assert len({record, Record(kind(values))}) == 1


@every_kind
def test_it_travels_between_processes_and_stays_read_only(kind, values, name):
    frozen = kind(values, source="a.file")

    arrived = pickle.loads(pickle.dumps(frozen))  # noqa: S301  (just written)

    assert (arrived, arrived.source) == (frozen, "a.file")
    assert not getattr(arrived, name).flags.writeable
