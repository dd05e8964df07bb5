"""Keeps libraries quiet while they are imported, and the imports short."""

from __future__ import annotations

import contextlib
import gc
import io
import logging
import sys
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def collection_paused() -> Iterator[None]:
    """No garbage collection inside the block.

    What large libraries define stays, and passes over it take a third of the seconds of their imports.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@contextlib.contextmanager
def quiet_imports() -> Iterator[list[str]]:
    """Collect the warnings and log lines that libraries write while they are imported, instead of showing them.

    The list is complete when the block ends. Afterwards the libraries log as before, or as they configured themselves
    during the import.
    """
    messages: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(f"{record.name}: {record.getMessage().strip()}")

    collector, stderr = Collector(), io.StringIO()
    named = [logging.getLogger(name) for name in ("xformers", "diffusers", "transformers", "torch")]
    before = [(log, log.propagate, list(log.handlers)) for log in named]
    for log in named:
        log.propagate, log.handlers = False, [collector]
    try:
        with warnings.catch_warnings(record=True) as caught, contextlib.redirect_stderr(stderr), collection_paused():
            warnings.simplefilter("default")
            yield messages
        messages += [f"{w.category.__name__}: {w.message}" for w in caught]
        messages += [line for line in stderr.getvalue().splitlines() if line.strip()]
    finally:
        for log, propagate, handlers in before:
            own = [handler for handler in log.handlers if handler is not collector]
            log.handlers = [*handlers, *(handler for handler in own if handler not in handlers)]
            log.propagate = propagate if not own else log.propagate
            for handler in own:
                if isinstance(handler, logging.StreamHandler) and handler.stream is stderr:
                    handler.setStream(sys.stderr)
