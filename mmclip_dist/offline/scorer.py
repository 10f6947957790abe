"""The worker of the `attention` stage: applies a checkpoint to the samples of a shard, batch by batch."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from mmclip_shards.schema import encode_npy
from torch import Size, Tensor

from mmclip_dist.checkpoint.model_files import load_model
from mmclip_dist.config import Precision
from mmclip_dist.data.batch import Example, collate_into
from mmclip_dist.data.example import ExampleMaker
from mmclip_dist.model.inputs import PlannedBatch, moved
from mmclip_dist.offline.attention import BATCH
from mmclip_dist.offline.stage import Members, Sample, Unreadable

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class _Scored(NamedTuple):
    """A batch on its way back from the device. examples: what each sample became, or why it cannot be decoded. grids
    [n, g, g] float32 on the CPU, of those that can be; copied: when they are there."""

    examples: list[tuple[str, Example | str]]
    grids: Tensor | None
    copied: torch.cuda.Event | None


class Scorer:
    """Attention grids of samples by the checkpoint in a folder; an image that cannot be decoded gets zeros.

    The batches of a shard are its rows 0 to batch - 1, batch to 2 batch - 1, ...: what a sample gets in the last bits depends on
    the others of its batch, so it must not depend on who scores which shard. threads: that decode the next batches meanwhile.
    """

    def __init__(self, checkpoint: str, precision: Precision = "fp32", batch: int = BATCH, threads: int = 1) -> None:
        torch.set_num_threads(1)  # one process a core
        self.model, self.tokenizer, config, meta = load_model(Path(checkpoint))
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model.to(self.device)
        self.grid, self.precision, self.batch, self.threads = config.model.image.grid, precision, batch, threads
        self.examine = ExampleMaker(
            self.tokenizer, meta.diseases, config.model.image.size, self.grid, config.model.text.max_tokens, config.entmlm,
            augment=None,
        )  # fmt: skip
        # Its first call sets how the tokenizer cuts; two threads must not do that at once.
        self.tokenizer("", truncation=True, max_length=config.model.text.max_tokens)

    def __call__(self, samples: Iterable[Sample]) -> Iterator[Sample]:
        """The rows of a shard. While a batch is scored the next ones are decoded, and the last one's grids come back."""
        behind: deque[_Scored] = deque()
        for examples in self.decoded(samples):
            batch = self.collated(examples)
            behind.append(_Scored(examples, *self._sent_back(None if batch is None else self.score(batch))))
            if len(behind) == 2:
                yield from self._rows(behind.popleft())
        while behind:
            yield from self._rows(behind.popleft())

    def decoded(self, samples: Iterable[Sample]) -> Iterator[list[tuple[str, Example | str]]]:
        """Batches of (key, example or why it cannot be decoded); two more are in work."""
        remaining, ahead = iter(samples), deque[list[Future[tuple[str, Example | str]]]]()
        with ThreadPoolExecutor(self.threads) as pool:
            try:
                while batch := [pool.submit(self._decode, *sample) for sample in islice(remaining, self.batch)]:
                    ahead.append(batch)
                    if len(ahead) == 3:
                        yield [future.result() for future in ahead.popleft()]
                while ahead:
                    yield [future.result() for future in ahead.popleft()]
            finally:
                pool.shutdown(cancel_futures=True)

    def _decode(self, key: str, members: Members) -> tuple[str, Example | str]:
        try:
            return key, self.examine(key, members, epoch=0)
        except ValueError as error:  # no scores: training meets the same sample, replaces it and counts it
            return key, str(error)

    def collated(self, examples: Iterable[tuple[str, Example | str]]) -> PlannedBatch | None:
        """Those that could be decoded, if any, on the CPU; pinned, if there is a card."""
        known = [example for _, example in examples if not isinstance(example, str)]
        if not known:
            return None

        def room(sizes: Iterable[tuple[torch.dtype, Size]]) -> list[Tensor]:
            return [torch.empty(size, dtype=dtype, pin_memory=self.device.type == "cuda") for dtype, size in sizes]

        return self.model.whole(collate_into(known, 0, self.tokenizer.pad_token_id, room))

    def score(self, batch: PlannedBatch) -> Tensor:
        """Grids [n, g, g] float32, on the device, which the host does not wait for."""
        dtype = AUTOCAST.get(self.precision)
        with torch.inference_mode(), torch.autocast(self.device.type, dtype or torch.bfloat16, enabled=dtype is not None):
            return self.model.attention_grid(moved(batch, self.device)).float()

    def _sent_back(self, grids: Tensor | None) -> tuple[Tensor | None, torch.cuda.Event | None]:
        if grids is None or self.device.type == "cpu":
            return grids, None
        back = torch.empty(grids.shape, pin_memory=True).copy_(grids, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
        return back, copied

    def _rows(self, scored: _Scored) -> Iterator[Sample]:
        if scored.copied is not None:
            scored.copied.synchronize()
        grids = iter(() if scored.grids is None else scored.grids.numpy().astype(np.float16))
        nothing = np.zeros((self.grid, self.grid), np.float16)
        for key, example in scored.examples:
            unreadable = isinstance(example, str)
            row = {"attention.npy": encode_npy(nothing if unreadable else next(grids))}
            yield key, Unreadable(row, example) if unreadable else row  # type: ignore[arg-type]
