"""The sections of a configuration that are this project's own: sampling defaults, names of labels.

```yaml
model: {params: …}     # CompVis'
sampling:              # fields of a request, with the defaults that the model was measured with
  sampler: ddim
  schedule: karras
  num_inference_steps: 50
  guidance_scale: 1.5
  eta: 0.0
  zero_terminal_snr: true    # trained down to nothing but noise: the noise schedule is rescaled
label_names: [red circle, green circle, …]    # of labels 0, 1, …
```
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from ldm_export.errors import ExportError
from ldm_runtime.errors import RequestError
from ldm_runtime.requests.request import CUSTOM, FIELDS

_MAX_NAMES, _MAX_LETTERS = 100_000, 200


@dataclass(frozen=True, kw_only=True)
class SamplingFields:
    """The fields of the section `sampling:`, named as those of a request; None where open."""

    sampler: str | None = None
    schedule: str | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    eta: float | None = None
    zero_terminal_snr: bool | None = None


def sampling_fields(config: Mapping[str, Any]) -> SamplingFields:
    """Return the section `sampling:` of a configuration.

    Raises:
        ExportError: It is not a mapping, or an entry is unknown or not what a request takes.
    """
    section = config.get("sampling")
    if section is None:
        return SamplingFields()
    known = [field.name for field in fields(SamplingFields)]
    if not isinstance(section, dict) or not set(section) <= set(known):
        found = ", ".join(map(str, section)) if isinstance(section, dict) else repr(section)[:80]
        raise ExportError(f"config: sampling has {found}; its entries are {', '.join(known)}")
    given = {name: value for name, value in section.items() if value is not None}
    try:
        checked: dict[str, Any] = {name: FIELDS[name].check(name, given[name]) for name in given}
    except RequestError as error:
        raise ExportError(f"config: sampling.{error}") from error
    if checked.get("schedule") == CUSTOM:
        raise ExportError(f"config: sampling.schedule {CUSTOM!r} is of requests that list sigmas")
    return SamplingFields(**checked)


def label_names(config: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Return the names of labels that a configuration lists, or None without the entry.

    Raises:
        ExportError: The entry is not a list of names.
    """
    listed = config.get("label_names")
    if listed is None:
        return None
    if not isinstance(listed, list):
        raise ExportError(f"config: label_names is {type(listed).__name__}; give a list of names")
    return checked_names(listed, "config: label_names")


def checked_names(names: Sequence[object], place: str) -> tuple[str, ...]:
    """Return names of labels, each one line of text.

    Raises:
        ExportError: There are none or too many, or one is not a line of text.
    """
    if not 0 < len(names) <= _MAX_NAMES:
        raise ExportError(f"{place} has {len(names)} names; give 1 to {_MAX_NAMES}")
    for number, name in enumerate(names):
        is_line = isinstance(name, str) and name.isprintable() and name.strip() == name
        if not is_line or not 0 < len(str(name)) <= _MAX_LETTERS:
            raise ExportError(
                f"{place}: the name of label {number} is {name!a:.80}; give a line of text of at "
                f"most {_MAX_LETTERS} characters"
            )
    return tuple(map(str, names))
