"""The configuration tree: one recipe YAML, then `key.sub=value` overrides, checked before anything is built.

A letter in a comment says where a default comes from: K known from the paper's abstract or figure, N the nearest
published code, O our own decision (README, "What is known of the method").
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
from collections.abc import Sequence
from contextlib import suppress
from importlib import resources
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from mmclip_shards.textfiles import read_text
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from mmclip_dist.errors import SECRET

Precision = Literal["fp32", "bf16", "fp16"]
"""What the model multiplies in."""


def _divide(name: str, value: int, by_name: str, by: int) -> None:
    if value % by:
        raise ValueError(f"{name}={value} is no multiple of {by_name}={by}")


class Section(BaseModel):
    """A frozen part of the tree that refuses keys it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Source(Section):
    """One packed set and its sidecars; every URL is a folder that holds a manifest.json."""

    url: str
    entities: str | None = None
    attention: str | None = None
    weight: float = Field(1.0, gt=0)  # share of the batch, relative to the other sources


class Augment(Section):
    """Random crop, with the attention grid cropped alike."""

    crop_area: tuple[float, float] = (0.6, 1.0)  # share of the image's area (N: MAE 0.2 to 1; O: keep small findings)
    flip: float = Field(0.0, ge=0, le=1)  # probability; off, since left and right carry meaning in radiology (O)

    @model_validator(mode="after")
    def _area(self) -> Self:
        if not 0 < self.crop_area[0] <= self.crop_area[1] <= 1:
            raise ValueError("crop_area is [smallest, largest] with 0 < smallest <= largest <= 1")
        return self


class Reading(Section):
    """How each loader process reads shards on object storage. Local shards ignore it."""

    memory_mib: int = Field(1024, gt=0)  # for fetched bytes: two shuffle blocks of each stream must fit
    connections: int = Field(16, gt=0)  # requests under way at once, besides a few second ones for those that are late
    client: Literal["s3fs", "obstore"] = "s3fs"  # reads s3://; obstore (the extra s3-fast) costs less processor time a byte
    cache: str | None = (
        None  # folder on a local disk where fetched bytes are kept, shared by the processes of a machine
    )
    cache_gib: float = Field(100.0, gt=0)  # limit of that folder
    budget_s: float = Field(120.0, gt=0)  # seconds without a new byte after which the run stops
    stall_s: float = Field(10.0, gt=0)  # seconds without a byte after which a request is made again


class Data(Section):
    sources: tuple[Source, ...] = ()
    streams: int = Field(64, gt=0)  # virtual streams; must divide the global batch. A multiple of ranks x workers reads least
    shuffle_block: int = Field(256, gt=0)  # samples of one stream that are permuted together, and read together
    workers: int = Field(0, ge=0)  # loader processes of each rank
    prefetch: int = Field(4, gt=0)  # batches that each worker prepares ahead
    max_bad_fraction: float = Field(1e-3, ge=0, le=1)  # undecodable samples above this share stop the run
    augment: Augment = Augment()
    reading: Reading = Reading()


class ImageEncoder(Section):
    pretrained: str | None = None  # transformers ViT: hub id or folder; None: random weights of the shape below
    size: int = Field(224, gt=0)  # pixels, square
    patch: int = Field(16, gt=0)
    width: int = Field(768, gt=0)
    depth: int = Field(12, gt=0)
    heads: int = Field(12, gt=0)

    @model_validator(mode="after")
    def _divides(self) -> Self:
        _divide("model.image.size", self.size, "model.image.patch", self.patch)
        _divide("model.image.width", self.width, "model.image.heads", self.heads)
        return self

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.size // self.patch


class TextEncoder(Section):
    pretrained: str | None = None  # transformers BERT family: hub id or folder
    tokenizer: str | None = None  # hub id or folder; None: that of `pretrained`
    max_tokens: int = Field(112, gt=2)  # N
    width: int = Field(768, gt=0)
    depth: int = Field(12, gt=0)
    heads: int = Field(12, gt=0)

    @model_validator(mode="after")
    def _divides(self) -> Self:
        _divide("model.text.width", self.width, "model.text.heads", self.heads)
        return self

    @property
    def tokenizer_name(self) -> str | None:
        return self.tokenizer or self.pretrained


class Decoder(Section):
    depth: int = Field(4, gt=0)  # N: MAE, MRM
    width: int = Field(512, gt=0)
    heads: int = Field(8, gt=0)

    @model_validator(mode="after")
    def _divides(self) -> Self:
        _divide("decoder.width", self.width, "decoder.heads", self.heads)
        return self


class Model(Section):
    image: ImageEncoder = ImageEncoder()
    text: TextEncoder = TextEncoder()
    embed: int = Field(256, gt=0)  # width of the shared space (N)
    temperature: float = Field(0.07, gt=0)  # at the start; learned (N)
    max_scale: float = Field(100.0, gt=1)  # clamp of 1 / temperature (N)
    checkpoint_activations: bool = False  # recompute each layer in the backward pass: less memory, a third more compute (O)
    compile: bool = False  # torch.compile of the encoders' layers (O)


class AttMIM(Section):
    """Attention-guided masked image modelling; the two modes are described in `mmclip_dist.model.mmclip`."""

    mode: Literal["feature", "split", "context"] = "feature"  # K: feature; O: split, context
    share: float = Field(1.0, gt=0, le=1)  # context: share of the images with a report or label that are rebuilt (O)
    guide: Literal["attention", "random"] = "attention"  # what chooses the patches; random: the control that ignores the scores
    ratio: float = Field(0.5, gt=0, lt=1)  # feature, context: share of patches that the scores hide (K: about half)
    hint: float = Field(0.1, ge=0, lt=1)  # share of the chosen patches left visible, others masked instead (N)
    salient_keep: float = Field(0.5, gt=0, lt=1)  # split: share of patches in the contrastive view (N)
    context_keep: float = Field(0.25, gt=0, lt=1)  # split, context: share of patches in the reconstruction view (O)
    unmasked_last_steps: int = Field(0, ge=0)  # split: steps at the end on whole images (N: FLIP)
    score_temperature: float = Field(0.1, gt=0)  # N
    decoder: Decoder = Decoder()

    @model_validator(mode="after")
    def _views(self) -> Self:
        if self.mode != "feature" and self._hidden + self.context_keep > 1:
            raise ValueError(f"attmim.{self._names} + attmim.context_keep may not pass 1: a patch is in one view only")
        return self

    @property
    def _names(self) -> str:
        return "ratio" if self.mode == "context" else "salient_keep"

    @property
    def _hidden(self) -> float:
        return self.ratio if self.mode == "context" else self.salient_keep

    def views(self, patches: int) -> tuple[int, int]:
        """Patches that respond most to the text (in split mode the salient view), and patches of the context view."""
        return round(self._hidden * patches), round(self.context_keep * patches)

    def check_patches(self, patches: int) -> None:
        """Raise ValueError if the shares round to no patch, or to more than there are."""
        if self.mode == "feature":
            hidden = round(self.ratio * patches)
            if not 0 < hidden < patches:
                raise ValueError(
                    f"attmim.ratio={self.ratio} rounds to {hidden} of {patches} patches: at least one must be masked and one seen"
                )
            return
        salient, context = self.views(patches)
        if not (salient and context) or salient + context > patches:
            raise ValueError(
                f"attmim.{self._names}={self._hidden} and attmim.context_keep={self.context_keep} round to {salient} and "
                f"{context} of {patches} patches: each view needs at least one, and together they may have {patches}"
            )


class EntMLM(Section):
    """Entity-driven masked language modelling."""

    probability: float = Field(0.5, gt=0, le=1)  # of each entity; at least one a report (O)
    word_probability: float = Field(0.15, gt=0, le=1)  # of each word of a report without entities (N: M3AE)
    share: float = Field(1.0, gt=0, le=1)  # of the reports that are masked and rebuilt (O)
    input: Literal["encoder", "embeddings"] = "encoder"  # what the decoder gets: the text encoder's second pass, or none (O)
    decoder: Decoder = Decoder(depth=2)


class Prompts(Section):
    file: str | None = None  # YAML of templates and disease names; None: the embedded one
    diseases: tuple[str, ...] = ()  # label names; empty: the labels of all sources


class Loss(Section):
    """Weights of the three terms (N: unweighted sum); a term of weight 0 is not computed."""

    contrastive: float = Field(1.0, ge=0)
    image: float = Field(1.0, ge=0)
    entity: float = Field(1.0, ge=0)
    impl: Literal["torch", "triton"] = "torch"  # of the kernels: contrastive loss and masking; triton needs CUDA GPUs

    @model_validator(mode="after")
    def _any(self) -> Self:
        if self.contrastive == self.image == self.entity == 0:
            raise ValueError("all loss weights are 0: nothing would be trained")
        return self


class Optim(Section):
    steps: int = Field(gt=0)  # length of the learning-rate schedule, counted from step 0
    stop_at: int | None = Field(None, gt=0)  # stop before the schedule's end: a run in two phases
    global_batch: int = Field(1024, gt=0)  # samples of one step over all ranks
    micro_batch: int | None = Field(None, gt=0)  # samples of a rank that are in memory at once; None: all of its share
    lr: float = Field(1e-4, gt=0)  # at a global batch of 1024; scaled linearly with the batch (N)
    warmup: float = Field(0.05, ge=0, lt=1)  # share of the steps (N)
    schedule: Literal["cosine", "wsd", "linear"] = "cosine"  # after the warm-up; all end at 0 (N)
    decay: float = Field(0.2, gt=0, le=1)  # wsd: share of the steps at the end in which the rate falls (N: 2405.18392)
    name: Literal["adamw", "lamb", "sgd", "deepspeed"] = "adamw"  # deepspeed: the one of `deepspeed.optimizer` (N: AdamW)
    layer_decay: float = Field(1.0, gt=0, le=1)  # the rate of an encoder's layer relative to the one above; 1: equal (O)
    encoder_rate: float = Field(1.0, gt=0, le=1)  # the rate of the encoders relative to heads and decoders; 1: equal (O)
    ema: float | None = Field(None, gt=0, lt=1)  # decay per step of an exponential average of the weights; None: none (O)
    betas: tuple[float, float] = (0.9, 0.95)  # of sgd, the first one is the momentum (N)
    weight_decay: float = Field(0.05, ge=0)  # N
    clip: float = Field(1.0, gt=0)  # global gradient norm (N)

    @model_validator(mode="after")
    def _stop(self) -> Self:
        if self.stop_at is not None and self.stop_at > self.steps:
            raise ValueError(
                f"optim.stop_at={self.stop_at} lies after the last step, optim.steps={self.steps}; set both"
            )
        return self

    @model_validator(mode="after")
    def _phases(self) -> Self:
        if self.schedule == "wsd" and self.warmup + self.decay > 1:
            raise ValueError(
                f"optim.warmup={self.warmup} and optim.decay={self.decay} of the steps overlap; their sum may not pass 1"
            )
        return self

    @property
    def has_scales(self) -> bool:
        """Whether some weights learn at another rate than others."""
        return self.layer_decay < 1 or self.encoder_rate < 1

    @property
    def last_step(self) -> int:
        return self.steps if self.stop_at is None else self.stop_at


class Track(Section):
    """Where the metrics go besides metrics.jsonl; `pip install mmclip-dist[tracking]` brings what they need."""

    tensorboard: bool = False  # event files in RUN/tensorboard
    wandb: str | None = None  # Weights & Biases: the project
    mlflow: str | None = None  # the tracking URI, http://... or sqlite:///...


class Checkpoint(Section):
    every: int = Field(1000, gt=0)  # steps
    keep: int = Field(2, gt=0)  # newest ones kept
    keep_every: int | None = Field(None, gt=0)  # steps: a checkpoint of a multiple of it is kept for good
    keep_best: int = Field(1, ge=0)  # those with the highest score of an evaluation, if there is one
    asynchronous: bool = False  # write in the background, from a copy of the state in host memory
    url: str | None = None  # keep a copy there (s3://BUCKET/RUN); an empty run folder fetches the newest
    start_from: str | None = None  # a checkpoint, a run or a checkpoint.url to continue: weights, optimizer and step
    host_local: bool = False  # run_dir is a disk of each host's own; only the checkpoints at `url` are whole
    trusted: bool = False  # load state files that may run any code; true only if you know who wrote them

    @model_validator(mode="after")
    def _store(self) -> Self:
        if self.host_local and self.url is None:
            raise ValueError(
                "checkpoint.host_local=true needs checkpoint.url: a host's own disk has only a part of each checkpoint, so all "
                "hosts put theirs into a store, checkpoint.url=s3://BUCKET/RUN"
            )
        return self


class Offload(Section):
    """What leaves the GPU's memory for the host's."""

    optimizer: Literal["none", "cpu"] = "none"  # its state and the fp32 weights, stepped there; zero_stage >= 1
    parameters: Literal["none", "cpu"] = "none"  # fetched layer by layer; zero_stage 3


class Health(Section):
    """When a run is in trouble."""

    max_bad_steps: int = Field(25, gt=0)  # steps in a row without finite gradients; fp16 needs some 16 to find its scale
    spike: float = Field(8.0, gt=0)  # robust standard deviations of the loss above its running median
    window: int = Field(128, ge=16)  # steps of the running median
    lost_s: float = Field(45.0, gt=0)  # seconds of silence after which a machine counts as lost and the run ends
    timeout_s: float = Field(600.0, gt=0)  # a step or a collective call that takes longer counts as hung and ends the run


class Evaluation(Section):
    """Zero-shot evaluation while training, shared by all ranks."""

    sets: tuple[str, ...] = ()  # packed, labelled sets that are not trained on, SET/SPLIT; none: no evaluation
    every: int = Field(1000, gt=0)  # steps, and after the last one


class FineTune(Section):
    """A classifier on a trained image encoder, in place of the objective of pretraining. `mmclip evaluate finetune` sets it."""

    checkpoint: str  # sha256 of the weights that it starts from
    classes: tuple[str, ...]
    labels: tuple[str, ...]  # their names in the training set
    exclusive: bool = False  # every image has exactly one of the classes: cross-entropy over them, else binary of each
    samples: str  # sha256 of the keys that it trains on
    smoothing: float = Field(0.0, ge=0, lt=1)  # of the labels
    drop_path: float = Field(0.0, ge=0, lt=1)  # share of the images that pass the last layer by; fewer the layers before
    head_norm: bool = False  # LayerNorm between the pooled patches and the linear head
    head_deviation: float = Field(2e-5, ge=0)  # standard deviation of the head's initial weights
    patience: int | None = Field(None, gt=0)  # evaluations without a better one after which it ends; None: all steps


class Config(Section):
    """The whole tree. `run_dir` holds everything that a run writes."""

    run_dir: str
    seed: int = Field(0, ge=0)
    precision: Precision = "bf16"
    zero_stage: Literal[0, 1, 2, 3] = 1
    offload: Offload = Offload()
    threads: int | None = Field(None, gt=0)  # torch threads of each rank on the CPU; None: cores / ranks
    log_every: int = Field(10, gt=0)  # steps
    log_gradients: bool = False  # every 10 logged rows, the gradient of each loss term at the encoders: one forward pass more
    data: Data = Data()
    model: Model = Model()
    attmim: AttMIM = AttMIM()
    entmlm: EntMLM = EntMLM()
    prompts: Prompts = Prompts()
    loss: Loss = Loss()
    optim: Optim
    checkpoint: Checkpoint = Checkpoint()
    health: Health = Health()
    track: Track = Track()
    evaluation: Evaluation = Evaluation()
    finetune: FineTune | None = None  # made by `mmclip evaluate finetune`
    deepspeed: dict[str, Any] = Field(default_factory=dict)  # passed through for what is not modelled here

    @field_validator("run_dir")
    @classmethod
    def _local(cls, folder: str) -> str:
        if "://" in folder:
            raise ValueError(
                f"run_dir={folder} is a URL, but a run works in a folder of a file system that all its machines share: name "
                f"one, and set checkpoint.url={folder} to keep a copy of its checkpoints there"
            )
        if not folder.strip() or not folder.isprintable():
            raise ValueError(f"run_dir={folder!r} is no name of a folder")
        return folder

    @model_validator(mode="after")
    def _engine(self) -> Self:
        """Refuse what the kernels or DeepSpeed would refuse late, or would accept and do wrong."""
        if self.loss.image:
            self.attmim.check_patches(self.model.image.grid**2)
        if self.offload.optimizer != "none" and self.zero_stage == 0:
            raise ValueError("offload.optimizer=cpu needs zero_stage=1 or more: at 0 DeepSpeed has nothing to offload")
        if self.offload.parameters != "none" and self.zero_stage != 3:
            raise ValueError(f"offload.parameters=cpu needs zero_stage=3, found {self.zero_stage}")
        if self.model.compile and self.zero_stage == 3:
            raise ValueError(
                "model.compile=true needs zero_stage=2 or less: ZeRO-3 gathers weights in hooks around every module, "
                "and torch.compile would break its graph at each of them"
            )
        if self.log_gradients and (self.zero_stage == 3 or self.optim.micro_batch):
            raise ValueError(
                "log_gradients=true needs zero_stage=2 or less and no optim.micro_batch: it goes back through a part of the "
                "graph only, and through all samples at once"
            )
        if self.precision == "fp16" and self.zero_stage == 0:
            raise ValueError(
                "precision=fp16 needs zero_stage=1 or more: at 0 DeepSpeed (0.19) divides the gradients by a loss scale that it "
                "never multiplied the loss by"
            )
        theirs = "optimizer" in self.deepspeed
        if theirs and self.optim.ema is not None:
            raise ValueError("optim.ema needs optim.name=adamw or lamb: DeepSpeed's own optimizers do not keep the average")
        if theirs != (self.optim.name == "deepspeed"):
            raise ValueError(
                "optim.name=deepspeed and a deepspeed.optimizer section go together: set both, or neither; "
                f"found optim.name={self.optim.name} {'with' if theirs else 'without'} the section"
            )
        return self

    def check_world(self, world: int) -> None:
        """Raise ValueError if this run cannot be spread over `world` ranks."""
        batch, streams = self.optim.global_batch, self.data.streams
        if world > batch:
            raise ValueError(f"optim.global_batch={batch} samples cannot be spread over {world} ranks: use at most {batch} ranks")
        if batch % streams:
            low = max(1, batch // streams) * streams
            raise ValueError(
                f"optim.global_batch={batch} is no multiple of data.streams={streams}; "
                f"the nearest ones are {low} and {low + streams}, or lower data.streams"
            )

        micro, least = self.optim.micro_batch, batch // world
        if micro is not None and batch % world == 0 and least % micro:
            raise ValueError(
                f"optim.micro_batch={micro} does not divide a rank's share of the batch, {batch} / {world} = {least}"
            )
        if self.passes(world) > least:
            raise ValueError(
                f"optim.micro_batch={micro} needs {self.passes(world)} passes, but some of the {world} ranks have {least} "
                "samples of a batch: raise optim.micro_batch"
            )

    def passes(self, world: int) -> int:
        """Passes that each of `world` ranks makes over its share of a batch: the largest share decides."""
        most = math.ceil(self.optim.global_batch / world)
        return math.ceil(most / (self.optim.micro_batch or most))

    def check_sources(self) -> None:
        """Raise ValueError if training lacks a set, a tokenizer or a sidecar that its losses need."""
        if self.finetune is not None:
            raise ValueError(f"{self.run_dir} is a part of a fine-tuning: start `mmclip evaluate finetune` again, and it goes on")
        if not self.data.sources:
            raise ValueError("data.sources is empty: name at least one set, data.sources='[{url: SET/train}]'")
        if self.loss.entity and not any(source.entities for source in self.data.sources):
            raise ValueError(
                "loss.entity needs entity sidecars: run `mmclip entities SET/train`, then set `entities` of the "
                "source, or train without the term: loss.entity=0"
            )
        bare = [source.url for source in self.data.sources if source.attention is None]
        if self.attmim.mode == "split" and self.attmim.guide == "attention" and self.loss.image and bare:
            raise ValueError(
                f"attmim.mode=split needs attention sidecars for {', '.join(bare)}: run `mmclip attention SET/train "
                "--checkpoint CHECKPOINT`, then set `attention` of the source, or use attmim.mode=context"
            )
        if not self.model.text.tokenizer_name:
            raise ValueError(
                "model.text.tokenizer is not set: name a transformers tokenizer (id or folder), or train one with "
                "`mmclip tokenizer SET/train --out DIR`"
            )

    @property
    def sets(self) -> list[str]:
        """What training reads: sets and their sidecars."""
        found = [url for each in self.data.sources for url in (each.url, each.entities, each.attention) if url]
        return list(dict.fromkeys(found))

    @property
    def places(self) -> list[str]:
        """All folders and URLs that a run reads or writes; a hub id among them looks like a folder that is not there."""
        image, text, kept = self.model.image, self.model.text, self.checkpoint
        others = image.pretrained, text.pretrained, text.tokenizer, self.data.reading.cache, kept.url, kept.start_from
        return list(dict.fromkeys([self.run_dir, *self.sets, *filter(None, others), *self.evaluation.sets]))

    @property
    def shares(self) -> tuple[float, float]:
        """Shares of the samples whose images, and whose reports, are masked and rebuilt."""
        return self.attmim.share if self.attmim.mode == "context" else 1.0, self.entmlm.share


OPERATIONAL = frozenset({
    "run_dir", "zero_stage", "offload", "threads", "log_every", "log_gradients", "data.workers", "data.prefetch",
    "data.max_bad_fraction", "data.reading", "model.checkpoint_activations", "model.compile", "loss.impl", "optim.stop_at",
    "optim.micro_batch", "checkpoint.every", "checkpoint.keep", "checkpoint.keep_every", "checkpoint.keep_best",
    "checkpoint.asynchronous", "checkpoint.url", "checkpoint.host_local", "checkpoint.trusted", "health", "track",
    "evaluation",
})  # fmt: skip
"""Keys, and sections with all their keys, that say how a run is carried out and not what it computes: the weights after a step
are the same up to rounding. They may change when a run goes on; all other keys may not."""


def is_operational(key: str) -> bool:
    """Whether a key, by its dotted name, may change when a run goes on."""
    parts = key.split(".")
    return any(".".join(parts[:length]) in OPERATIONAL for length in range(1, len(parts) + 1))


def differences(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """Dotted name -> (old value, new value) of every key that differs. A list is one value."""
    ours, theirs = (_flat(config.model_dump(mode="json")) for config in (old, new))
    return {key: (ours.get(key), theirs.get(key)) for key in ours | theirs if ours.get(key) != theirs.get(key)}


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in tree.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found


def recipe_names() -> list[str]:
    """Names of the recipes that come with the package."""
    folder = resources.files("mmclip_dist") / "recipes"
    return sorted(item.name.removesuffix(".yaml") for item in folder.iterdir() if item.name.endswith(".yaml"))


def _read_recipe(recipe: str) -> dict[str, Any]:
    if recipe in recipe_names():
        text = (resources.files("mmclip_dist") / "recipes" / f"{recipe}.yaml").read_text(encoding="utf-8")
    elif Path(recipe).is_file():
        text = read_text(recipe, "write it again, as YAML in UTF-8")
    else:
        raise ValueError(f"no recipe or YAML file {recipe!r}; the recipes are {', '.join(recipe_names())}")
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{recipe} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise ValueError(f"{recipe} must hold a mapping of sections, found {type(tree).__name__}")
    return tree


def _override(tree: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise ValueError(f"an override has the form key.sub=value, found {override!r}")
    *parents, leaf = path.split(".")
    node = tree
    for parent in parents:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise ValueError(f"{override!r}: {parent!r} is a value, not a section")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{SECRET.sub('...', override)!r}: the value is not valid YAML") from error
    if isinstance(value, str):  # YAML 1.1 reads 1e-4 as text
        with suppress(ValueError):
            value = float(value)
    node[leaf] = value


def _known_keys(section: type[BaseModel], prefix: str = "") -> list[str]:
    keys = []
    for name, field in section.model_fields.items():
        keys.append(prefix + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys += _known_keys(field.annotation, f"{prefix}{name}.")
    return keys


def one_line(error: ValidationError) -> str:
    """All faults of a configuration in one line, an unknown key with its nearest valid names."""
    parts = []
    for fault in error.errors():
        key = ".".join(str(part) for part in fault["loc"])
        if fault["type"] == "extra_forbidden":
            near = difflib.get_close_matches(key, _known_keys(Config), n=3, cutoff=0.5)
            hint = f"; did you mean {', '.join(near)}?" if near else "; `mmclip config RECIPE` lists the valid keys"
            if ":" in key:  # {url:SET} is one word to YAML
                hint = "; YAML takes a space after a colon, as in {url: SET}"
            parts.append(f"unknown config key {key!r}{hint}")
        else:
            message = fault["msg"].removeprefix("Value error, ")
            own = fault["type"] == "value_error"  # our own checks name their keys themselves
            parts.append(message if own or not key else f"{key}: {message}")
    return "; ".join(parts)


def parse(tree: dict[str, Any]) -> Config:
    """A checked tree from plain values; ValueError in one line."""
    for key, value in _flat(tree).items():
        if SECRET.search(str(value)):
            raise ValueError(
                f"{key} has a password or a signature in its URL, which the run folder, logs and lists of processes would show: "
                "leave it out, and give it in a file such as ~/.mlflow/credentials, ~/.aws/credentials, ~/.netrc or ~/.pgpass"
            )
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ValueError(one_line(error)) from error


def load_config(recipe: str, overrides: Sequence[str] = ()) -> Config:
    """The resolved tree of a recipe (a name or a YAML file) with `key.sub=value` overrides, in order."""
    tree = _read_recipe(recipe)
    for override in overrides:
        _override(tree, override)
    return parse(tree)


def dump_config(config: Config) -> str:
    """The resolved tree as YAML; `load_config` of it gives the same tree."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def config_hash(*parts: object) -> str:
    """sha256 of plain values: the identity of what made an output."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
