"""A bounded folder of chunks on a local disk, shared by the processes of a machine."""

from __future__ import annotations

import fcntl
import hashlib
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple


class Chunk(NamedTuple):
    """Bytes [start, stop) of the shard at `url` whose tar has this sha256."""

    url: str
    sha256: str
    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start


class ChunkFolder:
    """Chunks on a local disk, at most `limit` bytes; the least recently used are deleted first.

    A chunk's name comes from the whole URL and the shard's sha256, so two sets never share one. Any number of processes may
    use a folder: chunks appear whole (by a rename), and a lock guards the total size.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        if limit < 1:
            raise ValueError(f"the cache {folder} may hold {limit} bytes; allow it at least a few chunks of 8 MiB")
        self.folder, self.limit = folder, limit
        folder.mkdir(parents=True, exist_ok=True)
        with self._locked():
            pass  # fail now if we may not use the folder; `keep` would hide that

    def find(self, chunk: Chunk) -> bytes | None:
        """A chunk's bytes; None when it is not there or incomplete."""
        path = self._path(chunk)
        try:
            data = path.read_bytes()
        except OSError:
            return None
        if len(data) != chunk.size:
            self.remove(chunk)
            return None
        with suppress(OSError):  # another process deleted it, or another user owns it
            os.utime(path)
        return data

    def keep(self, chunk: Chunk, data: bytes | memoryview) -> None:
        """Store a chunk, unless it is larger than the whole folder may be. Deletes old chunks to make room."""
        path = self._path(chunk)
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        if len(data) > self.limit:
            return
        with self._locked() as total:
            if path.exists():
                return
            if total.value + len(data) > self.limit:
                total.value = self._make_room(len(data))
            try:
                temporary.write_bytes(data)
                temporary.replace(path)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
            total.value += len(data)

    def remove(self, chunk: Chunk) -> None:
        with self._locked() as total, suppress(FileNotFoundError):
            path = self._path(chunk)
            size = path.stat().st_size
            path.unlink()
            total.value -= size

    def _path(self, chunk: Chunk) -> Path:
        name = hashlib.sha256(f"{chunk.url}\n{chunk.sha256}\n{chunk.start}\n{chunk.stop}".encode()).hexdigest()
        return self.folder / f"{name[:40]}.chunk"

    def _make_room(self, wanted: int) -> int:
        """Delete the least recently used chunks, down to nine tenths of the limit -> bytes that are left."""
        found = []
        for path in self.folder.iterdir():
            if path.name.endswith(".tmp"):
                path.unlink(missing_ok=True)  # left by a killed process: nobody writes while we hold the lock
            elif path.suffix == ".chunk":
                state = path.stat()
                found.append((state.st_mtime_ns, path, state.st_size))
        total = sum(size for _, _, size in found)
        for _, path, size in sorted(found):
            if total + wanted <= self.limit * 9 // 10:
                break
            path.unlink(missing_ok=True)
            total -= size
        return total

    @contextmanager
    def _locked(self) -> Iterator[_Total]:
        descriptor = os.open(self.folder / ".total", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            text = os.pread(descriptor, 32, 0)
            total = _Total(int(text) if text.strip().isdigit() else self._make_room(0))
            yield total
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, str(max(0, total.value)).encode(), 0)
        finally:
            os.close(descriptor)


@dataclass
class _Total:
    value: int
