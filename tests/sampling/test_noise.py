"""Noise belongs to the canvas: standard normal, keyed by every argument, the same for any crop, thread and version."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from hires.sampling.noise import CanvasNoise, canvas_noise, drawn, joined
from hires.tiling.geometry import Box

BOX = Box(0, 0, 300, 301)


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    return float(abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]))


def test_canvas_noise_is_standard_normal_and_differs_by_key() -> None:
    a = canvas_noise(1, 0, 0, BOX, 4)
    assert abs(a.mean()) < 0.01
    assert abs(a.std() - 1) < 0.01
    assert abs((a**4).mean() - 3) < 0.1
    for other in (
        canvas_noise(2, 0, 0, BOX, 4),
        canvas_noise(1, 1, 0, BOX, 4),
        canvas_noise(1, 0, 1, BOX, 4),
        canvas_noise(1, 0, 0, BOX, 4, part=1),
    ):
        assert correlation(a, other) < 0.01
    assert correlation(a[0], a[1]) < 0.02
    assert correlation(a[:, 1:], a[:, :-1]) < 0.01
    assert correlation(a[..., 1:], a[..., :-1]) < 0.01


def test_parts_of_a_step_are_normal_and_independent_of_other_parts_and_steps() -> None:
    parts = {(step, part): canvas_noise(1, 0, step, BOX, 1, part) for step in (-1, 0, 1) for part in (0, 1, 2)}
    keys = list(parts)
    for i, key in enumerate(keys):
        assert abs(parts[key].mean()) < 0.015
        assert abs(parts[key].std() - 1) < 0.01
        assert all(correlation(parts[key], parts[other]) < 0.015 for other in keys[i + 1 :])


def test_law_3_noise_belongs_to_the_canvas() -> None:
    """A crop of the noise is the noise of the crop, whatever the canvas, the thread count or the thread."""
    for part in (0, 1):
        whole = canvas_noise(7, 2, 5, Box(0, 0, 64, 96), 4, part)
        assert np.array_equal(canvas_noise(7, 2, 5, Box(13, 40, 20, 33), 4, part), whole[:, 13:33, 40:73])
    before, drawn_there = torch.get_num_threads(), []
    try:
        torch.set_num_threads(1)
        worker = threading.Thread(target=lambda: drawn_there.append(CanvasNoise(7, 2, Box(0, 0, 64, 96), 4)(5, 1)))
        worker.start()
        worker.join()
    finally:
        torch.set_num_threads(before)
    assert np.array_equal(drawn_there[0][0].numpy(), whole)


@pytest.mark.parametrize(("part", "pinned"), [(0, "PINNED"), (1, "PINNED_PART_1")])
def test_noise_is_the_same_in_every_version(part: int, pinned: str) -> None:
    """Pinned, so that a seed keeps its picture."""
    values = canvas_noise(42, 0, -1, Box(0, 0, 1, 2), 2, part).ravel()
    assert values.tolist() == pytest.approx(globals()[pinned], abs=1e-6)


PINNED = [-0.029977617785334587, -0.44649115204811096, 1.0374354124069214, 0.289101779460907]
PINNED_PART_1 = [-0.2893289625644684, 0.5631492733955383, -1.3888801336288452, 1.5111455917358398]


def test_noise_takes_the_type_of_the_latents() -> None:
    noise = CanvasNoise(0, 0, Box(0, 0, 3, 5), 2)
    assert drawn(noise, torch.zeros(1, dtype=torch.float64), 0).dtype == torch.float64
    assert drawn(noise, torch.zeros(1), 0, 1).equal(noise(0, 1))


def test_increments_add_up_to_a_path() -> None:
    """Var W(a + b) = a + b, and the covariance of the whole with its first part is that part's length."""
    first, second = (torch.from_numpy(canvas_noise(3, 0, 0, BOX, 4, part)) for part in (0, 1))
    a, b = 0.7, 0.2
    whole = joined(first, second, (a, b))
    assert whole.std().item() == pytest.approx(1, abs=0.01)
    assert (whole * first).mean().item() == pytest.approx((a / (a + b)) ** 0.5, abs=0.01)
