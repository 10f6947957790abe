"""The sets of a plan: training sets of each seed, and held-out patients that all seeds share."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from mmclip_shards.datasets.synthetic import synthetic_records
from mmclip_shards.manifest import Manifest, load_manifest, save_manifest
from mmclip_shards.pack import pack
from mmclip_shards.reader import ShardReader
from mmclip_shards.schema import Record, canonical_json
from mmclip_shards.storage import exists
from mmclip_shards.writer import write_shard

from mmclip_dist.bench.learning.plan import Drawn, Packed, Plan
from mmclip_dist.data.tokenizer import save_tokenizer, tokenizer_of_sets
from mmclip_dist.offline.attention import attention_stage
from mmclip_dist.offline.entities import entities_stage
from mmclip_dist.offline.stage import Stage

_KEY = b"synthetic patients have nothing to hide"
_HELD_OUT = {"test": 1, "validation": 2, "probe": 3}
_DRAWS = 10_000  # of one test bed: numbers of the random generators that draw its sets


@dataclass(frozen=True)
class Training:
    """URLs of a seed's training sets, their sidecars of entities, and the tokenizer of their reports."""

    pairs: str
    unpaired: str | None
    entities: str
    tokenizer: str


class Sets:
    """Makes what a plan needs below a folder, once: what is there stays."""

    def __init__(self, data: Drawn | Packed, folder: Path) -> None:
        self.data, self.folder = data, folder

    def training(self, seed: int) -> Training:
        """The training sets of a seed."""
        data, here = self.data, self.folder / f"seed-{seed}"
        unpaired = None
        if isinstance(data, Packed):
            pairs, unpaired, here = data.pairs, data.unpaired, self.folder / "shared"
        else:
            pairs = self._draw(here / "pairs", data.pairs, 100 + seed)
            if data.unpaired:
                unpaired = self._draw(here / "unpaired", data.unpaired, 5_000 + seed, reports=False, labels=data.labels)
        tokenizer = here / "tokenizer"
        if not tokenizer.exists():
            save_tokenizer(tokenizer_of_sets([pairs]), tokenizer)
        return Training(pairs, unpaired, self.entities(pairs, here / "entities"), str(tokenizer))

    def held_out(self, name: str) -> str:
        """URL of the set `test`, `validation` or `probe`."""
        if isinstance(self.data, Packed):
            return str(getattr(self.data, name))
        return self._draw(self.folder / name, getattr(self.data, name), _HELD_OUT[name])

    def entities(self, base: str, out: Path) -> str:
        """The sidecar of the entities in the reports of `base`."""
        return _made(entities_stage(base, str(out)))

    def attention(self, base: str, checkpoint: Path, out: Path, entities: str | None = None) -> str:
        """The sidecar of a checkpoint's attention scores for `base`."""
        return _made(attention_stage(base, str(out), str(checkpoint), entities))

    def _draw(self, folder: Path, count: int, number: int, *, reports: bool = True, labels: bool = True) -> str:
        data = self.data
        assert isinstance(data, Drawn)
        seed = data.draw * _DRAWS + number
        facts = canonical_json({"count": count, "seed": seed, "size": data.size, "reports": reports, "labels": labels})
        pack(
            list(_records(count, seed, data.size, reports=reports, labels=labels)), str(folder), dataset="synthetic",
            splits={"all": 1.0}, short_side=data.size, samples_per_shard=256, patient_key=_KEY,
            config_hash=hashlib.sha256(facts).hexdigest(),
        )  # fmt: skip
        return str(folder / "all")


def _records(count: int, seed: int, size: int, *, reports: bool, labels: bool) -> Iterator[Record]:
    """Drawn records. Patients of another seed are other patients."""
    for record in synthetic_records(count, seed=seed, size=size, unpaired=not reports):
        yield replace(record, patient=f"{seed}-{record.patient}", labels=record.labels if labels else {})


def _made(stage: Stage) -> str:
    """Make a sidecar in this process: the same rows as on a cluster."""
    base = load_manifest(stage.base)
    if exists(f"{stage.out}/manifest.json") and load_manifest(stage.out).config_hash == stage.config_hash:
        return stage.out
    readers = [ShardReader(url, load_manifest(url)) for url in (stage.base, stage.entities) if url]
    make = stage.build()
    shards = []
    for number in range(len(base.shards)):
        rows = [
            (parts[0][0], {suffix: data for _, members in parts for suffix, data in members.items()})
            for parts in zip(*(reader.samples(number) for reader in readers), strict=True)
        ]
        shards.append(write_shard(stage.out, number, make(rows)))
    save_manifest(
        stage.out,
        Manifest(
            kind=stage.kind, dataset=base.dataset, split=base.split, config_hash=stage.config_hash,
            base={shard.path: shard.sha256 for shard in base.shards}, checkpoint=stage.checkpoint, shards=tuple(shards),
        ),
    )  # fmt: skip
    return stage.out


def overrides_of(plan: Plan, arm_name: str, training: Training, attention: dict[str, str]) -> list[str]:
    """What the arm's data is, as overrides. attention: base URL -> its sidecar, if the arm wants scores."""
    share = plan.arms[arm_name].unpaired
    sources = [{"url": training.pairs, "entities": training.entities, "weight": 1.0 - share}]
    if share:
        assert training.unpaired is not None
        sources.append({"url": training.unpaired, "weight": share})
    for source in sources:
        if source["url"] in attention:
            source["attention"] = attention[str(source["url"])]
    return [f"data.sources={canonical_json(sources).decode()}", f"model.text.tokenizer={training.tokenizer}"]
