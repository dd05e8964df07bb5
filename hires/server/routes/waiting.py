"""Waiting for a job in a request whose client may go away."""

from __future__ import annotations

import asyncio

from fastapi import HTTPException, Request

from hires.server.job import Job
from hires.server.queue import JobQueue

LOOK_SECONDS = 0.5


async def finished(queue: JobQueue, job: Job, request: Request, keep: bool = False) -> None:
    """Return when the job has ended. A client that goes away takes its job with it, unless the result is to be kept."""
    waited = asyncio.wrap_future(job.ended)
    while True:
        done, _ = await asyncio.wait([waited], timeout=LOOK_SECONDS)
        if done:
            break
        if not keep and await request.is_disconnected():
            queue.cancel(job)
            await asyncio.wait([waited], timeout=60)
            queue.forget(job)
            raise HTTPException(499, "the client went away")
    if job.status not in ("done", "failed", "cancelled"):
        raise HTTPException(503, "the server is stopping")
