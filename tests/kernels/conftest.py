"""What the tests of the kernels share."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

import pytest

from tests.ahead_of_time import use_compiler


@pytest.fixture(scope="session")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProcessPoolExecutor]:
    """A process in which Triton compiles its kernels, as for a user, instead of running them in Python."""
    folder = tmp_path_factory.mktemp("triton")
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, initializer=use_compiler, initargs=(folder,)) as process:
        yield process
