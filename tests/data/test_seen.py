"""Which patients and images a run saw: as the documents and the shards say, in shares, in one file."""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import xxhash
from mmclip_shards.manifest import load_manifest
from mmclip_shards.reader import ShardReader, iterate

from mmclip_dist import train
from mmclip_dist.checkpoint.folder import checkpoint_path
from mmclip_dist.data import seen as module
from mmclip_dist.data.seen import SEEN, Seen, load_seen


def reader_of(url: str) -> ShardReader:
    return ShardReader(url, load_manifest(url))


def test_it_is_what_the_samples_say(sets) -> None:
    found = Seen.of([reader_of(sets.paired), reader_of(sets.unpaired)])
    samples = [members for url in (sets.paired, sets.unpaired) for _, members in iterate(url)]
    patients = {xxhash.xxh3_64_intdigest(json.loads(members["json"])["patient"].encode()) for members in samples}
    images = {xxhash.xxh3_64_intdigest(members.get("png") or members["jpg"]) for members in samples}
    assert set(found.patients.tolist()) == patients and set(found.images.tolist()) == images
    assert found.patients.tolist() == sorted(patients) and found.unknown == ()
    assert found.datasets == ("synthetic", "synthetic-unpaired")


@pytest.mark.parametrize("world", [2, 5])
def test_shares_join_to_the_whole(sets, world: int, tmp_path: Path) -> None:
    readers = [reader_of(sets.paired), reader_of(sets.unpaired)]
    parts = [Seen.of(readers, rank, world) for rank in range(world)]
    assert len({len(part.images) for part in parts}) > 1 or world == 2  # the shards are shared
    for name, one in (("joined", Seen.joined(parts)), ("alone", Seen.of(readers))):
        one.save(tmp_path / name)
    assert (tmp_path / "joined").read_bytes() == (tmp_path / "alone").read_bytes()
    stored = load_seen(tmp_path / "alone")
    assert stored.common(Seen.of(readers)) == (len(stored.patients), len(stored.images))
    assert stored.common(Seen.of([reader_of(sets.test)])) == (0, 0)


def test_what_is_not_known_is_said(sets, monkeypatch: pytest.MonkeyPatch) -> None:
    read, bad = ShardReader.read, reader_of(sets.paired).keys(0)[0]
    monkeypatch.setattr(ShardReader, "read", lambda self, number, key, only: {} if key == bad else read(self, number, key, only))
    found = Seen.of([reader_of(sets.paired), reader_of(sets.unpaired)])
    assert found.unknown == ("synthetic/train",)
    monkeypatch.setattr(module, "local_path", lambda url: None if url == sets.unpaired else url)
    away = Seen.of([reader_of(sets.paired), reader_of(sets.unpaired)], fetch=False)  # a whole set is not fetched for this
    assert away.unknown == ("synthetic-unpaired/train", "synthetic/train") and away.datasets == found.datasets
    assert len(away.images) == load_manifest(sets.paired).samples + load_manifest(sets.unpaired).samples
    assert set(away.patients.tolist()) < set(found.patients.tolist())


def test_no_image_is_read_for_it(sets, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    read_span = ShardReader._read_span
    monkeypatch.setattr(ShardReader, "_read_span", lambda self, *of: taken.append(of[3]) or read_span(self, *of))
    Seen.of([reader_of(sets.paired)])
    held = [members for _, members in iterate(sets.paired)]
    taken = taken[: len(held)]
    assert taken == [len(members["json"]) for members in held]


def test_a_damaged_file_is_named(sets, tmp_path: Path) -> None:
    Seen.of([reader_of(sets.test)]).save(tmp_path / SEEN)
    (tmp_path / SEEN).write_bytes((tmp_path / SEEN).read_bytes()[:100])
    with pytest.raises(ValueError, match=r"seen\.npz is damaged"):
        load_seen(tmp_path / SEEN)


def test_another_manifest_name_changes_no_hash(sets) -> None:
    manifest = replace(load_manifest(sets.test), dataset="other")
    one, other = Seen.of([ShardReader(sets.test, manifest)]), Seen.of([reader_of(sets.test)])
    assert one.common(other) == (len(one.patients), len(one.images)) and one.datasets != other.datasets


def test_a_resumed_run_takes_it_from_its_checkpoint(
    sets, untrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If that trained on the same shards; a damaged list is made anew."""
    monkeypatch.setattr(train, "agreed", nullcontext)
    monkeypatch.setattr(train, "gathered", lambda value: [value])
    shutil.copytree(untrained, tmp_path / "run")
    kept, made = Seen.of([reader_of(sets.test)]), Seen.of([reader_of(sets.paired)])
    list_of_checkpoint = checkpoint_path(tmp_path / "run", 3) / SEEN

    def found(trained_on: tuple[str, ...]) -> list[int]:
        data = SimpleNamespace(trained_on=trained_on, seen=lambda rank, world: made)
        return train.seen_by_all(tmp_path / "run", data, 0, 1).images.tolist()

    assert found(()) == made.images.tolist()  # it has none yet
    kept.save(list_of_checkpoint)
    assert found(()) == kept.images.tolist()
    assert found(("other",)) == made.images.tolist()
    list_of_checkpoint.write_bytes(b"damaged")
    assert found(()) == made.images.tolist()
