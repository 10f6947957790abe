"""Write the files of a checkpoint: hash them on the way, read them back, on request in the background.

DeepSpeed calls it as its checkpoint engine. DeepSpeed's own asynchronous engine (`checkpoint.writer.decoupled`) hands the tensors
to a second process, and the next optimizer step waits for it. Here a copy is written while training goes on.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch
import xxhash
from deepspeed.checkpoint.utils import clone_tensors_for_torch_save
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointCommitInfo, CheckpointEngine

from mmclip_dist.checkpoint.folder import Entry, entry_of
from mmclip_dist.checkpoint.safe import load_state


class _Hashing:
    """A file for writing that hashes what it is given."""

    def __init__(self, handle: BinaryIO) -> None:
        self.handle, self.digest, self.size = handle, xxhash.xxh3_128(), 0
        self.failed: OSError | None = None

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        self.size += len(data)
        try:
            return self.handle.write(data)
        except OSError as error:
            self.failed = error
            raise

    def flush(self) -> None:
        self.handle.flush()


def save_verified(state: Any, path: Path) -> Entry:
    """torch.save, then read back from the disk. OSError if it could not be written, or reads as something else."""
    with path.open("wb") as handle:
        file = _Hashing(handle)
        try:
            torch.save(state, file)  # type: ignore[arg-type]  # it only writes
        except RuntimeError:
            if file.failed is not None:  # torch reports a full disk as a fault of its archive
                raise file.failed from None
            raise
    return read_back(path, Entry(file.size, file.digest.hexdigest()))


def read_back(path: Path, wanted: Entry | None = None) -> Entry:
    """Size and hash of a file, read from the disk and not from memory. OSError if they are not those that were written."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        with suppress(OSError):  # not every file system has a page cache to drop
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
    found = entry_of(path)
    if wanted is not None and found != wanted:
        raise OSError(f"{path} does not read back as it was written")
    return found


class CheckpointWriter(CheckpointEngine):
    """Writes this rank's files. `finished` reports failures: an error inside DeepSpeed's save, on one rank, would leave the
    others waiting.

    asynchronous: `save` copies the state to host memory and returns. trusted: as in `load_state`.
    """

    def __init__(self, asynchronous: bool, *, trusted: bool = False) -> None:
        super().__init__()
        self.asynchronous, self.trusted = asynchronous, trusted
        self._files: dict[Path, Entry] = {}
        self._failed: str | None = None
        self._jobs: queue.Queue[Callable[[], None]] = queue.Queue()
        if asynchronous:
            threading.Thread(target=self._work, name="checkpoint-writer", daemon=True).start()

    def _work(self) -> None:
        while True:
            job = self._jobs.get()
            job()
            self._jobs.task_done()

    def create(self, info: CheckpointCommitInfo) -> None:
        """Nothing to prepare."""

    def commit(self, info: CheckpointCommitInfo) -> bool:
        """Nothing to do: `Checkpoints` publishes when all ranks have finished."""
        return True

    def load(self, path: str, map_location: Any = None) -> Any:
        return load_state(path, map_location, trusted=self.trusted)

    def save(self, state_dict: Any, path: str) -> None:
        if self.asynchronous:
            state_dict = clone_tensors_for_torch_save(state_dict)
        self.write(lambda: {Path(path): save_verified(state_dict, Path(path))})

    def write(self, files: Callable[[], dict[Path, Entry]]) -> None:
        """Run files(), which writes files and returns them: at once, or after what is queued."""

        def job() -> None:
            try:
                if self._failed is None:
                    self._files |= files()
            except Exception as error:
                self._failed = str(error) if isinstance(error, OSError) else repr(error)

        if self.asynchronous:
            self._jobs.put(job)
        else:
            job()

    @property
    def busy(self) -> bool:
        """Whether something is still being written."""
        return self._jobs.unfinished_tasks > 0

    def finished(self) -> tuple[dict[Path, Entry], str | None]:
        """Wait until all is written. Returns the files since the last call, and what failed."""
        self._jobs.join()
        files, failed = self._files, self._failed
        self._files, self._failed = {}, None
        return files, failed
