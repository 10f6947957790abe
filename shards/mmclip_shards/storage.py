"""Read and write files, local or on object storage: a thin layer over fsspec with atomic writes and exact reads.

A remote request that fails is tried again (`faults.Patience`). After an error of credentials, the next try opens a new
session and reads them again. A folder that was served before is believed to be served again; until then, refused access and a
store that does not answer are told soon.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import shutil
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import fsspec
from fsspec.asyn import AsyncFileSystem
from fsspec.asyn import sync as run_async

from mmclip_shards.credentials import refuse, share_metadata
from mmclip_shards.fast_s3 import FastBucket, missing
from mmclip_shards.faults import CutFile, MissingCredentials, Patience, Stalled, Tries

T = TypeVar("T")
Url = str | os.PathLike[str]
"""A local path, or file://, memory://, s3://, gs:// ... (anything fsspec opens)."""

Client = Literal["s3fs", "obstore"]
"""Who reads ranges on S3; all else is done by s3fs, and on other stores by fsspec."""

PATIENCE = Patience()

_OPTIONS: dict[str, dict[str, Any]] = {
    # botocore makes one try with short time-outs: this module alone decides how often to try again.
    "s3": {"config_kwargs": {"connect_timeout": 5, "read_timeout": 30, "retries": {"total_max_attempts": 1},
                             "max_pool_connections": 64}},
}  # fmt: skip
_TRIES_BEFORE_SIZE = 2  # one short answer may be a broken response; after this many, ask for the file's size
_SLOWEST = 64 * 1024  # bytes a second, on average: a slower read counts as stalled
_PAGE = 1000  # entries of a page of a listing, the most that S3 gives
_OPENING_S = 60.0  # to open a session: it reads credentials, perhaps over the network
_EXPIRED = {
    "ExpiredToken",
    "ExpiredTokenException",
    "TokenRefreshRequired",
    "400",  # a refused HEAD request gives no reason
}

_filesystems: dict[tuple[int, str], Any] = {}
_served: set[str] = set()  # buckets and folders that answered this process, or the one that it was forked from
_opening = threading.Lock()


# Another thread may hold the lock at the moment of a fork; the child would wait for it for ever.
os.register_at_fork(after_in_child=_opening._at_fork_reinit)  # type: ignore[attr-defined]


def local_path(url: Url) -> Path | None:
    """The path behind a plain path or a file:// URL; None for every other store."""
    text = os.fspath(url)
    if text.startswith("file://"):
        return Path(text.removeprefix("file://"))
    return None if "://" in text else Path(text)


def join(url: Url, *parts: str) -> str:
    """`url` with `parts` appended, separated by slashes."""
    text = os.fspath(url)
    if "://" not in text:
        return str(Path(text, *parts))
    scheme, _, rest = text.partition("://")
    return f"{scheme}://" + "/".join([*([rest.rstrip("/")] if rest else []), *parts])


def exists(url: Url) -> bool:
    """Whether a file or a folder is there."""
    path = local_path(url)
    return path.exists() if path is not None else remote_kind(url) is not None


def remote_kind(url: Url) -> Literal["file", "directory"] | None:
    """What is behind the URL of a remote store."""

    def found(filesystem: Any, name: str) -> Literal["file", "directory"] | None:
        try:  # s3fs's own `exists` answers False for a bucket that refuses access
            told = _call(filesystem, PATIENCE.stall_s, "info", name)["type"]
        except FileNotFoundError:
            return None
        return "directory" if told == "directory" else "file"

    return _with_retries(url, found)


def read_bytes(url: Url) -> bytes:
    """A whole file. FileNotFoundError when missing, OSError when it cannot be read."""
    path = local_path(url)
    if path is not None:
        return path.read_bytes()
    return read_parsed(url, bytes)


def read_parsed(url: Url, parse: Callable[[bytes], T], tries: Tries | None = None) -> T:
    """parse(the bytes of a whole file). A remote file is read again after a ValueError: the store may have sent damaged bytes.

    tries: counts the failed tries and limits them; a fresh one by default.
    """
    if local_path(url) is not None:
        return parse(read_bytes(url))
    tries = tries or Tries(PATIENCE)
    stall_s = tries.patience.stall_s
    return _with_retries(url, lambda filesystem, name: parse(_read_whole(filesystem, name, stall_s)), tries)


def read_versioned(url: Url, parse: Callable[[bytes], T]) -> tuple[T, str]:
    """As `read_parsed` of a remote file, with its `version`. On S3 both are of one GET."""
    stall_s = PATIENCE.stall_s

    def read(filesystem: Any, name: str) -> tuple[T, str]:
        if hasattr(filesystem, "_call_s3"):
            data = _stream_whole(filesystem, name, stall_s)
            return parse(bytes(data.whole())), data.version
        told = _version(_call(filesystem, stall_s, "info", name))  # first: of a file that is replaced meanwhile, the old one
        return parse(_read_whole(filesystem, name, stall_s)), told

    return _with_retries(url, read)


def read_optional(url: Url) -> bytes | None:
    """A whole remote file, or None if it is not there: one request tells, as for `exists`."""

    def read(filesystem: Any, name: str) -> bytes | None:
        try:
            return _read_whole(filesystem, name, PATIENCE.stall_s)
        except FileNotFoundError:
            return None

    return _with_retries(url, read)


def version(url: Url) -> str:
    """A text that changes with a file, which is not read: its size and time of change; of a remote one its size, and its entity
    tag or time of change if the store tells one. FileNotFoundError when missing."""
    path = local_path(url)
    if path is not None:
        status = path.stat()
        return f"{status.st_size} {status.st_mtime_ns}"
    return _with_retries(url, lambda filesystem, name: _version(_call(filesystem, PATIENCE.stall_s, "info", name)))


def file_size(url: Url) -> int:
    """Bytes of a file. FileNotFoundError when missing."""
    path = local_path(url)
    if path is not None:
        return path.stat().st_size
    return _with_retries(url, lambda filesystem, name: int(_call(filesystem, PATIENCE.stall_s, "info", name)["size"]))


def check_client(client: Client, url: Url) -> None:
    """ValueError if `client` cannot read ranges of remote files in this folder."""
    if client != "obstore" or local_path(url) is not None:
        return
    if not os.fspath(url).startswith("s3://"):
        raise ValueError(f"obstore is used for s3:// alone, not for {os.fspath(url)}: use s3fs (data.reading.client)")
    if mend := missing():
        raise ValueError(
            f"obstore, which shall read {os.fspath(url)}, is not installed: {mend}, or use s3fs (data.reading.client)"
        )


def read_range(
    url: Url, offset: int, length: int, tries: Tries | None = None, client: Client = "s3fs"
) -> bytes | memoryview:
    """Exactly `length` bytes from `offset` on. CutFile when the file ends before that, OSError when the store fails.

    A remote read that breaks off continues at the byte where it stopped. tries: as in `read_parsed`.
    """
    path = local_path(url)
    if path is not None:
        with path.open("rb") as file:
            file.seek(offset)
            data = file.read(length)
        if len(data) != length:
            raise CutFile(f"{path}: {length} bytes wanted at offset {offset}, {len(data)} came")
        return data
    got = _Received()
    tries = tries or Tries(PATIENCE)
    while got.size < length:
        before, began = got.size, time.monotonic()
        filesystem, name = _open_remote(url)
        try:
            read = _read_fast if client == "obstore" else _read_some
            read(filesystem, name, offset + before, length - before, got, tries.patience.stall_s)
            if got.size < length:
                raise OSError(f"{length} bytes wanted at offset {offset}, {got.size} came")
        except Exception as fault:
            if tries.count == _TRIES_BEFORE_SIZE:
                _check_end(url, offset, length, tries.patience.stall_s)
            came = got.size - before
            progress = came > 0 and came >= _SLOWEST * (time.monotonic() - began)  # a trickle could last for days
            _wait(tries, url, f"{os.fspath(url)}, offset {offset + got.size}", filesystem, fault, progress=progress)
    _served.update(_places(url))
    return got.whole()


def write_atomic(url: Url, data: bytes) -> None:
    """Publish a whole file or nothing: a rename on a local disk, one completed upload on object storage."""
    path = local_path(url)
    if path is None:
        patience = PATIENCE.stall_s + len(data) / _SLOWEST
        _with_retries(url, lambda filesystem, name: _call(filesystem, patience, "pipe_file", name, data))
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    # A killed process leaves this file. It ends in .tmp, so nobody takes it for a shard.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        if error.filename is None:  # a write does not tell where the disk is full
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def upload(source: Path, url: Url) -> None:
    """Publish a local file whole or not at all; large files go in parts. FileNotFoundError without `source`, else OSError."""
    path, size = local_path(url), source.stat().st_size
    if path is None:
        patience = PATIENCE.stall_s + size / _SLOWEST
        _with_retries(url, lambda filesystem, name: _call(filesystem, patience, "put_file", str(source), name))
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        shutil.copyfile(source, temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def download(url: Url, target: Path) -> None:
    """Copy a whole file to `target` and make its folder. After an error or a kill, `target` may be incomplete."""
    target.parent.mkdir(parents=True, exist_ok=True)
    path = local_path(url)
    if path is not None:
        shutil.copyfile(path, target)
        return
    patience = PATIENCE.stall_s + file_size(url) / _SLOWEST
    _with_retries(url, lambda filesystem, name: _call(filesystem, patience, "get_file", name, str(target)))


def remove(url: Url) -> None:
    """Delete a file; nothing happens when it is not there."""
    path = local_path(url)
    if path is not None:
        path.unlink(missing_ok=True)
        return
    with contextlib.suppress(FileNotFoundError):
        _with_retries(url, lambda filesystem, name: filesystem.rm_file(name))


def remove_empty_folder(url: Url) -> None:
    """Delete a local folder that holds nothing. Object storage has no folders to delete."""
    path = local_path(url)
    if path is not None and path.is_dir() and not any(path.iterdir()):
        path.rmdir()


def list_folder(url: Url) -> list[str]:
    """Sorted names in a folder; empty when there is no such folder. PermissionError when access is refused."""
    path = local_path(url)
    if path is not None:
        return sorted(entry.name for entry in path.iterdir()) if path.is_dir() else []

    try:
        return sorted(name for name, _ in scan_remote(url))
    except FileNotFoundError:
        return []


def scan_remote(url: Url, *, deep: bool = False) -> Iterator[tuple[str, bool]]:
    """(name, whether it is a folder) of each entry of a remote folder; on S3 a page is held at a time.

    deep: the paths of all files below it. Nothing for a folder that is not there; FileNotFoundError for such a bucket.
    """
    token: str | None = None
    while True:
        entries, token = _with_retries(url, partial(_page, deep=deep, token=token))
        yield from entries
        if token is None:
            return


# -- Remote stores ----------------------------------------------------------------------------------------------------


def _with_retries(url: Url, action: Callable[[Any, str], T], tries: Tries | None = None) -> T:
    """action(file system, name), repeated until it succeeds or `tries` gives up."""
    tries = tries or Tries(PATIENCE)
    while True:
        filesystem, name = _open_remote(url)
        try:
            found = action(filesystem, name)
        except Exception as fault:
            _wait(tries, url, os.fspath(url), filesystem, fault)
        else:
            _served.update(_places(url))
            return found


def _wait(tries: Tries, url: Url, what: str, filesystem: Any, fault: Exception, *, progress: bool = False) -> None:
    """Wait for the next try after a fault, as long as its kind and what the store did before deserve."""
    fault, status = _diagnose(url, filesystem, fault), _status(fault)
    bucket, folder = _places(url)
    refused = isinstance(fault, PermissionError) and not isinstance(fault, MissingCredentials)
    tries.wait(what, fault, progress=progress, served=status >= 500 or (folder if refused else bucket) in _served)


def _places(url: Url) -> tuple[str, str]:
    """A file's bucket and folder."""
    scheme, _, path = os.fspath(url).partition("://")
    return f"{scheme}://{path.partition('/')[0]}", f"{scheme}://{path.rpartition('/')[0]}"


def _status(fault: Exception) -> int:
    """The HTTP status that a store answered with; 0 if it did not answer."""
    response = getattr(fault.__cause__, "response", None) or {}
    return int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _diagnose(url: Url, filesystem: Any, fault: Exception) -> Exception:
    """The error that `Tries` should judge. After an error of credentials or session, the next try opens a new session."""
    expired = (getattr(fault.__cause__, "response", None) or {}).get("Error", {}).get("Code") in _EXPIRED
    missing = "Credential" in type(fault).__name__  # none found, or the service that gives them failed
    if expired or missing or isinstance(fault, PermissionError | RuntimeError):
        session = os.getpid(), os.fspath(url).partition("://")[0]
        with _opening:
            if _filesystems.get(session) is filesystem:  # else another thread has replaced it already
                del _filesystems[session]
    if expired:
        refuse()
        # an OSError, so that it is tried longer than other refusals: the renewal may come late
        return OSError(f"{fault} (expired credentials? they are read again at every try)")
    if missing:
        return MissingCredentials(f"{fault}: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE")
    return fault


def _check_end(url: Url, offset: int, length: int, stall_s: float) -> None:
    """CutFile when the file really ends before the wanted bytes: more tries would not help."""
    try:
        filesystem, name = _open_remote(url)
        size = int(_call(filesystem, stall_s, "info", name)["size"])
    except Exception:
        return  # the size is unknown: go on trying
    if size < offset + length:
        raise CutFile(f"{length} bytes wanted at offset {offset}, but the file has {size} bytes")


def _call(filesystem: Any, seconds: float, method: str, *arguments: object) -> Any:
    """Call a method of the file system. OSError after `seconds`, if the file system is asynchronous (others cannot stop)."""
    if isinstance(filesystem, AsyncFileSystem):
        return run_async(filesystem.loop, _within, seconds, filesystem, getattr(filesystem, f"_{method}"), *arguments)
    return getattr(filesystem, method)(*arguments)


def _page(filesystem: Any, name: str, *, deep: bool, token: str | None) -> tuple[list[tuple[str, bool]], str | None]:
    """A page of a listing, and what to ask the next one by."""
    if not hasattr(filesystem, "_call_s3"):
        try:
            found = filesystem.find(name, detail=True).values() if deep else filesystem.ls(name, detail=True)
        except FileNotFoundError:
            return [], None
        above = len(name.rstrip("/")) + 1
        return [(each["name"].rstrip("/")[above:], each["type"] == "directory") for each in found if each["name"][above:]], None
    bucket, key, _ = filesystem.split_path(name)
    prefix = f"{key.rstrip('/')}/" if key else ""
    asked = {"Bucket": bucket, "Prefix": prefix, "MaxKeys": _PAGE} | ({} if deep else {"Delimiter": "/"})
    asked |= {"ContinuationToken": token} if token is not None else {}
    ask = partial(filesystem._call_s3, "list_objects_v2", **asked)
    answer = run_async(filesystem.loop, _within, PATIENCE.stall_s, filesystem, ask)
    folders = [(each["Prefix"][len(prefix) : -1], True) for each in answer.get("CommonPrefixes", ())]
    files = [(each["Key"][len(prefix) :], False) for each in answer.get("Contents", ())]
    entries = folders + [entry for entry in files if entry[0] and not entry[0].endswith("/")]  # else the mark of a folder
    return entries, answer.get("NextContinuationToken") if answer.get("IsTruncated") else None


def _version(told: Mapping[str, Any]) -> str:
    """Of the facts that a store tells of a file."""
    names = ("ETag", "etag", "mtime", "modified", "last_modified", "LastModified", "created")
    return " ".join([str(told.get("size")), *[str(told[name]) for name in names if told.get(name)][:1]])


class _Received:
    """The bytes of a read as they arrive, joined once at the end. Growing one buffer would copy them again and again, and
    hold the interpreter's lock."""

    def __init__(self) -> None:
        self.parts: list[bytes | memoryview] = []
        self.size = 0
        self.version = ""  # of a whole file

    def add(self, part: bytes | memoryview) -> None:
        self.parts.append(part)
        self.size += len(part)

    def whole(self) -> bytes | memoryview:
        return self.parts[0] if len(self.parts) == 1 else b"".join(self.parts)


def _read_whole(filesystem: Any, name: str, stall_s: float) -> bytes:
    if not hasattr(filesystem, "_call_s3"):
        return bytes(filesystem.cat_file(name))
    return bytes(_stream_whole(filesystem, name, stall_s).whole())


def _stream_whole(filesystem: Any, name: str, stall_s: float) -> _Received:
    data = _Received()
    run_async(filesystem.loop, _stream_s3, filesystem, name, 0, None, data, stall_s)
    return data


def _read_some(filesystem: Any, name: str, offset: int, length: int, into: _Received, stall_s: float) -> None:
    """Append up to `length` bytes from `offset` on to `into`. After an error, `into` keeps the bytes that came before it."""
    if hasattr(filesystem, "_call_s3"):  # s3fs drops the bytes that came before a connection broke
        run_async(filesystem.loop, _stream_s3, filesystem, name, offset, length, into, stall_s)
    else:
        patience = stall_s + length / _SLOWEST
        into.add(_call(filesystem, patience, "cat_file", name, offset, offset + length)[:length])


def _read_fast(filesystem: Any, name: str, offset: int, length: int, into: _Received, stall_s: float) -> None:
    """As `_read_some`, by obstore. It keeps nothing of a broken answer."""
    bucket, key, _ = filesystem.split_path(name)
    with _opening:
        fast = filesystem.fast_buckets.get((bucket, stall_s))
        if fast is None:
            fast = filesystem.fast_buckets[bucket, stall_s] = FastBucket(bucket, stall_s)
    into.add(
        run_async(filesystem.loop, _within, stall_s + length / _SLOWEST, filesystem, fast.read, key, offset, length)
    )


async def _within(seconds: float, filesystem: Any, function: Callable[..., Awaitable[T]], *arguments: object) -> T:
    """function(*arguments) of a file system. OSError after `seconds`."""
    async with _limit(filesystem, seconds, f"no answer within {seconds:g} s"):
        return await function(*arguments)


async def _stream_s3(
    filesystem: Any, name: str, offset: int, length: int | None, into: _Received, stall_s: float
) -> None:
    """Append the answer of one GET to `into`: of a range, or of the whole file if `length` is None.

    OSError when no byte comes for `stall_s`, when the answer is too slow, or when it holds another range.
    """
    bucket, key, _ = filesystem.split_path(name)
    asked = {} if length is None else {"Range": f"bytes={offset}-{offset + length - 1}"}
    now = asyncio.get_running_loop().time
    async with _limit(filesystem, stall_s, f"no byte for {stall_s:g} s, or fewer than {_SLOWEST} a second") as stall:
        answer = await filesystem._call_s3("get_object", Bucket=bucket, Key=key, **asked)
        body = answer["Body"]
        try:
            if length is None and (length := answer.get("ContentLength")) is None:
                raise OSError("the store does not say how long the file is")
            into.version = _version({"size": length, **answer})
            if asked and not answer.get("ContentRange", "").startswith(f"bytes {offset}-"):
                found = answer.get("ContentRange") or "no range"
                raise OSError(f"asked for the bytes from {offset} on, the store sent {found}")
            end, latest = into.size + length, now() + stall_s + length / _SLOWEST
            # Read a whole file until nothing comes: the client compares its checksum only then.
            while (into.size < end or not asked) and (part := await body.read(1 << 20)):
                into.add(part[: end - into.size])
                stall.reschedule(min(now() + stall_s, latest))
        finally:
            body.close()


@contextlib.asynccontextmanager
async def _limit(filesystem: Any, seconds: float, told: str) -> AsyncIterator[asyncio.Timeout]:
    """Stalled(told) when the block takes longer than `seconds`. Opening the session does not count: it may take seconds."""
    try:
        async with asyncio.timeout(_OPENING_S) as limit:
            if hasattr(filesystem, "set_session"):
                await filesystem.set_session()
            limit.reschedule(asyncio.get_running_loop().time() + seconds)
            yield limit
    except TimeoutError as error:  # fsspec replaces a TimeoutError by one without a message
        raise Stalled(told) from error


def _open_remote(url: Url) -> tuple[Any, str]:
    """This process's file system for a URL, and the file's name in it.

    Each process opens its own: one that was inherited through fork raises or hangs (s3fs issues 369, 889, 914). The
    listing cache is off: it hides shards that were published after the first listing.
    """
    text = os.fspath(url)
    protocol = text.partition("://")[0]
    with _opening:
        cached = _filesystems.get((os.getpid(), protocol))
        if cached is None:
            options = _OPTIONS.get(protocol, {}) | _session_of(protocol)
            cached = fsspec.filesystem(protocol, use_listings_cache=False, skip_instance_cache=bool(options), **options)
            if hasattr(cached, "retries"):
                cached.retries = 1
            cached.fast_buckets = {}  # here, so that a new session brings new ones, with the credentials of the moment
            _filesystems[(os.getpid(), protocol)] = cached
    return cached, str(cached._strip_protocol(text))


def _session_of(protocol: str) -> dict[str, Any]:
    if protocol != "s3":
        return {}
    fsspec.get_filesystem_class(protocol)  # says what to install where it is missing
    from aiobotocore.session import AioSession

    return {"session": share_metadata(AioSession())}
