"""Packing: what it writes, what it refuses before it writes, how it goes on after a kill, and which images it leaves out."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import uuid
import weakref
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mmclip_shards import storage
from mmclip_shards.images import Rendering, decode_image
from mmclip_shards.journal import Done, read_journal
from mmclip_shards.manifest import load_manifest, save_manifest
from mmclip_shards.pack import pack
from mmclip_shards.reader import iterate
from mmclip_shards.schema import Box, Record
from mmclip_shards.split import hash_patient, split_of
from mmclip_shards.testing.s3_server import S3Server
from mmclip_shards.verify import verify
from PIL import Image

KEY = b"k" * 32
HALVES = {"train": 0.5, "test": 0.5}


def records(count: int = 12) -> list[Record]:
    """Two images a patient; in no order; labels differ from record to record."""
    found = [
        Record(
            key=f"s{number:02d}",
            image=np.full((20, 30), number, np.uint8),
            patient=f"RAW-{number // 2}",
            source=f"images/s{number:02d}.png",
            report=f"Report {number}." if number % 3 else "",
            labels={"Edema": 1} if number % 2 else {"Mass": 0, "Edema": None},
        )
        for number in range(count)
    ]
    return found[::-1]


def pack_to(dest: str | Path, of: Sequence[Record] | None = None, **changes: object):  # type: ignore[no-untyped-def]
    options: dict = {"dataset": "toy", "splits": HALVES, "config_hash": "c", "patient_key": KEY, "samples_per_shard": 3}
    return pack(records() if of is None else of, dest, **(options | changes))


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("remote", [False, True])
def test_what_is_written(tmp_path: Path, remote: bool) -> None:
    dest = f"memory://{tmp_path.name}-pack" if remote else str(tmp_path / "set")
    manifests = pack_to(dest)
    assert list(manifests) == ["train", "test"]
    seen: dict[str, str] = {}
    for split, manifest in manifests.items():
        assert manifest == load_manifest(f"{dest}/{split}")
        assert (manifest.kind, manifest.dataset, manifest.split) == ("base", "toy", split)
        assert manifest.labels == ("Edema", "Mass")
        samples = list(iterate(f"{dest}/{split}"))
        assert len(samples) == manifest.samples
        assert [key for key, _ in samples] == sorted(key for key, _ in samples)
        for key, files in samples:
            seen[key] = split
            number = int(key[1:])
            document = json.loads(files["json"])
            assert set(files) == {"png", "json"}
            assert np.asarray(Image.open(io.BytesIO(files["png"]))).tolist() == [[number] * 30] * 20
            assert document["report"] == ({"text": f"Report {number}."} if number % 3 else None)
            assert document["labels"] == ({"Edema": 1, "Mass": None} if number % 2 else {"Edema": None, "Mass": 0})
            assert document["patient"] == hash_patient(f"RAW-{number // 2}", KEY)
            assert (document["width"], document["height"]) == (30, 20)
            assert b"RAW" not in files["json"]
    assert seen == {record.key: split_of(record.patient, HALVES) for record in records()}


def test_a_rebuild_is_byte_identical_whatever_the_order_and_the_workers(tmp_path: Path) -> None:
    pack_to(tmp_path / "a")
    pack_to(tmp_path / "b", sorted(records(), key=lambda record: record.key), workers=2)
    assert files_in(tmp_path / "a") == files_in(tmp_path / "b")
    assert len(files_in(tmp_path / "a")) >= 2 * 3


def test_how_images_were_made_is_stated_and_is_part_of_the_sets_identity(tmp_path: Path) -> None:
    plain = pack_to(tmp_path / "a", short_side=10)["train"]
    stated = {"short_side": 10, "format": "source", "quality": 95, "window": None, "clahe": False}
    assert plain.images == load_manifest(tmp_path / "a" / "train").images == stated
    other = Rendering(format="webp-lossless", window=(1, 99), clahe=True)
    with pytest.raises(ValueError, match="other settings"):
        pack_to(tmp_path / "a", short_side=10, rendering=other)
    images = [*records()[:6], replace(records()[0], key="z", image=np.arange(600, dtype=np.uint16).reshape(20, 30))]
    made = pack_to(tmp_path / "b", images, splits={"train": 1.0}, short_side=10, rendering=other)["train"]
    assert made.images == {**stated, "format": "webp-lossless", "window": [1, 99], "clahe": True}
    assert not verify(str(tmp_path / "b" / "train")).findings
    ((_, files),) = [sample for sample in iterate(tmp_path / "b" / "train") if sample[0] == "z"]
    assert set(files) == {"webp", "json"} and np.asarray(decode_image(files["webp"])).std() > 10
    assert pack_to(tmp_path / "b", images, splits={"train": 1.0}, short_side=10, rendering=other)["train"] == made


def test_boxes_and_big_images_are_scaled_together(tmp_path: Path) -> None:
    record = Record("a", np.zeros((100, 200), np.uint8), "p", "a.png", boxes=(Box("Mass", 10, 20, 30, 40),))
    pack_to(tmp_path / "set", [record], splits={"train": 1.0}, short_side=50)
    ((_, files),) = iterate(tmp_path / "set" / "train")
    document = json.loads(files["json"])
    assert (document["width"], document["height"]) == (100, 50)
    assert document["boxes"] == [{"label": "Mass", "x": 5, "y": 10, "width": 15, "height": 20}]


@settings(max_examples=15, deadline=None)
@given(
    patients=st.lists(st.sampled_from([f"p{n}" for n in range(8)]), min_size=1, max_size=30),
    seed=st.integers(0, 3),
    train=st.floats(0.1, 0.9),
)
def test_patients_never_cross_splits(
    tmp_path_factory: pytest.TempPathFactory, patients: list[str], seed: int, train: float
) -> None:
    dest = tmp_path_factory.mktemp("cross")
    of = [Record(f"k{n}", np.zeros((2, 2), np.uint8), patient, "s") for n, patient in enumerate(patients)]
    splits = {"train": train, "test": 1 - train}
    try:
        manifests = pack_to(dest / "set", of, splits=splits, seed=seed)
    except ValueError as error:
        assert "no patient fell in split" in str(error)
        assert len({split_of(patient, splits, seed) for patient in patients}) == 1
        return
    hashes = {s: {json.loads(f["json"])["patient"] for _, f in iterate(dest / "set" / s)} for s in manifests}
    assert hashes["train"] and hashes["test"] and not hashes["train"] & hashes["test"]
    assert sum(manifest.samples for manifest in manifests.values()) == len(patients)


def test_explicit_splits(tmp_path: Path) -> None:
    own = {record.key: "val" if record.patient == "RAW-2" else "train" for record in records()}
    manifests = pack_to(tmp_path / "set", splits=None, split_of_record=own)
    assert {split: manifest.samples for split, manifest in manifests.items()} == {"train": 10, "val": 2}
    own["s04"] = "train"
    with pytest.raises(ValueError, match=r"record 7 \(val\) and record 8 \(train\) belong to the same") as caught:
        pack_to(tmp_path / "other", splits=None, split_of_record=own)
    assert "RAW" not in str(caught.value)
    del own["s04"]
    with pytest.raises(ValueError, match="record 8 has no split"):
        pack_to(tmp_path / "other", splits=None, split_of_record=own)
    for splits in (None, HALVES):
        with pytest.raises(ValueError, match="not both"):
            pack_to(tmp_path / "other", splits=splits, split_of_record=own if splits else None)
    with pytest.raises(ValueError, match="split name"):
        pack_to(tmp_path / "other", splits=None, split_of_record=dict.fromkeys((r.key for r in records()), "../x"))
    assert not (tmp_path / "other").exists()


def test_records_that_repeat_a_key_are_counted_and_listed(tmp_path: Path) -> None:
    twice = [*records(), *(replace(row, image=np.zeros((9, 9), np.uint8), patient="RAW-9") for row in records()[:2])]
    with pytest.raises(ValueError, match=r"^2 of 14 records have the key of an earlier one \(records 1 and 13 share the key\)"):
        pack_to(tmp_path / "set", twice, max_bad_fraction=0.14)
    assert not (tmp_path / "set").exists()
    manifests = pack_to(tmp_path / "set", twice, max_bad_fraction=0.15)
    assert sum(manifest.samples for manifest in manifests.values()) == 12
    listed = [json.loads(line) for path in tmp_path.glob("set/*/quarantine.jsonl") for line in path.read_text().splitlines()]
    assert sorted((row["key"], row["reason"]) for row in listed) == [
        ("s10", "record 14 has the key of record 2"), ("s11", "record 13 has the key of record 1"),
    ]  # fmt: skip
    for split in manifests:  # the first record of a key is packed: its bytes are those of a pack without the others
        pack_to(tmp_path / "once")
        assert list(iterate(tmp_path / "set" / split)) == list(iterate(tmp_path / "once" / split))
    assert pack_to(tmp_path / "set", twice, max_bad_fraction=0.15) == manifests
    # an unreadable image counts with them
    broken = [replace(row, image=b"no image") if row.key == "s03" else row for row in twice]
    with pytest.raises(ValueError, match="3 of 14 images cannot be used"):
        pack_to(tmp_path / "broken", broken, max_bad_fraction=0.15)


def test_everything_else_is_checked_before_anything_is_written(tmp_path: Path) -> None:
    one = records()[0]
    bad: dict[str, list[Record]] = {
        "no records": [],
        "records 1 and 13 share the key": [*records(), replace(one, patient="RAW-9")],
        "record 13: sample key": [*records(), replace(one, key="a.b")],
        "record 13: a patient id is empty": [*records(), replace(one, key="new", patient=" ")],
        "record 13: label": [*records(), replace(one, key="new", labels={"Edema": 7})],
        "record 13: box": [*records(), replace(one, key="new", boxes=(Box("", 0, 0, 1, 1),))],
        "1 of 13 images are missing, the first one of record 13": [
            *records(),
            replace(one, key="new", image=tmp_path / "x.png"),
        ],
    }
    for message, of in bad.items():
        with pytest.raises(ValueError, match=message):
            pack_to(tmp_path / "set", of)
        assert not (tmp_path / "set").exists()
    with pytest.raises(
        ValueError, match=r"no patient fell in split 'val' \(fraction 0.01 of 6 patients\).*larger fraction"
    ):
        pack_to(tmp_path / "set", splits={"train": 0.5, "test": 0.49, "val": 0.01})
    assert list(pack_to(tmp_path / "zero", splits={**HALVES, "val": 0.0})) == ["train", "test"]
    assert not (tmp_path / "set").exists()


KILLED = """
import os, signal, sys
from pathlib import Path

def kill(done, total):
    if done == 10:
        os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    sys.path.insert(0, sys.argv[1])
    from test_pack import pack_to, image_files
    folder = Path(sys.argv[2])
    pack_to(folder / "set", image_files(folder / "images"), workers=int(sys.argv[3]), progress=kill)
"""


def image_files(folder: Path) -> list[Record]:
    """The records, their images in files that are written if they are missing."""
    folder.mkdir(exist_ok=True)
    found = []
    for record in records():
        path = folder / f"{record.key}.png"
        if not path.exists():
            Image.fromarray(record.image).save(path)  # type: ignore[arg-type]
        found.append(replace(record, image=path))
    return found


def changed_times(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def stop_after(images: int):  # type: ignore[no-untyped-def]
    def progress(done: int, total: int) -> None:
        if done == images:
            raise KeyboardInterrupt

    return progress


def test_patients_in_two_splits_are_left_out_of_both_and_listed(tmp_path: Path) -> None:
    own = {record.key: "val" if record.patient in ("RAW-2", "RAW-3") else "train" for record in records()}
    own["s04"] = "train"
    with pytest.raises(ValueError, match=r"^1 of 6 patients are in two splits: .*--max-bad-fraction 0\.167") as told:
        pack_to(tmp_path / "set", splits=None, split_of_record=own, max_bad_fraction=0.166)
    assert "RAW" not in str(told.value) and not (tmp_path / "set").exists()
    made = pack_to(tmp_path / "set", splits=None, split_of_record=own, max_bad_fraction=0.167)
    assert {split: manifest.samples for split, manifest in made.items()} == {"train": 8, "val": 2}
    for split, key in (("train", "s04"), ("val", "s05")):
        (line,) = (tmp_path / "set" / split / "quarantine.jsonl").read_text().splitlines()
        reason = "the patient is in two splits: record 7 (val) and record 8 (train) belong to the same patient"
        assert json.loads(line) == {"key": key, "reason": reason}
    own |= {f"s{number:02d}": "val" for number in (6, 8, 10)} | {"s07": "train"}
    own = {key: "val" if key in ("s04",) else "train" for key in own}
    with pytest.raises(ValueError, match="every patient of split 'val' is in another split"):
        pack_to(tmp_path / "other", splits=None, split_of_record=own, max_bad_fraction=1)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_pack_goes_on_after_its_last_finished_shard_and_the_bytes_are_the_same(
    tmp_path: Path, workers: int
) -> None:
    of = image_files(tmp_path / "images")
    pack_to(tmp_path / "whole", of)
    (tmp_path / "killed.py").write_text(KILLED)
    command = [sys.executable, tmp_path / "killed.py", Path(__file__).parent, tmp_path, str(workers)]
    # A worker that outlives the pack holds the pipes open: then this does not end in time.
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    before = changed_times(tmp_path / "set")
    journals = {split: journal(tmp_path / "set" / split) for split in HALVES}
    finished = [f"{split}/{done.shard.path}" for split, rows in journals.items() for done in rows]
    # Of several workers, the fourth shard may be on its way still.
    assert len(finished) == (4 if workers == 1 else 3) and not [name for name in before if name.endswith("manifest.json")]
    left = 12 - sum(done.records for rows in journals.values() for done in rows)
    (tmp_path / "set" / "train" / ".000000.tar.0123456789ab.tmp").write_bytes(b"half")
    totals = set()
    pack_to(tmp_path / "set", of, progress=lambda done, total: totals.add(total))
    assert files_in(tmp_path / "set") == files_in(tmp_path / "whole")
    after = changed_times(tmp_path / "set")
    assert {name: after[name] for name in finished} == {name: before[name] for name in finished}
    assert totals == {left}, "images of finished shards were decoded again"


def journal(folder: Path) -> list[Done]:
    """The finished shards of an unfinished split."""
    path = folder / "pack.jsonl"
    return read_journal(str(folder), json.loads(path.read_text().splitlines()[0])["config_hash"]) if path.exists() else []


class UnsendableError(Exception):
    """Made of two parts, so that pickle cannot make it again."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first} {second}")


class Drawn:
    """An image that a worker makes: noise, or what ends it."""

    def __init__(self, ends: str = "") -> None:
        self.ends = ends

    def __call__(self) -> tuple[np.ndarray, tuple[Box, ...]]:
        if self.ends == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.ends == "interrupted":
            os.kill(os.getpid(), signal.SIGINT)
        if self.ends == "raises":
            raise TypeError("no such drawing")
        if self.ends == "raises what cannot be sent":
            raise UnsendableError("no such", "drawing")
        return np.random.default_rng(0).integers(0, 255, (1500, 1500), np.uint8), ()


@pytest.mark.parametrize(
    ("ends", "error", "told"),
    [
        ("killed", ValueError, "a worker process died.*fewer workers.*shards are kept"),
        ("raises", TypeError, "no such drawing"),
        ("raises what cannot be sent", RuntimeError, "UnsendableError.*no such drawing"),
    ],
)
def test_how_a_worker_ends_is_told_and_the_pack_goes_on_from_there(
    tmp_path: Path, ends: str, error: type[Exception], told: str
) -> None:
    of = sorted((replace(record, image=Drawn()) for record in records(24)), key=lambda record: record.key)
    broken = [*of[:-1], replace(of[-1], image=Drawn(ends))]
    before = set(multiprocessing.active_children())  # of other tests in this process
    with pytest.raises(error, match=told) as raised:
        pack_to(tmp_path / "set", broken, splits={"train": 1.0}, workers=2)
    if ends == "raises":
        assert "in __call__" in "".join(raised.value.__notes__), "the worker's own traceback"
    assert set(multiprocessing.active_children()) <= before
    assert journal(tmp_path / "set" / "train"), "finished shards were not kept"
    pack_to(tmp_path / "set", of, splits={"train": 1.0}, workers=2)
    pack_to(tmp_path / "whole", of, splits={"train": 1.0})
    assert files_in(tmp_path / "set") == files_in(tmp_path / "whole")


INTERRUPTED = """
import sys
from dataclasses import replace

if __name__ == "__main__":
    sys.path.insert(0, sys.argv[1])
    from test_pack import Drawn, pack_to, records
    pack_to(sys.argv[2], [replace(record, image=Drawn("interrupted")) for record in records()], workers=2)
"""


def test_ctrl_c_in_a_terminal_reaches_the_packing_process_and_no_worker(tmp_path: Path) -> None:
    # In a process of its own: the helper that multiprocessing starts beside the first worker lets the signal through.
    (tmp_path / "interrupted.py").write_text(INTERRUPTED)
    command = [sys.executable, tmp_path / "interrupted.py", Path(__file__).parent, tmp_path / "set"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert sum(load_manifest(tmp_path / "set" / split).samples for split in HALVES) == 12


def test_images_larger_than_what_a_pipe_holds_pass_both_ways(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (12, 1500, 1500), np.uint8)
    of = [replace(record, image=image) for record, image in zip(records(), noise, strict=True)]
    for workers in (1, 3):
        pack_to(tmp_path / str(workers), of, short_side=1500, workers=workers)
    assert files_in(tmp_path / "1") == files_in(tmp_path / "3")
    assert min(len(data) for name, data in files_in(tmp_path / "1").items() if name.endswith(".tar")) > 2**20


def test_shards_that_cannot_be_published_beside_the_workers_stop_the_pack_and_are_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack_to(tmp_path / "whole")
    write = storage.write_atomic

    def failing(url: str, data: bytes) -> None:
        if url.endswith("000001.tar"):
            raise OSError("the disk is full")
        write(url, data)

    with monkeypatch.context() as broken:
        broken.setattr(storage, "write_atomic", failing)
        with pytest.raises(OSError, match="full"):
            pack_to(tmp_path / "set", workers=2)
    assert not list((tmp_path / "set").glob("*/manifest.json"))
    pack_to(tmp_path / "set", workers=2)
    assert files_in(tmp_path / "set") == files_in(tmp_path / "whole")


def test_a_pack_that_fails_at_any_write_goes_on_from_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pack_to(tmp_path / "whole")
    write, left = storage.write_atomic, 0

    def failing(url: str, data: bytes) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError("the disk is full")
        write(url, data)

    monkeypatch.setattr(storage, "write_atomic", failing)
    for writes in range(5 * 3 + 2):  # tar, index and journal of every shard, and two manifests
        left, dest = writes, tmp_path / f"set{writes}"
        with pytest.raises(OSError, match="full"):
            pack_to(dest)
        left = 1000
        pack_to(dest)
        assert files_in(dest) == files_in(tmp_path / "whole")


def test_an_interrupted_pack_on_s3_goes_on(tmp_path: Path, s3: S3Server) -> None:
    pack_to(tmp_path / "whole")
    dest = f"{s3.url}/{uuid.uuid4().hex}/set"
    with pytest.raises(KeyboardInterrupt):
        pack_to(dest, progress=stop_after(10))
    totals = set()
    pack_to(dest, progress=lambda done, total: totals.add(total))
    assert totals == {2}
    for split in HALVES:
        names = [path.name for path in sorted((tmp_path / "whole" / split).iterdir())]
        assert storage.list_folder(f"{dest}/{split}") == names
        assert all(
            storage.read_bytes(f"{dest}/{split}/{name}") == (tmp_path / "whole" / split / name).read_bytes()
            for name in names
        )


def test_a_journal_of_a_finished_split_goes(tmp_path: Path) -> None:
    pack_to(tmp_path)
    whole = files_in(tmp_path)
    (tmp_path / "test" / "pack.jsonl").write_text("killed before it was removed")
    pack_to(tmp_path)
    assert files_in(tmp_path) == whole


def test_an_unfinished_pack_of_other_settings_or_with_a_damaged_journal_is_refused_and_left_alone(
    tmp_path: Path,
) -> None:
    dest = tmp_path / "set"
    with pytest.raises(KeyboardInterrupt):
        pack_to(dest, progress=stop_after(10))
    before = files_in(dest)
    for changes in ({"config_hash": "d"}, {"short_side": 10}, {"splits": {"all": 1.0}}):
        with pytest.raises(ValueError, match=r"set/test holds 2 shards of an unfinished .*delete .*/test to") as caught:
            pack_to(dest, **changes)
        assert "\n" not in str(caught.value)
    assert files_in(dest) == before
    for damaged in (b"", b"{}\n", b"[]\n", before["train/pack.jsonl"].replace(b"sha256", b"sha")):
        (dest / "train" / "pack.jsonl").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"train/pack.jsonl.*delete .*/train to pack"):
            pack_to(dest)


@pytest.mark.parametrize("change", ["image", "image gone", "tar cut", "tar gone", "index"])
def test_from_the_first_changed_shard_on_all_are_made_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, change: str
) -> None:
    of, dest = image_files(tmp_path / "images"), tmp_path / "set"
    options: dict = {"splits": {"train": 1.0}, "max_bad_fraction": 0.1}
    with pytest.raises(KeyboardInterrupt):
        pack_to(dest, of, progress=stop_after(11), **options)
    image, before = tmp_path / "images" / "s04.png", changed_times(dest)
    tar = dest / "train" / "000001.tar"
    if change == "image":  # of the same size, so that only its time tells
        data = bytearray(image.read_bytes())
        Image.fromarray(np.full((20, 30), 5, np.uint8)).save(image)
        assert image.stat().st_size == len(data)
    elif change == "image gone":
        image.unlink()
    elif change == "tar cut":
        tar.write_bytes(tar.read_bytes()[:-512])
    elif change == "tar gone":
        tar.unlink()
    else:
        tar.with_name("000001.index.json").write_bytes(b"{}")
    pack_to(dest, of, **options)
    assert "shard 1 have changed, so 2 of 3 finished shards are made again" in caplog.text
    pack_to(tmp_path / "fresh", of, **options)
    assert files_in(dest) == files_in(tmp_path / "fresh")
    after = changed_times(dest)
    assert after["train/000000.tar"] == before["train/000000.tar"]
    assert after["train/000002.tar"] != before["train/000002.tar"]


@pytest.mark.parametrize("journaled", [True, False])
def test_a_shard_that_is_no_longer_part_of_the_set_goes(tmp_path: Path, journaled: bool) -> None:
    of, dest = image_files(tmp_path / "images"), tmp_path / "set"
    with pytest.raises(KeyboardInterrupt):
        pack_to(dest, of, splits={"train": 1.0}, samples_per_shard=11, progress=stop_after(12))
    assert (dest / "train" / "000001.tar").exists()
    if not journaled:  # killed just before
        journal = dest / "train" / "pack.jsonl"
        journal.write_bytes(b"".join(journal.read_bytes().splitlines(keepends=True)[:-1]))
    of[0].image.unlink()  # type: ignore[union-attr]
    (manifest,) = pack_to(dest, of, splits={"train": 1.0}, samples_per_shard=11, max_bad_fraction=0.1).values()
    assert sorted(files_in(dest / "train")) == ["000000.index.json", "000000.tar", "manifest.json", "quarantine.jsonl"]
    assert manifest.samples == 11


def spoil(folder: Path) -> dict[str, str]:
    """Make five images unusable, each in its own way -> key -> reason."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8))
    noise.save(folder / "s01.png", "JPEG")
    (folder / "s01.png").write_bytes((folder / "s01.png").read_bytes()[:-1000])
    (folder / "s02.png").write_bytes(b"")
    (folder / "s03.png").write_bytes(b"not an image")
    (folder / "s07.png").unlink()
    (folder / "s11.png").unlink()
    (folder / "s11.png").symlink_to(folder)
    return {"s01": "runcated", "s02": "is empty", "s03": "another format", "s07": "No such", "s11": "directory"}


@pytest.mark.parametrize("workers", [1, 2])
def test_bad_images_are_listed_and_the_rest_is_a_set_without_their_records(tmp_path: Path, workers: int) -> None:
    of = image_files(tmp_path / "images")
    bad = spoil(tmp_path / "images")
    pack_to(tmp_path / "set", of, max_bad_fraction=0.5, workers=workers)
    files = files_in(tmp_path / "set")
    lists = {split: files.pop(f"{split}/quarantine.jsonl", b"") for split in HALVES}
    rows = [json.loads(line) for text in lists.values() for line in text.splitlines()]
    assert sorted(row["key"] for row in rows) == sorted(bad)
    for row in rows:
        assert set(row) == {"key", "reason"} and bad[row["key"]] in row["reason"]
        assert str(tmp_path) not in row["reason"] and "RAW" not in row["reason"]
    pack_to(tmp_path / "without", [record for record in of if record.key not in bad])
    assert files == files_in(tmp_path / "without")
    with pytest.raises(KeyboardInterrupt):
        pack_to(tmp_path / "again", of, max_bad_fraction=0.5, progress=stop_after(11))
    pack_to(tmp_path / "again", of, max_bad_fraction=0.5)
    assert files_in(tmp_path / "again") == files_in(tmp_path / "set"), "a pack that goes on left out others"


def test_too_many_bad_images_are_one_error_that_says_how_to_go_on(tmp_path: Path) -> None:
    of, dest = image_files(tmp_path / "images"), tmp_path / "set"
    for number in range(7):
        (tmp_path / "images" / f"s{number:02}.png").write_bytes(b"not an image")
    for limit in (0.0, 0.58):
        with pytest.raises(ValueError, match="7 of 12 images cannot be used") as caught:
            pack_to(dest, of, max_bad_fraction=limit)
        assert str(caught.value).count("not a usable") == 5 and "\n" not in str(caught.value)
    enough = float(re.findall(r"--max-bad-fraction ([0-9.]+)", str(caught.value))[0])
    assert enough == 0.584
    assert not list(dest.rglob("manifest.json"))
    listed = {json.loads(line)["key"] for path in dest.rglob("quarantine.jsonl") for line in path.open()}
    assert listed == {f"s{number:02}" for number in range(7)}
    tars = {name: time for name, time in changed_times(dest).items() if name.endswith(".tar")}
    assert sum(manifest.samples for manifest in pack_to(dest, of, max_bad_fraction=enough).values()) == 5
    assert {name: time for name, time in changed_times(dest).items() if name.endswith(".tar")} == tars


def test_a_mended_image_joins_the_set_even_if_it_looks_the_same(tmp_path: Path) -> None:
    of, dest, image = image_files(tmp_path / "images"), tmp_path / "set", tmp_path / "images" / "s04.png"
    pack_to(tmp_path / "whole", of)
    data, times = image.read_bytes(), (image.stat().st_atime_ns, image.stat().st_mtime_ns)
    image.write_bytes(bytes(len(data)))
    os.utime(image, ns=times)
    with pytest.raises(ValueError, match=r"1 of 12 images cannot be used: s04 \(not a usable"):
        pack_to(dest, of)
    image.write_bytes(data)
    os.utime(image, ns=times)
    pack_to(dest, of)
    assert files_in(dest) == files_in(tmp_path / "whole")


def test_bad_images_of_finished_splits_count(tmp_path: Path) -> None:
    of = image_files(tmp_path / "images")
    spoil(tmp_path / "images")
    pack_to(tmp_path / "set", of, max_bad_fraction=0.5)
    (tmp_path / "set" / "test" / "manifest.json").unlink()
    with pytest.raises(ValueError, match="5 of 12 images cannot be used"):
        pack_to(tmp_path / "set", of, max_bad_fraction=0.4)
    assert pack_to(tmp_path / "set", of, max_bad_fraction=5 / 12)["test"]


def test_a_split_without_a_usable_image_is_refused(tmp_path: Path) -> None:
    of = [replace(record, image=b"no") if record.patient == "RAW-2" else record for record in records()]
    own = {record.key: "val" if record.patient == "RAW-2" else "train" for record in of}
    with pytest.raises(ValueError, match=r"no image of split 'val' can be used: .*val/quarantine.jsonl"):
        pack_to(tmp_path / "set", of, splits=None, split_of_record=own, max_bad_fraction=1)
    with pytest.raises(ValueError, match="max_bad_fraction is 2; it must be between 0 and 1"):
        pack_to(tmp_path / "set", max_bad_fraction=2)


def test_records_that_are_made_on_demand_are_not_held_and_made_twice(tmp_path: Path) -> None:
    alive: weakref.WeakSet[Record] = weakref.WeakSet()
    made_of: Counter[int] = Counter()
    most = 0

    class OnDemand(Sequence[Record]):
        def __len__(self) -> int:
            return 12

        def __getitem__(self, number):  # type: ignore[no-untyped-def]
            nonlocal most
            made = Hashed(**vars(records()[number]))
            alive.add(made)
            made_of[number] += 1
            most = max(most, len(alive))
            return made

    pack_to(tmp_path / "set", OnDemand())
    pack_to(tmp_path / "list")
    assert files_in(tmp_path / "set") == files_in(tmp_path / "list")
    assert most <= 3
    assert set(made_of.values()) == {2}, "each is made once to be checked and once to be packed"


class Hashed(Record):
    """A record that fits in a set of weak references."""

    __hash__ = object.__hash__


def test_packing_again_skips_and_another_set_is_refused(tmp_path: Path) -> None:
    dest = tmp_path / "set"
    first = pack_to(dest)
    before = {path: path.stat().st_mtime_ns for path in dest.rglob("*")}

    def never(done: int, total: int) -> None:
        raise AssertionError("an image was decoded again")

    assert pack_to(dest, progress=never) == first
    assert {path: path.stat().st_mtime_ns for path in dest.rglob("*")} == before
    for changes in (
        {"config_hash": "d"},
        {"seed": 1},
        {"short_side": 10},
        {"samples_per_shard": 2},
        {"patient_key": b"other"},
        {"splits": {"train": 1.0}},
    ):
        with pytest.raises(ValueError, match="holds another set"):
            pack_to(dest, **changes)
    with pytest.raises(ValueError, match="itself a split"):
        pack_to(dest / "train")
    assert {path: path.stat().st_mtime_ns for path in dest.rglob("*")} == before


def test_sidecars_beside_the_splits_are_no_other_set(tmp_path: Path) -> None:
    first = pack_to(tmp_path)
    base = {shard.path: shard.sha256 for shard in first["train"].shards}
    save_manifest(tmp_path / "entities", replace(first["train"], kind="entities", base=base, config_hash="e"))
    assert pack_to(tmp_path) == first


def test_a_split_that_is_missing_is_made_again(tmp_path: Path) -> None:
    first = pack_to(tmp_path / "set")
    whole = files_in(tmp_path / "set")
    (tmp_path / "set" / "test" / "manifest.json").unlink()
    (tmp_path / "set" / "test" / "000000.tar").write_bytes(b"half")
    seen: list[int] = []
    assert pack_to(tmp_path / "set", progress=lambda done, total: seen.append(total)) == first
    assert set(seen) == {first["test"].samples}
    assert files_in(tmp_path / "set") == whole


@pytest.mark.parametrize("name", ["workers", "short_side", "samples_per_shard"])
def test_numbers_must_be_positive(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is 0; it must be at least 1"):
        pack_to(tmp_path / "set", **{name: 0})
    assert not (tmp_path / "set").exists()
