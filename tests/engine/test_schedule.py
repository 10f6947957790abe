"""The learning rate: a pure function of the step."""

from __future__ import annotations

from itertools import pairwise

import pytest

from mmclip_dist.config import Optim
from mmclip_dist.engine.schedule import learning_rate


def rates(**options: object) -> list[float]:
    optim = Optim(steps=100, lr=0.1, warmup=0.1, **options)  # type: ignore[arg-type]
    return [learning_rate(step, optim) for step in range(101)]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
def test_it_rises_to_the_peak_and_falls_to_nothing(schedule: str) -> None:
    found = rates(schedule=schedule)
    assert found[0] == pytest.approx(0.1 / 11)  # never 0: the first step counts
    assert found[9] == pytest.approx(0.1 * 10 / 11) and found[10] == pytest.approx(0.1)
    assert found[100] == pytest.approx(0, abs=1e-12)
    assert all(later <= earlier + 1e-12 for earlier, later in pairwise(found[10:]))


def test_the_shapes() -> None:
    assert rates(schedule="cosine")[55] == pytest.approx(0.05)
    assert rates(schedule="linear")[82] == pytest.approx(0.1 * 18 / 90)
    wsd = rates(schedule="wsd", decay=0.2)
    assert wsd[10:81] == pytest.approx([0.1] * 71) and wsd[85] == pytest.approx(0.1 * (1 - 0.25**0.5))


def test_the_peak_scales_with_the_global_batch() -> None:
    assert rates(global_batch=256)[10] == pytest.approx(0.1 / 4)
