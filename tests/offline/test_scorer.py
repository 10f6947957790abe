"""The worker of the `attention` stage, without Ray: each sample gets its own grid, an undecodable one zeros."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from mmclip_shards.manifest import load_manifest
from mmclip_shards.reader import iterate
from mmclip_shards.schema import decode_npy

from mmclip_dist.checkpoint.folder import Meta
from mmclip_dist.checkpoint.model_files import load_model, write_model
from mmclip_dist.config import Source
from mmclip_dist.data.batch import collate
from mmclip_dist.data.example import ExampleMaker
from mmclip_dist.data.join import JoinedSet
from mmclip_dist.model.build import build_model
from mmclip_dist.offline.scorer import Scorer


@pytest.fixture(scope="module")
def checkpoint(sets, tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its classes are in another order than the set's."""
    folder = tmp_path_factory.mktemp("checkpoint")
    diseases = load_manifest(sets.paired).labels[::-1]
    config = sets.config()
    write_model(folder, build_model(config, tokenizer, diseases), tokenizer, config, Meta(1, 1, 1, diseases, ()))
    return folder


def joined_samples(sets, kind: str) -> list[tuple[str, dict[str, bytes]]]:
    source = Source(url=sets.paired, entities=sets.sidecar("entities")) if kind == "paired" else Source(url=sets.unpaired)
    joined = JoinedSet(source)
    keys = [joined.key(0, row) for row in range(6)]
    return [(key, joined.read(0, key)) for key in keys]


@pytest.mark.parametrize("kind", ["paired", "unpaired"])
def test_every_sample_gets_the_grid_that_the_model_gives_it_alone(sets, checkpoint: Path, kind: str) -> None:
    samples = joined_samples(sets, kind)
    rows = list(Scorer(str(checkpoint))(samples))
    assert [key for key, _ in rows] == [key for key, _ in samples]
    model, tokenizer, config, meta = load_model(checkpoint)
    maker = ExampleMaker(tokenizer, meta.diseases, 32, 4, 48, config.entmlm, augment=None)
    grids = [decode_npy(row["attention.npy"]) for _, row in rows]
    for (key, members), grid in zip(samples, grids, strict=True):
        with torch.no_grad():
            alone = model.attention_grid(collate([maker(key, members, 0)], 0, tokenizer.pad_token_id))[0]
        assert grid.dtype == np.float16 and grid.shape == (4, 4)
        np.testing.assert_allclose(grid, alone.numpy(), rtol=2e-3, atol=1e-4)
    assert len({grid.tobytes() for grid in grids}) == len(grids)  # so that a swap is seen


def test_an_undecodable_image_gets_zeros_and_its_neighbours_their_own(sets, checkpoint: Path) -> None:
    samples = joined_samples(sets, "paired")
    score = Scorer(str(checkpoint))
    whole = [row["attention.npy"] for _, row in score(samples)]
    broken = [(key, members | {"png": b"no image"}) if number == 2 else (key, members)
              for number, (key, members) in enumerate(samples)]  # fmt: skip
    found = [row["attention.npy"] for _, row in score(broken)]
    assert not decode_npy(found[2]).any() and decode_npy(found[2]).shape == (4, 4)
    for number in (0, 1, 3, 4, 5):
        np.testing.assert_allclose(decode_npy(found[number]), decode_npy(whole[number]), rtol=2e-3, atol=1e-4)
    only = list(score([broken[2]]))
    assert [key for key, _ in only] == [samples[2][0]] and not decode_npy(only[0][1]["attention.npy"]).any()


def test_rows_come_in_the_order_of_the_samples(sets, checkpoint: Path) -> None:
    samples = [(key, members) for key, members in iterate(sets.unpaired)][:5]
    score = Scorer(str(checkpoint))
    forwards, backwards = dict(score(samples)), dict(score(samples[::-1]))
    assert list(forwards) == [key for key, _ in samples] == list(backwards)[::-1]
    for key, _ in samples:
        np.testing.assert_allclose(
            decode_npy(forwards[key]["attention.npy"]), decode_npy(backwards[key]["attention.npy"]), rtol=2e-3, atol=1e-4
        )


def test_bf16_is_near_fp32_and_both_depend_on_the_batch_alone(sets, checkpoint: Path) -> None:
    """Not on the threads, nor on what was scored before; so any worker makes the same shard. The size of the batch may matter."""
    samples, grids = joined_samples(sets, "paired"), {}
    for precision in ("fp32", "bf16"):
        first = Scorer(str(checkpoint), precision, batch=4)
        rows = list(first(samples))
        assert list(Scorer(str(checkpoint), precision, batch=4, threads=3)(iter(samples))) == rows
        list(first(samples[3:]))
        assert list(first(samples)) == rows
        assert list(first(samples[:4])) == rows[:4] and list(first(samples[4:])) == rows[4:]
        grids[precision] = np.stack([decode_npy(row["attention.npy"]) for _, row in rows]).astype(np.float32)
        others = np.stack([decode_npy(row["attention.npy"]) for _, row in Scorer(str(checkpoint), precision, batch=1)(samples)])
        np.testing.assert_allclose(others, grids[precision], rtol=2e-3 if precision == "fp32" else 0.1, atol=1e-4)
    assert (grids["bf16"] != grids["fp32"]).any()  # it was rounded
    np.testing.assert_allclose(grids["bf16"], grids["fp32"], rtol=0.1)


def test_rows_come_as_batches_are_done_and_reading_is_little_ahead(sets, checkpoint: Path) -> None:
    samples, read = joined_samples(sets, "paired"), []

    def reading():
        for sample in samples:
            read.append(sample[0])
            yield sample

    rows = Scorer(str(checkpoint), batch=1)(reading())
    assert next(iter(rows))[0] == samples[0][0] and len(read) < len(samples)
