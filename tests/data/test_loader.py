"""Batches: the same whoever reads them, joined by key, with every failure counted."""

from __future__ import annotations

import io
import json
import uuid
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from mmclip_shards import storage
from mmclip_shards.images import prepare_image
from mmclip_shards.manifest import load_manifest, save_manifest
from mmclip_shards.reader import iterate
from PIL import Image

from mmclip_dist.config import Source
from mmclip_dist.data import reading
from mmclip_dist.data.batch import Batch
from mmclip_dist.data.example import ExampleMaker, MissingSidecar
from mmclip_dist.data.join import JoinedSet
from mmclip_dist.data.reading import open_sets
from tests.batches import loader


def assert_equal(ours: Batch, theirs: Batch, rows: slice = slice(None)) -> None:
    """Equal rows; padding may differ, since it follows the longest report of the rows at hand."""
    assert ours["keys"] == theirs["keys"][rows] and ours["step"] == theirs["step"]
    for name in ("image", "report_id", "labels", "attention", "has_attention", "noise"):
        assert torch.equal(ours[name], theirs[name][rows]), name
    for name in ("tokens", "token_mask", "masked_tokens", "target_tokens", "evidence"):
        length = ours[name].shape[1]
        assert torch.equal(ours[name], theirs[name][rows][:, :length]), name
        assert not theirs["token_mask"][rows][:, length:].any()


def test_ranks_workers_and_seeking_do_not_change_a_batch(sets, tokenizer) -> None:
    config = sets.config()
    alone = list(islice(loader(config, tokenizer), 14))  # past the end of an epoch
    for rank in range(2):
        half = slice(rank * 4, rank * 4 + 4)
        for ours, theirs in zip(islice(loader(config, tokenizer, rank=rank, world=2), 14), alone, strict=True):
            assert_equal(ours, theirs, half)
    for workers in (1, 2):
        parallel = sets.config(f"data.workers={workers}")
        for ours, theirs in zip(islice(loader(parallel, tokenizer), 5), alone[:5], strict=True):
            assert_equal(ours, theirs)
    assert_equal(next(loader(config, tokenizer, start=9)), alone[9])


def test_workers_go_on_after_the_launchers_sigterm_and_end_with_the_loader(sets, tokenizer) -> None:
    """The launcher ends all processes of a rank; the rank itself needs batches until all ranks have stopped."""
    before = set(psutil.Process().children())
    batches = loader(sets.config("data.workers=2", "data.prefetch=1"), tokenizer)
    next(batches)
    new = set(psutil.Process().children()) - before
    workers = [child for child in new if "resource_tracker" not in " ".join(child.cmdline())]
    assert len(workers) == 2
    for worker in workers:
        worker.terminate()
    assert [next(batches)["step"] for _ in range(6)] == [1, 2, 3, 4, 5, 6]
    batches.close()
    gone, alive = psutil.wait_procs(workers, timeout=30)
    assert len(gone) == 2 and not alive


def test_every_epoch_draws_another_crop_and_other_masks(sets, tokenizer) -> None:
    seen: dict[str, list[tuple[torch.Tensor, list[int]]]] = {}
    for batch in islice(loader(sets.config(), tokenizer), 30):
        for key, image, masked in zip(batch["keys"], batch["image"], batch["target_tokens"], strict=True):
            seen.setdefault(key, []).append((image, (masked >= 0).nonzero().flatten().tolist()))
    twice = [entries for entries in seen.values() if len(entries) > 1]
    assert len(twice) > 20 and not any(torch.equal(first[0], second[0]) for first, second, *_ in twice)
    reports = [entries for entries in twice if entries[0][1]]
    differ = sum(first[1] != second[1] for first, second, *_ in reports)
    assert len(reports) > 10 and differ > 0.3 * len(reports)  # a report with one entity masks the same one each time


def test_another_seed_gives_another_order_and_other_draws(sets, tokenizer) -> None:
    one, other = (list(islice(loader(sets.config(f"seed={seed}"), tokenizer), 8)) for seed in (0, 1))
    assert one[0]["keys"] != other[0]["keys"]
    noise = [{key: row for b in run for key, row in zip(b["keys"], b["noise"], strict=True)} for run in (one, other)]
    shared = noise[0].keys() & noise[1].keys()
    assert shared and not any(torch.equal(noise[0][key], noise[1][key]) for key in shared)


def test_what_a_batch_holds(sets, tokenizer) -> None:
    batch = next(loader(sets.config(), tokenizer))
    paired = batch["report_id"] >= 0
    assert (
        batch["image"].shape == (8, 1, 32, 32)
        and batch["attention"].shape == (8, 4, 4)
        and batch["noise"].shape == (8, 16)
    )
    assert paired.any() and (~paired).any() and batch["has_attention"].all()
    hidden = batch["target_tokens"] >= 0
    assert hidden[paired].any(1).all() and not hidden[~paired].any()
    assert (batch["masked_tokens"][hidden] == tokenizer.mask_token_id).all()
    assert torch.equal(batch["masked_tokens"][~hidden], batch["tokens"][~hidden])
    assert torch.equal(batch["target_tokens"][hidden], batch["tokens"][hidden])
    assert not (batch["evidence"] & ~batch["token_mask"]).any() and batch["evidence"][paired].any(1).all()
    stored = {key: json.loads(members["json"])["labels"] for url in (sets.paired, sets.unpaired) for key, members in iterate(url)}
    names = load_manifest(sets.paired).labels  # the unpaired set has the same ones
    assert batch["labels"].tolist() == [[stored[key][name] for name in names] for key in batch["keys"]]
    assert set(batch["labels"].unique().tolist()) == {0, 1}


def test_masked_tokens_are_entities(sets, tokenizer) -> None:
    """In the fixture the entities are five known words: nothing else may be masked where one of them occurs."""
    words = ("effusion", "heart", "lung", "consolidation", "pneumothorax")
    checked = 0
    for batch in islice(loader(sets.config(), tokenizer), 6):
        for tokens, targets in zip(batch["tokens"], batch["target_tokens"], strict=True):
            text = tokenizer.decode(tokens, skip_special_tokens=True)
            hidden = targets[targets >= 0]
            if len(hidden) and any(word in text for word in words):
                masked = tokenizer.decode(hidden).replace(" ", "")
                for word in words:
                    masked = masked.replace(word, "")
                assert masked.strip("s") == "", masked
                checked += 1
    assert checked > 10


def test_a_report_without_entity_sidecar_stops_the_run(sets, tokenizer) -> None:
    config = sets.config(f"data.sources=[{{url: {sets.paired}}}]")
    with pytest.raises(MissingSidecar, match="mmclip entities"):
        next(loader(config, tokenizer))
    batch = next(loader(sets.config(f"data.sources=[{{url: {sets.paired}}}]", "loss.entity=0"), tokenizer))
    assert (batch["target_tokens"] >= 0).any(1).all()  # words are masked, but the term is not computed
    assert torch.equal(batch["evidence"].sum(1), batch["token_mask"].sum(1) - 2)  # all tokens but [CLS] and [SEP]


def test_undecodable_images_are_replaced_and_listed(sets, tokenizer, tmp_path: Path, monkeypatch) -> None:
    config = sets.config()
    alone = list(islice(loader(config, tokenizer), 8))
    bad = alone[2]["keys"][3]
    call = ExampleMaker.__call__

    def broken(self, key, members, epoch):
        return call(self, key, members | {"png": b"broken", "jpg": b"broken"} if key == bad else members, epoch)

    monkeypatch.setattr(ExampleMaker, "__call__", broken)
    found = list(islice(loader(config, tokenizer), 8))
    assert [key for key, reason in found[2]["replaced"] if "not a usable JPEG, PNG or WebP" in reason] == [bad]
    assert found[2]["keys"][3] != bad
    changed = [i for i in range(8) if found[2]["keys"][i] != alone[2]["keys"][i]]
    assert changed == [3]
    again = list(islice(loader(config, tokenizer), 8))
    assert [batch["keys"] for batch in again] == [batch["keys"] for batch in found]  # the replacement is pure, too


@pytest.mark.parametrize("kind", ["entities", "attention"])
def test_stale_and_short_sidecars_are_refused(sets, tmp_path: Path, kind: str) -> None:
    made = load_manifest(sets.sidecar(kind))
    path = sorted(made.base)[0]
    stale = replace(made, base={**made.base, path: "0" * 64})
    short = replace(made, shards=(replace(made.shards[0], samples=made.shards[0].samples - 1), *made.shards[1:]))
    wrong = replace(made, kind="attention" if kind == "entities" else "entities")
    for name, manifest, message in (
        ("stale", stale, "made from other shards"),
        ("short", short, f"holds {made.samples - 1} of {made.samples} samples"),
        ("wrong", wrong, f"not {kind}"),
    ):
        save_manifest(str(tmp_path / name), manifest)
        with pytest.raises(ValueError, match=message) as caught:
            JoinedSet(Source(url=sets.paired, **{kind: str(tmp_path / name)}))
        assert f"mmclip {kind} {sets.paired}" in str(caught.value)


def test_a_sidecar_is_no_base_set(sets) -> None:
    with pytest.raises(ValueError, match="name the packed set itself"):
        JoinedSet(Source(url=sets.sidecar("entities")))


def test_labels_that_are_uncertain_or_not_mentioned_are_unknown(sets, tokenizer) -> None:
    maker = ExampleMaker(tokenizer, ("A", "B", "C", "D", "E"), 32, 4, 48, sets.config().entmlm, None)
    joined = JoinedSet(Source(url=sets.unpaired))
    members = joined.read(0, joined.key(0, 0))
    about = json.loads(members["json"]) | {"labels": {"A": 1, "B": 0, "C": -1, "D": None}}
    example = maker("key", members | {"json": json.dumps(about).encode()}, 0)
    assert example["labels"].tolist() == [1, 0, -1, -1, -1]


def test_an_image_that_exif_turns_is_trained_on_upright_as_packing_stores_it(sets, tokenizer) -> None:
    pixels, exif, file = np.zeros((32, 32), np.uint8), Image.Exif(), io.BytesIO()
    pixels[:, :16] = 255
    exif[0x0112] = 6  # the left half becomes the upper one
    Image.fromarray(pixels).save(file, "PNG", exif=exif)
    maker = ExampleMaker(tokenizer, (), 32, 4, 48, sets.config().entmlm, None)
    shown = [
        maker("key", {"png": data}, 0)["image"] for data in (file.getvalue(), prepare_image(file.getvalue(), 32).data)
    ]
    assert torch.equal(*shown)
    assert shown[0][0, :16].min() > shown[0][0, 16:].max()


# -- Remote sets ------------------------------------------------------------------------------------------------------


def copied(url: str, to: str) -> str:
    for name in storage.list_folder(url):
        if "." in name:
            storage.write_atomic(storage.join(to, name), storage.read_bytes(storage.join(url, name)))
    return to


@pytest.mark.parametrize(
    "overrides", [(), ("data.reading.cache={cache}", "data.shuffle_block=1000000"), ("data.workers=2",)]
)
def test_remote_sets_and_sidecars_give_the_same_batches(
    sets, tokenizer, tmp_path, monkeypatch, overrides: tuple[str, ...]
) -> None:  # fmt: skip
    """The base on one URL, the sidecars on others; a whole block ahead, a few steps ahead where memory is short, and in forked
    workers."""
    if overrides[:1] == ("data.reading.cache={cache}",):
        monkeypatch.setattr(reading, "MIB", 64)
    overrides = tuple(text.format(cache=tmp_path) for text in overrides)
    root = f"memory://{uuid.uuid4().hex}"
    source = {"url": copied(sets.paired, f"{root}/base")}
    source |= {kind: copied(sets.sidecar(kind), f"{root}/side/{kind}") for kind in ("entities", "attention")}
    local = sets.config(f"data.sources=[{{url: {sets.paired}, entities: {sets.sidecar('entities')}, "
                        f"attention: {sets.sidecar('attention')}}}]", *overrides)  # fmt: skip
    remote = sets.config(f"data.sources={json.dumps([source])}", *overrides)
    joined = open_sets(remote.data.sources, remote.data, 1)
    assert (joined[0].ahead == 0) == ("data.shuffle_block=1000000" in overrides)
    for ours, theirs in zip(islice(loader(remote, tokenizer), 6), islice(loader(local, tokenizer), 6), strict=True):
        assert_equal(ours, theirs)
        assert ours["reading"].samples == 8
    tallies = [batch["reading"] for batch in islice(loader(remote, tokenizer), 6)]
    assert sum(tally.requests + tally.cache_hits for tally in tallies) > 0
