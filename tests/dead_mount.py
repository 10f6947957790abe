"""A mount whose server is gone: whatever touches it waits. No network is needed: a FUSE file system that nobody serves."""

from __future__ import annotations

import ctypes
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

_DETACH = 2  # MNT_DETACH


@contextmanager
def dead_mount(folder: Path) -> Iterator[Path]:
    """Mount it there. Leaving the block ends all that wait for it. Skips loudly where such mounts are not allowed."""
    folder.mkdir(parents=True, exist_ok=True)
    libc = ctypes.CDLL(None, use_errno=True)
    try:
        device = os.open("/dev/fuse", os.O_RDWR)
    except OSError as error:
        skip(f"/dev/fuse: {error.strerror}")
    try:
        options = f"fd={device},rootmode=40000,user_id={os.getuid()},group_id={os.getgid()}".encode()
        if libc.mount(b"dead", os.fsencode(folder), b"fuse", 0, options):
            skip(f"mounting FUSE: {os.strerror(ctypes.get_errno())}")
        try:
            yield folder
        finally:
            os.close(device)  # first: what waits gets an error
            device = -1
            libc.umount2(os.fsencode(folder), _DETACH)
    finally:
        if device >= 0:
            os.close(device)


def skip(why: str) -> None:
    warnings.warn(f"dead file systems are NOT TESTED: {why}", stacklevel=2)
    pytest.skip(f"dead file systems are NOT TESTED: {why}")
