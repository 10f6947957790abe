"""MMCLIP: two encoders, a shared space, and two decoders that rebuild what was masked.

Shape letters: B samples of this rank, n of them with a report, P patches, K kept patches, T tokens, C diseases,
D width of an encoder, E shared width.

AttMIM has three modes. `feature` encodes the whole image once and hides the features of the patches that respond most to
the report (the paper's own way). The others hide patches from the encoder itself: what it makes of the context view must rebuild
the rest. In `context` the contrastive loss sees the whole image; a share of the images is rebuilt, and an image without report
and label costs its context view only. In `split` it sees the salient view, by scores that are known beforehand, so that each
patch is encoded at most once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from mmclip_kernels import (
    SplitViews,
    TopkMask,
    attention_scores,
    attention_split_views,
    attention_topk_mask,
    contrastive_loss,
)
from torch import Tensor, nn
from torch.nn import functional as F

from mmclip_dist.config import Config
from mmclip_dist.data.batch import Batch
from mmclip_dist.model.decoders import CrossDecoder
from mmclip_dist.model.encoders import ImageTower, TextTower, pool
from mmclip_dist.model.inputs import Counts, Plan, PlannedBatch
from mmclip_dist.model.losses import masked_cross_entropy, masked_mean_square, prompt_contrastive, prompt_targets
from mmclip_dist.model.masking import patch_pixels, ranked_or_drawn


@dataclass(frozen=True)
class ImageFeatures:
    """What the image encoder made of a batch, and what AttMIM hid of it.

    seen [m, K, D]: features of every encoded patch, of the images whose reports EntMLM rebuilds. embedding [B, E]: of the
    contrastive view. query [R, P, D], masked [R, P]: the decoder's input and what it must rebuild; None without AttMIM.
    """

    seen: Tensor
    embedding: Tensor
    query: Tensor | None
    masked: Tensor | None


@dataclass(frozen=True)
class Embedded:
    """What the contrastive loss sees of some samples: image [B, E], report [n, E] of those that have one, prompt [2C, E],
    scale [1]."""

    image: Tensor
    report: Tensor
    prompt: Tensor
    scale: Tensor


@dataclass(frozen=True)
class Part:
    """One pass over a part of a rank's batch: its losses are shares that add up to those of the whole.

    count: how many parts there are. gradient: that of the contrastive loss in what this part embeds (prompts and scale: in all
    parts together); None where it has no weight.
    """

    count: int
    gradient: Embedded | None


@dataclass(frozen=True)
class TextMemory:
    """What guides an image: its report's tokens, or its disease prompts where it has none. Of the R images that are rebuilt.

    features [R, T + 2C, D], present [R, T + 2C]: for the image decoder. evidence [R, T + 2C]: the words that may score
    patches, which a negated, doubtful or past finding never does.
    """

    features: Tensor
    present: Tensor
    evidence: Tensor


class MMCLIP(nn.Module):
    prompt_tokens: Tensor
    prompt_mask: Tensor

    def __init__(
        self, config: Config, *, vocabulary: int, prompt_tokens: Tensor, prompt_mask: Tensor, stored: Path | None = None
    ) -> None:
        """`vocabulary`: tokens of the tokenizer. prompt_tokens, prompt_mask [R, 2C, T]: see `tokenize_prompts`.

        stored: a folder in which `save_shapes` left the encoders' shapes; no pretrained weights are looked for then.
        """
        super().__init__()
        self.config = config
        self.image = ImageTower(config.model.image, stored and stored / "image")
        self.text = TextTower(config.model.text, vocabulary, stored and stored / "text")
        self.image_head = nn.Linear(self.image.width, config.model.embed, bias=False)
        self.text_head = nn.Linear(self.text.width, config.model.embed, bias=False)
        # Shape [1]: ZeRO cannot partition a 0-dim parameter in bf16 under gloo.
        self.log_scale = nn.Parameter(torch.full((1,), math.log(1 / config.model.temperature)))
        self.mask_token = nn.Parameter(torch.randn(1, 1, self.image.width) * 0.02)
        patches, patch = config.model.image.grid**2, config.model.image.patch
        self.image_decoder = CrossDecoder(
            config.attmim.decoder, query_width=self.image.width, memory_width=self.text.width,
            output_width=patch**2, max_length=patches,
        )  # fmt: skip
        self.text_decoder = CrossDecoder(
            config.entmlm.decoder, query_width=self.text.width, memory_width=self.image.width,
            output_width=vocabulary, max_length=config.model.text.max_tokens,
        )  # fmt: skip
        self.register_buffer("prompt_tokens", None, persistent=False)
        self.register_buffer("prompt_mask", None, persistent=False)
        self.set_prompts(prompt_tokens, prompt_mask)

    @property
    def encoders(self) -> tuple[ImageTower | TextTower, ...]:
        return self.image, self.text

    def save_shapes(self, folder: Path) -> None:
        """Write the encoders' shapes, which `stored` reads: a checkpoint must not need the folder or hub they came from."""
        self.image.vit.config.save_pretrained(folder / "image")
        self.text.bert.config.save_pretrained(folder / "text")

    # -- The objective --------------------------------------------------------------------------------------------

    def forward(self, batch: Batch, part: Part | None = None, *, embed_only: bool = False) -> dict[str, Tensor] | Embedded:
        """Losses of one batch: "contrastive", "image" and "entity", those with a weight. Each is a scalar whose mean over
        the ranks is the loss of the global batch.

        part: `batch` is a part of this rank's, and the losses are its shares. Of "contrastive" only the gradient is then
        meaningful. embed_only: no loss, only what `contrast` takes. Both are for `engine/gradient_cache.py`.
        """
        weights = self.config.loss
        batch = self.prepared(batch)
        plan, counts = batch["plan"], batch["counts"]
        prompts = self._prompt_features(batch["step"])  # [2C, D]
        reports = self.text(batch["tokens"][plan.paired], batch["token_mask"][plan.paired], plan.packing)  # [n, T, D]
        if embed_only:
            return self._embed(batch, reports, prompts, self._contrastive_view(batch))
        memory = self._text_memory(batch, reports, prompts) if weights.image else None
        images = self._encode_images(batch, memory)

        losses = {}
        if weights.contrastive:
            embedded = self._embed(batch, reports, prompts, images.embedding)
            losses["contrastive"] = _along(embedded, part) if part else self.contrast(embedded, batch)
        if memory and images.query is not None and images.masked is not None:
            losses["image"] = self._rebuild_image(batch, memory, images.query, images.masked)
        elif weights.image:
            losses["image"] = images.embedding.sum() * 0.0  # unmasked steps at the end: nothing to rebuild
        if weights.entity:
            losses["entity"] = self._rebuild_entities(batch, plan, images, sum(counts.masked) / len(counts.masked))
        return losses

    def prepared(self, batch: Batch | PlannedBatch) -> PlannedBatch:
        """The batch with its plan and the counts of all ranks. Asking for what is missing waits for the device."""
        device = batch["image"].device
        ready = PlannedBatch(**batch)
        if "plan" not in ready:
            ready["plan"] = Plan.of(batch, self.text.width, self.config.shares).to(device)
        if "counts" not in ready:
            ready["counts"] = Counts.of(ready["plan"], _world(), device)
        return ready

    def _embed(self, batch: PlannedBatch, reports: Tensor, prompts: Tensor, image: Tensor) -> Embedded:
        mask = batch["token_mask"][batch["plan"].paired]
        return Embedded(image, self._embed_text(pool(reports, mask)), self._embed_text(prompts), self.scale())

    def contrast(self, embedded: Embedded, batch: PlannedBatch) -> Tensor:
        """Reports against their images, prompts against unpaired images; the mean over all images of the global batch."""
        plan, counts = batch["plan"], batch["counts"]
        ids = batch["report_id"][plan.paired]
        over_reports = contrastive_loss(
            embedded.image[plan.paired], embedded.report, embedded.scale, image_ids=ids, text_ids=ids,
            impl=self.config.loss.impl, group=_world(), sizes=(counts.paired, counts.paired),
        )  # fmt: skip
        over_prompts, unpaired_rows = prompt_contrastive(
            embedded.image[plan.unpaired], embedded.prompt, embedded.scale, batch["labels"][plan.unpaired], _world(),
            counts.unpaired,
        )  # fmt: skip
        paired_rows = sum(counts.paired)
        rows = (paired_rows + unpaired_rows).clamp(min=1)
        return (paired_rows * over_reports + unpaired_rows * over_prompts) / rows

    def _rebuild_image(self, batch: PlannedBatch, memory: TextMemory, query: Tensor, masked: Tensor) -> Tensor:
        """AttMIM: normalised pixels of the masked patches, from the rest and the text. The mean over the ranks is that over all
        images that are rebuilt."""
        rows, counts = batch["plan"].rebuilt, batch["counts"].rebuilt
        features = self.image_decoder(query, memory.features, memory.present)
        pixels: Tensor = self.image_decoder.head(features)
        if len(rows) == 0:
            return pixels.sum() * 0.0
        of_rank = masked_mean_square(pixels, patch_pixels(_rows(batch["image"], rows), self.image.patch), masked)
        return of_rank / (sum(counts) / len(counts) / len(rows))

    def _rebuild_entities(
        self, batch: PlannedBatch, plan: Plan, images: ImageFeatures, masked_tokens: float
    ) -> Tensor:
        """EntMLM: the masked entities, from the rest of the report and the image. masked_tokens: the ranks' mean number."""
        target = batch["target_tokens"][plan.read].flatten()[plan.masked]
        return masked_cross_entropy(self.rebuild_entities(batch, plan, images.seen), target, masked_tokens)

    def rebuild_entities(self, batch: Batch, plan: Plan, seen: Tensor) -> Tensor:
        """Logits of the masked tokens [K, vocabulary], from the rest of the reports and image features seen [m, K, D]."""
        rows, packing = plan.read, plan.read_packing
        if self.config.entmlm.input == "embeddings":
            query = self.text.embed(batch["masked_tokens"][rows], packing)
        else:
            query = packing.pack(self.text(batch["masked_tokens"][rows], batch["token_mask"][rows], packing))
        features = packing.unpack(self.text_decoder(query, seen, None, packing))
        logits: Tensor = self.text_decoder.head(features.flatten(0, 1)[plan.masked])
        return logits

    # -- Encoders -------------------------------------------------------------------------------------------------

    def _encode_images(self, batch: PlannedBatch, memory: TextMemory | None) -> ImageFeatures:
        """memory: None without AttMIM."""
        patches, plan, mode = self._patches(batch), batch["plan"], self.config.attmim.mode
        if self._splits(batch["step"]):
            return self._encode_views(batch, patches)
        if memory and mode == "context":
            seen = self.image.encode(_rows(patches, plan.known))
            views = self._views(batch, _rows(patches, plan.rebuilt), self._scores_now(batch, memory, seen))
            query = self._context(views, self.image.encode(views.context), patches.shape[1])
            return ImageFeatures(_rows(seen, plan.read_known), self._embed_known(seen, batch), query, views.mask)
        seen = self.image.encode(patches)
        if not memory or mode == "split":
            return ImageFeatures(_rows(seen, plan.read), self._embed_image(seen.mean(1)), None, None)
        hidden = self._hide_patches(batch, seen, memory)
        return ImageFeatures(_rows(seen, plan.read), self._embed_image(seen.mean(1)), hidden.masked, hidden.mask)

    def _encode_views(self, batch: PlannedBatch, patches: Tensor) -> ImageFeatures:
        """Split mode: each patch enters the encoder at most once, in one of two views."""
        views = self._views(batch, patches)
        salient, context = self.image.encode(views.salient), self.image.encode(views.context)
        query, seen = self._context(views, context, patches.shape[1]), torch.cat([salient, context], 1)
        return ImageFeatures(_rows(seen, batch["plan"].read), self._embed_image(salient.mean(1)), query, views.mask)

    def _context(self, views: SplitViews, context: Tensor, patches: int) -> Tensor:
        """Features of the context view in their places, the mask token everywhere else [R, P, D]."""
        empty = self.mask_token.expand(len(context), patches, -1)
        return empty.scatter(1, views.ids_context[:, :, None].expand_as(context), context)

    def _contrastive_view(self, batch: PlannedBatch) -> Tensor:
        """Only the embedding for the contrastive loss [B, E], as `_encode_images` computes it."""
        patches = self._patches(batch)
        if self._splits(batch["step"]):
            patches = self._views(batch, patches).salient
        elif self.config.loss.image and self.config.attmim.mode == "context":
            return self._embed_known(self.image.encode(_rows(patches, batch["plan"].known)), batch)
        return self._embed_image(self.image.encode(patches).mean(1))

    def _embed_known(self, seen: Tensor, batch: PlannedBatch) -> Tensor:
        """seen [V, P, D] -> embeddings [B, E]; 0 for images without report and label, which the contrastive loss leaves out."""
        embedding = self._embed_image(seen.mean(1))
        if len(embedding) == len(batch["image"]):
            return embedding
        return embedding.new_zeros(len(batch["image"]), embedding.shape[1]).index_copy(0, batch["plan"].known, embedding)

    def _patches(self, batch: Batch) -> Tensor:
        return self.image.embed(batch["image"].to(self.mask_token.dtype))

    def _splits(self, step: int) -> bool:
        """Whether this step encodes two views: in split mode, except for the unmasked steps at the end."""
        options = self.config.attmim
        masked = step < self.config.optim.steps - options.unmasked_last_steps
        return options.mode == "split" and self.config.loss.image > 0 and masked

    def _views(self, batch: PlannedBatch, patches: Tensor, now: Tensor | None = None) -> SplitViews:
        """patches [R, P, D]: of the images that are rebuilt, in split mode all. now [R, P]: scores where no sidecar has any."""
        options, rows = self.config.attmim, batch["plan"].rebuilt
        salient, context = options.views(patches.shape[1])
        noise, scores = _rows(batch["noise"], rows), _rows(batch["attention"], rows).flatten(1)
        if now is not None:
            scores = torch.where(_rows(batch["has_attention"], rows)[:, None], scores, now)
        scores = noise if options.guide == "random" else ranked_or_drawn(scores, noise)
        return attention_split_views(
            patches, salient=salient, context=context, hint=options.hint, scores=scores, noise=noise, impl=self.config.loss.impl
        )

    def _hide_patches(self, batch: PlannedBatch, seen: Tensor, memory: TextMemory) -> TopkMask:
        """Feature mode: the mask token in place of the features that respond most to the text.

        Scores are the sidecar's where there is one, else those of this very step.
        """
        options, noise = self.config.attmim, batch["noise"]
        known, stored = batch["has_attention"], batch["attention"].flatten(1)
        scored = batch["plan"].scored
        hide = partial(
            attention_topk_mask, seen, ratio=options.ratio, mode="replace", select="hint", hint=options.hint,
            mask_token=self.mask_token, noise=noise, impl=self.config.loss.impl,
        )  # fmt: skip
        if options.guide == "random":
            return hide(scores=noise)
        with torch.no_grad():  # always, on every rank: ZeRO-3 gathers weights when a layer is called
            words, patches = self.text_head(memory.features), self.image_head(seen)
        temperature = options.score_temperature
        if scored == "all":
            return hide(scores=ranked_or_drawn(stored, noise))
        if scored == "some":
            computed = attention_scores(patches, words, memory.evidence, temperature=temperature)
            return hide(scores=ranked_or_drawn(torch.where(known[:, None], stored, computed), noise))
        return hide(words, memory.evidence, score_features=patches, temperature=temperature)

    @torch.no_grad()
    def _scores_now(self, batch: PlannedBatch, memory: TextMemory, seen: Tensor) -> Tensor | None:
        """Context mode: scores of this very step [R, P], from features seen [V, P, D]; all equal for an image without report and
        label, whose whole is not encoded. None if no mask needs them."""
        plan = batch["plan"]
        if self.config.attmim.guide == "random":
            return None
        if len(seen) < len(batch["image"]):
            seen = seen.new_zeros(len(batch["image"]), *seen.shape[1:]).index_copy(0, plan.known, seen)
        words = self.text_head(memory.features)  # the heads on every rank: see _hide_patches
        patches = self.image_head(_rows(seen, plan.rebuilt))
        if plan.scored == "all":
            return None
        return attention_scores(patches, words, memory.evidence, temperature=self.config.attmim.score_temperature)

    @torch.no_grad()
    def score_patches(self, seen: Tensor, words: Tensor, evidence: Tensor) -> Tensor:
        """seen [B, P, D], words [B, T, D], evidence [B, T] bool -> attention per patch [B, P] float32, no gradient."""
        temperature = self.config.attmim.score_temperature
        return attention_scores(self.image_head(seen), self.text_head(words), evidence, temperature=temperature)

    def _prompt_features(self, step: int) -> Tensor:
        """Pooled prompts [2C, D]; every step takes another pair of templates."""
        number = step % len(self.prompt_tokens)
        tokens, mask = self.prompt_tokens[number], self.prompt_mask[number]
        packing = self._prompt_packings[number] = self._prompt_packings[number].to(tokens.device)
        return pool(self.text(tokens, mask, packing), mask)

    def encode_text(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """tokens, mask [N, T] -> pooled features [N, D]."""
        return pool(self.text(tokens, mask), mask)

    def set_prompts(self, tokens: Tensor, mask: Tensor) -> None:
        """Use these prompts [R, 2C, T] (see `tokenize_prompts`) in place of those that the model was built with."""
        self.prompt_tokens, self.prompt_mask = tokens, mask
        self._prompt_packings = [self.text.pack(of_template) for of_template in mask]

    def _text_memory(self, batch: PlannedBatch, reports: Tensor, prompts: Tensor) -> TextMemory:
        rows, plan, half = len(batch["tokens"]), batch["plan"], len(prompts) // 2
        whole = reports
        if len(reports) < rows:
            whole = reports.new_zeros(rows, *reports.shape[1:]).index_copy(0, plan.paired, reports)
        of_reports, labels, tokens, words, report = (
            _rows(value, plan.rebuilt)
            for value in (whole, batch["labels"], batch["token_mask"], batch["evidence"], batch["report_id"])
        )
        paired = report >= 0
        positive, allowed = prompt_targets(labels)
        unlabelled = ~allowed.any(1, keepdim=True)
        every_disease = torch.arange(2 * half, device=positive.device) < half  # the sum over all disease prompts
        guides = torch.where(unlabelled, every_disease, positive) & ~paired[:, None]
        sick = positive[:, :half].any(1, keepdim=True)
        evidence = torch.where(sick, positive, every_disease) & every_disease & ~paired[:, None]
        return TextMemory(
            torch.cat([of_reports, prompts.expand(len(of_reports), -1, -1)], dim=1),
            torch.cat([tokens & paired[:, None], guides], dim=1),
            torch.cat([words & paired[:, None], evidence], dim=1),
        )

    def _guides(self, whole: PlannedBatch) -> TextMemory:
        """What guides every image of the batch, whatever share training rebuilds. whole: as `whole` makes it."""
        batch: Batch = whole
        plan = whole["plan"]
        reports = self.text(batch["tokens"][plan.paired], batch["token_mask"][plan.paired], plan.packing)
        return self._text_memory(whole, reports, self._prompt_features(0))

    def whole(self, batch: Batch) -> PlannedBatch:
        """The batch with a plan by which every image and every report is rebuilt. The host waits for one that is on a card."""
        plan = Plan.of(batch, self.text.width, (1.0, 1.0)).to(batch["image"].device)
        return PlannedBatch(**batch | {"plan": plan})  # type: ignore[typeddict-item]

    def _embed_image(self, features: Tensor) -> Tensor:
        return F.normalize(self.image_head(features), dim=-1)

    def _embed_text(self, features: Tensor) -> Tensor:
        return F.normalize(self.text_head(features), dim=-1)

    # -- Inference ------------------------------------------------------------------------------------------------

    def scale(self) -> Tensor:
        """1 / temperature, shape [1]. Clamped here, because ZeRO's fp32 copy would undo a clamp of the weight itself."""
        return self.log_scale.clamp(max=math.log(self.config.model.max_scale)).exp()

    def embed_images(self, image: Tensor) -> Tensor:
        """image [B, 1, S, S] -> embeddings of whole images [B, E], L2-normalised."""
        return self._embed_image(self.image.encode(self.image.embed(image.to(self.mask_token.dtype))).mean(1))

    def embed_texts(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """tokens, mask [N, T] -> embeddings [N, E], L2-normalised."""
        return self._embed_text(self.encode_text(tokens, mask))

    def image_masks(self, batch: Batch) -> Tensor:
        """Which patches of every image AttMIM hides [B, P] bool, by the rule of training. Where no sidecar scores the patches,
        they are scored by the image's text, in every mode."""
        whole = self.whole(batch)
        memory, patches = self._guides(whole), self._patches(batch)
        seen = self.image.encode(patches)
        if self.config.attmim.mode == "feature":
            mask = self._hide_patches(whole, seen, memory).mask
        else:
            mask = self._views(whole, patches, self.score_patches(seen, memory.features, memory.evidence)).mask
        return mask

    def rebuild_images(self, batch: Batch, masked: Tensor) -> Tensor:
        """Normalised pixels of all patches [B, P, patch^2], from those that are not masked and the text, as in training.

        masked [B, P] bool, as many in every row.
        """
        memory = self._guides(self.whole(batch))
        patches = self._patches(batch)
        if self.config.attmim.mode == "feature":
            query = torch.where(masked[:, :, None], self.mask_token, self.image.encode(patches))
        else:
            places = (~masked).nonzero()[:, 1].view(len(masked), -1, 1).expand(-1, -1, patches.shape[2])
            context = self.image.encode(patches.gather(1, places))
            query = self.mask_token.expand_as(patches).scatter(1, places, context)
        pixels: Tensor = self.image_decoder.head(self.image_decoder(query, memory.features, memory.present))
        return pixels

    def attention_grid(self, batch: Batch | PlannedBatch) -> Tensor:
        """Attention scores of whole, un-augmented images [B, grid, grid], against each one's report or prompts. float32.

        A plan that the batch has must come from `whole`; then the host waits for nothing.
        """
        memory = self._guides(batch if "plan" in batch else self.whole(batch))  # type: ignore[arg-type]
        seen = self.image.encode(self.image.embed(batch["image"]))
        side = self.config.model.image.grid
        return self.score_patches(seen, memory.features, memory.evidence).unflatten(1, (side, side))


def _rows(values: Tensor, rows: Tensor) -> Tensor:
    """values[rows]. A plan lists rows in order, so as many as there are need no copy, and their gradient no scatter."""
    return values if len(rows) == len(values) else values[rows]


def _along(embedded: Embedded, part: Part) -> Tensor:
    """A scalar whose gradient in `embedded` is that of the part. Its value has no meaning."""
    gradient = part.gradient
    assert gradient is not None
    own = [(embedded.image * gradient.image).sum(), (embedded.report * gradient.report).sum()]
    shared = [(embedded.prompt * gradient.prompt).sum(), (embedded.scale * gradient.scale).sum()]
    return torch.stack(own).sum() + torch.stack(shared).sum() / part.count


def _world() -> dist.ProcessGroup | None:
    return dist.group.WORLD if dist.is_initialized() else None
