"""Offline stages on Ray: sidecars in the order of the base, made once, never mixed, resumed after a crash."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import ray
import torch
from mmclip_shards.manifest import Manifest, load_manifest, save_manifest
from mmclip_shards.reader import ShardReader, iterate
from mmclip_shards.rewrite import reshard, select
from mmclip_shards.schema import decode_npy, encode_npy
from mmclip_shards.writer import write_shard

from mmclip_dist.checkpoint.folder import Meta
from mmclip_dist.checkpoint.model_files import load_model, write_model
from mmclip_dist.config import Source
from mmclip_dist.data.batch import collate
from mmclip_dist.data.example import ExampleMaker
from mmclip_dist.data.join import JoinedSet
from mmclip_dist.model.build import build_model
from mmclip_dist.offline.attention import attention_stage
from mmclip_dist.offline.entities import entities_stage
from mmclip_dist.offline.stage import (
    JOURNAL,
    QUARANTINE,
    Stage,
    _fitting,
    _joined,
    _memory_of,
    _workers,
    connect,
    progress_line,
    run_stage,
)
from tests.conftest import wait_for, write_sidecar
from tests.offline.failing_maker import build_failing, build_large

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster():
    connect(None)
    yield
    ray.shutdown()


class Made(NamedTuple):
    """A finished sidecar folder, and what the stage reported on the way."""

    out: Path
    manifest: Manifest
    seen: list[tuple[int, int]]


def run(stage: Stage, workers: int = 2):
    seen: list[tuple[int, int]] = []
    return run_stage(stage, workers=workers, report=lambda done, total: seen.append((done, total))), seen


@pytest.fixture(scope="module")
def made(sets, cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """The entities of the paired set. Tests that change the folder take a copy."""
    out = tmp_path_factory.mktemp("made") / "entities"
    return Made(out, *run(entities_stage(sets.paired, str(out))))


def test_entities_of_every_report(sets, made: Made) -> None:
    out, manifest, seen = str(made.out), made.manifest, made.seen
    base = load_manifest(sets.paired)
    assert seen[0] == (0, len(base.shards)) and seen[-1] == (len(base.shards), len(base.shards))
    assert manifest == load_manifest(out) and not (made.out / JOURNAL).exists()
    JoinedSet(Source(url=sets.paired, entities=out))
    found = 0
    for (base_key, sample), (key, row) in zip(iterate(sets.paired), iterate(out), strict=True):
        assert base_key == key
        report = json.loads(sample["json"])["report"]["text"]
        for entity in json.loads(row["entities.json"]):
            assert report[entity["start"] : entity["end"]] == entity["text"] and isinstance(entity["negated"], bool)
            found += 1
    assert found > 3 * base.samples


def test_again_is_skipped_and_after_a_crash_only_the_rest_is_made(sets, made: Made, tmp_path: Path) -> None:
    out = tmp_path / "entities"
    shutil.copytree(made.out, out)
    stage = entities_stage(sets.paired, str(out))
    whole = {path.name: path.read_bytes() for path in out.iterdir()}
    times = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    run(stage)
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == times

    rows = json.loads(whole["manifest.json"])
    shards = {
        str(n): {k: shard[k] for k in ("path", "samples", "bytes", "sha256", "index", "index_sha256")}
        for n, shard in enumerate(rows["shards"])
    }
    (out / "manifest.json").unlink()
    (out / "000001.tar").unlink()
    del shards["1"]
    (out / JOURNAL).write_text(json.dumps({"config_hash": stage.config_hash, "base": rows["base"], "shards": shards}))
    _, seen = run(stage)
    assert seen[0] == (len(shards), len(shards) + 1)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == whole  # and the bytes are the same
    assert (out / "000000.tar").stat().st_mtime_ns == times["000000.tar"]


def test_another_configuration_is_refused(sets, made: Made, tmp_path: Path) -> None:
    out = str(made.out)
    stage = entities_stage(sets.paired, out)
    with pytest.raises(ValueError, match=r"another configuration.*--out"):
        run(Stage(stage.kind, stage.base, out, "0" * 64, stage.build))
    with pytest.raises(ValueError, match="name the packed set itself"):
        run(entities_stage(out, str(tmp_path / "again")))


def failing(sets, out: Path, fault: str) -> Stage:
    return Stage("entities", sets.paired, str(out), "0" * 64, partial(build_failing, fault, f"{out}.count"))


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("fault", "kind", "told"),
    [
        ("bug", OSError, r"shard 00000\d\.tar: failed 3 times: RuntimeError: the model is gone"),
        ("dies", OSError, r"shard 00000\d\.tar: failed 3 times: its worker died"),
        ("damaged", OSError, r"0 of 4 shards are made.* shard 00000\d\.tar: key k-7, offset 512: damaged"),
        ("no start", ValueError, "a worker cannot start: no such model here"),
    ],
)
def test_what_fails_again_and_again_is_named_in_one_line(
    sets, cluster: None, tmp_path: Path, fault: str, kind: type[Exception], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mmclip_dist.offline.stage._LOST_AT_MOST", 0)
    with pytest.raises(kind, match=told) as caught:
        run(failing(sets, tmp_path / "out", fault), workers=1)
    assert "\n" not in str(caught.value) and "Traceback" not in str(caught.value)
    assert str(caught.value).count("shard 0") == (fault != "no start")  # it ended before the second
    assert not (tmp_path / "out" / "manifest.json").exists()
    # Its workers are gone while the error is still at hand: they would keep their CPUs from the next stage.
    wait_for(lambda: ray.available_resources().get("CPU") == ray.cluster_resources()["CPU"], 30)


def test_a_shard_that_fails_for_good_costs_no_other(sets, cluster: None, tmp_path: Path) -> None:
    """The others are made and kept; the same command makes the one that is missing."""
    stage, made = failing(sets, tmp_path / "out", "first damaged"), []
    total = len(load_manifest(sets.paired).shards)
    with pytest.raises(OSError, match=rf"{total - 1} of {total} shards are made; the same command makes .* damaged") as caught:
        run_stage(stage, workers=1, report=lambda done, total: made.append(done))
    assert caught.type is OSError and made[-1] == total - 1
    assert not (tmp_path / "out" / "manifest.json").exists()
    manifest, seen = run(stage, workers=1)
    assert seen[0] == (total - 1, total) and len(manifest.shards) == total
    JoinedSet(Source(url=sets.paired, entities=str(tmp_path / "out")))


@pytest.mark.timeout(120)
@pytest.mark.parametrize("fault", ["once", "dies twice at each of two shards"])
def test_a_stage_goes_on_as_long_as_there_is_progress(sets, cluster: None, tmp_path: Path, fault: str) -> None:
    """Four deaths are too many for one shard, but not for two."""
    manifest, seen = run(failing(sets, tmp_path / "out", fault), workers=1)
    assert manifest.samples == load_manifest(sets.paired).samples and seen[-1][0] == seen[-1][1] == len(manifest.shards) >= 2
    JoinedSet(Source(url=sets.paired, entities=str(tmp_path / "out")))


@pytest.mark.timeout(60)
def test_a_worker_for_which_there_is_no_room_holds_up_no_shard(sets, cluster: None, tmp_path: Path) -> None:
    workers = int(ray.cluster_resources()["CPU"]) + 1
    assert workers <= len(load_manifest(sets.paired).shards), "each worker would have a shard"
    manifest, _ = run(failing(sets, tmp_path / "out", "none"), workers=workers)
    assert manifest.samples == load_manifest(sets.paired).samples


def with_bad_documents(url: str, to: Path, bad: int) -> str:
    """The set again, with some samples whose JSON is cut."""
    found = load_manifest(url)
    shards = []
    for number, _ in enumerate(found.shards):
        samples = list(ShardReader(url, found).samples(number))
        if number == 0:
            samples[:bad] = [(key, members | {"json": b'{"report": '}) for key, members in samples[:bad]]
        shards.append(write_shard(to, number, samples))
    save_manifest(to, replace(found, shards=tuple(shards)))
    return str(to)


def test_an_unreadable_report_gets_an_empty_row_and_is_listed(
    sets, cluster: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, out = with_bad_documents(sets.paired, tmp_path / "base", 2), tmp_path / "entities"
    manifest, _ = run(entities_stage(base, str(out)))
    listed = [json.loads(line) for line in (out / QUARANTINE).read_text().splitlines()]
    keys = [key for key, _ in iterate(base)][:2]
    assert [row["key"] for row in listed] == keys and all("JSON" in row["reason"] for row in listed)
    assert f"2 of {manifest.samples} samples cannot be read and have empty rows: {out}/{QUARANTINE}" in capsys.readouterr().out
    rows = dict(iterate(str(out)))
    assert list(rows) == [key for key, _ in iterate(base)]
    assert all(rows[key] == {"entities.json": b"[]"} for key in keys)
    JoinedSet(Source(url=base, entities=str(out)))


def test_too_many_unreadable_reports_end_the_stage(sets, cluster: None, tmp_path: Path) -> None:
    base = with_bad_documents(sets.paired, tmp_path / "base", 3)
    with pytest.raises(ValueError, match=r"3 samples of .*/base cannot be read, more than 2 may be: \S+ \(.*JSON"):
        run(entities_stage(base, str(tmp_path / "out")), workers=1)
    with pytest.raises(ValueError, match="more than 2 may be"):  # nor does a second run publish what the first one refused
        run(entities_stage(base, str(tmp_path / "out")), workers=1)
    assert not (tmp_path / "out" / "manifest.json").exists()
    with pytest.raises(ValueError, match="more than 0 may be"):
        run_stage(entities_stage(base, str(tmp_path / "no")), workers=1, report=lambda *_: None, max_bad_fraction=0)


@pytest.fixture(scope="module")
def checkpoint(sets, tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config, diseases = sets.config(), load_manifest(sets.paired).labels
    folder = tmp_path_factory.mktemp("checkpoint") / "step"
    folder.mkdir()
    write_model(folder, build_model(config, tokenizer, diseases), tokenizer, config, Meta(1, 1, 1, diseases, ()))
    return folder


def test_attention_scores_are_the_models(sets, checkpoint: Path, cluster: None, tmp_path: Path) -> None:
    model, tokenizer, config, meta = load_model(checkpoint)
    maker = ExampleMaker(
        tokenizer, meta.diseases, config.model.image.size, config.model.image.grid, config.model.text.max_tokens,
        config.entmlm, augment=None,
    )  # fmt: skip
    for base, entities in ((sets.paired, sets.sidecar("entities")), (sets.unpaired, None)):
        out = str(tmp_path / ("paired" if entities else "unpaired"))
        manifest, _ = run(attention_stage(base, out, str(checkpoint), entities), workers=1)
        JoinedSet(Source(url=base, attention=out))
        assert manifest.checkpoint is not None
        grids = [decode_npy(row["attention.npy"]) for _, row in iterate(out)]
        assert all(grid.dtype == np.float16 and grid.shape == (4, 4) for grid in grids)
        assert all(np.isfinite(grid).all() and grid.sum() > 0.9 for grid in grids)  # one softmax a word at least
        assert len({grid.tobytes() for grid in grids}) > 0.9 * len(grids)
        joined = JoinedSet(Source(url=base, entities=entities))
        key = joined.key(0, 2)
        with torch.no_grad():
            batch = collate([maker(key, joined.read(0, key), epoch=0)], 0, tokenizer.pad_token_id)
            expected = model.attention_grid(batch)[0].numpy()
        np.testing.assert_allclose(grids[2].astype(np.float32), expected, rtol=2e-3, atol=1e-4)


def spans_of(word: str) -> Callable[[dict[str, bytes]], dict[str, bytes]]:
    """Entities of every report: where it has this word."""

    def make(members: dict[str, bytes]) -> dict[str, bytes]:
        report = json.loads(members["json"])["report"]["text"]
        start = report.lower().find(word)
        span = {"start": start, "end": start + len(word), "text": report[start : start + len(word)]}
        return {"entities.json": json.dumps([span | {"label": "FINDING", "negated": False}] if start >= 0 else []).encode()}

    return make


def test_the_identity_of_scores_holds_every_input(sets, checkpoint: Path, tmp_path: Path) -> None:
    """Weights, model configuration, diseases, prompts and tokenizer; which entities, not only whether. Moving changes nothing."""
    heart, lung = str(tmp_path / "heart"), str(tmp_path / "lung")
    write_sidecar(sets.paired, heart, "entities", spans_of("heart"))
    write_sidecar(sets.paired, lung, "entities", spans_of("lung"))

    def identity(folder: Path = checkpoint, entities: str | None = heart) -> str:
        stage = attention_stage(sets.paired, "unused", str(folder), entities)
        return f"{stage.config_hash} {stage.guide}"

    moved = tmp_path / "moved"
    shutil.copytree(checkpoint, moved)
    assert identity(moved) == identity()
    assert len({identity(), identity(entities=lung), identity(entities=None)}) == 3

    def edited(name: str, old: str, new: str) -> str:
        """The identity after a change of one file."""
        folder = tmp_path / name.replace("/", "-")
        shutil.copytree(checkpoint, folder)
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new, 1))
        return identity(folder)

    weights = tmp_path / "weights"
    shutil.copytree(checkpoint, weights)
    data = bytearray((weights / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (weights / "model.safetensors").write_bytes(data)
    others = [
        identity(weights),
        edited("prompts.yaml", "There is", "One sees"),
        edited("meta.json", "Cardiomegaly", "Large heart"),
        edited("config.yaml", "score_temperature: 0.1", "score_temperature: 0.2"),
        edited("tokenizer/tokenizer.json", "##", "#@"),
        edited("image/config.json", '"num_attention_heads": 2', '"num_attention_heads": 4'),
    ]
    assert len({identity(), *others}) == 1 + len(others)


def test_scores_that_were_copied_with_their_entities_are_found_made(sets, checkpoint: Path, tmp_path: Path) -> None:
    """After `mmclip reshard` and `filter` the stage has nothing to do; with entities of its own it refuses the copy."""

    def stage_of(base: str, entities: str | None = None) -> Stage:
        return attention_stage(base, f"{base}/attention", str(checkpoint), entities or f"{base}/entities")

    first = str(tmp_path / "set" / "train")
    shutil.copytree(sets.paired, first)
    write_sidecar(first, f"{first}/entities", "entities", spans_of("heart"))
    stage = stage_of(first)
    write_sidecar(first, stage.out, "attention", lambda _: {"attention.npy": encode_npy(np.ones((4, 4), np.float16))})
    made = replace(
        load_manifest(stage.out), config_hash=stage.config_hash, guide=stage.guide, checkpoint=stage.checkpoint
    )
    save_manifest(stage.out, made)
    reshard(tmp_path / "set", tmp_path / "new", samples_per_shard=5)
    select(tmp_path / "set", tmp_path / "some", "len(report) > 0")
    for base in (first, str(tmp_path / "new" / "train"), str(tmp_path / "some" / "train")):
        found = run_stage(stage_of(base), workers=1, report=print)
        assert found == load_manifest(f"{base}/attention")
    write_sidecar(base, str(tmp_path / "lung"), "entities", spans_of("lung"))
    for others in (str(tmp_path / "lung"), f"{first}/entities"):  # of other content; of other shards
        with pytest.raises(ValueError, match=r"set or entities|other shards"):
            run_stage(stage_of(base, others), workers=1, report=print)


def test_an_interrupted_stage_with_other_entities_mixes_no_scores(sets, cluster: None, checkpoint: Path, tmp_path: Path) -> None:
    """The first run, with one set of entities, died after its first shard; the second has others."""
    heart, lung, out = (str(tmp_path / name) for name in ("heart", "lung", "out"))
    write_sidecar(sets.paired, heart, "entities", spans_of("heart"))
    write_sidecar(sets.paired, lung, "entities", spans_of("lung"))
    first = attention_stage(sets.paired, out, str(checkpoint), heart)
    manifest, _ = run(first, workers=1)
    rows = {"0": asdict(manifest.shards[0])}
    (tmp_path / "out" / "manifest.json").unlink()
    (tmp_path / "out" / JOURNAL).write_text(
        json.dumps({"config_hash": first.config_hash, "base": manifest.base, "shards": rows})
    )
    second = attention_stage(sets.paired, out, str(checkpoint), lung)
    with pytest.raises(ValueError, match=rf"{out} holds 1 shards of an interrupted stage of another .*delete {JOURNAL}"):
        run(second, workers=1)
    (tmp_path / "out" / JOURNAL).unlink()
    found, seen = run(second, workers=1)
    assert seen[0] == (0, len(manifest.shards))  # nothing of the first run counts
    assert found.shards[0].sha256 != manifest.shards[0].sha256
    joined = JoinedSet(Source(url=sets.paired, entities=lung))
    samples = [(joined.key(0, row), joined.read(0, joined.key(0, row))) for row in range(joined.counts[0])]
    assert list(ShardReader(out, found).samples(0)) == list(second.build()(samples))


def test_precision_and_batch_belong_to_the_configuration_and_workers_do_not(
    sets, cluster: None, checkpoint: Path, tmp_path: Path
) -> None:
    """In bf16, too, every worker makes the same bytes of a shard; a stage does not go on with another precision or batch."""
    out = str(tmp_path / "out")
    stage = attention_stage(sets.paired, out, str(checkpoint), precision="bf16", batch=7, cpus=2)
    manifest, _ = run(stage, workers=1)
    base, alone = load_manifest(sets.paired), stage.build()
    for number, shard in reversed(list(enumerate(manifest.shards))):  # in another order than the worker had them
        rows = alone(ShardReader(sets.paired, base).samples(number))
        assert write_shard(str(tmp_path / "alone"), number, rows) == shard
    others = [{"precision": "fp32", "batch": 7}, {"precision": "bf16"}, {"precision": "bf16", "batch": 8}]
    for options in others:
        with pytest.raises(ValueError, match="holds attention of another configuration, checkpoint, precision, set or entities"):
            run(attention_stage(sets.paired, out, str(checkpoint), **options))
    (tmp_path / "out" / "manifest.json").unlink()
    (tmp_path / "out" / JOURNAL).write_text(
        json.dumps({"config_hash": stage.config_hash, "base": manifest.base, "shards": {"0": asdict(manifest.shards[0])}})
    )
    for options in others:
        with pytest.raises(ValueError, match="1 shards of an interrupted stage of another configuration, checkpoint, precision"):
            run(attention_stage(sets.paired, out, str(checkpoint), **options))
    assert attention_stage(sets.paired, out, str(checkpoint)).config_hash == (
        attention_stage(sets.paired, out, str(checkpoint), precision="fp32", batch=64, cpus=3).config_hash
    )
    trained = load_model(checkpoint)[2].precision
    on_a_card = attention_stage(sets.paired, out, str(checkpoint), gpus=1).config_hash
    assert on_a_card == attention_stage(sets.paired, out, str(checkpoint), precision=trained).config_hash


@pytest.mark.timeout(60)
def test_a_sidecar_that_does_not_fit_the_base_is_refused(sets, checkpoint: Path, tmp_path: Path) -> None:
    """Before any worker starts: attention given as entities, and entities of another set."""
    out = str(tmp_path / "out")
    with pytest.raises(ValueError, match=r"holds attention, not entities; rebuild it with `mmclip entities"):
        run(attention_stage(sets.paired, out, str(checkpoint), sets.sidecar("attention")))
    with pytest.raises(ValueError, match="was made from other shards"):
        run(attention_stage(sets.unpaired, out, str(checkpoint), sets.sidecar("entities")))
    assert not Path(out).exists()


@pytest.mark.parametrize("content", [b'{"config_hash": "00', b"\xff\xfe{}", b'["no journal"]'])
def test_a_spoiled_journal_is_named_with_its_mend(sets, tmp_path: Path, content: bytes) -> None:
    out = tmp_path / "entities"
    out.mkdir()
    (out / JOURNAL).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{out}/{JOURNAL} .*delete it, and every shard is made again"):
        run(entities_stage(sets.paired, str(out)))


def test_rows_of_different_keys_are_never_joined() -> None:
    assert _joined((("a", {"json": b"1"}), ("a", {"entities.json": b"2"}))) == ("a", {"json": b"1", "entities.json": b"2"})
    with pytest.raises(ValueError, match="the sidecar has b where the set has a: rebuild it"):
        _joined((("a", {"json": b"1"}), ("b", {"entities.json": b"2"})))


def test_undecodable_images_get_no_scores_and_stop_nothing(sets, checkpoint: Path) -> None:
    make = attention_stage(sets.paired, "unused", str(checkpoint)).build()
    reader = ShardReader(sets.paired, load_manifest(sets.paired))
    samples = [(key, reader.read(0, key)) for key in reader.keys(0)[:3]]
    samples[1] = (samples[1][0], samples[1][1] | {"png": b"broken"})
    grids = [decode_npy(row["attention.npy"]) for _, row in make(iter(samples))]
    assert grids[1].max() == 0 and grids[0].max() > 0 and grids[2].max() > 0


def test_progress_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    report = progress_line("shards", as_json=True)
    report(1, 4)
    report(3, 4)
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert first == {"unit": "shards", "done": 1, "total": 4, "per_s": 0.0, "left_s": None}
    assert (second["done"], second["total"]) == (3, 4) and second["per_s"] > 0 and second["left_s"] >= 0


# --- memory -----------------------------------------------------------------------------------------------------


def test_a_worker_asks_for_the_memory_that_its_models_take(sets, cluster, tmp_path, monkeypatch, capsys) -> None:
    stage = Stage("entities", sets.paired, str(tmp_path), "large", partial(build_large, 400_000_000), measured=True)
    need = _memory_of(stage)
    assert 1.25 * 400e6 <= need < 1.25 * 400e6 + 500e6
    asked: list[int] = []

    def workers(stage: Stage, memory: int):
        asked.append(memory)
        return _workers(stage, memory)

    monkeypatch.setattr("mmclip_dist.offline.stage._workers", workers)
    monkeypatch.setattr("mmclip_dist.offline.stage._nodes_memory", lambda: [need // 2, need + need // 2])
    run(stage)
    assert "1 of 2 workers run: each takes" in capsys.readouterr().out
    assert need * 0.9 < asked[0] < need * 1.1
    with pytest.raises(ValueError, match="a worker cannot start: no such model here"):
        _memory_of(replace(stage, build=partial(build_failing, "no start", "")))


def test_workers_fit_the_nodes() -> None:
    assert _fitting(4, [3, 8, 13]) == 5
    with pytest.raises(ValueError, match=r"a worker takes 4.0 GiB and the largest node lends 3.0 GiB: choose a smaller model"):
        _fitting(4 << 30, [3 << 30, 2 << 30])
