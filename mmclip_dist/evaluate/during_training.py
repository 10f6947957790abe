"""Zero-shot evaluation while training. Every rank scores its share of the images; all can stop between two batches."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from mmclip_dist.config import Config
from mmclip_dist.engine import watchdog
from mmclip_dist.engine.weights import averaged
from mmclip_dist.evaluate.classification import per_class_auc
from mmclip_dist.evaluate.encoders import Trained
from mmclip_dist.evaluate.protocol import OWN, check_prompts, load_protocol
from mmclip_dist.evaluate.shared import together
from mmclip_dist.evaluate.zeroshot import Evaluation, Scored, labelled_sets
from mmclip_dist.run.stop import StopRequest


class EvaluationDuringTraining:
    """On the sets of `config.evaluation`. ValueError if there is none with labels, or if one is trained on."""

    def __init__(self, config: Config, tokenizer: PreTrainedTokenizerBase, trained_on: tuple[str, ...]) -> None:
        sets = labelled_sets(config.evaluation.sets, trained_on)
        self.evaluation = Evaluation(sets, load_protocol(OWN), config.prompts.file)
        self.tokenizer = tokenizer
        check_prompts(self.evaluation.prompts, lambda text: len(tokenizer(text)["input_ids"]), config.model.text.max_tokens)
        self.every, self.last, self.of_average = config.evaluation.every, config.optim.last_step, config.optim.ema is not None

    def due(self, step: int) -> bool:
        return step % self.every == 0 or step == self.last

    def missed(self, step: int) -> bool:
        """Never: nothing that follows depends on the scores."""
        return False

    def scores(self, engine: Any, stop: StopRequest) -> dict[str, float] | None:
        """AUC of every class and their mean, "macro"; None if a stop came in between. A collective call.

        Uses the averaged weights if the run keeps them. The numbers do not depend on the number of ranks.
        """
        watchdog.beat("evaluating")
        rank, world = dist.get_rank(), dist.get_world_size()
        own: list[list[Scored]] = []
        with averaged(engine) if self.of_average else nullcontext():
            for some in self.evaluation.rounds(Trained(engine.module, self.tokenizer), rank, world):
                own.append(some)
                if stop.requested(torch.device(engine.device)):
                    return None
        scored = together(own)
        aucs = per_class_auc(np.concatenate([s.scores for s in scored]), np.concatenate([s.known.labels for s in scored]))
        named = {
            name: float(auc) for name, auc in zip(self.evaluation.classes, aucs, strict=True) if not np.isnan(auc)
        }
        return {"macro": float(np.mean(list(named.values())))} | named if named else {}
