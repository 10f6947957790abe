"""A set and its sidecars, sample by sample."""

from __future__ import annotations

import json

import numpy as np
from mmclip_shards.manifest import load_manifest
from mmclip_shards.reader import iterate
from mmclip_shards.schema import decode_npy, encode_npy

from mmclip_dist.config import Source
from mmclip_dist.data.join import JoinedSet
from tests.conftest import write_sidecar


def test_every_sample_gets_its_own_sidecars(sets, tmp_path) -> None:
    """Each grid holds a number made from its sample's JSON, so that a neighbour's grid is noticed."""

    def number(members: dict[str, bytes]) -> float:
        return float(sum(members["json"]) % 1999)

    out = str(tmp_path / "attention")
    write_sidecar(sets.paired, out, "attention", lambda m: {"attention.npy": encode_npy(np.full((2, 2), number(m), np.float16))})
    joined = JoinedSet(Source(url=sets.paired, entities=sets.sidecar("entities"), attention=out))
    assert joined.counts == [shard.samples for shard in load_manifest(sets.paired).shards]
    stored = dict(iterate(sets.paired))
    assert len({number(members) for members in stored.values()}) > 0.9 * len(stored)
    seen = set()
    for shard, count in enumerate(joined.counts):
        for row in range(count):
            key = joined.key(shard, row)
            members = joined.read(shard, key)
            assert {name: members[name] for name in stored[key]} == stored[key]
            assert (decode_npy(members["attention.npy"]) == number(stored[key])).all()
            report = json.loads(members["json"])["report"]["text"]
            spans = json.loads(members["entities.json"])
            assert spans and all(report[span["start"] : span["end"]] == span["text"] for span in spans)
            seen.add(key)
    assert seen == set(stored)
