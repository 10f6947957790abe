"""Offline stage `attention`: how strongly each patch of every image responds to its report, as a sidecar.

A frozen checkpoint scores each un-augmented image against the entities that its report states as seen, or against
the prompts of its diseases. One float16 grid an image.
"""

from __future__ import annotations

from functools import partial

from mmclip_shards.manifest import load_manifest, manifest_hash
from mmclip_shards.storage import join, local_path

from mmclip_dist.checkpoint.folder import step_of, weights_hash
from mmclip_dist.checkpoint.identity import model_hash, stored_config
from mmclip_dist.checkpoint.mirror import local_checkpoint
from mmclip_dist.config import Precision, config_hash
from mmclip_dist.offline.stage import Maker, Stage

BATCH = 64  # images at once


def attention_stage(
    base: str, out: str, checkpoint: str, entities: str | None = None, gpus: float = 0, *,
    cpus: int = 1, precision: Precision | None = None, batch: int = BATCH,
) -> Stage:  # fmt: skip
    """Scores of the images in `base` by a checkpoint, guided by the `entities` sidecar, to `out`.

    checkpoint: a folder, a run, or the URL of a mirror, from which every worker then fetches its copy.
    gpus: of each worker process; 0 scores on the CPU. cpus: of each; on a card they decode ahead of it. precision: of the model's
    products; None: as in its training on a card, fp32 on a CPU. batch: images at once. The last bits of a score depend on both,
    so both belong to the sidecar's configuration.
    """
    # Everything that affects a score: the model with its tokenizer, prompts and diseases, and the content of the entities. Their
    # hash stands alone, as it is another one when `mmclip reshard` copies them and the scores into other shards.
    guide = None if entities is None else manifest_hash(load_manifest(entities))
    with local_checkpoint(checkpoint) as folder:
        weights = weights_hash(folder)
        precision = precision or (stored_config(folder).precision if gpus else "fp32")
        identity = config_hash("attention", model_hash(folder, weights), precision, batch)
        if local_path(checkpoint) is not None:
            checkpoint = str(folder)
        elif step_of(checkpoint.rstrip("/").rpartition("/")[2]) is None:
            checkpoint = join(checkpoint, folder.name)  # every worker fetches this one, though the mirror may get a newer one
    build = partial(_build, checkpoint, precision, batch, cpus)
    return Stage("attention", base, out, identity, build, entities, guide, weights, gpus, cpus)


def _build(checkpoint: str, precision: Precision, batch: int, threads: int) -> Maker:
    # Imported here: who starts the stage needs neither torch nor the model.
    from mmclip_dist.offline.scorer import Scorer

    with local_checkpoint(checkpoint) as folder:
        return Scorer(str(folder), precision, batch, threads)
