"""Bytes in and out, local and on a remote store (fsspec's memory file system stands in for it)."""

from __future__ import annotations

import multiprocessing
import os
import uuid
from pathlib import Path

import pytest
from mmclip_shards import storage
from mmclip_shards.faults import Patience


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "PATIENCE", Patience(first_wait_s=0.002, longest_wait_s=0.01))


@pytest.fixture(params=["local", "file", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return {"local": str(tmp_path), "file": f"file://{tmp_path}", "memory": f"memory://{uuid.uuid4().hex}"}[
        request.param
    ]


def test_write_read_list_remove(folder: str) -> None:
    where = storage.join(folder, "train", "a.bin")
    assert not storage.exists(where)
    assert storage.list_folder(storage.join(folder, "train")) == []
    storage.write_atomic(where, b"0123456789")
    assert storage.exists(where) and storage.exists(storage.join(folder, "train"))
    assert storage.read_bytes(where) == b"0123456789"
    assert storage.list_folder(storage.join(folder, "train")) == ["a.bin"]
    storage.write_atomic(where, b"new")
    assert storage.read_bytes(where) == b"new"
    storage.remove(where)
    storage.remove(where)
    assert not storage.exists(where)
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(where)


def test_ranges_are_exact_or_an_error(folder: str) -> None:
    where = storage.join(folder, "a.bin")
    storage.write_atomic(where, b"0123456789")
    assert storage.read_range(where, 3, 4) == b"3456"
    assert storage.read_range(where, 10, 0) == b""
    for offset, length in ((8, 3), (10, 1), (99, 1)):
        with pytest.raises(OSError, match="wanted at offset"):
            storage.read_range(where, offset, length)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("/a/b", "/a/b/c/d"),
        ("a/", "a/c/d"),
        ("file:///a", "file:///a/c/d"),
        ("s3://bucket/x/", "s3://bucket/x/c/d"),
        ("memory://", "memory://c/d"),
    ],
)
def test_join(url: str, expected: str) -> None:
    assert storage.join(url, "c", "d") == expected


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    where = tmp_path / "a.bin"
    storage.write_atomic(where, b"old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        storage.write_atomic(where, b"new")
    assert where.read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin"]


def _filesystem_identity(queue: multiprocessing.Queue) -> None:
    queue.put((os.getpid(), sorted({pid for pid, _ in storage._filesystems})))
    storage.exists("memory://x")
    queue.put((os.getpid(), sorted({pid for pid, _ in storage._filesystems})))


def test_a_filesystem_is_made_anew_after_fork() -> None:
    storage.exists("memory://x")
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_filesystem_identity, args=(queue,))
    child.start()
    inherited, after = queue.get(timeout=20), queue.get(timeout=20)
    child.join(20)
    assert inherited[0] not in inherited[1]
    assert after[0] in after[1]


def test_refused_access_is_not_an_empty_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """fsspec's walk turns 403 into "empty"; ls must raise and so must we."""
    filesystem, _ = storage._open_remote("memory://x")

    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError("403")

    monkeypatch.setattr(type(filesystem), "ls", refuse)
    monkeypatch.setattr(storage, "_served", set())
    with pytest.raises(PermissionError):
        storage.list_folder("memory://x")
