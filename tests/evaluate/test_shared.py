"""Evaluation by several ranks: the same document, bit for bit, written by one of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from mmclip_shards.datasets.synthetic.set import pack_synthetic

from mmclip_dist.cli import app
from mmclip_dist.cli import run as run_command
from mmclip_dist.evaluate import probe, reading, tasks
from tests.ranks import run_ranks


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("shared") / "set")
    pack_synthetic(folder, 90, seed=13, size=40, splits={"train": 0.4, "val": 0.3, "test": 0.3}, samples_per_shard=8)
    return folder


def evaluate(words: list[str], read: str) -> int:
    """`mmclip evaluate`, in batches of 8. read: a file to which each batch that this rank encodes adds a line."""
    import sys

    reading.BATCH = tasks.BATCH = 8
    known = reading.LabelledImages._known

    def told(self: reading.LabelledImages, whole: list, samples: list) -> reading.Known:
        with Path(read).open("a") as handle:
            handle.write(f"{len(samples)}\n")
        return known(self, whole, samples)

    reading.LabelledImages._known = told  # type: ignore[method-assign]
    probe.SHARES = tasks.SHARES = (1.0,)
    sys.argv = ["mmclip", "evaluate", *words]
    try:
        return run_command(app)
    except SystemExit as stop:
        return int(stop.code or 0)


def by_ranks(ranks: int, words: list[str], folder: Path) -> tuple[dict, list[str], list[int]]:
    """The document that the command wrote, what each rank printed, and the sizes of the batches that were encoded."""
    folder.mkdir()
    words = [*words, "--out", str(folder / "result.json")]
    if words[0] == "probe":
        words += ["--cache", str(folder / "cache")]
    code, logs = run_ranks(evaluate, words, str(folder / "read"), ranks=ranks, folder=folder / "logs")
    assert code == 0, logs
    sizes = [int(line) for line in (folder / "read").read_text().split()]
    return json.loads((folder / "result.json").read_text()), logs, sizes


@pytest.mark.slow
@pytest.mark.parametrize("task", ["zeroshot", "probe", "retrieval", "pointing"])
def test_ranks_share_the_work_and_find_the_same(untrained: Path, data: str, tmp_path: Path, task: str) -> None:
    words = [task, str(untrained), "--data", data, *(["--validation", data] if task == "zeroshot" else [])]
    alone, _, sizes = by_ranks(1, words, tmp_path / "alone")
    both, logs, halves = by_ranks(3, words, tmp_path / "three")
    assert both == alone and sorted(halves) == sorted(sizes)  # every batch once
    assert "┃" in logs[0]  # the table
    assert logs[1] == logs[2] == ""


@pytest.mark.slow
def test_an_error_of_all_ranks_is_one_line(untrained: Path, data: str, tmp_path: Path) -> None:
    words = ["zeroshot", str(untrained), "--data", data, "--protocol", "siim@mavl"]
    code, logs = run_ranks(evaluate, words, str(tmp_path / "read"), ranks=2, folder=tmp_path / "logs")
    assert code == 2 and "but the model reads 48" in logs[0] and logs[1] == "", logs
