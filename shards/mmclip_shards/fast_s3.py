"""Ranges of objects on S3 through `obstore` (the extra `s3-fast`): faster than s3fs, for less processor time a byte.

Addresses, regions and credentials are those that botocore finds, and errors are those of s3fs, so that a fault is judged alike
whoever met it.
"""

from __future__ import annotations

import datetime
import os
import re
from typing import Any

from mmclip_shards.credentials import share_metadata
from mmclip_shards.faults import Stalled

_TTL = datetime.timedelta(minutes=10)  # botocore renews credentials that expire sooner
_CONNECT_S = 5
_process: int | None = None


def missing() -> str | None:
    """What to install, if ranges cannot be read this way."""
    try:
        import obstore  # noqa: F401
    except ImportError:
        return 'pip install "mmclip-dist[s3-fast]" (or "mmclip-shards[s3-fast]")'
    return None


class FastBucket:
    """A bucket, with the credentials of the moment. stall_s: seconds without a byte that end a request."""

    def __init__(self, bucket: str, stall_s: float) -> None:
        from botocore.exceptions import NoCredentialsError
        from botocore.session import Session
        from obstore.store import S3Store

        _check_process()
        session = share_metadata(Session())
        credentials = session.get_credentials()
        if credentials is None:
            raise NoCredentialsError()
        client = session.create_client("s3")

        def provide() -> Any:
            now = credentials.get_frozen_credentials()
            return {
                "access_key_id": now.access_key, "secret_access_key": now.secret_key, "token": now.token,
                "expires_at": datetime.datetime.now(datetime.UTC) + _TTL,
            }  # fmt: skip

        address = client.meta.endpoint_url
        options: Any = {
            "allow_http": address.startswith("http://"), "connect_timeout": f"{_CONNECT_S} s",
            "read_timeout": datetime.timedelta(seconds=stall_s), "timeout": "1 h",  # the caller limits a whole request
        }  # fmt: skip
        self.stall_s = stall_s
        self._store = S3Store(
            bucket, endpoint=address, region=client.meta.region_name or "us-east-1", credential_provider=provide,
            client_options=options, retry_config={"max_retries": 0},
        )  # fmt: skip

    async def read(self, key: str, offset: int, length: int) -> memoryview:
        """Up to `length` bytes from `offset` on, in one request."""
        import obstore

        _check_process()
        try:
            return memoryview(await obstore.get_range_async(self._store, key, start=offset, length=length))[:length]
        except (obstore.exceptions.BaseError, FileNotFoundError) as error:
            fault = self._as_of_s3fs(str(error))
        raise fault  # its cause is the store's answer, as for s3fs

    def _as_of_s3fs(self, told: str) -> BaseException:
        """The error that s3fs raises for the same answer."""
        from botocore.exceptions import ClientError
        from s3fs.errors import translate_boto_error

        told, _, source = told.partition("\n\nDebug source:")
        if "TimedOut" in source or "kind: Timeout" in source:
            return Stalled(f"no byte for {self.stall_s:g} s")
        if status := re.search(r"non-2xx status code: (\d+)", told):
            code, message = (re.search(rf"<{name}>([^<]*)</{name}>", told) for name in ("Code", "Message"))
            answer = {
                "Error": {"Code": code[1] if code else status[1], "Message": f"{code and code[1]}: {message and message[1]}"},
                "ResponseMetadata": {"HTTPStatusCode": int(status[1])},
            }  # fmt: skip
            translated: BaseException = translate_boto_error(ClientError(answer, "GetObject"))
            return translated
        details = re.findall(r'message: "([^"]+)"', source)[-1:]  # of the operating system
        return OSError(": ".join([" ".join(told.split()), *details]))


def _check_process() -> None:
    """Threads of the library do not live on in a forked process: requests there would never end."""
    global _process  # noqa: PLW0603
    if _process is None:
        _process = os.getpid()
    elif _process != os.getpid():
        raise NotImplementedError(
            "obstore was used before this process was forked and cannot be used in it: start processes by `spawn`, or before "
            "the first read, or read by s3fs"
        )
