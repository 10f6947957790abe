"""Run folders on disks of the hosts' own (`checkpoint.host_local`): each host has the files of its ranks, the store has all.

A checkpoint counts once it is whole in the store. A host that comes to the run, or has lost its disk, gets its copy from there.
"""

from __future__ import annotations

from pathlib import Path

from mmclip_shards.storage import join

from mmclip_dist.checkpoint.folder import checkpoints_of, kept_by, say, set_aside
from mmclip_dist.checkpoint.mirror import fetch_checkpoint, fetch_newest, mirror
from mmclip_dist.config import Checkpoint
from mmclip_dist.engine.collective import first_rank_does, hosts_do


def bring_here(run_dir: Path, settings: Checkpoint) -> None:
    """Bring the newest whole checkpoint of the store to every host, and set newer ones aside. A collective call."""
    url = str(settings.url)

    def newest() -> str | None:
        mirror(run_dir, url, kept_by(settings))  # what this host alone made, and could not upload
        found = fetch_newest(url, run_dir, say)
        return found.name if found else None

    name = first_rank_does(newest, "fetching a checkpoint")

    def here() -> None:
        if name is not None:
            fetch_checkpoint(join(url, name), run_dir, say)
        for own in checkpoints_of(run_dir):
            if name is None or own.name > name:
                set_aside(own, f"is not whole at {url}")

    hosts_do(here, "fetching a checkpoint")
