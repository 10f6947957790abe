"""Prove at the start that all ranks see one run folder: without this, the first checkpoint would fail, an hour later."""

from __future__ import annotations

import secrets
import time
from pathlib import Path

import torch.distributed as dist

from mmclip_dist.engine.collective import agreed, first_rank_does, place

_SEEN_S = 45.0  # a network file system may show a new file so late (NFS: acdirmin, 30 s)


def check_shared(folder: Path) -> None:
    """Rank 0 writes a token and every rank reads it. A collective call; AgreedError names the ranks that see another folder."""
    token, first = first_rank_does(lambda: _leave_token(folder), "writing a token to the run folder")
    path = folder / token
    try:
        with agreed():
            if not _appears(path, token):
                raise ValueError(
                    f"run_dir={folder} is not the folder of {first} (its file {token} is not there): set run_dir to a folder "
                    "that all machines share"
                )
    finally:
        if dist.get_rank() == 0:
            path.unlink(missing_ok=True)


def _leave_token(folder: Path) -> tuple[str, str]:
    token = f".shared-{secrets.token_hex(8)}"
    (folder / token).write_text(token)
    return token, place()


def _appears(path: Path, content: str) -> bool:
    deadline = time.monotonic() + _SEEN_S
    while True:
        try:
            if path.read_text() == content:
                return True
        except FileNotFoundError:
            pass
        if time.monotonic() > deadline:
            return False
        time.sleep(0.5)
