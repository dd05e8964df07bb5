"""Requests that stay open until their job has ended."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from fastapi import HTTPException, Request
from starlette.concurrency import run_in_threadpool

from hires.server.bodies import AnyTask
from hires.server.job import Job
from hires.server.queue import JobQueue

Result = TypeVar("Result")
LOOK_SECONDS = 0.5
"""How often to look whether the client is still there."""


async def take_in(queue: JobQueue, decode: Callable[[], Result]) -> Result:
    """Call a function that decodes the pictures of a request, in a thread.

    Few are called at a time; the others wait without a thread, so that no number of requests fills the memory.
    """
    async with queue.taking_in:
        return await run_in_threadpool(decode)


async def submit_waiting(queue: JobQueue, tasks: Sequence[AnyTask], origin: str, folder: Path | None = None) -> Job:
    """Queue a job for a client that waits, with the pictures that its tasks name in `folder`. Errors of `JobQueue.submit`."""

    def link_pictures(task: AnyTask, target: Path, index: int) -> AnyTask:
        return task if folder is None else task.link_pictures(folder, target)

    return await run_in_threadpool(queue.submit, tasks, durable=False, origin=origin, prepare=link_pictures)


async def wait_for(queue: JobQueue, job: Job, request: Request, keep: bool = False) -> None:
    """Return when the job has ended. A client that goes away cancels its job, unless `keep` is set."""
    ended = asyncio.wrap_future(job.ended)
    while True:
        done, _ = await asyncio.wait([ended], timeout=LOOK_SECONDS)
        if done:
            break
        if not keep and await request.is_disconnected():
            queue.cancel(job)
            await asyncio.wait([ended], timeout=60)
            queue.forget(job)
            raise HTTPException(499, "the client went away")
    if job.status not in ("done", "failed", "cancelled"):
        raise HTTPException(503, "the server is stopping")
