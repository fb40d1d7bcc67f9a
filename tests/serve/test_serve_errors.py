import copy
import pickle

import pytest

from ldm_serve.errors import ServeError, invalid, unavailable


@pytest.mark.parametrize(
    "error",
    [
        invalid("size", "size: must be even"),
        unavailable("the server is ending"),
        ServeError(429, "queue_full", "later", kind="rate_limit_error", retry_after=3.0),
    ],
    ids=lambda error: error.code,
)
@pytest.mark.parametrize("send", [lambda each: pickle.loads(pickle.dumps(each)), copy.copy])  # noqa: S301
def test_an_error_survives_pickle_and_copy(error, send):
    found = send(error)

    assert (type(found), str(found)) == (type(error), str(error))
    assert (found.body, found.headers, found.status) == (error.body, error.headers, error.status)
