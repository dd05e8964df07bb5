"""Strategies on the oracle: what each costs and makes, a guided relay against plain loops, and the measures themselves."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.disks import quiet_energy
from benchmarks.oracle import Oracle, find_objects, prior_of
from benchmarks.outcome import averaged, drift, on_oracle, prior_energy
from benchmarks.recipes import HOLD, RECIPES, Hold, Work, base, dilated, gaussian, random_roll, relay, rolled
from benchmarks.subjects import OracleSubject
from benchmarks.suites import guides, strategies
from hires.metrics.seams import seam_ratio
from hires.refine.low_pass import Area
from hires.refine.structure import power_ramp
from hires.sampling.noise import canvas_noise
from hires.sampling.samplers import karras
from hires.tiling.geometry import Box, Size, make_grid

pytestmark = pytest.mark.usefixtures("warm")

SUBJECT = OracleSubject()


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


@pytest.mark.parametrize("count", [1, pytest.param(6, marks=pytest.mark.slow)])
def test_at_four_times_the_window_tiles_from_noise_repeat_the_object_and_a_guided_relay_does_not(count: int) -> None:
    """The means over `count` seeds."""
    canvas, seeds, found = Size(256, 256), range(count), {}
    subject = OracleSubject(relay_sigma=3.0)
    bases = [base(subject, canvas, seed, Work())[0][0, 0] for seed in seeds]
    for name in ("multidiffusion box", "multidiffusion hann", "relay", "relay + guidance"):
        pictures = [RECIPES[name](subject, canvas, seed, Work())[0][0, 0] for seed in seeds]
        lines = range(32, 256, 32)
        found[name] = {
            "duplicates": np.mean([len(find_objects(p, subject.oracle)) for p in pictures]),
            "seam": np.mean([seam_ratio(p.numpy(), lines, lines) for p in pictures]),
            "drift": np.mean([drift(averaged(p, (64, 64)), first) for p, first in zip(pictures, bases, strict=True)]),
        }
    assert found["multidiffusion box"]["duplicates"] >= 8 and found["multidiffusion hann"]["duplicates"] >= 8
    held = found["relay + guidance"]
    assert held["duplicates"] <= 0.2 and abs(held["seam"] - 1) <= 0.02 and held["drift"] <= 0.4
    assert found["relay"]["drift"] > 0.4  # it is the guidance that holds it
    assert found["multidiffusion box"]["seam"] > 1.1 > found["multidiffusion hann"]["seam"]


def area(picture: Tensor, factor: int) -> Tensor:
    h, w = picture.shape
    return picture.reshape(h // factor, factor, w // factor, factor).mean((1, 3))


def cubic(picture: Tensor, factor: int) -> Tensor:
    """Keys' bicubic by a whole factor, edges repeated, tap by tap."""

    def kernel(t: float) -> float:
        t = abs(t)
        return 1.5 * t**3 - 2.5 * t**2 + 1 if t <= 1 else -0.5 * (t**3 - 5 * t**2 + 8 * t - 4) if t < 2 else 0.0

    def along(x: Tensor) -> Tensor:
        out = torch.zeros(x.shape[0] * factor, x.shape[1], dtype=x.dtype)
        for i in range(len(out)):
            centre = (i + 0.5) / factor - 0.5
            for j in range(math.floor(centre) - 1, math.floor(centre) + 3):
                out[i] += kernel(centre - j) * x[min(max(j, 0), len(x) - 1)]
        return out

    return along(along(picture).T).T


def test_a_guided_tiled_relay_is_plain_loops_in_float64() -> None:
    """Base, enlarge, re-noise, refine in tiles under structure guidance: every step written out."""
    oracle = Oracle(native=16, spread=1.5)
    subject = OracleSubject(oracle=oracle, steps=12, relay_sigma=3.0)
    found, _ = relay(hold=Hold(Area, power_ramp))(subject, Size(48, 32), 5, Work())

    def unit(stage: int, h: int, w: int) -> Tensor:
        return torch.from_numpy(canvas_noise(5, stage, -1, Box(0, 0, h, w), 1)[0]).double()

    levels = karras(12, 0.02, 20.0).double().tolist()
    x = unit(0, 24, 16) * math.sqrt(levels[0] ** 2 + 1)
    for sigma, following in itertools.pairwise(levels):
        estimate = oracle(x[None, None], sigma)[0, 0]
        x = x + (x - estimate) * (following - sigma) / sigma
    enlarged = cubic(x, 2)
    wanted_low = cubic(area(enlarged, 2), 2)
    late = [sigma for sigma in levels if sigma <= 3.0]
    x = enlarged + unit(1, 48, 32) * late[0]
    window = torch.sin(math.pi * (torch.arange(16).double() + 0.5) / 16) ** 2 + 1e-3
    for sigma, following in itertools.pairwise(late):
        total, weight = torch.zeros(48, 32).double(), torch.zeros(48, 32).double()
        for top in (0, 8, 16, 24, 32):
            for left in (0, 8, 16):
                tile = slice(top, top + 16), slice(left, left + 16)
                total[tile] += window[:, None] * window * oracle(x[tile][None, None], sigma)[0, 0]
                weight[tile] += window[:, None] * window
        estimate = total / weight
        estimate = estimate + sigma / late[0] * (wanted_low - cubic(area(estimate, 2), 2))
        x = x + (x - estimate) * (following - sigma) / sigma
    torch.testing.assert_close(found[0, 0].double(), x, rtol=0, atol=1e-5 * float(x.abs().max()))


@pytest.mark.parametrize("name", [name for name in RECIPES if not name.startswith("npa")])
def test_every_recipe_fills_the_canvas_and_counts_its_work(name: str) -> None:
    subject, canvas = OracleSubject(oracle=Oracle(native=16, spread=1.5), steps=6), Size(48, 48)
    work = Work()
    latents, grid = RECIPES[name](subject, canvas, 3, work)
    again, _ = RECIPES[name](subject, canvas, 3, Work())
    assert torch.equal(latents, again)
    assert bool(latents.isfinite().all())
    assert latents.shape[-2:] == (grid.canvas.height, grid.canvas.width) == ((16, 16) if name == "base" else (48, 48))
    late = len(subject.sigmas(True)) - 1
    windows = {
        "base": 6,
        "direct": 6 * 9,
        "multidiffusion box": 6 * 25,
        "multidiffusion hann": 6 * 25,
        "spot": 6 * 9,
        "demofusion": 6 + 6 * (9 + 4) + 6 * (25 + 9),
        "relay": 6 + late * 25,
        "relay + guidance": 6 + late * 25,
    }
    assert work.windows == windows[name]
    assert work.flops > 0


def test_a_roll_changes_nothing_for_what_moves_with_it_and_differs_per_level() -> None:
    x, roll = noise(1, 1, 40, 56), random_roll(7, Size(40, 56))
    oracle = Oracle(native=16, spread=1.5)
    torch.testing.assert_close(rolled(oracle, roll)(x, 0.8, None), oracle(x, 0.8), rtol=0, atol=1e-5)
    assert roll(0.8) == roll(0.8) and len({roll(s) for s in (0.1, 0.2, 0.4, 0.8)}) > 1

    def ramp(x: Tensor, sigma: float, cond: object) -> Tensor:
        return x * torch.arange(56)

    assert not torch.equal(rolled(ramp, roll)(x, 0.8, None), ramp(x, 0.8, None))


def test_dilated_pictures_interleave() -> None:
    x, seen = noise(1, 1, 9, 12), []

    def half(part: Tensor, sigma: float, cond: object) -> Tensor:
        seen.append(part.shape[-2:])
        return part / 2

    assert torch.equal(dilated(half, 3)(x, 1.0, None), x / 2)
    assert seen == [(3, 4)] * 9
    flat = gaussian(torch.full((1, 1, 9, 9), 2.0), 3, 0.8)
    torch.testing.assert_close(flat, torch.full_like(flat, 2.0))


def test_a_seam_ratio_sees_steps_and_blurs_at_lines_and_nothing_elsewhere() -> None:
    picture = noise(160, 224).numpy()
    rows, cols = range(32, 160, 32), range(32, 224, 32)
    assert seam_ratio(picture, rows, cols) == pytest.approx(1.0, abs=0.03)
    stepped = picture + 3.0 * ((np.arange(160) // 32) % 2)[:, None] + 3.0 * ((np.arange(224) // 32) % 2)[None, :]
    assert seam_ratio(stepped, rows, cols) > 2
    assert seam_ratio(stepped, [r + 16 for r in rows if r < 140], [c + 16 for c in cols if c < 200]) < 1
    blurred = picture.copy()
    for line in rows:
        blurred[line] = blurred[line - 1]
    assert seam_ratio(blurred, rows, []) < 0.1
    assert seam_ratio(picture, [], []) == 1.0


def test_detail_is_one_for_the_priors_field_and_none_for_an_enlarged_picture() -> None:
    oracle = Oracle()

    def field(h: int, w: int) -> Tensor:
        prior = prior_of(oracle, Size(h, w))
        return torch.fft.irfft2(torch.fft.rfft2(noise(h, w).double()) * prior.spectrum.sqrt(), s=(h, w))

    def detail(picture: Tensor) -> float:
        return quiet_energy(picture.numpy().astype(np.float32), 0.125) / prior_energy(oracle, picture, 0.125)

    assert detail(field(192, 256)) == pytest.approx(1.0, abs=0.1)
    assert detail(cubic(field(64, 80), 4)) < 0.1


def test_an_outcome_of_the_enlarged_base_itself_drifts_little_and_has_no_duplicate() -> None:
    canvas = Size(256, 256)
    first, _ = base(SUBJECT, canvas, 1, Work())
    large = SUBJECT.enlarged(first, canvas)
    found = on_oracle(large, first, make_grid(canvas, Size(64, 64), 32), SUBJECT.oracle)
    assert found.duplicates == 0 and found.kept and found.drift < 0.15 and found.detail < 0.1
    assert drift(first[0, 0], first[0, 0]) == 0
    assert len(find_objects(first[0, 0], SUBJECT.oracle)) == 1


def test_the_guides_compared_hold_the_picture_better_than_none() -> None:
    none, held = (guides.measured(hold, 3.0, 2, 192) for hold in (None, HOLD))
    assert held["drift"] < 0.7 * none["drift"] and held["duplicates"] <= none["duplicates"]
    for low_pass in guides.LOW_PASSES.values():
        flat = torch.full((1, 1, 192, 192), 0.5)
        torch.testing.assert_close(low_pass(3.0)(flat), flat, rtol=0, atol=1e-5)
    for ramp in guides.RAMPS.values():
        assert ramp(3.0)(3.0) == pytest.approx(1.0)


def row(strategy: str, **facts: object) -> dict[str, str]:
    plain = {
        "model": "oracle",
        "side": "256",
        "relay_sigma": "",
        "seeds": "6",
        "duplicates": "0",
        "seam_ratio": "1",
        "drift": "0.3",
    }
    rest = {name: "1" for name in strategies.COLUMNS if name not in plain}
    return plain | rest | {"strategy": strategy} | {k: str(v) for k, v in facts.items()}


def test_limits_hold_or_not_by_the_numbers() -> None:
    good = [row("multidiffusion box", duplicates=12), row("relay + guidance", relay_sigma=3.0)]
    assert len(strategies.limits(good)) == 4 and all(strategies.limits(good).values())
    for worse in (
        row("multidiffusion box", duplicates=7),
        row("relay + guidance", drift=0.41),
        row("relay + guidance", seam_ratio=0.97),
    ):
        assert not all(strategies.limits([worse]).values())
    assert strategies.limits([row("relay", drift=0.9), row("relay + guidance", drift=0.9, side=512)]) == {}


def test_the_newest_rows_make_the_table() -> None:
    rows = [row("relay", relay_sigma="1.0", drift=0.9), row("direct"), row("relay", relay_sigma="1.0", drift=0.2)]
    newest = strategies.newest(rows)
    assert [r["strategy"] for r in newest] == ["direct", "relay"] and newest[1]["drift"] == "0.2"
    text = strategies.table(newest)
    assert "oracle, 4 times its window, 6 seeds" in text and "| relay from sigma 1 |" in text


def test_the_command_refuses_what_it_cannot_run_and_names_the_choices() -> None:
    for words, reason in (
        (["--only", "npa"], "no attention"),
        (["--only", "sdedit"], "give some of base, direct"),
        (["--sides", "many"], "give numbers"),
    ):
        with pytest.raises(SystemExit, match=reason):
            strategies.main(words)


def test_the_command_ends_with_one_json_document(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strategies, "chosen", lambda text, model: ["spot", "relay + guidance"])
    assert strategies.main(["--quick"]) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document["suite"] == "strategies"
    assert [r["strategy"] for r in document["rows"]] == ["spot", "relay + guidance"]
    assert all(float(r["seconds_p50"]) > 0 for r in document["rows"])
