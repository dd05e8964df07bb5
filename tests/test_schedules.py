from __future__ import annotations

import pytest

from hires.errors import RequestError
from hires.schedules import SCHEDULES, exponential, find_schedule, karras


def test_exponential_is_the_published_cosxl_table() -> None:
    sigmas = exponential(42, 0.002, 120.0).tolist()
    assert sigmas[:4] == pytest.approx([120, 91.76, 70.16, 53.65], rel=1e-4)
    assert sigmas[-4:] == pytest.approx([0.0034, 0.0026, 0.0020, 0], abs=6e-5)
    assert len(sigmas) == 43
    assert sum(s > 14.6 for s in sigmas) == 8


def test_karras_ends_where_it_should() -> None:
    sigmas = karras(10, 0.03, 14.6).tolist()
    assert sigmas[0] == pytest.approx(14.6)
    assert sigmas[-2] == pytest.approx(0.03)
    assert sigmas[-1] == 0


@pytest.mark.parametrize("name", list(SCHEDULES))
def test_every_schedule_falls_and_takes_one_step(name: str) -> None:
    sigmas = SCHEDULES[name](25, 0.01, 30).tolist()
    assert sigmas == sorted(sigmas, reverse=True)
    assert SCHEDULES[name](1, 0.01, 30).tolist() == pytest.approx([30, 0])


def test_an_unknown_schedule_is_refused() -> None:
    with pytest.raises(RequestError, match="unknown schedule 'karas': did you mean 'karras'"):
        find_schedule("karas")
