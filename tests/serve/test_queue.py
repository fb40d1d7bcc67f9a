import pytest
from hypothesis import given
from hypothesis import strategies as st

from ldm_serve.buckets import TokenBuckets
from ldm_serve.queue import FairQueue


def test_keys_take_turns_and_each_is_served_in_order():
    queue = FairQueue()
    for item in ("a1", "a2", "a3", "b1", "c1", "b2"):
        queue.put(item[0], item)

    assert list(queue) == ["a1", "b1", "c1", "a2", "b2", "a3"]
    assert [queue.pop() for _ in range(len(queue))] == ["a1", "b1", "c1", "a2", "b2", "a3"]
    with pytest.raises(IndexError, match="empty"):
        queue.pop()


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers()), max_size=40))
def test_iteration_foretells_the_order(items):
    queue = FairQueue()
    for number, (key, value) in enumerate(items):
        queue.put(key, (key, number, value))

    foretold = list(queue)

    assert [queue.pop() for _ in range(len(queue))] == foretold
    for key in "abc":
        mine = [item for item in foretold if item[0] == key]
        assert mine == sorted(mine, key=lambda item: item[1])


def test_a_key_waits_for_one_item_of_each_other_however_many_they_bring():
    queue = FairQueue()
    for number in range(1000):
        queue.put("flood", f"flood{number}")
    queue.pop()

    queue.put("other", "mine")

    assert [queue.pop(), queue.pop()] == ["flood1", "mine"]


def test_items_can_be_removed():
    queue = FairQueue()
    for item in ("a1", "b1", "a2"):
        queue.put(item[0], item)

    assert queue.remove("a", "a1")
    assert not queue.remove("a", "a1")
    assert not queue.remove("c", "c1")
    assert (queue.count("a"), queue.count("b"), queue.count("c")) == (1, 1, 0)
    assert list(queue) == ["a2", "b1"]
    assert queue.remove("b", "b1")
    assert len(queue) == 1


def test_a_bucket_gains_tokens_with_time_up_to_its_size():
    now = 0.0
    buckets = TokenBuckets(per_minute=6, now=lambda: now)

    assert [buckets.take("a") for _ in range(6)] == [0.0] * 6
    assert buckets.take("a") == pytest.approx(10)
    assert buckets.take("b") == 0.0
    now = 4.0
    assert buckets.take("a") == pytest.approx(6)
    now = 10.0
    assert buckets.take("a") == 0.0
    now = 1e6
    assert [buckets.take("a") for _ in range(6)] == [0.0] * 6
    assert buckets.take("a") > 0
