"""Credentials of a metadata service (EC2, ECS, EKS): one process of a machine fetches them for all of its user's.

64 loader processes that ask at once are refused by such a service. So the process that holds a lock asks, and leaves the answer
in a file that this user alone may read. It goes when a process that used it ends, and is made again when it is missed. Keys from
the environment or from files are found as ever: this takes the place of the metadata services, at the end of botocore's chain.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import fcntl
import hashlib
import json
import os
import socket
import stat
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

_SERVICES = ("container-role", "iam-role")  # botocore's names, in its order
_RENEW_S = 900.0  # before they expire, as botocore does; half of their life, if that is shorter
_WAIT_S = 30.0  # for the process that asks; a service answers or is given up within 10 s
_POLL_S = 0.02
_given: str | None = None  # the access key that this process got last
_refused: str | None = None  # one that a store called expired

Found = dict[str, Any]
"""access_key, secret_key, token and expiry_time (ISO), as botocore names them."""


def share_metadata(session: Any) -> Any:
    """The session, of botocore or aiobotocore, whose metadata services are asked by one process of the machine."""
    resolver = session.get_component("credential_provider")
    for name in _SERVICES:
        resolver.remove(name)
    resolver.providers.append(_AsyncProvider() if type(session).__module__.startswith("aiobotocore") else _Provider())
    return session


def refuse() -> None:
    """A store called the credentials that this process uses expired: get others, if the file still holds these."""
    global _refused  # noqa: PLW0603
    _refused = _given


def shared() -> Found | None:
    """The machine's credentials, valid for at least `_RENEW_S` or half of their life; None where no service gives any.

    CredentialRetrievalError if the process that asks for all has no answer. ValueError for a folder that is not safe.
    """
    global _given  # noqa: PLW0603
    path = _path()
    found = _read(path) or _fetched_by_one(path)
    if found is not None:
        if _given is None:
            atexit.register(path.unlink, missing_ok=True)
        _given = found["access_key"]
    return found


class _Provider:
    METHOD = CANONICAL_NAME = "shared-metadata"

    def load(self) -> Any:
        from botocore.credentials import RefreshableCredentials

        found = shared()
        return found and RefreshableCredentials.create_from_metadata(found, refresh_using=shared, method=self.METHOD)


class _AsyncProvider(_Provider):
    async def load(self) -> Any:
        from aiobotocore.credentials import AioRefreshableCredentials

        async def refresh() -> Found | None:
            return await asyncio.to_thread(shared)

        found = await refresh()
        return found and AioRefreshableCredentials.create_from_metadata(found, refresh_using=refresh, method=self.METHOD)


def _fetched_by_one(path: Path) -> Found | None:
    lock = os.open(path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT, 0o600)
    try:
        if _locked(lock):
            return _read(path) or _ask(path)
        until = time.monotonic() + _WAIT_S
        while not (free := _locked(lock)) and time.monotonic() < until:
            time.sleep(_POLL_S)
        if found := _read(path):
            return found
        told = "the process that asked for all had no answer" if free else f"no answer to another process in {_WAIT_S:g} s"
        # Not asked again by each of those that waited: they come back at random moments.
        from botocore.exceptions import CredentialRetrievalError

        raise CredentialRetrievalError(provider=_Provider.METHOD, error_msg=told)
    finally:
        fcntl.flock(lock, fcntl.LOCK_UN)  # closing is not enough: a process that was forked meanwhile has the file open, too
        os.close(lock)


def _locked(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _ask(path: Path) -> Found | None:
    """Ask the services, and publish what they give."""
    from botocore.session import Session

    resolver = Session().get_component("credential_provider")
    for name in _SERVICES:
        credentials = resolver.get_provider(name).load()
        if credentials is not None:
            keys = credentials.get_frozen_credentials()
            found = {
                "access_key": keys.access_key, "secret_key": keys.secret_key, "token": keys.token,
                "expiry_time": credentials._expiry_time.isoformat(),
            }  # fmt: skip
            with contextlib.suppress(OSError):  # a full disk ends no run: every process asks then
                _publish(path, found)
            return found
    return None


def _publish(path: Path, found: Found) -> None:
    file, temporary = tempfile.mkstemp(dir=path.parent)  # mode 0600
    try:
        with os.fdopen(file, "w") as output:
            json.dump(found, output)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _read(path: Path) -> Found | None:
    """The published credentials, if they are good for a while."""
    try:
        with path.open() as file:
            found: Found = json.load(file)
            since = datetime.fromtimestamp(os.fstat(file.fileno()).st_mtime, UTC)
    except FileNotFoundError:
        return None
    expiry = datetime.fromisoformat(found["expiry_time"])
    renew_s = min(_RENEW_S, (expiry - since).total_seconds() / 2)
    return found if (expiry - _now()).total_seconds() > renew_s and found["access_key"] != _refused else None


def _now() -> datetime:
    return datetime.now(UTC)


def _path() -> Path:
    """The file of this machine's identity, in a folder of this user alone."""
    folder = Path(tempfile.gettempdir(), f"mmclip-credentials-{os.getuid()}")
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise ValueError(f"{folder} must be a folder that you own and nobody else may enter: remove it, or set another TMPDIR")
    asked = {name: value for name, value in os.environ.items() if name.startswith(("AWS_CONTAINER_", "AWS_EC2_METADATA_"))}
    identity = json.dumps([socket.gethostname(), sorted(asked.items())])
    return folder / f"{hashlib.sha256(identity.encode()).hexdigest()[:32]}.json"
