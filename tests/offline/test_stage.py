"""Offline stages on Ray: sidecars in the order of the base, made once, never mixed, resumed after a crash."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import ray
from mmclip_shards.manifest import load_manifest
from mmclip_shards.reader import ShardReader, iterate
from mmclip_shards.schema import decode_npy

from mmclip_dist.checkpoint.folder import Meta
from mmclip_dist.checkpoint.model_files import write_model
from mmclip_dist.config import Source
from mmclip_dist.data.join import JoinedSet
from mmclip_dist.model.build import build_model
from mmclip_dist.offline.attention import attention_stage
from mmclip_dist.offline.entities import entities_stage
from mmclip_dist.offline.stage import JOURNAL, Stage, connect, run_stage


@pytest.fixture(scope="module")
def cluster():
    connect(None)
    yield
    ray.shutdown()


def run(stage: Stage, workers: int = 2):
    seen: list[tuple[int, int]] = []
    return run_stage(stage, workers=workers, report=lambda done, total: seen.append((done, total))), seen


def test_entities_of_every_report(sets, cluster: None, tmp_path: Path) -> None:
    out = str(tmp_path / "entities")
    manifest, seen = run(entities_stage(sets.paired, out))
    base = load_manifest(sets.paired)
    assert seen[0] == (0, len(base.shards)) and seen[-1] == (len(base.shards), len(base.shards))
    assert manifest == load_manifest(out) and not (tmp_path / "entities" / JOURNAL).exists()
    JoinedSet(Source(url=sets.paired, entities=out))
    found = 0
    for (base_key, sample), (key, row) in zip(iterate(sets.paired), iterate(out), strict=True):
        assert base_key == key
        report = json.loads(sample["json"])["report"]["text"]
        for entity in json.loads(row["entities.json"]):
            assert report[entity["start"] : entity["end"]] == entity["text"] and isinstance(entity["negated"], bool)
            found += 1
    assert found > 3 * base.samples


def test_again_is_skipped_and_after_a_crash_only_the_rest_is_made(sets, cluster: None, tmp_path: Path) -> None:
    out = tmp_path / "entities"
    stage = entities_stage(sets.paired, str(out))
    run(stage)
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


def test_another_configuration_is_refused(sets, cluster: None, tmp_path: Path) -> None:
    out = str(tmp_path / "entities")
    stage = entities_stage(sets.paired, out)
    run(stage)
    with pytest.raises(ValueError, match=r"another configuration.*--out"):
        run(Stage(stage.kind, stage.base, out, "0" * 64, stage.build))
    with pytest.raises(ValueError, match="name the packed set itself"):
        run(entities_stage(out, str(tmp_path / "again")))


def test_a_worker_that_keeps_dying_stops_the_stage_and_leaves_no_manifest(sets, cluster: None, tmp_path: Path) -> None:
    def build():
        def die(samples):
            raise RuntimeError("the model is gone")

        return die

    stage = Stage("entities", sets.paired, str(tmp_path / "out"), "0" * 64, build)
    with pytest.raises(ray.exceptions.RayTaskError, match="the model is gone"):
        run(stage)
    assert not (tmp_path / "out" / "manifest.json").exists() and not list(tmp_path.glob("out/*.tar"))


def test_attention_scores_are_the_models(sets, tokenizer, cluster: None, tmp_path: Path) -> None:
    config = sets.config()
    diseases = load_manifest(sets.paired).labels
    checkpoint = tmp_path / "step"
    checkpoint.mkdir()
    write_model(checkpoint, build_model(config, tokenizer, diseases), tokenizer, config, Meta(1, 1, 1, diseases, ()))
    for base, entities in ((sets.paired, sets.sidecar("entities")), (sets.unpaired, None)):
        out = str(tmp_path / ("paired" if entities else "unpaired"))
        manifest, _ = run(attention_stage(base, out, str(checkpoint), entities), workers=1)
        JoinedSet(Source(url=base, attention=out))
        assert manifest.checkpoint is not None
        grids = [decode_npy(row["attention.npy"]) for _, row in iterate(out)]
        assert all(grid.dtype == np.float16 and grid.shape == (4, 4) for grid in grids)
        assert all(np.isfinite(grid).all() and grid.sum() > 0.9 for grid in grids)  # one softmax a word at least
        assert len({grid.tobytes() for grid in grids}) > 0.9 * len(grids)
    assert attention_stage(sets.paired, "x", str(checkpoint)).config_hash != manifest.config_hash or entities is None


def test_undecodable_images_get_no_scores_and_stop_nothing(sets, tokenizer, tmp_path: Path) -> None:
    config, diseases = sets.config(), load_manifest(sets.paired).labels
    checkpoint = tmp_path / "step"
    checkpoint.mkdir()
    write_model(checkpoint, build_model(config, tokenizer, diseases), tokenizer, config, Meta(1, 1, 1, diseases, ()))
    make = attention_stage(sets.paired, "unused", str(checkpoint)).build()
    reader = ShardReader(sets.paired, load_manifest(sets.paired))
    samples = [(key, reader.read(0, key)) for key in reader.keys(0)[:3]]
    samples[1] = (samples[1][0], samples[1][1] | {"png": b"broken"})
    grids = [decode_npy(row["attention.npy"]) for _, row in make(samples)]
    assert grids[1].max() == 0 and grids[0].max() > 0 and grids[2].max() > 0
