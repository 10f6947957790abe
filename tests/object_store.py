"""Fixtures of tests against a real S3 server. `tests/conftest.py` imports them, so that tests in every folder see them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache

import pytest
from botocore import session
from mmclip_shards import storage
from mmclip_shards.testing.fault_proxy import FaultProxy
from mmclip_shards.testing.s3_server import S3Server


@pytest.fixture(scope="session")
def s3() -> Iterator[S3Server]:
    """A server; this process, and those it starts, reach it as s3://."""
    with pytest.MonkeyPatch.context() as patch:
        # Each new session parses megabytes of service descriptions, for half a second once torch is loaded; tests make hundreds.
        patch.setattr(session, "create_loader", lru_cache(session.create_loader))
        with S3Server() as server, client_environment(server.environment()):
            yield server


@pytest.fixture
def faulty(s3: S3Server) -> Iterator[FaultProxy]:
    """A proxy in front of the server; in this test, s3:// goes through it."""
    with FaultProxy(s3) as proxy, client_environment(s3.environment(proxy.endpoint)):
        yield proxy


@contextmanager
def client_environment(variables: Mapping[str, str]) -> Iterator[None]:
    """These AWS_ variables and no others; sessions and answers with the ones of before are forgotten."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            patch.delenv(name)
        for name, value in variables.items():
            patch.setenv(name, value)
        storage._filesystems.clear()
        storage._served.clear()
        yield
    storage._filesystems.clear()
    storage._served.clear()
