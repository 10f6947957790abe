"""The data of a run: what the config says reaches the sets, their order and the examples."""

from __future__ import annotations

from itertools import islice

import pytest
import torch
from mmclip_shards.manifest import load_manifest

from mmclip_dist.data.example import MissingSidecar
from mmclip_dist.data.training import open_training_data
from tests.batches import loader


@pytest.mark.parametrize("seed", [0, 3])
def test_batches_follow_from_the_config(sets, tokenizer, seed: int) -> None:
    """Also those of the second of two ranks, from a later step on."""
    config = sets.config(f"seed={seed}")
    expected = islice(loader(config, tokenizer, rank=1, world=2, start=5), 4)
    with open_training_data(config, tokenizer, 2) as data:
        for ours, theirs in zip(islice(data.batches(1, 2, 5), 4), expected, strict=True):
            assert ours["keys"] == theirs["keys"] and ours["step"] == theirs["step"]
            assert torch.equal(ours["image"], theirs["image"]) and torch.equal(ours["masked_tokens"], theirs["masked_tokens"])


def test_every_shard_of_every_source_counts_as_trained_on(sets, tokenizer) -> None:
    with open_training_data(sets.config(), tokenizer, 1) as data:
        manifests = [load_manifest(url) for url in (sets.paired, sets.unpaired)]
        assert set(data.trained_on) == {shard.sha256 for manifest in manifests for shard in manifest.shards}
        assert len(data.trained_on) == sum(len(manifest.shards) for manifest in manifests)
        for url, manifest in zip((sets.paired, sets.unpaired), manifests, strict=True):
            assert f"{url}: {manifest.samples} samples, {manifest.samples % 4} of them left out" in str(data)


def test_diseases_are_those_of_the_config_or_of_the_sets(sets, tokenizer) -> None:
    with open_training_data(sets.config(), tokenizer, 1) as data:
        assert data.diseases == load_manifest(sets.paired).labels
    named = data.diseases[:1:-1]
    with open_training_data(sets.config(f"prompts.diseases=[{', '.join(named)}]"), tokenizer, 1) as data:
        batch = next(data.batches(0, 1, 0))
        assert data.diseases == named and batch["labels"].shape == (8, len(named))


def test_the_entity_term_needs_entity_sidecars(sets, tokenizer) -> None:
    bare = f"data.sources=[{{url: {sets.paired}}}]"
    with open_training_data(sets.config(bare), tokenizer, 1) as data, pytest.raises(MissingSidecar, match="mmclip entities"):
        next(data.batches(0, 1, 0))
    with open_training_data(sets.config(bare, "loss.entity=0"), tokenizer, 1) as data:
        assert len(next(data.batches(0, 1, 0))["keys"]) == 8
