"""Shared fixtures: the shipped model's spec, and a tiny random SDXL-type folder with an epsilon schedule."""

from __future__ import annotations

import gc
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if not os.environ.get("HIRES_TEST_GPU"):  # before torch looks: the numbers here are the CPU's, on any machine
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="hires-tests-")  # what this machine was measured at is no part of a test

from hires.checkpoints.model import ModelSpec
from hires.checkpoints.spec import load_spec
from tests.support import speed

if TYPE_CHECKING:
    from hires.engine.loaded import LoadedModels
    from tests.support.checkpoints import Checkpoint

# The same examples on every run: a change fails or passes for what it changed. HIRES_TEST_RANDOM=1 draws new ones.
settings.register_profile("hires", derandomize=not os.environ.get("HIRES_TEST_RANDOM"))
settings.load_profile("hires")

frozen_modules = 0  # how many were imported at the last freeze


def pytest_configure(config: pytest.Config) -> None:
    speed.full = "not slow" not in config.getoption("markexpr") or "HIRES_TEST_GPU" in os.environ


def pytest_unconfigure() -> None:
    gc.unfreeze()  # libraries complain at exit of objects that are still there


def pytest_runtest_setup() -> None:
    """Keep what was imported so far out of later garbage collections.

    The engine collects garbage before each large step, and PyTorch, diffusers and transformers leave half a million objects:
    to look through them takes a third of a small render's time. What a test itself leaves behind is still found.
    """
    global frozen_modules
    if len(sys.modules) > frozen_modules:
        frozen_modules = len(sys.modules)
        gc.collect()
        gc.freeze()


@pytest.fixture(scope="session")
def shared_models() -> LoadedModels:
    """The models that tests with `warm` share."""
    from hires.engine.loaded import LoadedModels

    return LoadedModels()


@pytest.fixture
def warm(monkeypatch: pytest.MonkeyPatch, shared_models: LoadedModels) -> None:
    """One-shot renders find the models of earlier tests in memory: for files that test something else than loading.

    A used model draws what a fresh one draws (tests/engine/test_resident.py), in half the seconds of a small render.
    """
    monkeypatch.setattr("hires.engine.run.LoadedModels", lambda stay: shared_models)


@pytest.fixture
def cold(warm: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a file of `warm` tests one that does test loading."""
    from hires.engine.loaded import LoadedModels

    monkeypatch.setattr("hires.engine.run.LoadedModels", LoadedModels)


@pytest.fixture(scope="session")
def demo() -> ModelSpec:
    return load_spec("demo")


@pytest.fixture(scope="session")
def eps_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped folder with the scheduler of SDXL: weights that mean nothing to it, but every part in its place."""
    folder = tmp_path_factory.mktemp("model") / "sdxl"
    shutil.copytree(load_spec("demo").path, folder)
    scheduler = {
        "_class_name": "EulerDiscreteScheduler",
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "prediction_type": "epsilon",
    }
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    return folder


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Checkpoint]:
    """`checkpoint(family, layout)`: a tiny one in the layout 'file' or 'folder', written once and to be left as it is."""
    from tests.support.checkpoints import make

    root, kept = tmp_path_factory.mktemp("checkpoints"), {}

    def get(family: str, layout: str = "file") -> Checkpoint:
        if (family, layout) not in kept:
            kept[family, layout] = make(root / family / layout, family, layout)
        return kept[family, layout]

    return get
