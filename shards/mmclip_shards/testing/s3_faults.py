"""The faults that a reader of shards must survive, each at a chosen byte of a shard."""

from __future__ import annotations

from typing import NamedTuple

from mmclip_shards.manifest import ShardIndex
from mmclip_shards.testing.fault_proxy import Fault

_HEADER = 512
"""Bytes of a tar header."""


class Places(NamedTuple):
    """Bytes of a shard to break. boundary: first of an entry; header: in that entry's header; data: in the data before it."""

    boundary: int
    header: int
    data: int


def places(index: ShardIndex, row: int) -> Places:
    """Places between the first two members of a sample. A reader of single samples asks for these bytes, too."""
    (_, data, length, _), (_, second, *_) = index.sample(row)[:2]
    return Places(second - _HEADER, second - _HEADER // 2, data + length // 2)


def faults(at: Places) -> dict[str, Fault]:
    """All faults, by name."""
    return {
        "500": Fault("error", status=500, code="InternalError"),
        "503 SlowDown": Fault("error", status=503, code="SlowDown"),
        "403": Fault("error", status=403, code="AccessDenied"),
        "404": Fault("error", status=404, code="NoSuchKey"),
        "400 ExpiredToken": Fault("error", status=400, code="ExpiredToken"),
        "403 ExpiredToken": Fault("error", status=403, code="ExpiredToken"),
        "no answer": Fault("silence"),
        "stall at a boundary": Fault("stall", at.boundary),
        "stall in data": Fault("stall", at.data),
        "5 bytes a second": Fault("trickle", at.data),
        "closed at a boundary": Fault("close", at.boundary),
        "closed in data": Fault("close", at.data),
        "reset at a boundary": Fault("reset", at.boundary),
        "reset in data": Fault("reset", at.data),
        "short, length agrees, at a boundary": Fault("short", at.boundary),
        "short, length agrees, in a sample": Fault("short", at.data),
        "short, length agrees, in a header": Fault("short", at.header),
        "short, length and range agree, at a boundary": Fault("short_range", at.boundary),
        "short, length and range agree, in a sample": Fault("short_range", at.data),
        "short, length and range agree, in a header": Fault("short_range", at.header),
        "short, no length, at a boundary": Fault("unsized", at.boundary),
        "short, no length, in a sample": Fault("unsized", at.data),
        "flipped bit in data": Fault("flip", at.data),
        "flipped bit in data, true checksum sent": Fault("flip_checksum", at.data),
        "flipped bit in a header": Fault("flip", at.header),
        "flipped bit in a header, true checksum sent": Fault("flip_checksum", at.header),
        "zeros from a boundary on": Fault("zeros", at.boundary),
        "zeros from a byte of data on": Fault("zeros", at.data),
        "empty 200": Fault("empty"),
        "error page with 200": Fault("page"),
        "range ignored": Fault("whole"),
    }


def lasting_error(fault: Fault, *, in_shard: bool) -> type[Exception]:
    """The kind of error that a reader must raise for a fault that stays. in_shard: it breaks the tar, not index or manifest.

    ValueError when the stored bytes look damaged, FileNotFoundError or PermissionError when the store refuses, OSError when
    it fails.
    """
    if fault.status == 404:
        return (
            FileNotFoundError if in_shard else ValueError
        )  # for index and manifest, the message says how to make them
    if fault.code == "AccessDenied":
        return PermissionError
    # The client compares the checksum of a whole file, but not that of a range.
    damaged = (
        {"flip", "zeros", "flip_checksum"} if in_shard else {"flip", "zeros", "short", "short_range", "empty", "page"}
    )
    return ValueError if fault.kind in damaged else OSError
