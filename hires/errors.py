"""What can go wrong, in one tree. Messages carry the value that failed and the next move.

HiresError
├── RequestError          the request cannot be carried out as given; exit code 2
│   ├── SizeError         a size that is no size, or that no plan reaches
│   ├── ModelError        no such model, or a file or folder that is none
│   ├── OutputError       the output cannot be written where it was asked for
│   ├── BackendError      a named backend cannot run this
│   └── BudgetError       no plan fits the budget
├── RunError              something failed while running; exit code 1
│   ├── MemoryLadderError every rung of the plan's ladder ran out of memory
│   ├── NotFiniteError    the network or the autoencoder gives no numbers, in float32 either
│   └── WriteError        the disk refused the file
└── Cancelled             the user stopped it; exit code 130
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class HiresError(Exception):
    """Anything that hires raises on purpose; `exit_code` is what the command line returns."""

    exit_code = 1


class RequestError(HiresError):
    exit_code = 2


class SizeError(RequestError):
    pass


class ModelError(RequestError):
    pass


class OutputError(RequestError):
    pass


class BackendError(RequestError):
    pass


class BudgetError(RequestError):
    pass


class RunError(HiresError):
    pass


class MemoryLadderError(RunError):
    pass


class NotFiniteError(RunError):
    pass


class WriteError(RunError):
    pass


class Cancelled(HiresError):
    exit_code = 130


def unknown(what: str, value: str, known: Iterable[str]) -> str:
    """'unknown sampler 'eular': did you mean 'euler'? known: …', the message for a name from a closed list."""
    names = sorted(known)
    near = difflib.get_close_matches(value, names, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"unknown {what} {value!r}: {hint}known: {', '.join(names)}"
