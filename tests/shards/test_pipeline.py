"""Sets handed to `webdataset`: checked bytes, joined sidecars, every sample once."""

from __future__ import annotations

import pickle
import shutil
import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import webdataset
from mmclip_shards import storage
from mmclip_shards.manifest import load_index, load_manifest, save_manifest
from mmclip_shards.pipeline import as_webdataset
from mmclip_shards.reader import ShardReader, iterate
from mmclip_shards.writer import write_shard
from torch.utils.data import DataLoader


def members_of(sample: dict[str, object]) -> dict[str, object]:
    return {name: value for name, value in sample.items() if not name.startswith("__")}


def copied(folder: str, tmp_path: Path) -> str:
    return str(shutil.copytree(folder, tmp_path / "copy"))


@pytest.fixture
def sidecars(sets) -> list[str]:
    return [sets.sidecar("entities"), sets.sidecar("attention")]


@pytest.mark.parametrize("remote", [False, True])
def test_samples_are_those_of_the_reader(sets, remote: bool) -> None:
    url = sets.paired
    if remote:
        url = f"memory://{uuid.uuid4().hex}/set"
        for path in Path(sets.paired).iterdir():
            storage.write_atomic(storage.join(url, path.name), path.read_bytes())
    pipeline = as_webdataset(url)
    assert isinstance(pipeline, webdataset.DataPipeline)
    samples = list(pipeline)
    assert [(sample["__key__"], members_of(sample)) for sample in samples] == list(iterate(sets.paired))
    shards = [storage.join(url, shard.path) for shard in load_manifest(url).shards]
    assert list(dict.fromkeys(sample["__url__"] for sample in samples)) == shards and len(shards) > 2
    assert [sample["__key__"] for sample in pipeline] == [sample["__key__"] for sample in samples]  # a second epoch


def test_sidecars_are_joined_by_key_in_whatever_order_their_rows_are(sets, sidecars: list[str], tmp_path: Path) -> None:
    turned = copied(sidecars[0], tmp_path)
    manifest = load_manifest(turned)
    rows = [list(ShardReader(sidecars[0], manifest).samples(number))[::-1] for number in range(len(manifest.shards))]
    shards = tuple(write_shard(turned, number, some) for number, some in enumerate(rows))
    save_manifest(turned, replace(manifest, shards=shards))
    entities, attention = (dict(iterate(url)) for url in sidecars)
    assert len(set(map(str, entities.values()))) > 10  # a wrong join would show
    found = {sample["__key__"]: members_of(sample) for sample in as_webdataset(sets.paired, [turned, sidecars[1]])}
    assert found == {key: files | entities[key] | attention[key] for key, files in iterate(sets.paired)}


def test_a_chain_of_stages_decodes_pictures_text_and_scores(sets, sidecars: list[str]) -> None:
    tuples = (
        as_webdataset(sets.paired, sidecars)
        .shuffle(20)
        .decode("pil")
        .to_tuple("__key__", "jpg;png", "json", "entities.json", "attention.npy")
    )
    found = list(tuples)
    keys = [key for key, _ in iterate(sets.paired)]
    assert sorted(key for key, *_ in found) == keys and [key for key, *_ in found] != keys
    for _, image, document, spans, scores in found:
        assert image.size == (40, 40) and set(document) >= {"report", "labels", "patient"}
        assert isinstance(spans, list) and scores.dtype == np.float16 and scores.shape == (4, 4)


def test_two_workers_of_a_dataloader_deliver_every_sample_once(sets, sidecars: list[str]) -> None:
    loader = DataLoader(as_webdataset(sets.paired, sidecars), batch_size=None, num_workers=2)
    samples = list(loader)
    assert sorted(sample["__key__"] for sample in samples) == [key for key, _ in iterate(sets.paired)]
    assert all("entities.json" in sample and "attention.npy" in sample for sample in samples)


def test_nodes_and_workers_read_whole_shards_of_their_own(sets, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = as_webdataset(sets.paired)
    shards = [storage.join(sets.paired, shard.path) for shard in load_manifest(sets.paired).shards]
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("NUM_WORKERS", "2")
    read: dict[tuple[int, int], list[str]] = {}
    keys: list[str] = []
    for place in ((0, 0), (0, 1), (1, 0), (1, 1)):
        monkeypatch.setenv("RANK", str(place[0]))
        monkeypatch.setenv("WORKER", str(place[1]))
        samples = list(pipeline)
        keys += [sample["__key__"] for sample in samples]
        read[place] = list(dict.fromkeys(sample["__url__"] for sample in samples))
    assert sorted(keys) == [key for key, _ in iterate(sets.paired)]
    assert read == {(n, w): shards[n::2][w::2] for n, w in read}


def test_a_pipeline_can_be_sent_to_another_process(sets, sidecars: list[str]) -> None:
    pipeline = as_webdataset(sets.paired, sidecars)
    next(iter(pipeline))
    again = pickle.loads(pickle.dumps(pipeline))  # noqa: S301
    assert [sample["__key__"] for sample in again] == [key for key, _ in iterate(sets.paired)]


@pytest.mark.parametrize("where", ["set", "sidecar"])
def test_a_damaged_byte_is_noticed(sets, sidecars: list[str], tmp_path: Path, where: str) -> None:
    url = copied(sets.paired if where == "set" else sidecars[0], tmp_path)
    row = load_manifest(url).shards[1]
    _, offset, length, _ = load_index(url, row).sample(2)[0]
    path = Path(url, row.path)
    data = bytearray(path.read_bytes())
    data[offset + length // 2] ^= 1
    path.write_bytes(data)
    samples = iter(as_webdataset(url) if where == "set" else as_webdataset(sets.paired, [url]))
    with pytest.raises(ValueError, match=rf"copy/000001\.tar, key \S+, offset {offset}: .*damaged"):
        list(samples)


def stale(url: str) -> None:
    manifest = load_manifest(url)
    save_manifest(url, replace(manifest, base=dict.fromkeys(manifest.base or {}, "0" * 64)))


def short(url: str) -> None:
    manifest = load_manifest(url)
    save_manifest(url, replace(manifest, shards=manifest.shards[:-1]))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [(stale, "made from other shards.*mmclip entities"), (short, r"holds \d+ of \d+ samples.*mmclip entities")],
)
def test_stale_and_short_sidecars_are_refused(
    sets, sidecars: list[str], tmp_path: Path, spoil: Callable[[str], None], message: str
) -> None:
    url = copied(sidecars[0], tmp_path)
    spoil(url)
    with pytest.raises(ValueError, match=message):
        as_webdataset(sets.paired, [url])


def test_sets_that_are_not_what_they_are_named_as_are_refused(sets, sidecars: list[str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="name the packed set itself"):
        as_webdataset(sidecars[0])
    with pytest.raises(ValueError, match="second set of kind base"):
        as_webdataset(sets.paired, [sets.unpaired])
    with pytest.raises(ValueError, match="second set of kind entities"):
        as_webdataset(sets.paired, [sidecars[0], sidecars[0]])
    with pytest.raises(ValueError, match="give a list"):
        as_webdataset(sets.paired, sidecars[0])
    with pytest.raises(ValueError, match=r"no manifest\.json"):
        as_webdataset(tmp_path)
