"""Cheaper pictures after the memory ladder ended, if the user allows them."""

from __future__ import annotations

import logging
from dataclasses import replace

from hires.devices.spec import DeviceSpec
from hires.engine.job import RenderJob
from hires.errors import MemoryLadderError
from hires.planning import planner
from hires.planning.explain import in_smaller_tiles
from hires.planning.plan import MemoryPlan

log = logging.getLogger(__name__)


def cheaper_job(job: RenderJob, error: MemoryLadderError) -> RenderJob:
    """The job in smaller tiles, without journal or base. `error` if the user allows no other picture, or none is left.

    Not with packed weights: the ladder ends with weights in host memory already.
    """
    request = next(planner.smaller_tiles(job.request, job.spec), None) if job.request.allow_approximate else None
    if request is None:
        raise error
    log.warning("%s; drawing another picture, as `allow_approximate` allows", error)
    return replace(job, request=request, journal=None, base=None)


def plan_cheaper(job: RenderJob, device: DeviceSpec) -> MemoryPlan:
    """The plan of a cheaper picture, which its notes call an approximation."""
    return in_smaller_tiles(planner.plan(job.request, job.spec, device), job.request)
