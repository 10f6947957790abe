"""The data of a training run: its sets, their order, and what turns samples into batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from mmclip_shards.manifest import manifest_hash
from transformers import PreTrainedTokenizerBase

from mmclip_dist.config import Config
from mmclip_dist.data.batch import Batch
from mmclip_dist.data.example import ExampleMaker
from mmclip_dist.data.join import JoinedSet
from mmclip_dist.data.loader import build_loader, build_order, label_names
from mmclip_dist.data.order import Order
from mmclip_dist.data.parts import check_open_files
from mmclip_dist.data.reading import open_sets
from mmclip_dist.data.seen import Seen


@dataclass(frozen=True)
class TrainingData:
    """trained_on: sha256 of every base shard that training may read."""

    config: Config
    sets: list[JoinedSet]
    order: Order
    maker: ExampleMaker
    diseases: tuple[str, ...]

    @property
    def trained_on(self) -> tuple[str, ...]:
        return tuple(shard.sha256 for joined in self.sets for shard in joined.manifest.shards)

    def seen(self, rank: int, world: int) -> Seen:
        """A rank's share of the patients and images of all base sets; the patients of sets on object storage stay unknown."""
        return Seen.of([joined.readers[0] for joined in self.sets], rank, world, fetch=False)

    @property
    def identity(self) -> list[list[str]]:
        """Hashes of each set's manifest and of its sidecars' manifests. They do not change when sets move."""
        return [[manifest_hash(reader.manifest) for reader in joined.readers] for joined in self.sets]

    def batches(self, rank: int, world: int, start: int) -> Iterator[Batch]:
        """A rank's batches of steps start, start + 1, ... without end."""
        config = self.config
        return build_loader(
            self.sets, self.order, self.maker, data=config.data, global_batch=config.optim.global_batch, rank=rank,
            world=world, start=start,
        )  # fmt: skip

    def __str__(self) -> str:
        return "\n".join(
            f"{self.config.data.sources[joined.number].url}: {joined.samples} samples, {joined.remainder} of them left out "
            "of each epoch in turn"
            for joined in self.order.sets
        )


@contextmanager
def open_training_data(
    config: Config, tokenizer: PreTrainedTokenizerBase, world: int, chosen: Sequence[Sequence[int]] | None = None
) -> Iterator[TrainingData]:
    """Open the sets of `config.data`, and stop reading ahead at the end. chosen: the rows of each shard of the first set that are
    used; None: all.

    With `config.finetune`, samples are images with the labels of its classes, which get their names; reports are left out.
    """
    sets, tuned = open_sets(config.data.sources, config.data, world), config.finetune
    try:
        if chosen is not None:
            sets[0].choose(chosen)
        diseases = tuned.classes if tuned else config.prompts.diseases or label_names(sets)
        maker = ExampleMaker(
            tokenizer, tuned.labels if tuned else diseases, config.model.image.size, config.model.image.grid,
            config.model.text.max_tokens, config.entmlm, config.data.augment, config.seed,
            needs_entities=config.loss.entity > 0, reports=tuned is None,
        )  # fmt: skip
        check_open_files(config.data.workers, config.data.reading.connections)
        yield TrainingData(config, sets, build_order(sets, config.data, config.seed), maker, tuple(diseases))
    finally:
        sets[0].chunks.close()
