"""The suites of `hires bench`, by name."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace

import torch

from hires.bench.row import BenchSetup, Row
from hires.bench.timing import Timed
from hires.devices.probe import probe
from hires.errors import BudgetError, MemoryLadderError
from hires.tiling.retry import free_memory, is_out_of_memory
from hires.units import Json


def suite_of(name: str) -> Callable[[BenchSetup], Iterator[Row]]:
    """A suite by its name."""
    from hires.bench import files, kernels, models

    return {
        "attention": kernels.attention_rows,
        "norm": kernels.norm_rows,
        "vae": models.vae_rows,
        "denoise": models.denoise_rows,
        "render": models.render_rows,
        "io": files.io_rows,
        "upscale": files.upscale_rows,
    }[name]


def rows_of(name: str, setting: BenchSetup) -> Iterator[Row]:
    """The rows of a suite, size by size. What has no room, in the budget or in memory, is a row and ends that size."""
    for size in setting.of(name):
        try:
            yield from suite_of(name)(replace(setting, sizes=(size,)))
        except (BudgetError, MemoryLadderError) as error:
            state = f"no room: {error}"
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            state = "out of memory"
        else:
            continue
        free_memory()
        yield Row(suite=name, case=setting.model, way="", size=str(size), taken=Timed(state=state))


def described(setting: BenchSetup) -> Json:
    """The machine that rows are of."""
    from hires._version import __version__

    facts = probe(setting.device)
    threads, date = torch.get_num_threads(), time.strftime("%Y-%m-%d")
    return {
        "hires": __version__,
        "torch": torch.__version__,
        "date": date,
        "threads": threads,
        "device": facts.name,
        "budget_bytes": setting.budget_bytes,
    } | {key: value for key, value in asdict(facts).items() if key in ("kind", "capability")}
