"""Signatures that list the fields of a request, for `inspect.signature` and notebooks' completion.

Type checkers read `**fields: Unpack[RequestFields]`; what looks at the live function would see no
names there.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from ldm_runtime.requests.fields import FieldRecord
from ldm_runtime.requests.input_types import RequestFields

_Function = TypeVar("_Function", bound=Callable[..., Any])


def list_fields(function: _Function, records: Mapping[str, FieldRecord]) -> _Function:
    """Give a function a signature that has a keyword per field in place of `**fields`.

    Args:
        function: A function that takes `**fields: Unpack[RequestFields]`; it is returned.
        records: The record of every field, by name.
    """
    signature = inspect.signature(function)
    hints = RequestFields.__annotations__
    own = [each for each in signature.parameters.values() if each.kind is not each.VAR_KEYWORD]
    keywords = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=records[name].default,
            annotation=hints[name],
        )
        for name in hints
    ]
    function.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[*own, *keywords]
    )
    return function
