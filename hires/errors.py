"""Every error that hires raises on purpose, in one tree.

Messages carry the value that failed and the next move.

HiresError
├── RequestError          the request cannot be carried out as given; exit code 2
│   ├── SizeError         an invalid size, or one that no plan reaches
│   ├── ModelError        the model is missing, or the file or folder holds none
│   ├── OutputError       the output cannot be written to the requested place
│   ├── BackendError      a named backend cannot run this
│   └── BudgetError       no plan fits the budget
├── RunError              something failed while running; exit code 1
│   ├── MemoryLadderError every rung of the plan's ladder ran out of memory
│   ├── NotFiniteError    the network or the autoencoder gives NaN or infinity, even in float32
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
    """The request cannot be carried out as given."""

    exit_code = 2


class SizeError(RequestError):
    """The size is invalid, or no plan reaches it."""


class ModelError(RequestError):
    """The model is missing, or the file or folder holds none that hires knows."""


class OutputError(RequestError):
    """The output cannot be written to the requested place."""


class BackendError(RequestError):
    """The backend that the user named cannot run this."""


class BudgetError(RequestError):
    """No plan fits the memory budget."""


class RunError(HiresError):
    """Something failed while running."""


class MemoryLadderError(RunError):
    """Every rung of the memory ladder ran out of memory."""


class NotFiniteError(RunError):
    """The network or the autoencoder gives NaN or infinity, even in float32."""


class WriteError(RunError):
    """The operating system refused to write the file."""


class Cancelled(HiresError):
    """The user stopped the run."""

    exit_code = 130


def unknown(what: str, value: str, known: Iterable[str]) -> str:
    """The message for a name outside a closed list, with the nearest known name.

    Example: "unknown sampler 'eular': did you mean 'euler'? known: ddim, dpm_2, …".
    """
    names = sorted(known)
    near = difflib.get_close_matches(value, names, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"unknown {what} {value!r}: {hint}known: {', '.join(names)}"
