"""Cheaper images after the memory ladder ended, where the user allows them."""

from __future__ import annotations

import logging
from collections.abc import Callable

from hires.checkpoints.spec import ModelSpec
from hires.devices.spec import DeviceSpec
from hires.engine.results import RenderResult
from hires.errors import MemoryLadderError
from hires.options.render import RenderRequest
from hires.planning import explain, planner
from hires.planning.plan import MemoryPlan

log = logging.getLogger(__name__)


def _cheaper(request: RenderRequest, spec: ModelSpec, error: MemoryLadderError) -> RenderRequest:
    """The next picture that takes less memory, where the user allows another one; else the error."""
    found = next(planner.approximations(request, spec), None)
    if found is None:
        raise error
    log.warning("%s; drawing another picture, as --allow-approximate allows", error)
    return found


def _unkept(
    request: RenderRequest,
    made: MemoryPlan,
    spec: ModelSpec,
    device: DeviceSpec,
    run: Callable[[RenderRequest, MemoryPlan], RenderResult],
) -> RenderResult:
    """A run without a journal, and cheaper pictures after it where they are allowed."""
    try:
        return run(request, made)
    except MemoryLadderError as error:
        cheaper = _cheaper(request, spec, error)
    return _approximate(cheaper, spec, device, run)


def _approximate(
    request: RenderRequest, spec: ModelSpec, device: DeviceSpec, run: Callable[[RenderRequest, MemoryPlan], RenderResult]
) -> RenderResult:
    """The first of ever cheaper pictures that has room, its plan saying so. MemoryLadderError where none has."""
    while True:
        made = explain.approximated(planner.plan(request, spec, device), request)
        try:
            return run(request, made)
        except MemoryLadderError as error:
            request = _cheaper(request, spec, error)
