"""Checkpoints: written under a temporary name, read back, published whole by one rename, and found again.

`checkpoints/step-00001000/` holds DeepSpeed's state (weights, optimizer), the random states, and, for every use that is not
training, `model.safetensors` with `config.yaml` and `meta.json`. The encoders' shapes, the tokenizer and the prompts make it
complete: a checkpoint can be moved and used without its run, and without the weights that the run started from.
`checkpoint.json` has the size and hash of every file.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from mmclip_shards.storage import exists, join, local_path
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mmclip_dist.checkpoint import conversion
from mmclip_dist.checkpoint.folder import (
    CONFIG,
    MANIFEST,
    WEIGHTS,
    Entry,
    Meta,
    checkpoint_name,
    checkpoint_path,
    checkpoints_of,
    fault,
    kept_by,
    read_meta,
    resolve_checkpoint,
    say,
    scores_of,
    set_aside,
    write_manifest,
)  # fmt: skip
from mmclip_dist.checkpoint.mirror import fetch_checkpoint, fetch_newest, mirror, retract, upload_files
from mmclip_dist.checkpoint.model_files import write_model
from mmclip_dist.checkpoint.safe import check_files, load_state
from mmclip_dist.checkpoint.writer import CheckpointWriter, read_back
from mmclip_dist.config import Checkpoint as Settings
from mmclip_dist.config import Config
from mmclip_dist.data.seen import SEEN, Seen
from mmclip_dist.engine import deepspeed_inside, watchdog
from mmclip_dist.engine.collective import AgreedFailure, agreed, first_rank_does, gathered, hosts_do, sums
from mmclip_dist.engine.random_state import random_state, set_random_state
from mmclip_dist.engine.weights import averaged_weights, full_weights
from mmclip_dist.launcher import first_of_machine

_RANDOM = "random-{rank:05d}.pt"
_FETCHED = ".start_from"  # in the run folder: the copy of a checkpoint.start_from that is a URL


class Checkpoints:
    """The checkpoints of one run. All methods are collective calls; a failure on one rank is raised on all."""

    def __init__(
        self, run_dir: Path, engine: Any, tokenizer: PreTrainedTokenizerBase, config: Config, seen: Seen | None = None
    ) -> None:
        """seen: patients and images of the training sets, which every checkpoint tells."""
        self.run_dir, self.engine, self.tokenizer, self.config, self.seen = run_dir, engine, tokenizer, config, seen
        self.device = torch.device(engine.device)
        self.writer = engine.checkpoint_engine = CheckpointWriter(
            config.checkpoint.asynchronous, trusted=config.checkpoint.trusted
        )
        deepspeed_inside.leave_out_recovery_script(engine)
        self._under_way: tuple[Meta, Path, float] | None = None  # what, where, since when
        self._uploader = CheckpointWriter(asynchronous=config.checkpoint.url is not None)
        self._uploading: int | None = None  # step of the checkpoint whose files the ranks upload, each its own
        self._published: int | None = None  # step of the newest one
        own = config.checkpoint.host_local
        self._keeps_folder = first_of_machine() if own else dist.get_rank() == 0
        self.once_a_folder = hosts_do if own else first_rank_does

    # -- Saving -------------------------------------------------------------------------------------------------------

    @property
    def writing(self) -> bool:
        """Whether this rank still writes a checkpoint that is not published yet, or uploads one. Not a collective call."""
        return (self._under_way is not None and self.writer.busy) or self._uploader.busy

    def save(self, meta: Meta) -> None:
        """Save the state of all ranks, or, if asynchronous, begin to. Publishing it removes checkpoints that need not stay."""
        self._settle()
        watchdog.beat("saving a checkpoint")
        began = time.monotonic()
        folder = _temporary(checkpoint_path(self.run_dir, meta.step), "writing")
        with agreed():
            if self._keeps_folder:
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir(parents=True)
        self.engine.save_checkpoint(
            str(folder.parent), tag=folder.name, client_state=conversion.CLIENT_STATE, save_latest=False
        )
        self.writer.save(random_state(), str(folder / _RANDOM.format(rank=dist.get_rank())))
        weights = full_weights(self.engine)
        averages = averaged_weights(self.engine) if self.config.optim.ema is not None else None
        if dist.get_rank() == 0:
            self.writer.write(lambda: self._write_model(folder, weights, averages, meta))
        self._under_way = meta, folder, began
        if not self.config.checkpoint.asynchronous:
            self.publish()

    def _write_model(
        self, folder: Path, weights: dict[str, Tensor], averages: dict[str, Tensor] | None, meta: Meta
    ) -> dict[Path, Entry]:
        write_model(folder, self.engine.module, self.tokenizer, self.config, meta, weights, averages)
        if self.seen is not None:
            self.seen.save(folder / SEEN)
        # .pt files are excluded: their writers verify them, perhaps just now on another rank.
        return {path: read_back(path) for path in folder.rglob("*") if path.is_file() and path.suffix != ".pt"}

    def publish(self) -> None:
        """Wait until every rank has written and read back its files, then give the checkpoint under way its final name.

        Each rank uploads its own files in the background; once all have, the next call makes the copy whole.
        """
        if self._uploading is not None:
            self._complete_upload(self._uploading)
        if self._under_way is None:
            return
        meta, folder, began = self._under_way
        while sums(self.device, busy=self.writer.busy)["busy"]:
            watchdog.beat("writing a checkpoint")
            time.sleep(0.1)
        files, failed = self.writer.finished()
        self._under_way = None
        rows = {str(path.relative_to(folder)): entry for path, entry in files.items()}
        told = gathered((rows, failed))
        self.once_a_folder(lambda: self._publish(meta, folder, told), "publishing a checkpoint")
        self._published = meta.step
        if dist.get_rank() == 0:
            print(f"step {meta.step}  checkpoint written and read back in {time.monotonic() - began:.1f} s", flush=True)
        if (url := self.config.checkpoint.url) is not None:
            self._uploader.write(partial(self._upload, meta.step, url, sorted(rows)))
            self._uploading = meta.step

    def _publish(self, meta: Meta, folder: Path, told: list[tuple[dict[str, Entry], str | None]]) -> None:
        reasons = [failed for _, failed in told if failed is not None]
        try:
            if reasons:
                raise OSError(reasons[0])
            files = {name: entry for rows, _ in told for name, entry in rows.items()}
            elsewhere = [name for name in files if not (folder / name).exists()]
            if elsewhere and not self.config.checkpoint.host_local:
                raise OSError(f"{elsewhere[0]} was written on another machine; set run_dir to a folder that all of them share")
            write_manifest(folder, files)
            for path in [folder, *(path for path in folder.rglob("*") if path.is_dir())]:
                _sync_folder(path)
        except OSError as error:
            shutil.rmtree(folder, ignore_errors=True)
            older = checkpoints_of(self.run_dir)
            kept = f"{older[-1]} and those before it are untouched" if older else "there is no older one"
            raise ValueError(f"the checkpoint of step {meta.step} could not be written: {error}; {kept}") from error
        final = checkpoint_path(self.run_dir, meta.step)
        if final.exists():
            final.rename(_temporary(final, "replaced"))
        folder.rename(final)
        _sync_folder(final.parent)
        shutil.rmtree(_temporary(final, "replaced"), ignore_errors=True)
        keep = kept_by(self.config.checkpoint)(scores_of(checkpoints_of(self.run_dir)))
        for old in checkpoints_of(self.run_dir):
            if old not in {checkpoint_path(self.run_dir, step) for step in keep}:
                shutil.rmtree(old)

    def _upload(self, step: int, url: str, files: list[str]) -> dict[Path, Entry]:
        if dist.get_rank() == 0:
            retract(url, step)
        upload_files(checkpoint_path(self.run_dir, step), url, files)
        return {}

    def _complete_upload(self, step: int) -> None:
        """Wait until every rank has uploaded its files; rank 0 then adds the manifest and deletes old copies, in the background.
        If the store fails, warn and go on: the next upload brings what is missing."""
        self._uploads_done()
        self._uploading, failed = None, [reason for reason in gathered(self._uploader.finished()[1]) if reason is not None]
        url = self.config.checkpoint.url
        if dist.get_rank() or url is None:
            return

        def complete() -> dict[Path, Entry]:
            try:
                if failed:
                    raise OSError(failed[0])
                mirror(self.run_dir, url, kept_by(self.config.checkpoint), step)
            except (OSError, ValueError) as error:
                print(f"warning: {url} lacks the newest checkpoint: {error}; tried again with the next one", file=sys.stderr)
            return {}

        self._uploader.write(complete)

    def _uploads_done(self) -> None:
        while sums(self.device, busy=self._uploader.busy)["busy"]:
            watchdog.beat("uploading a checkpoint")
            time.sleep(0.1)

    def finish(self) -> None:
        """Finish files, publication and upload. AgreedFailure if hosts have disks of their own and the last checkpoint is not
        whole in the store: it is whole nowhere."""
        self._settle()
        if not self.config.checkpoint.host_local or (step := self._published) is None:
            return

        def check() -> None:
            copy = join(str(self.config.checkpoint.url), checkpoint_name(step))
            if not exists(join(copy, MANIFEST)):
                raise OSError(f"the checkpoint of step {step} did not reach {copy} (see above): the same command goes on")

        first_rank_does(check, "looking for the last checkpoint in the store")

    def _settle(self) -> None:
        """Finish files, publication and upload. A later save may then remove what was uploaded."""
        self.publish()
        if self._uploading is not None:
            self._complete_upload(self._uploading)
        if self.config.checkpoint.url is not None:
            self._uploads_done()

    # -- Resuming -----------------------------------------------------------------------------------------------------

    def resume(self, trained_on: tuple[str, ...]) -> int:
        """Load the newest whole checkpoint of the run, or the one to start from; the step to go on with (0: nothing to load).

        trained_on: sha256 of the base shards that this run reads.
        """
        found = self.once_a_folder(partial(newest_whole, self.run_dir, self.config.checkpoint), "looking for a checkpoint")
        if len(names := {path and path.name for path in gathered(found)}) > 1:
            raise AgreedFailure(f"the machines would go on from different checkpoints, {names}: start the run again")
        if found is None:
            return 0
        with agreed():
            meta = read_meta(found)
            if found.parent.parent == self.run_dir:
                check_data(found, meta, trained_on)
            elif meta.step >= self.config.optim.last_step:
                start, last = self.config.checkpoint.start_from, self.config.optim.last_step
                raise ValueError(
                    f"checkpoint.start_from={start} is of step {meta.step}, and this run ends at step {last}: nothing would be "
                    "trained; set optim.steps or optim.stop_at to a later step"
                )
            if self.seen is not None and found.parent.parent != self.run_dir:
                self.seen = self.seen.after(found / SEEN)
            if not self.config.checkpoint.trusted:
                check_files(sorted(found.rglob("*.pt"))[dist.get_rank() :: dist.get_world_size()])
            check_shapes(found, self.engine.module)
            convert = conversion.needs_conversion(meta, dist.get_world_size(), self.config.zero_stage)
        if convert:
            self._load_converted(found, meta)
        else:
            loaded, _ = self.engine.load_checkpoint(str(found.parent), tag=found.name)
            if loaded is None:
                raise ValueError(f"DeepSpeed could not load {found}; rename that folder to go on from an older one")
        states = found / _RANDOM.format(rank=dist.get_rank())
        if meta.world_size == dist.get_world_size() and states.exists():
            set_random_state(load_state(states, trusted=self.config.checkpoint.trusted))
        dist.barrier()
        if self._keeps_folder:
            shutil.rmtree(self.run_dir / _FETCHED, ignore_errors=True)
        return meta.step

    def _load_converted(self, found: Path, meta: Meta) -> None:
        ranks, stage = dist.get_world_size(), self.config.zero_stage
        if dist.get_rank() == 0:
            print(
                f"{found} was written by {meta.world_size} ranks at zero_stage={meta.zero_stage}: it is being converted for "
                f"{ranks} at zero_stage={stage}", flush=True,
            )  # fmt: skip
        scratch = _temporary(checkpoint_path(self.run_dir, meta.step), "converting")
        converted = self.once_a_folder(lambda: conversion.convert(found, scratch), "converting a checkpoint")
        if not conversion.load_converted(self.engine, converted):
            raise ValueError(f"DeepSpeed could not load {converted}, converted from {found}")
        if self._keeps_folder:
            shutil.rmtree(scratch)


def _temporary(final: Path, doing: str) -> Path:
    return final.with_name(f".{final.name}.{doing}")


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def newest_whole(run_dir: Path, settings: Settings) -> Path | None:
    """Where to go on: the newest whole checkpoint of the run folder, else of `settings.url`, else `settings.start_from`.

    A torn one is said, and gets another name, so that it neither counts as one to keep nor is looked at again.
    """
    for left in (run_dir / "checkpoints").glob(".step-*"):
        shutil.rmtree(left)  # left by a killed save or conversion
    for checkpoint in reversed(checkpoints_of(run_dir)):
        torn = fault(checkpoint)
        if torn is None:
            return checkpoint
        set_aside(checkpoint, f"is torn: {torn}")
    if settings.url is not None and exists(settings.url):
        fetched = fetch_newest(settings.url, run_dir, say)
        if fetched is not None:
            say(f"going on from a copy of {settings.url}: {fetched}")
            return fetched
    if settings.start_from is None:
        return None
    path = local_path(settings.start_from)
    if path is None:  # beside this run's own checkpoints, and for as long as it takes to load it
        shutil.rmtree(run_dir / _FETCHED, ignore_errors=True)
        return fetch_checkpoint(settings.start_from, run_dir / _FETCHED, say)
    start = resolve_checkpoint(str(path))
    torn = fault(start)
    if torn is not None:
        raise ValueError(f"checkpoint.start_from={settings.start_from}: {start} is torn: {torn}; name an older one")
    return start


def check_data(checkpoint: Path, meta: Meta, trained_on: tuple[str, ...]) -> None:
    """ValueError if a run would go on with other data, or in another order, than it began with."""
    if meta.trained_on == trained_on:
        return
    gone, new = len(set(meta.trained_on) - set(trained_on)), len(set(trained_on) - set(meta.trained_on))
    changed = f"{gone} of its {len(meta.trained_on)} shards are gone, {new} are new"
    raise ValueError(
        f"the data changed since {checkpoint} was written: {changed if gone or new else 'its shards come in another order'}. "
        f"Restore the sets, or go on with other data in a new run: run_dir=ANOTHER checkpoint.start_from={checkpoint}"
    )


def check_shapes(checkpoint: Path, model: torch.nn.Module) -> None:
    """ValueError if a checkpoint belongs to another model."""
    with safe_open(checkpoint / WEIGHTS, framework="pt") as file:
        there = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (no mapping)
    here = {name: tuple(getattr(value, "ds_shape", value.shape)) for name, value in model.named_parameters()}
    here |= {name: tuple(value.shape) for name, value in model.state_dict().items() if name not in here}
    wrong = [name for name in sorted(there.keys() | here.keys()) if there.get(name) != here.get(name)]
    if wrong:
        raise ValueError(
            f"{checkpoint} is of another model: {len(wrong)} of {len(here)} tensors differ, among them {wrong[0]} with "
            f"shape {there.get(wrong[0], 'none')} there and {here.get(wrong[0], 'none')} here; take over `model`, `attmim` and "
            f"`entmlm` from {checkpoint / CONFIG}"
        )
