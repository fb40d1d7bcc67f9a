"""Progress of a request: the events of its stream, reported as they pass."""

import collections.abc
from collections.abc import Iterable, Iterator, Sequence
from typing import TextIO

from ldm_runtime.pipeline.results import Result
from ldm_runtime.pipeline.sampling import Step
from ldm_runtime.progress import Progress, reporting_to


def report_steps(
    events: Iterable[Step | Result], batches: Sequence[range], progress: Progress
) -> Iterator[Step | Result]:
    """Yield the events of a stream, and report how far its images are.

    Args:
        events: The stream.
        batches: Indices of the images that are sampled together, in order.
        progress: Told of every batch by name, such as "image 2/4".
    """
    total = batches[-1].stop
    names = [_name(images, total) for images in batches]
    progress.plan(dict.fromkeys(names))
    running = names[0]
    progress.begin(running)
    for event in events:
        if isinstance(event, Step):
            name = _name(event.images, total)
            if name != running:
                progress.end(running, "generated")
                progress.begin(name)
                running = name
            progress.advance(event.index / event.total)
        else:
            progress.end(running, "generated")
        yield event


def report_results(
    results: Iterator[Result], count: int, stream: TextIO
) -> collections.abc.Generator[Result, None, None]:
    """Yield the results of `count` requests, and report each to a stream when it is there."""
    names = [f"request {number}/{count}" for number in range(1, count + 1)]
    with reporting_to(stream) as progress:
        progress.plan(dict.fromkeys(names))
        for name in names:
            progress.begin(name)
            result = next(results)
            progress.end(name, "generated")
            yield result


def _name(images: range, total: int) -> str:
    first, last = images[0] + 1, images[-1] + 1
    return f"image {last}/{total}" if first == last else f"images {first}-{last}/{total}"
