"""Prove at the start that all ranks see one run folder, or that each machine has its own.

Without this, the first checkpoint would fail, an hour later.
"""

from __future__ import annotations

import secrets
import time
from pathlib import Path

import torch.distributed as dist
from mmclip_shards.storage import join, read_bytes, remove, write_atomic

from mmclip_dist.engine.collective import agreed, first_rank_does, gathered, place
from mmclip_dist.launcher import first_of_machine

_SEEN_S = 45.0  # a network file system may show a new file so late (NFS: acdirmin, 30 s)
_OR_OWN = ", or, where each has a disk of its own, checkpoint.host_local=true and a checkpoint.url"


def check_shared(folder: str, key: str) -> None:
    """Rank 0 writes a token and every rank reads it. A collective call; AgreedError names the ranks that see another folder.

    folder: a path or a URL, the value of the configuration's `key`.
    """
    token, first = first_rank_does(lambda: _leave_token(folder), f"writing a token to {key}")
    url = join(folder, token)
    try:
        with agreed():
            if not _appears(url, token):
                raise ValueError(
                    f"{key}={folder} is not the folder of {first} (its file {token} is not there): set {key} to a folder "
                    f"that all machines share{_OR_OWN if key == 'run_dir' else ''}"
                )
    finally:
        if dist.get_rank() == 0:
            remove(url)


def check_own(folder: Path) -> None:
    """Each machine's first rank writes a token, and must see no other machine's. A collective call; AgreedError if one does."""
    path = folder / f".own-{secrets.token_hex(8)}"
    with agreed():
        if first_of_machine():
            folder.mkdir(parents=True, exist_ok=True)
            path.touch()
    try:
        tokens = gathered(path.name)
        with agreed():
            if first_of_machine() and any((folder / token).exists() for token in tokens if token != path.name):
                raise ValueError(
                    f"run_dir={folder} is a folder of several machines: leave out checkpoint.host_local, or set run_dir to a "
                    "disk of each machine's own"
                )
    finally:
        path.unlink(missing_ok=True)


def _leave_token(folder: str) -> tuple[str, str]:
    token = f".shared-{secrets.token_hex(8)}"
    write_atomic(join(folder, token), token.encode())
    return token, place()


def _appears(url: str, content: str) -> bool:
    deadline = time.monotonic() + _SEEN_S
    while True:
        try:
            if read_bytes(url) == content.encode():
                return True
        except FileNotFoundError:
            pass
        if time.monotonic() > deadline:
            return False
        time.sleep(0.5)
