"""When a remote read is tried again, how long it waits, and what error it ends in."""

from __future__ import annotations

import threading

import pytest
from mmclip_shards import faults
from mmclip_shards.faults import CutFile, GaveUp, MissingCredentials, Patience, Tries, renamed


class Waits:
    """In place of random waits: each is the longest allowed one, on a clock that only waiting moves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.bounds = 0.0, list[float]()
        monkeypatch.setattr(faults, "_waits", self)
        monkeypatch.setattr(faults.time, "monotonic", lambda: self.now)

    def uniform(self, low: float, high: float) -> float:
        assert low == 0, "full jitter starts at 0"
        self.bounds.append(high)
        return high

    def wait(self, seconds: float) -> bool:
        self.now += seconds
        return False


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> Waits:
    return Waits(monkeypatch)


def failing(waits: Waits, patience: Patience, fault: Exception, *, most: int = 100, served: bool = True) -> Exception:
    """The error after which a read gives up."""
    tries = Tries(patience, waits)  # type: ignore[arg-type]
    with pytest.raises(Exception) as caught:
        for _ in range(most):
            tries.wait("s3://set/a.tar", fault, served=served)
    return caught.value


def test_waits_double_up_to_the_longest_and_end_with_the_budget(waits: Waits) -> None:
    patience = Patience(budget_s=40.0, first_wait_s=0.5, longest_wait_s=10.0)
    error = failing(waits, patience, OSError("SlowDown"))
    assert waits.bounds[:6] == [1, 2, 4, 8, 10, 10]
    assert sum(waits.bounds) == pytest.approx(40) and waits.bounds[6] == pytest.approx(5), "never past the budget"
    assert type(error) is OSError and str(error).startswith("s3://set/a.tar: tried ")
    assert "SlowDown" in str(error) and isinstance(error.__cause__, OSError)


def test_progress_starts_the_budget_and_the_waits_anew(waits: Waits) -> None:
    tries = Tries(Patience(budget_s=10.0, first_wait_s=1.0, longest_wait_s=4.0), waits)  # type: ignore[arg-type]
    for _ in range(50):
        tries.wait("x", OSError("cut"), progress=True)
    assert set(waits.bounds) == {2.0} and waits.now == 100 and tries.count == 50


@pytest.mark.parametrize("fault", [FileNotFoundError("404"), PermissionError("403"), ValueError("damaged")])
def test_a_refusal_is_tried_four_times_and_keeps_its_kind(waits: Waits, fault: Exception) -> None:
    error = failing(waits, Patience(), fault, served=False)
    assert type(error) is type(fault) and str(fault) in str(error)
    assert len(waits.bounds) == 3


def test_a_refusal_between_other_faults_is_not_counted_with_them(waits: Waits) -> None:
    tries = Tries(Patience(budget_s=1e6), waits)  # type: ignore[arg-type]
    for _ in range(5):
        tries.wait("x", FileNotFoundError("404"))
        tries.wait("x", OSError("500"))
    assert tries.count == 10


@pytest.mark.parametrize("fault", [PermissionError("403"), MissingCredentials("none")])
def test_a_store_that_served_before_and_refuses_now_has_the_whole_budget(waits: Waits, fault: Exception) -> None:
    error = failing(waits, Patience(budget_s=60.0), fault)
    assert type(error) is PermissionError and sum(waits.bounds) == pytest.approx(60)


@pytest.mark.parametrize("fault", [MissingCredentials("none"), OSError("refused")])
def test_a_store_that_never_answered_is_told_soon_with_the_mend(waits: Waits, fault: Exception) -> None:
    error = failing(waits, Patience(), fault, served=False)
    assert sum(waits.bounds) == pytest.approx(15)
    assert ("never served" in str(error) and "AWS_ENDPOINT_URL" in str(error)) == (type(fault) is OSError)


def test_our_own_faults_are_never_tried_again(waits: Waits) -> None:
    assert isinstance(failing(waits, Patience(), TypeError("ours")), TypeError)
    assert not waits.bounds


def test_a_closed_reader_gives_up_at_once() -> None:
    closed = threading.Event()
    closed.set()
    with pytest.raises(GaveUp):
        Tries(Patience(first_wait_s=60.0), closed).wait("x", OSError("500"))


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (FileNotFoundError(2, "gone"), FileNotFoundError),
        (PermissionError("refused"), PermissionError),
        (NotADirectoryError("file"), NotADirectoryError),
        (ValueError("damaged"), ValueError),
        (CutFile("short"), ValueError),
        (TimeoutError("slow"), OSError),
        (ConnectionResetError("reset"), OSError),
        (OSError(5, "Input/output error"), OSError),
        (RuntimeError("session closed"), OSError),
    ],
)
def test_an_error_that_is_renamed_says_who_can_mend_it(error: Exception, kind: type[Exception]) -> None:
    found = renamed(error, "shard a, key b")
    assert type(found) is kind and str(found) == "shard a, key b"
