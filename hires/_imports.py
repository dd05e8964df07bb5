"""Libraries kept quiet while they are imported."""

from __future__ import annotations

import contextlib
import io
import logging
import sys
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def quiet_imports() -> Iterator[list[str]]:
    """Keep libraries' import-time warnings and log lines from the user; the list holds them when the block is left.

    Only while the block runs: afterwards the libraries log as they did, or as they set themselves up meanwhile.
    """
    said: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(f"{record.name}: {record.getMessage().strip()}")

    keep, stderr = Keep(), io.StringIO()
    named = [logging.getLogger(name) for name in ("xformers", "diffusers", "transformers", "torch")]
    before = [(log, log.propagate, list(log.handlers)) for log in named]
    for log in named:
        log.propagate, log.handlers = False, [keep]
    try:
        with warnings.catch_warnings(record=True) as caught, contextlib.redirect_stderr(stderr):
            warnings.simplefilter("default")
            yield said
        said += [f"{w.category.__name__}: {w.message}" for w in caught]
        said += [line for line in stderr.getvalue().splitlines() if line.strip()]
    finally:
        for log, propagate, handlers in before:
            own = [handler for handler in log.handlers if handler is not keep]
            log.handlers = [*handlers, *(handler for handler in own if handler not in handlers)]
            log.propagate = propagate if not own else log.propagate
            for handler in own:
                if isinstance(handler, logging.StreamHandler) and handler.stream is stderr:
                    handler.setStream(sys.stderr)
