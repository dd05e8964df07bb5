"""Renders in the background: their events as they come, their results, and whose turn it is."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Generator, Iterator

from hires.engine.results import RenderResult
from hires.errors import Cancelled
from hires.events import Event, OnEvent

TURN_SECONDS = 0.1
"""How often a run that waits for its turn looks whether it was cancelled."""
LOOK_SECONDS = 0.02
"""How often an asynchronous iteration looks for an event."""


class TurnLock:
    """A reentrant lock that threads get in the order in which they came."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._waiting: deque[tuple[threading.Event, int]] = deque()
        self._owner: int | None = None
        self._depth = 0

    def __enter__(self) -> None:
        own, turn = threading.get_ident(), threading.Event()
        with self._guard:
            if self._owner in (None, own):
                self._owner, self._depth = own, self._depth + 1
                return
            self._waiting.append((turn, own))
        try:
            turn.wait()
        except BaseException:  # Ctrl-C
            with self._guard:
                came = (turn, own) not in self._waiting
                if not came:
                    self._waiting.remove((turn, own))
            if came:
                self.__exit__()
            raise

    def __exit__(self, *error: object) -> None:
        with self._guard:
            self._depth -= 1
            if self._depth:
                return
            self._owner = None
            if self._waiting:
                turn, self._owner = self._waiting.popleft()
                self._depth = 1
                turn.set()


class Run:
    """A render at work in a thread of its own; iterate over it for its events, ask `result` for the picture.

    The events go to whoever iterates first; an iteration ends with the render.

    Args:
        work: renders and tells of its events.
        after: a run that has to end first; None to begin at once.
    """

    def __init__(self, work: Callable[[OnEvent], RenderResult], after: Run | None = None) -> None:
        self._events: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        self._after = after
        self._result: RenderResult | None = None
        self._error: BaseException | None = None
        self._cancelled, self._ended = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._work, args=(work,), name="hires-render", daemon=True)
        self._thread.start()

    def _wait_for_turn(self) -> None:
        """Wait for the runs before, also for those before one that gave its turn up. Cancelled where this one gives up."""
        while self._after is not None and not self._cancelled.is_set():
            if self._after.wait(TURN_SECONDS):
                self._after = self._after._after
        if self._cancelled.is_set():
            raise Cancelled("the run was cancelled before it began")

    def _work(self, work: Callable[[OnEvent], RenderResult]) -> None:
        try:
            self._wait_for_turn()
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

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for its end, whichever that is; whether it came within that many seconds."""
        return self._ended.wait(timeout)

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
        while True:
            try:
                event = self._events.get(timeout=TURN_SECONDS)
            except queue.Empty:
                event = None
            if event is not None:
                yield event
            elif self.done() and self._events.empty():
                return

    async def __aiter__(self) -> AsyncIterator[Event]:
        while True:  # no thread waits, which would take an event with it where this is cancelled
            try:
                event = self._events.get_nowait()
            except queue.Empty:
                event = None
                await asyncio.sleep(LOOK_SECONDS)
            if event is not None:
                yield event
            elif self.done() and self._events.empty():
                return

    def __await__(self) -> Generator[object, None, RenderResult]:
        return asyncio.to_thread(self.result).__await__()

    def __repr__(self) -> str:
        state = "at work" if not self.done() else "failed" if self._error is not None else "finished"
        return f"<hires.Run {state}>"
