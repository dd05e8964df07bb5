"""A render in the background: its events as they come, and its result."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import AsyncIterator, Callable, Generator, Iterator

from hires.engine.results import RenderResult
from hires.errors import Cancelled
from hires.events import Event, OnEvent


class Run:
    """A render at work in a thread of its own; iterate over it for its events, ask `result` for the picture.

    The events go to whoever iterates first; an iteration ends with the render.

    Args:
        work: renders and tells of its events.
    """

    def __init__(self, work: Callable[[OnEvent], RenderResult]) -> None:
        self._events: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        self._result: RenderResult | None = None
        self._error: BaseException | None = None
        self._cancelled, self._ended = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._work, args=(work,), name="hires-render", daemon=True)
        self._thread.start()

    def _work(self, work: Callable[[OnEvent], RenderResult]) -> None:
        try:
            self._result = work(self._hear)
        except BaseException as error:  # noqa: BLE001 - `result` raises it where somebody waits
            self._error = error.with_traceback(None)
        finally:
            self._ended.set()
            self._events.put(None)

    def _hear(self, event: Event) -> None:
        if self._cancelled.is_set():
            raise Cancelled("the run was cancelled")
        self._events.put(event)

    def done(self) -> bool:
        """Whether it has ended, one way or another."""
        return self._ended.is_set()

    def cancel(self) -> None:
        """Stop after the tile in progress; `result` raises Cancelled then. Nothing happens to a run that has ended."""
        self._cancelled.set()

    def result(self, timeout: float | None = None) -> RenderResult:
        """Wait for the picture. TimeoutError after that many seconds; the render's own errors, Cancelled included."""
        if not self._ended.wait(timeout):
            raise TimeoutError(f"the render is still at work after {timeout:g} s")
        if self._error is not None:
            raise self._error
        assert self._result is not None, "a run ends with a result or an error"
        return self._result

    def __iter__(self) -> Iterator[Event]:
        while (event := self._events.get()) is not None:
            yield event
        self._events.put(None)  # a later iteration ends at once

    async def __aiter__(self) -> AsyncIterator[Event]:
        while (event := await asyncio.to_thread(self._events.get)) is not None:
            yield event
        self._events.put(None)

    def __await__(self) -> Generator[object, None, RenderResult]:
        return asyncio.to_thread(self.result).__await__()

    def __repr__(self) -> str:
        state = "at work" if not self.done() else "failed" if self._error is not None else "finished"
        return f"<hires.Run {state}>"
