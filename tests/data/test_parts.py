"""What loader workers hand over: slots of memory that are used again, whatever a part holds; and the thread that joins parts."""

from __future__ import annotations

import multiprocessing
import re
import resource
import threading
from collections.abc import Iterator
from itertools import islice
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import psutil
import pytest
import torch
import torch.utils.data._utils as loader_inside

from mmclip_dist.data.batch import collate, join, split_batch
from mmclip_dist.data.example import ExampleMaker
from mmclip_dist.data.join import JoinedSet
from mmclip_dist.data.parts import Slots, check_open_files, in_thread
from tests.batches import loader, mixed_batch


def same(ours: dict, theirs: dict) -> bool:
    return ours.keys() == theirs.keys() and all(
        torch.equal(value, theirs[name]) if isinstance(value, torch.Tensor) else value == theirs[name]
        for name, value in ours.items()
    )


def test_a_part_is_the_batch_and_costs_no_descriptor(sets, tokenizer) -> None:
    """Also when all reports are longer than allowed: a slot holds the largest part."""
    maker = ExampleMaker(tokenizer, ("A", "B"), 32, 4, 8, sets.config().entmlm, None)
    joined = JoinedSet(sets.config().data.sources[0])
    examples = [maker(joined.key(0, row), joined.read(0, joined.key(0, row)), 0) for row in range(5)]
    assert {len(example["tokens"]) for example in examples} == {8}
    slots, before = Slots(5, maker.bytes_per_example, 1), psutil.Process().num_fds()
    kept = [slots.collate(examples[step:], step, tokenizer.pad_token_id) for step in range(2)]
    assert psutil.Process().num_fds() == before
    for step, part in enumerate(kept):
        assert same(slots.batch(part), collate(examples[step:], step, tokenizer.pad_token_id))
        assert len(ForkingPickler.dumps(part)) < 4096  # the pixels do not travel
    again = slots.collate(examples, 2, tokenizer.pad_token_id)
    assert slots.batch(again)["image"].data_ptr() == slots.batch(kept[0])["image"].data_ptr()  # no fresh memory


@pytest.mark.parametrize(("workers", "prefetch"), [(1, 1), (1, 3), (2, 1)])
def test_slots_that_are_used_again_change_no_batch_that_is_kept(sets, tokenizer, workers: int, prefetch: int) -> None:
    """The consumer keeps all of them; workers run ahead as far as they may."""
    found = []
    for number in (0, workers):
        stream = loader(sets.config(f"data.workers={number}", f"data.prefetch={prefetch}"), tokenizer)
        found.append(list(islice(stream, 4 * (prefetch + 1))))
        stream.close()
    for none, some in zip(*found, strict=True):
        assert same({**some, "reading": None}, {**none, "reading": None})


@pytest.mark.parametrize("count", [1, 3, 8])
def test_joined_parts_are_the_batch(sets, tokenizer, count: int) -> None:
    """Also where the parts are padded to lengths of their own."""
    batch = mixed_batch(sets, tokenizer)
    cut = []
    for part in split_batch(batch, count):
        longest = max(1, int(part["token_mask"].sum(1).max()))
        names = ("tokens", "token_mask", "masked_tokens", "target_tokens", "evidence")
        cut.append(part | {name: part[name][:, :longest] for name in names})
    assert same(join(cut, tokenizer.pad_token_id), batch)


def test_open_files_do_not_grow_with_the_batch(sets, tokenizer) -> None:
    """A descriptor for each tensor of each sample once ended runs of 128 samples under the usual limit of 1,024."""
    most = []
    for batch in (8, 64):
        config = sets.config("data.workers=2", f"optim.global_batch={batch}", "data.streams=4", "data.prefetch=2")
        stream, found = loader(config, tokenizer), 0
        for _ in islice(stream, 4):
            found = max(found, psutil.Process().num_fds())
            assert "/dev/shm/torch" not in Path("/proc/self/maps").read_text()  # containers have little of it
        stream.close()
        most.append(found)
    assert most[1] - most[0] <= 2, most


def limited(soft: int, hard: int, asked: tuple[int, int], told: multiprocessing.Queue[str]) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    try:
        check_open_files(*asked)
        told.put(f"{resource.getrlimit(resource.RLIMIT_NOFILE)[0]} files")
    except ValueError as error:
        told.put(str(error))


@pytest.mark.parametrize(
    ("soft", "hard", "asked", "answer"),
    [
        (256, 256, (2, 16), "256 files"),
        (64, 1000, (2, 16), "1000 files"),
        (64, 124, (2, 16), "124 files"),
        (64, 123, (2, 16), "2 loader workers needs about 124 open files, but may open 123: .*`ulimit -n 4096`.*data.workers"),
        (1024, 4096, (1000, 16), "needs about 4116 open files, but may open 4096: raise the limit .*`ulimit -n 4116`"),
    ],
)  # fmt: skip
def test_too_few_open_files_are_told_before_a_loader_fails(
    soft: int, hard: int, asked: tuple[int, int], answer: str
) -> None:
    context = multiprocessing.get_context("fork")
    told: multiprocessing.Queue[str] = context.Queue()
    process = context.Process(target=limited, args=(soft, hard, asked, told))
    process.start()
    assert re.search(answer, told.get(timeout=30))
    process.join()


class Items:
    """An endless iterator that counts, tells when it is closed, and may fail."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.given, self.closed, self.fails_at = 0, False, fails_at

    def __iter__(self) -> Iterator[int]:
        return self

    def __next__(self) -> int:
        if self.given == self.fails_at:
            raise OSError("the store is down")
        self.given += 1
        return self.given - 1

    def close(self) -> None:
        self.closed = True


def test_the_thread_keeps_the_order_runs_little_ahead_and_closes_what_it_reads() -> None:
    items = Items()
    with in_thread(items, "test") as found:
        assert list(islice(found, 5)) == [0, 1, 2, 3, 4]
        assert items.given <= 8
    assert items.closed


def test_the_thread_is_not_waited_for_once_the_loader_processes_are_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """It asks torch's queue of a killed process for 5 s: a job would end so much later after an error."""
    gone, still = threading.Event(), threading.Event()

    def waits() -> Iterator[int]:
        yield 0
        still.wait(5)
        gone.set()
        yield 1

    with in_thread(waits(), "test") as found:
        assert next(found) == 0
        monkeypatch.setattr(loader_inside, "python_exit_status", True)
    assert not gone.is_set()
    still.set()


def test_an_error_comes_in_place_of_the_item_that_did_not_come() -> None:
    items = Items(fails_at=2)
    with in_thread(items, "test") as found:
        assert [next(found), next(found)] == [0, 1]
        with pytest.raises(OSError, match="the store is down"):
            next(found)
    assert items.closed
