from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from hires.checkpoints.noise_levels import vp_sigmas
from hires.sampling.conditioning import Conditioning, sdxl_size_ids
from hires.sampling.denoisers import edm_v, eps, x0
from hires.sampling.guidance import Guidance, guided
from hires.tiling.geometry import Size


def test_edm_v_equals_the_published_preconditioning() -> None:
    from diffusers import EDMEulerScheduler

    scheduler = EDMEulerScheduler(sigma_min=0.002, sigma_max=120.0, sigma_data=1.0, prediction_type="v_prediction")
    generator = torch.Generator().manual_seed(0)
    x, output = torch.randn(1, 4, 6, 5, generator=generator), torch.randn(1, 4, 6, 5, generator=generator)
    for sigma in np.geomspace(0.002, 120, 20):
        inputs: list[tuple[Tensor, float]] = []

        def network(scaled: Tensor, time: float, cond: object, seen: list[tuple[Tensor, float]] = inputs) -> Tensor:
            seen.append((scaled, time))
            return output

        ours = edm_v(network)(x * sigma, float(sigma), None)
        level = torch.tensor(sigma, dtype=torch.float32)
        theirs = scheduler.precondition_outputs(x * sigma, output, level)
        assert (ours - theirs).abs().max() <= 1e-6 * theirs.abs().max()
        torch.testing.assert_close(inputs[0][0], scheduler.precondition_inputs(x * sigma, level), rtol=1e-6, atol=1e-6)
        assert inputs[0][1] == pytest.approx(0.25 * np.log(sigma))


def test_eps_finds_its_time_and_removes_known_noise() -> None:
    table = vp_sigmas("scaled_linear", 0.00085, 0.012)
    assert table[0] == pytest.approx(0.0292, abs=1e-4)
    assert table[-1] == pytest.approx(14.615, abs=1e-3)
    clean, noise = torch.randn(1, 4, 3, 3), torch.randn(1, 4, 3, 3)
    times: list[float] = []

    def network(x: Tensor, time: float, cond: object) -> Tensor:
        times.append(time)
        return noise

    for t in (0, 200, 500, 999):
        denoised = eps(network, table)(clean + table[t] * noise, table[t], None)
        torch.testing.assert_close(denoised, clean, rtol=0, atol=1e-5)
    assert times == pytest.approx([0, 200, 500, 999])
    eps(network, table)(clean, (table[3] * table[4]) ** 0.5, None)
    assert times[-1] == pytest.approx(3.5)


def test_x0_takes_what_the_network_gives_at_its_time() -> None:
    table = vp_sigmas("scaled_linear", 0.00085, 0.012)
    seen: list[tuple[Tensor, float]] = []

    def network(x: Tensor, time: float, cond: object) -> Tensor:
        seen.append((x, time))
        return x.half() * 2

    x = torch.randn(1, 4, 3, 3)
    denoised = x0(network, table)(x, table[999], None)
    assert denoised.dtype == torch.float32
    assert seen[0][1] == pytest.approx(999)
    torch.testing.assert_close(seen[0][0], x / (table[999] ** 2 + 1) ** 0.5)
    torch.testing.assert_close(denoised, seen[0][0].half().float() * 2)


def conditioning(value: float) -> Conditioning:
    return Conditioning(
        tokens=torch.full((1, 2, 3), value), pooled=torch.full((1, 4), value), size_ids=sdxl_size_ids(Size(8, 8))
    )


def test_guidance_shares_one_batch_and_follows_the_formula() -> None:
    batches: list[int] = []

    def denoise(x: Tensor, sigma: float, cond: Conditioning) -> Tensor:
        batches.append(x.shape[0])
        return x * 0 + cond.tokens.mean(dim=(1, 2))[:, None, None, None]

    x = torch.zeros(1, 4, 2, 2)
    assert (guided(denoise, conditioning(1.0), Guidance(low=3.0, high=3.0))(x, 1.0, conditioning(2.0)) == 1 + 3 * (2 - 1)).all()
    assert batches == [2]
    assert guided(denoise, conditioning(1.0), Guidance(low=1.0, high=1.0)) is denoise


def test_conditionings_join_in_order_and_must_agree() -> None:
    joined = conditioning(1.0).concatenate(conditioning(2.0))
    assert joined.batch == 2
    assert joined.tokens[:, 0, 0].tolist() == [1.0, 2.0]
    with pytest.raises(AssertionError):
        conditioning(1.0).concatenate(Conditioning(tokens=torch.zeros(1, 2, 3)))
