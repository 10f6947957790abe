"""Worker processes that answer in order. How they end is tested by packing (`test_pack.py`)."""

from __future__ import annotations

import multiprocessing
import platform
import resource
import time

import pytest
from mmclip_shards.processes import in_order


def slow_first(number: int) -> int:
    time.sleep(0.5 if number == 0 else 0)
    return number * number


def test_answers_come_in_the_order_of_the_questions_whoever_is_faster() -> None:
    assert list(in_order(slow_first, range(50), 3)) == [(number, number * number) for number in range(50)]
    assert list(in_order(slow_first, [], 2)) == []


def test_few_questions_are_taken_ahead() -> None:
    taken: list[int] = []

    def questions():  # type: ignore[no-untyped-def]
        for number in range(1000):
            taken.append(number)
            yield number

    before = set(multiprocessing.active_children())
    answers = in_order(slow_first, questions(), 2)
    for used in range(1, 21):
        next(answers)
        assert len(taken) - used < 2 * 8
    assert len(set(multiprocessing.active_children()) - before) == 2
    answers.close()
    assert set(multiprocessing.active_children()) <= before


def faults(size: int) -> int:
    """Page faults while a few blocks are written and freed, as an image's are."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        blocks = [bytearray(b"x") * size for _ in range(4)]
        del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="what is tested is how glibc's malloc is told to keep memory")
def test_a_worker_keeps_the_memory_of_an_image_for_the_next_one() -> None:
    found = [count for _, count in in_order(faults, [2**20] * 12, 2)]
    assert sorted(found)[6] < 16  # 4,096 if each block's pages were given back
