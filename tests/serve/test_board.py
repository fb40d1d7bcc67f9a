import asyncio
import io
from dataclasses import replace

import pytest
from PIL import Image

from ldm_serve.board import JobBoard, Wish
from ldm_serve.errors import ServeError
from ldm_serve.intake import check_request
from ldm_serve.routes.jobs import data_url, job_json
from ldm_serve.served_models import ServedModels
from ldm_serve.settings import Limits
from tests.serve.fake_executor import FakeExecutor


def png(image):
    file = io.BytesIO()
    image.save(file, format="PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def model(bundle):
    return ServedModels({"tiny": bundle}).find(None)


@pytest.fixture
def board(model):
    """Runs a scenario with a board over a fake executor."""

    def run(scenario, room=1, **limits):
        async def main():
            executor = FakeExecutor(room)
            board = JobBoard(executor, Limits(**limits))
            await board.start()
            return await scenario(board, executor)

        return asyncio.run(main())

    return run


@pytest.fixture
def submit(model):
    def submit(board, key="a", wish=None, **fields):
        checked = check_request({"prompt": "red", **fields}, model, Limits())
        return board.submit(key, checked, wish or Wish())

    return submit


def refusal(function, *arguments, **options):
    with pytest.raises(ServeError) as error:
        function(*arguments, **options)
    return error.value


def test_a_job_goes_from_the_queue_to_its_images(board, submit):
    async def scenario(board, executor):
        first, second = submit(board), submit(board)
        states = [(first.state, board.position(first)), (second.state, board.position(second))]
        executor.step(first.id, 5)
        progress = first.progress
        executor.finish(first.id)
        executor.finish(second.id, b"second")
        result = await second.outcome()
        return states, progress, first, second, result

    states, progress, first, second, result = board(scenario)

    assert states == [("generating", None), ("queued", 0)]
    assert progress == 0.5
    assert (first.state, second.state) == ("completed", "completed")
    assert result.images == [b"second"]


def test_a_worker_is_told_which_bundle_a_request_was_checked_against(board, submit, model):
    async def scenario(board, executor):
        return executor.works[submit(board).id].bundle_sha256

    assert board(scenario) == model.bundle_sha256


def test_keys_take_turns(board, submit):
    async def scenario(board, executor):
        running = submit(board, "flood")
        for _ in range(5):
            submit(board, "flood")
        other = submit(board, "other")
        positions = [board.position(other)]
        executor.finish(running.id)
        positions.append(board.position(other))
        executor.finish(next(iter(executor.works)))
        return positions, other.state

    assert board(scenario) == ([1, 0], "generating")


def test_a_key_that_has_its_share_is_told_when_to_come_back(board, submit):
    async def scenario(board, executor):
        submit(board)
        submit(board)
        mine = refusal(submit, board)
        other = submit(board, "b")
        executor.finish(next(iter(executor.works)))
        return mine, other.state, submit(board).state

    error, other, again = board(scenario, max_queue_per_key=2)

    assert (error.status, error.code, error.kind) == (429, "queue_full", "rate_limit_error")
    assert 1 <= int(error.headers["Retry-After"]) <= 120
    assert (other, again) == ("queued", "queued")


def test_a_full_queue_is_said_to_be(board, submit):
    async def scenario(board, executor):
        for key in "abc":
            submit(board, key)
        return refusal(submit, board, "d"), refusal(board.check_readiness)

    error, readiness = board(scenario, max_queue=2)

    assert (error.status, str(error)) == (429, "2 requests wait; ask again later")
    assert (readiness.status, str(readiness)) == (503, "the queue is full")


def test_a_server_whose_first_worker_is_not_ready_refuses(board, submit):
    async def scenario(board, executor):
        executor.is_ready = False
        before = refusal(submit, board)
        executor.is_ready = True
        board.check_readiness()
        executor.is_ready, executor.room = False, 0  # it died, and is being replaced
        waiting = submit(board)
        return before, waiting.state, refusal(board.check_readiness)

    before, state, readiness = board(scenario)

    assert (before.status, before.retry_after) == (503, 5)
    assert "the model is being opened" in str(before)
    assert state == "queued"
    assert "no worker is ready" in str(readiness)


def test_a_draining_server_finishes_what_has_come(board, submit):
    async def scenario(board, executor):
        job, waiting = submit(board), submit(board)
        closing = asyncio.ensure_future(board.close(5))
        await asyncio.sleep(0)
        error = refusal(submit, board)
        executor.finish(job.id)
        executor.finish(waiting.id)
        await closing
        return error, job.state, waiting.state, executor.is_closed

    error, *states = board(scenario)

    assert (error.status, str(error)) == (503, "the server is ending; ask another one")
    assert states == ["completed", "completed", True]


def test_what_is_left_when_time_is_up_gets_an_error(board, submit):
    async def scenario(board, executor):
        job, waiting = submit(board), submit(board)
        await board.close(0.01)
        return job, waiting, executor

    job, waiting, executor = board(scenario)

    assert (job.state, waiting.state) == ("failed", "failed")
    assert str(job.error) == "the server has ended"
    assert executor.cancelled == [job.id]


def test_a_deadline_counts_the_wait(board, submit):
    async def scenario(board, executor):
        running = submit(board, wish=Wish(deadline_seconds=0.02))
        waiting = submit(board, wish=Wish(deadline_seconds=0.01))
        await asyncio.sleep(0.05)
        return running, waiting, executor.cancelled, submit(board).state

    running, waiting, cancelled, after = board(scenario)

    for job in (running, waiting):
        assert (job.error.status, job.error.code) == (504, "deadline_exceeded")
        assert job.error.headers["x-should-retry"] == "false"
    assert cancelled == [running.id]
    assert after == "generating"


def test_a_cancelled_job_makes_room(board, submit):
    async def scenario(board, executor):
        jobs = [submit(board) for _ in range(3)]
        board.cancel(jobs[1])
        board.cancel(jobs[0])
        board.cancel(jobs[0])
        return jobs, executor.cancelled

    jobs, cancelled = board(scenario)

    assert [job.state for job in jobs] == ["cancelled", "cancelled", "generating"]
    assert cancelled == [jobs[0].id]


def test_a_job_is_its_keys_own(board, submit):
    async def scenario(board, executor):
        job = submit(board, "a")
        found = board.find("a", job.id) is job and board.find(None, job.id) is job
        return (
            found,
            board.jobs_of("a") == [job],
            board.jobs_of("b"),
            refusal(board.find, "b", job.id),
        )

    *found, error = board(scenario)

    assert found == [True, True, []]
    assert (error.status, error.code) == (404, "job_not_found")


def test_old_results_are_forgotten(board, submit):
    async def scenario(board, executor):
        jobs = []
        for _ in range(3):
            jobs.append(submit(board))
            executor.finish(jobs[-1].id)
        return [refusal(board.find, None, jobs[0].id).code, board.find(None, jobs[1].id).state]

    assert board(scenario, kept_results=2) == ["job_not_found", "completed"]


def test_results_are_kept_up_to_some_bytes_and_the_latest_always(board, submit):
    async def scenario(board, executor):
        jobs = [submit(board) for _ in range(3)]
        for job in jobs[:2]:
            executor.finish(job.id, b"x" * 50)
        both = [board.find(None, job.id) for job in jobs[:2]]
        executor.finish(jobs[2].id, b"x" * 500)
        gone = [refusal(board.find, None, job.id).status for job in jobs[:2]]
        return both == jobs[:2], gone, board.find(None, jobs[2].id) is jobs[2]

    assert board(scenario, kept_bytes=100) == (True, [404, 404], True)


def test_results_are_kept_for_a_while_only(board, submit):
    async def scenario(board, executor):
        job = submit(board)
        executor.finish(job.id)
        kept = board.find(None, job.id) is job
        await asyncio.sleep(0.03)
        return kept, refusal(board.find, None, job.id).status

    assert board(scenario, kept_seconds=0.02) == (True, 404)


def test_a_failure_of_the_executor_reaches_the_client(board, submit):
    async def scenario(board, executor):
        job = submit(board)
        executor.fail(job.id)
        with pytest.raises(ServeError) as error:
            await job.outcome()
        return error.value

    error = board(scenario)

    assert (error.status, error.code, error.should_retry) == (500, "worker_crash", False)


def test_a_slow_follower_sees_the_latest_state_and_the_end(board, submit):
    async def scenario(board, executor):
        job = submit(board)
        seen = []

        async def follow():
            async for _ in job.changes():
                seen.append((job.state, job.steps.get(0, 0)))

        following = asyncio.ensure_future(follow())
        await asyncio.sleep(0)
        for step in range(1, 10):
            executor.step(job.id, step)
        await asyncio.sleep(0)
        executor.finish(job.id)
        await following
        return seen

    assert board(scenario) == [("generating", 0), ("generating", 9), ("completed", 9)]


def test_a_step_back_of_a_replayed_job_is_shown(board, submit):
    async def scenario(board, executor):
        job = submit(board, num_images=2)
        executor.step(job.id, 8)
        executor.step(job.id, 4, image=1)
        before = job.progress
        executor.step(job.id, 1)
        return before, job.progress

    assert board(scenario, room=2) == (0.6, 0.25)


def test_what_happens_is_counted(board, submit):
    async def scenario(board, executor):
        done, failed, gone = submit(board), submit(board), submit(board)
        executor.finish(done.id)
        executor.fail(failed.id)
        board.cancel(gone)
        return board.metrics.text().decode()

    text = board(scenario)

    for outcome in ("ok", "failed", "cancelled"):
        assert f'ldm_requests_total{{model="tiny",outcome="{outcome}"}} 1.0' in text
    assert 'ldm_images_total{model="tiny"} 1.0' in text
    assert "ldm_queue_depth 0.0" in text
    assert "ldm_inflight 0.0" in text
    assert "ldm_workers 1.0" in text


def test_calls_of_the_unet_and_the_images_in_them_are_counted(board, submit):
    async def scenario(board, executor):
        executor.finish(submit(board).id, calls=5, called_images=7)
        executor.finish(submit(board).id, calls=3, called_images=9)
        return board.metrics.text().decode()

    text = board(scenario)

    assert 'ldm_batches_total{model="tiny"} 8.0' in text
    assert 'ldm_batch_images_total{model="tiny"} 16.0' in text


def test_the_time_of_a_step_is_counted_from_the_second_on(board, submit, monkeypatch):
    async def scenario(board, executor):
        job = submit(board, num_images=2)
        for second, image, step in ((1, 0, 1), (2, 1, 1), (4, 0, 2), (10, 1, 3)):
            monkeypatch.setattr("ldm_serve.jobs.time.monotonic", lambda second=second: second)
            executor.step(job.id, step, image=image)
        return board.metrics.text().decode()

    text = board(scenario)

    assert 'ldm_step_seconds_count{model="tiny"} 2.0' in text
    assert 'ldm_step_seconds_sum{model="tiny"} 7.0' in text  # 3 s, and 4 s for each of two


def test_a_draining_server_ends_what_takes_longer_while_clients_wait(board, submit):
    """The answer comes before the server closes its connections."""

    async def scenario(board, executor):
        job, waiting = submit(board), submit(board)
        board.drain(0.05)
        board.drain(60)  # a later call cannot give more time
        async with asyncio.timeout(5):
            return [await refusal_of(each.outcome()) for each in (job, waiting)], executor

    errors, executor = board(scenario)

    assert [(each.status, str(each)) for each in errors] == [(503, "the server has ended")] * 2
    assert not executor.is_closed


def test_a_server_is_drained_when_clients_have_fetched_their_images(board, submit, monkeypatch):
    async def scenario(board, executor):
        job, late = submit(board), submit(board)
        board.drain(60)
        found = [board.is_drained]
        executor.finish(job.id)
        executor.finish(late.id)
        found.append(board.is_drained)
        job.unfetched.discard(0)
        found.append(board.is_drained)
        monkeypatch.setattr("ldm_serve.board.GRACE_SECONDS", -1)  # as if they had ended long ago
        return [*found, board.is_drained]

    assert board(scenario) == [False, False, False, True]


def test_a_server_without_jobs_is_drained_at_once(board):
    async def scenario(board, executor):
        before = board.is_drained
        board.drain(60)
        return before, board.is_drained

    assert board(scenario) == (False, True)


async def refusal_of(outcome):
    with pytest.raises(ServeError) as error:
        await outcome
    return error.value


def test_without_any_worker_left_requests_are_not_kept_waiting(board, submit):
    async def scenario(board, executor):
        jobs = [submit(board), submit(board)]
        executor.is_over, executor.is_ready = True, False
        executor.changed()
        ends = [await refusal_of(each.outcome()) for each in jobs]
        return ends, refusal(submit, board)

    ends, refused = board(scenario)

    assert [each.status for each in ends] == [503, 503]
    assert "no worker is left" in str(ends[0])
    assert refused.status == 503


def test_what_a_request_brought_is_encoded_while_it_waits_and_forgotten_with_its_end(board, model):
    """The images of clients are far larger than those of results, and these are kept for long."""
    url = data_url(png(Image.new("RGB", (64, 48), (255, 0, 0))), "png")
    fields = {"prompt": "red", "image": url, "mask_image": url, "mask_blur": (2, 2)}

    async def scenario(board, executor):
        checked = check_request(fields, model, Limits())
        job = board.submit("a", checked, Wish())
        work, waiting = executor.works[job.id], board.submit("a", checked, Wish())
        decoded = [each.checked.request.source_image for each in (job, waiting)]
        urls = [each.work.fields["mask_image"] for each in (job, waiting)]
        executor.finish(job.id)
        return decoded, urls, job, work

    decoded, urls, job, work = board(scenario)

    assert [(each.size, each.mask.size) for each in decoded] == [((1, 1), (1, 1))] * 2
    assert urls == [url, url]
    assert work.fields["image"] == url  # it may have to be run again
    assert job.work.fields == job.checked.fields == {}
    assert job.checked.request.source_image.size == (1, 1)
    assert job.checked.request.source_image.blur == (2, 2)
    assert job_json(job, None)["width"] == 64


def test_previews_that_are_needed_are_refused_where_there_are_none(board, model):
    async def scenario(board, executor):
        without = replace(model, has_previews=False)
        checked = check_request({"prompt": "red"}, without, Limits())
        job = board.submit("a", checked, Wish(previews=True))
        wish = Wish(previews=True, needs_previews=True)
        return job.work.previews, refusal(board.submit, "a", checked, wish)

    previews, error = board(scenario)

    assert previews is False
    assert (error.status, error.param) == (400, "previews")
