"""Bytes in and out of a folder, local or on object storage: thin over fsspec, with atomic writes and exact reads."""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path
from typing import Any

import fsspec

Url = str | os.PathLike[str]
"""A local path, or file://, memory://, s3://, gs:// ... (anything fsspec opens)."""

_filesystems: dict[tuple[int, str], Any] = {}


def local_path(url: Url) -> Path | None:
    """The path behind a plain path or a file:// URL; None for every other store."""
    text = os.fspath(url)
    if text.startswith("file://"):
        return Path(text.removeprefix("file://"))
    return None if "://" in text else Path(text)


def join(url: Url, *parts: str) -> str:
    """`url` with names appended."""
    text = os.fspath(url)
    if "://" not in text:
        return str(Path(text, *parts))
    scheme, _, rest = text.partition("://")
    return f"{scheme}://" + "/".join([*([rest.rstrip("/")] if rest else []), *parts])


def exists(url: Url) -> bool:
    """Whether a file or a folder is there."""
    path = local_path(url)
    if path is not None:
        return path.exists()
    filesystem, name = _open_remote(url)
    return bool(filesystem.exists(name))


def read_bytes(url: Url) -> bytes:
    """A whole file. FileNotFoundError when missing, OSError when it cannot be read."""
    path = local_path(url)
    if path is not None:
        return path.read_bytes()
    filesystem, name = _open_remote(url)
    return bytes(filesystem.cat_file(name))


def read_range(url: Url, offset: int, length: int) -> bytes:
    """Exactly `length` bytes from `offset` on. OSError when the file ends before."""
    path = local_path(url)
    if path is not None:
        with path.open("rb") as file:
            file.seek(offset)
            data = file.read(length)
    else:
        filesystem, name = _open_remote(url)
        data = bytes(filesystem.cat_file(name, start=offset, end=offset + length)) if length else b""
    if len(data) != length:
        raise OSError(f"{os.fspath(url)}: {length} bytes wanted at offset {offset}, {len(data)} came")
    return data


def write_atomic(url: Url, data: bytes) -> None:
    """Publish a whole file or nothing: a rename on a local disk, one completed upload on object storage."""
    path = local_path(url)
    if path is None:
        filesystem, name = _open_remote(url)
        filesystem.pipe_file(name, data)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    # The name ends in .tmp, so that what a killed process leaves can never be taken for a shard.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def remove(url: Url) -> None:
    """Delete a file; nothing happens when it is not there."""
    path = local_path(url)
    if path is not None:
        path.unlink(missing_ok=True)
        return
    filesystem, name = _open_remote(url)
    with contextlib.suppress(FileNotFoundError):
        filesystem.rm_file(name)


def remove_empty_folder(url: Url) -> None:
    """Delete a local folder that holds nothing. Object storage has no folders to delete."""
    path = local_path(url)
    if path is not None and path.is_dir() and not any(path.iterdir()):
        path.rmdir()


def list_folder(url: Url) -> list[str]:
    """Sorted names in a folder; empty when there is no such folder. Refused access raises, it never reads as empty."""
    path = local_path(url)
    if path is not None:
        return sorted(entry.name for entry in path.iterdir()) if path.is_dir() else []
    filesystem, name = _open_remote(url)
    try:
        found = filesystem.ls(name, detail=False)
    except FileNotFoundError:
        return []
    return sorted(entry.rstrip("/").rsplit("/", 1)[-1] for entry in found if entry.rstrip("/") != name.rstrip("/"))


def _open_remote(url: Url) -> tuple[Any, str]:
    """This process's file system for a URL, and the name in it.

    One inherited across fork raises or hangs (s3fs 369, 889, 914), hence the process id. Its listing cache is off: it
    hides shards published after the first look.
    """
    text = os.fspath(url)
    protocol = text.partition("://")[0]
    cached = _filesystems.get((os.getpid(), protocol))
    if cached is None:
        cached = fsspec.filesystem(protocol, use_listings_cache=False)
        _filesystems[(os.getpid(), protocol)] = cached
    return cached, str(cached._strip_protocol(text))
