"""An executor that does what a test tells it to."""

from ldm_serve.executors.contract import ExecutorStats
from ldm_serve.executors.messages import Failed, Finished, Progress


class FakeExecutor:
    """Holds the jobs it is given until a test ends them.

    Attributes:
        room: Images that it takes at once.
        is_ready: Whether it says so.
        works: The jobs it has, by their identifiers.
        cancelled: Identifiers of those that were cancelled.
        is_over: Whether it says that no worker is left.
        is_closed: Whether it was closed.
        reason: Why it is not ready, if it is not.
    """

    def __init__(self, room=1):
        self.room, self.is_ready, self.is_over, self.is_closed = room, True, False, False
        self.works, self.cancelled = {}, []
        self.reason = "the model is being opened"

    async def start(self, report, changed):
        self.report, self.changed = report, changed

    def submit(self, work):
        self.works[work.job] = work

    def cancel(self, job):
        if self.works.pop(job, None) is not None:
            self.cancelled.append(job)

    def stats(self):
        used = sum(work.num_images for work in self.works.values())
        return ExecutorStats(
            is_ready=self.is_ready,
            room=0 if self.is_over else self.room - used,
            workers=1,
            restarts=0,
            is_over=self.is_over,
            reason="" if self.is_ready else self.reason,
        )

    async def close(self):
        self.is_closed = True

    def step(self, job, step, total=10, image=0, preview=None):
        self.report(Progress(job=job, image=image, step=step, total=total, preview=preview))

    def finish(self, job, image=b"image", **counts):
        work = self.works.pop(job)
        count = range(work.num_images)
        seeds = [work.fields["seed"] + index for index in count]
        self.report(
            Finished(
                job=job,
                images=[image for _ in count],
                seeds=seeds,
                metadata=[{} for _ in count],
                infotexts=[None for _ in count],
                timings={"total": 0.5},
                **counts,
            )
        )
        self.changed()

    def fail(self, job, status=500, code="worker_crash", message="two workers ended"):
        del self.works[job]
        self.report(Failed(job=job, status=status, code=code, message=message))
        self.changed()
