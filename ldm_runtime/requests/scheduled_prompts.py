"""Prompts of a request over the steps that it makes: each step sees a text of each.

Steps are numbered as in the web UI. The first step that is made is step 1, also of a run that
starts from an image and makes the last steps only; shares are of all steps of the schedule all the
same. The second pass begins after the last number of the schedule, and shares from 1 on are of the
steps that it makes. Latents that have steps of the schedule behind them go on after their numbers.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from ldm_runtime.errors import RequestError
from ldm_runtime.requests.request import GenerationRequest
from ldm_runtime.requests.resolved import PromptCondition, ResolvedRequest
from ldm_runtime.text.prompt_editing import ScheduledText, count_texts, prompt_schedule
from ldm_runtime.text.prompts import parse_prompt


@dataclass(frozen=True, kw_only=True)
class StepPrompts:
    """The texts of the prompts from a step on.

    Attributes:
        first_step: The first step that sees them.
        texts: Each after the name of its field: "negative_prompt", if guidance has a use for it,
            then "prompt".
    """

    first_step: int
    texts: tuple[tuple[str, str], ...]


def scheduled_prompts(request: ResolvedRequest) -> tuple[StepPrompts, ...]:
    """Return the texts of a request with a prompt, in the order of the steps from which they hold.

    There is always at least one; the first holds from the first step that is made. Those that no
    step sees are left out.

    Raises:
        RequestError: Too many brackets of a prompt are open at once.
    """
    condition = request.condition_as(PromptCondition)
    prompts = {"prompt": condition.prompt}
    if request.is_guided:
        prompts = {"negative_prompt": condition.negative_prompt, **prompts}
    found: list[StepPrompts] = []
    for step, current in _changes(request, prompts):
        texts = tuple(current.items())
        if not found or found[-1].texts != texts:
            found.append(StepPrompts(first_step=step, texts=texts))
    return tuple(found)


def prompt_texts(request: ResolvedRequest) -> tuple[tuple[str, str], ...]:
    """Return each text of both prompts that steps see, once, after the name of its field.

    Raises:
        RequestError: Too many brackets of a prompt are open at once.
    """
    condition = request.condition_as(PromptCondition)
    prompts = {"prompt": condition.prompt, "negative_prompt": condition.negative_prompt}
    changes = _changes(request, prompts)
    return tuple(dict.fromkeys(item for _, texts in changes for item in texts.items()))


def count_characters(request: GenerationRequest, num_steps: int) -> dict[str, int]:
    """Return how many characters the texts of each prompt have in all, by its field.

    It is what `resolution.resolve` reads, known in time that is linear in the lengths of the
    prompts.

    Args:
        request: The request.
        num_steps: Steps of a pass, at least 1.

    Raises:
        RequestError: Too many brackets of a prompt are open at once.
    """
    prompts = {"prompt": request.prompt or "", "negative_prompt": request.negative_prompt}
    if request.literal_prompt:
        return {field: len(text) for field, text in prompts.items()}
    counts = {}
    for field, text in prompts.items():
        with _of_field(field):
            counts[field] = count_texts(text, num_steps) * len(text)
    return counts


def check_prompts(request: ResolvedRequest) -> None:
    """Check that every text of the prompts of a request can be read.

    Raises:
        RequestError: One of them cannot.
    """
    if not isinstance(request.condition, PromptCondition) or request.condition.literal:
        return
    for field, text in prompt_texts(request):
        with _of_field(field):
            parse_prompt(text)


def _changes(
    request: ResolvedRequest, prompts: Mapping[str, str]
) -> Iterator[tuple[int, Mapping[str, str]]]:
    """Yield the steps at which a pass begins or a text may change, and the texts from there on."""
    if request.condition_as(PromptCondition).literal:
        yield request.passes[0].first_step, prompts
        return
    total, earlier = request.num_steps, 0
    for each in request.passes:
        schedules = {
            field: _schedule(field, text, total, earlier) for field, text in prompts.items()
        }
        start = each.first_step - 1 - earlier
        for step, texts in _changes_of_pass(schedules, range(start, start + len(each.steps))):
            yield earlier + step + 1, texts
        total, earlier = len(request.passes[-1].steps), earlier + total


def _changes_of_pass(
    schedules: Mapping[str, Sequence[ScheduledText]], steps: range
) -> Iterator[tuple[int, Mapping[str, str]]]:
    """Yield the indices of the first step and of others, from 0, with the texts from there on."""
    rows = {field: iter(schedule) for field, schedule in schedules.items()}
    current = {field: next(each) for field, each in rows.items()}
    step = steps.start
    while step < steps.stop:
        for field, each in rows.items():
            while current[field].last_step <= step:
                current[field] = next(each)
        yield step, {field: each.text for field, each in current.items()}
        step = min(each.last_step for each in current.values())


def _schedule(field: str, text: str, total: int, earlier: int) -> tuple[ScheduledText, ...]:
    with _of_field(field):
        return prompt_schedule(text, total, earlier_steps=earlier)


@contextmanager
def _of_field(field: str) -> Iterator[None]:
    """Let an error of the block name the field that it is about."""
    try:
        yield
    except ValueError as error:
        raise RequestError(field, str(error)) from error
