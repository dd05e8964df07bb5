"""The JSON documents that `hires serve` writes and its client reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias, TypedDict

Json: TypeAlias = "bool | int | float | str | Sequence[Json] | Mapping[str, Json] | None"
"""A value that JSON can hold."""

ENDED = ("done", "failed", "cancelled")
"""The statuses of a job that has ended; the others are 'queued' and 'running'."""


class ProgressDocument(TypedDict):
    """How far a job has come."""

    fraction: float
    """0 to 1, over all images of the job."""
    picture: int
    """The number of the image in progress, from 0."""
    pictures: int
    """Images of the whole job."""
    stage: str
    done: int
    """Tiles (or bands) that the stage has finished."""
    total: int
    """Tiles (or bands) of the whole stage."""
    step: int
    steps: int
    eta_seconds: float | None
    """Expected seconds until the job is done; None before anything was measured."""
    elapsed: float
    """Seconds since its first image began."""
    device: str
    """Where it runs; empty before that is known."""
    peak_bytes: int
    """The most memory that was held so far: of the card at work, else of the process."""
    previews: int
    """How many previews there have been."""


class ResultDocument(TypedDict):
    """A finished image of a job."""

    url: str
    file: str
    size: str
    """WIDTHxHEIGHT."""
    bytes: int
    """The length of the file; 0 where it is gone."""
    seed: int
    seconds: float
    notes: list[str]


class JobDocument(TypedDict):
    """A job as `GET /jobs/{id}` describes it."""

    id: str
    kind: str
    """'render', 'edit' or 'upscale'."""
    status: str
    """'queued', 'running', or one of `ENDED`."""
    position: int | None
    """How many of the waiting jobs came before it; None where it does not wait.

    Shorter jobs, and those whose model is loaded, may go first.
    """
    created: float
    started: float | None
    finished: float | None
    """Seconds since 1970, as `created` and `started`."""
    progress: ProgressDocument
    prompt: str
    """Its first 200 characters."""
    error: str | None
    results: list[ResultDocument]


class PlanDocument(TypedDict):
    """What a job would do, as `POST /plan` describes it."""

    text: str
    plan: dict[str, Json] | None
    """The `MemoryPlan` as JSON; None where no diffusion model runs."""
    svg: str | None
    """A drawing of the plan."""


class ModelsDocument(TypedDict):
    """The names that a server offers."""

    models: list[str]
    loras: list[str]
    upscalers: list[str]
