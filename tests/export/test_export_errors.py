"""Errors of an export cross processes, like those of the runtime."""

import copy
import pickle
from pathlib import Path

import pytest

from ldm_export import errors
from ldm_export.errors import CheckpointError

ARGUMENTS = {CheckpointError: (Path("model.ckpt"), "is empty")}


KINDS = [each for each in vars(errors).values() if isinstance(each, type)]


@pytest.mark.parametrize("kind", [each for each in KINDS if issubclass(each, Exception)])
def test_every_error_survives_pickle_and_copy(kind):
    error = kind(*ARGUMENTS.get(kind, ("a message",)))

    pickled = pickle.loads(pickle.dumps(error))  # noqa: S301  (our own)
    for found in (pickled, copy.copy(error), copy.deepcopy(error)):
        assert type(found) is kind
        assert (str(found), vars(found)) == (str(error), vars(error))
