import contextlib
import gc
import signal
import subprocess
import sys
import threading
import time
import traceback
from dataclasses import replace

import numpy as np
import pytest

from ldm_runtime import GenerationRequest, Generator
from ldm_runtime.backends import get_backend
from ldm_runtime.backends.contract import BoundInputs, EngineSource
from ldm_runtime.bundle.manifest import load_manifest
from ldm_runtime.conditioning import Conditioning
from ldm_runtime.errors import ShapeError
from ldm_runtime.pipeline.batching import LoopScheduler, in_order, run_together
from ldm_runtime.pipeline.passes import open_passes
from ldm_runtime.pipeline.sampling import sample_latents
from ldm_runtime.requests.resolution import resolve
from ldm_runtime.samplers import SAMPLERS
from ldm_runtime.testing import TINY_SPEC, FakeEngine, tiny_networks, tiny_requests, tiny_spec
from tests.runtime.ctrl_c import output_of_interrupted

SECONDS = 30  # what no test here takes unless a thread waits for ever


@pytest.fixture(autouse=True)
def no_thread_outlives_a_test():
    def give_up(*_):
        raise TimeoutError("a thread waits for another for ever")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
    assert loop_threads() == []


@pytest.fixture(scope="module")
def unet(tiny_bundle):
    with open_unet(tiny_bundle) as engine:
        yield engine


def open_unet(bundle):
    manifest = load_manifest(bundle)
    source = EngineSource(
        bundle=bundle, manifest=manifest, component=manifest.component("unet"), threads=1
    )
    return get_backend("onnxruntime").open_engine(source)


def loop_threads():
    return [each for each in threading.enumerate() if each.name == "ldm-loop"]


def doubling():
    """An engine that doubles, row by row, and keeps its calls."""
    return FakeEngine(lambda inputs: {"y": inputs["x"] * 2})


class CountingEngine(FakeEngine):
    """An engine that keeps what is bound."""

    def __init__(self):
        super().__init__(lambda inputs: {"y": inputs["x"] + inputs["c"]})
        self.bound = []

    def bind(self, constants):
        self.bound.append(constants)
        return BoundInputs(runner=self, constants=constants)


def column(*values):
    return np.array(values, dtype=np.float32)[:, None]


def doubler(start, calls):
    """Return a loop that asks for a column to be doubled again and again."""

    def loop(engine):
        x = start
        for _ in range(calls):
            x = engine.run({"x": x})["y"]
            yield x[:, 0].tolist()

    return loop


def rows_of(engine):
    return [len(call["x"]) for call in engine.calls]


def resolved(**fields):
    return resolve(GenerationRequest(prompt="a red circle", **fields), TINY_SPEC)


def test_loops_share_calls_and_each_gets_its_own_rows():
    engine = doubling()

    items = list(
        run_together([doubler(column(1), 2), doubler(column(3, 5), 2)], engine, max_samples=8)
    )

    assert items == [(0, [2]), (1, [6, 10]), (0, [4]), (1, [12, 20])]
    assert rows_of(engine) == [3, 3]


def test_a_call_has_at_most_the_rows_allowed_and_the_earliest_loop_has_its_turn_first():
    engine = doubling()
    loops = [doubler(column(1, 1), 2), doubler(column(2, 2), 1), doubler(column(3), 2)]

    items = list(run_together(loops, engine, max_samples=3))

    assert [index for index, _ in items] == [0, 0, 1, 2, 2]
    assert rows_of(engine) == [2, 2, 3, 1]


def test_a_later_loop_that_fits_overtakes_one_that_does_not():
    engine = doubling()
    loops = [doubler(column(1, 1), 1), doubler(column(2, 2), 1), doubler(column(3), 1)]

    items = list(run_together(loops, engine, max_samples=3))
    wide = list(run_together([doubler(column(1, 1, 1), 1), *loops], doubling(), max_samples=4))

    assert [index for index, _ in items] == [0, 1, 2]
    assert [index for index, _ in wide] == [0, 1, 2, 3]
    assert rows_of(engine) == [2, 3]


def test_a_loop_with_more_rows_than_allowed_has_calls_of_its_own():
    engine = doubling()

    loops = [doubler(column(1, 2, 3, 4, 5), 2), doubler(column(6), 1)]
    items = list(run_together(loops, engine, max_samples=2))

    assert items[1] == (0, [4, 8, 12, 16, 20])
    assert rows_of(engine) == [5, 5, 1]


def test_loops_that_ask_for_fewer_rows_than_it_takes_have_calls_of_their_own():
    engine = doubling()
    loops = [doubler(column(*range(rows)), 2) for rows in (2, 1, 2, 1, 3)]

    items = list(run_together(loops, engine, max_samples=9, min_samples=2))

    assert rows_of(engine) == [7, 7, 1, 1, 1, 1]
    assert [index for index, _ in items] == [0, 2, 4, 0, 2, 4, 1, 1, 3, 3]


@pytest.mark.parametrize(
    "other",
    [np.ones((1, 2), np.float32), np.ones((1, 1, 1), np.float32), np.ones((1, 1), np.float64)],
)
def test_rows_of_another_shape_or_type_do_not_share_a_call(other):
    engine = doubling()

    items = list(run_together([doubler(column(1), 2), doubler(other, 2)], engine, max_samples=8))

    assert rows_of(engine) == [1] * 4
    assert {call["x"].dtype for call in engine.calls} == {np.dtype("f4"), other.dtype}
    assert [index for index, _ in items] == [0, 0, 1, 1]


def test_bound_rows_of_another_length_do_not_share_a_call():
    engine = CountingEngine()
    loops = [binder(column(1), np.full((1, size), 5, np.float32)) for size in (1, 1, 3)]

    list(run_together(loops, engine, max_samples=8))

    assert [len(call["c"]) for call in engine.calls] == [2, 2, 1, 1]


def binder(start, constant, calls=2):
    """Return a loop that binds a constant and asks for start + constant."""

    def loop(engine):
        bound = engine.bind({"c": constant})
        for _ in range(calls):
            yield bound.run({"x": start})["y"].tolist()

    return loop


def test_a_loop_is_begun_when_there_is_room_for_it():
    begun = []

    def loops():
        for index in range(6):
            begun.append(index)
            yield doubler(column(index), 1)

    items = run_together(loops(), doubling(), max_samples=2)

    assert begun == []
    assert next(items) == (0, [0])
    assert begun == [0, 1]
    assert [index for index, _ in items] == [1, 2, 3, 4, 5]
    assert begun == list(range(6))


def test_a_loop_that_ends_makes_room_for_the_next():
    engine = doubling()
    loops = [doubler(column(1), 5), doubler(column(1), 1), doubler(column(1), 4)]

    list(run_together(loops, engine, max_samples=2))

    assert rows_of(engine) == [2] * 5


def test_loops_may_make_any_number_of_items_a_call():
    def silent(engine):
        engine.run({"x": column(1)})
        engine.run({"x": column(1)})
        yield from ()

    def chatty(_engine):
        yield from ("a", "b")

    items = list(run_together([silent, chatty, doubler(column(1), 1)], doubling(), max_samples=4))

    assert items == [(1, "a"), (1, "b"), (2, [2])]


def test_no_loops_make_no_items():
    assert list(run_together([], doubling(), max_samples=1)) == []


def test_an_answer_belongs_to_its_loop():
    def spoiler(engine):
        answer = engine.run({"x": column(1)})["y"]
        answer[...] = np.nan
        yield answer.flags.owndata

    items = list(run_together([spoiler, doubler(column(3), 1)], doubling(), max_samples=4))

    assert items == [(0, True), (1, [6])]


def test_constants_are_bound_once_as_long_as_the_same_loops_share_calls():
    engine = CountingEngine()
    loops = [binder(column(i, i), column(10, 20), calls) for i, calls in ((1, 5), (2, 3))]

    items = list(run_together(loops, engine, max_samples=4))

    assert items[0] == (0, [[11], [21]])
    assert items[1] == (1, [[12], [22]])
    assert [len(each["c"]) for each in engine.bound] == [4, 2]


def test_other_constants_of_the_same_loop_are_bound_anew():
    def loop(engine):
        for constant in (column(1), column(2)):
            yield engine.bind({"c": constant}).run({"x": column(0)})["y"].item()

    assert list(run_together([loop], CountingEngine(), max_samples=1)) == [(0, 1), (0, 2)]


@pytest.mark.parametrize("is_stopped", [False, True])
def test_a_network_that_no_loop_uses_any_more_is_forgotten(is_stopped):
    """Its constants would stay in memory, on a GPU too."""
    first, second = doubling(), doubling()
    scheduler = LoopScheduler(max_samples=1)

    def loop(share):
        for engine in (first, second):
            share(engine).run({"x": column(1)})
        yield None

    def call(index):
        list(scheduler.call([index]))
        return [each.engine for each in scheduler._networks]

    for index in range(2):
        list(scheduler.begin(index, loop))

    assert call(0) == call(1) == [first]
    assert call(0) == [first]  # the second was that loop's alone, which has ended
    if is_stopped:
        scheduler.stop(1)
        assert scheduler._networks == []
    else:
        assert call(1) == []


def test_only_the_thread_that_consumes_calls_the_network():
    callers = set()

    def note(inputs):
        callers.add(threading.current_thread())
        return {"y": inputs["x"]}

    list(run_together([doubler(column(1), 3)] * 3, FakeEngine(note), max_samples=2))

    assert callers == {threading.current_thread()}


def test_nothing_happens_between_two_items():
    engine = doubling()
    items = run_together([doubler(column(1), 9)] * 2, engine, max_samples=2)

    next(items)
    time.sleep(0.05)

    assert len(engine.calls) == 1
    items.close()


def test_loops_see_the_context_of_the_consumer():
    def divide(_engine):
        yield np.float32(1) / np.float32(0)

    with np.errstate(divide="ignore"):
        assert list(run_together([divide], doubling(), max_samples=1)) == [(0, np.inf)]
    with np.errstate(divide="raise"), pytest.raises(FloatingPointError):
        list(run_together([divide], doubling(), max_samples=1))


def closable(closed, index):
    """Return a loop that runs for ever and notes that it was closed."""

    def loop(engine):
        try:
            while True:
                yield engine.run({"x": column(1)})
        finally:
            closed.append(index)

    return loop


@pytest.mark.parametrize("items_taken", [0, 1, 2, 3])
def test_closing_stops_every_loop_that_was_begun(items_taken):
    closed, engine = [], doubling()
    items = run_together([closable(closed, i) for i in range(3)], engine, max_samples=2)
    for _ in range(items_taken):
        next(items)

    items.close()

    assert sorted(closed) == ([0, 1] if items_taken else [])
    assert loop_threads() == []
    assert list(items) == []


def test_a_generator_that_nobody_wants_any_more_stops_its_loops():
    closed = []
    items = run_together([closable(closed, 0)] * 2, doubling(), max_samples=2)
    next(items)

    del items
    gc.collect()

    assert closed == [0, 0]
    assert loop_threads() == []


def test_a_loop_that_will_not_stop_is_not_waited_for_at_its_next_call():
    def stubborn(engine):
        for _ in range(3):
            with contextlib.suppress(BaseException):
                yield engine.run({"x": column(1)})
            with contextlib.suppress(BaseException):
                engine.run({"x": column(1)})

    items = run_together([stubborn, stubborn], doubling(), max_samples=2)
    next(items)

    items.close()

    assert loop_threads() == []


def breaks(_engine):
    """A loop that fails after its first item."""
    yield None
    raise KeyError("broken here")


def test_an_error_in_a_loop_stops_the_others_and_is_raised_once_with_its_traceback():
    closed = []
    items = run_together(
        [closable(closed, 0), breaks, closable(closed, 2)], doubling(), max_samples=4
    )

    with pytest.raises(KeyError, match="broken here") as caught:
        list(items)

    assert [each.name for each in traceback.extract_tb(caught.tb)][-1] == "breaks"
    assert closed == [0]
    assert loop_threads() == []
    assert list(items) == []


def test_an_error_of_the_network_stops_the_loops_and_is_raised_once_with_its_traceback():
    closed, calls = [], []

    def fail_at_the_second(inputs):
        calls.append(inputs)
        if len(calls) == 2:
            raise MemoryError("too large")
        return {"y": inputs["x"]}

    loops = [closable(closed, i) for i in range(2)]
    items = run_together(loops, FakeEngine(fail_at_the_second), max_samples=4)
    with pytest.raises(MemoryError, match="too large") as caught:
        list(items)

    assert [each.name for each in traceback.extract_tb(caught.tb)][-1] == "fail_at_the_second"
    assert sorted(closed) == [0, 1]
    assert len(calls) == 2
    assert list(items) == []


def test_an_error_while_loops_are_made_stops_those_under_way():
    closed = []

    def loops():
        yield closable(closed, 0)
        raise LookupError("no more")

    with pytest.raises(LookupError, match="no more"):
        list(run_together(loops(), doubling(), max_samples=4))

    assert closed == [0]


def test_an_error_leaves_no_arrays_behind():
    gc.collect()
    gc.disable()
    try:
        with contextlib.suppress(KeyError):
            list(run_together([breaks], doubling(), max_samples=1))
        left = [each for each in gc.get_objects() if type(each) is KeyError]
    finally:
        gc.enable()

    assert left == []


@pytest.mark.parametrize("place", ["loop", "network"])
def test_an_interrupt_stops_the_loops_wherever_it_arrives(place):
    code = f"""
import time
import numpy as np
from ldm_runtime.pipeline.batching import run_together
from ldm_runtime.testing import FakeEngine

signals = iter([signal.SIGINT])

def interrupt(value):
    for number in signals:
        os.kill(os.getpid(), number)
        time.sleep(0.1)
    return value

def loop(engine):
    while True:
        x = np.ones((1, 1))
        engine.run({{"x": interrupt(x) if {place!r} == "loop" else x}})
        yield 1

def network(inputs):
    return {{"y": interrupt(inputs["x"]) if {place!r} == "network" else inputs["x"]}}

try:
    for _ in run_together([loop, loop], FakeEngine(network), max_samples=2):
        pass
except KeyboardInterrupt:
    print("interrupted", [each.name for each in threading.enumerate()])
"""

    assert output_of_interrupted(code) == "interrupted ['MainThread']\n"


def test_a_process_ends_although_a_generator_is_half_consumed():
    code = """
import numpy as np
from ldm_runtime.pipeline.batching import run_together
from ldm_runtime.testing import FakeEngine

def loop(engine):
    while True:
        yield engine.run({"x": np.ones((1, 1))})

items = run_together([loop, loop], FakeEngine(dict), max_samples=2)
next(items)
print("done")
"""

    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=SECONDS
    )

    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


def test_what_happens_does_not_depend_on_the_clock():
    def record():
        rng = np.random.default_rng(0)
        engine = doubling()
        loops = [
            doubler(column(*range(size)), calls)
            for size, calls in zip(rng.integers(1, 4, 50), rng.integers(0, 9, 50), strict=True)
        ]
        items = list(run_together(loops, engine, max_samples=6))
        return items, [call["x"].tolist() for call in engine.calls]

    assert record() == record()


def test_a_network_shared_twice_over_is_the_same_network():
    def outer(engine):
        yield [item for _, item in run_together([doubler(column(1), 2)] * 2, engine, max_samples=2)]

    engine = doubling()

    items = list(run_together([outer, outer], engine, max_samples=4))

    assert items == [(0, [[2], [2], [4], [4]]), (1, [[2], [2], [4], [4]])]
    assert rows_of(engine) == [4, 4]


def test_rows_must_be_allowed():
    with pytest.raises(ValueError, match="max_samples must be at least 1, got 0"):
        run_together([], doubling(), max_samples=0)


def test_inputs_of_one_call_have_the_same_rows():
    def loop(engine):
        yield engine.bind({"c": column(1, 2, 3)}).run({"x": column(1, 2)})

    with pytest.raises(ShapeError, match="'c' has shape 3x1, but this engine takes 2x1"):
        list(run_together([loop], CountingEngine(), max_samples=4))


def test_results_are_put_in_order():
    def results():
        for index in (1, 0, 3, 2):
            produced.append(index)
            yield index, str(index)

    produced = []
    ordered = in_order(results())

    assert [(next(ordered), list(produced)) for _ in range(3)] == [
        ("0", [1, 0]),
        ("1", [1, 0]),
        ("2", [1, 0, 3, 2]),
    ]
    assert list(ordered) == ["3"]


def test_closing_what_puts_in_order_stops_the_loops():
    closed = []
    items = run_together([closable(closed, 0)], doubling(), max_samples=2)
    ordered = in_order(items)
    next(ordered)

    ordered.close()

    assert closed == [0]


REQUESTS = [
    {"sampler": sampler, "seed": index, "num_inference_steps": 2 + index % 5}
    | {"guidance_scale": (1.0, 2.5, 7.0)[index % 3], "num_images": 1 + index % 2}
    for index, sampler in enumerate(SAMPLERS)
]


@pytest.mark.parametrize("max_samples", [2, 5, 8, 64])
def test_requests_of_every_kind_get_together_bit_for_bit_what_they_get_alone(unet, max_samples):
    requests = [resolved(**fields) for fields in (*REQUESTS, {"height": 24, "seed": 5})]
    contexts = np.random.default_rng(0).normal(size=(len(requests), 2, 16, 8)).astype(np.float32)

    def loop_of(request, context):
        rows = context[1:] if request.guidance_scale == 1 else context
        conditioning = Conditioning(context=rows)
        return lambda engine: sample_latents(engine, conditioning, request, TINY_SPEC)

    loops = [loop_of(*each) for each in zip(requests, contexts, strict=True)]
    together = [[] for _ in loops]
    for index, step in run_together(loops, unet, max_samples=max_samples, min_samples=2):
        together[index].append(step.latents)

    for loop, found in zip(loops, together, strict=True):
        alone = [step.latents for step in loop(unet)]
        np.testing.assert_array_equal(found, alone)


@pytest.mark.parametrize("max_samples", [3, 4, 8])
@pytest.mark.parametrize("task", ["unconditional", "super-resolution", "inpainting"])
def test_requests_without_context_get_together_bit_for_bit_what_they_get_alone(
    bundle_of, task, max_samples
):
    spec = tiny_spec(task)
    networks = {name: FakeEngine(each) for name, each in tiny_networks(task).items()}
    all_passes = [
        open_passes(networks.__getitem__, None, resolve(replace(request, **change), spec), spec)
        for request in tiny_requests(task)
        for change in ({"num_images": 2}, {"num_images": 2, "seed": 9}, {"num_images": 1})
    ]

    def loop_of(passes):
        return lambda engine: sample_latents(
            engine, passes.conditioning, passes.request, spec, start=passes.start
        )

    loops = [loop_of(passes) for passes in all_passes]
    with Generator(bundle_of(task), threads=1) as generator:
        unet = Counting(generator._network("unet"))
        together = [[] for _ in loops]
        for index, step in run_together(loops, unet, max_samples=max_samples, min_samples=2):
            together[index].append(step.latents)
        calls, unet.calls = unet.calls, 0
        for loop, found in zip(loops, together, strict=True):
            np.testing.assert_array_equal(found, [step.latents for step in loop(unet)])
    assert (calls < unet.calls) == (max_samples > 3)


class Counting:
    """Counts the calls of a network."""

    def __init__(self, runner):
        self.runner, self.calls = runner, 0

    def run(self, inputs):
        self.calls += 1
        return self.runner.run(inputs)
