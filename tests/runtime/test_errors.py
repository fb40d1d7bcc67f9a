"""Errors cross processes: every class of the tree survives pickle and copy."""

import copy
import pickle
import textwrap

import pytest

import ldm_runtime.errors
from ldm_runtime import Generator
from ldm_runtime.errors import LdmError, RequestError, ShapeError

#: Arguments of the constructors that take more than a message.
ARGUMENTS = {RequestError: ("seed", "is -1; give 0 or more"), ShapeError: ("x", (1, 2), (1, "n"))}

#: Errors of the exporter are in the tree too, if something imported them.
RUNTIME = "ldm_runtime."

WAYS = {
    "oldest pickle": lambda error: pickle.loads(pickle.dumps(error, 0)),  # noqa: S301  (our own)
    "newest pickle": lambda error: pickle.loads(pickle.dumps(error, -1)),  # noqa: S301  (our own)
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
}


def tree(kind=LdmError):
    return [kind, *(below for each in kind.__subclasses__() for below in tree(each))]


def made(kind):
    error = kind(*ARGUMENTS.get(kind, ("a message",)))
    error.add_note("a note")
    return error


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", [kind for kind in tree() if kind.__module__.startswith(RUNTIME)])
def test_every_error_survives_pickle_and_copy(kind, way):
    error = made(kind)

    found = WAYS[way](error)

    assert type(found) is kind
    assert (str(found), found.args, vars(found)) == (str(error), error.args, vars(error))


def test_the_tree_in_the_docstring_is_the_tree():
    drawn = textwrap.dedent(ldm_runtime.errors.__doc__).split("\n\n")[1]

    names = [line.strip("│├└─ ").split()[0] for line in drawn.splitlines()]

    here = [each.__name__ for each in tree() if each.__module__ == ldm_runtime.errors.__name__]
    assert sorted(names) == sorted(here)


def test_a_generator_says_what_to_do_instead_of_pickling_it(tiny_bundle):
    with Generator(tiny_bundle, threads=1) as generator:
        for send in (pickle.dumps, copy.copy, copy.deepcopy):
            with pytest.raises(TypeError, match="a Generator cannot be pickled or copied; open"):
                send(generator)
