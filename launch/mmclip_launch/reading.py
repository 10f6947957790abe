"""Whether a host may read sets, and how fast. Sent there as text; it needs mmclip_shards there, as training does.

`request` is set by the sender: urls of splits and sidecars (SET/train), seconds to read, 0 to look at the manifests alone.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle
from typing import Any

_BLOCK, _READERS = 4 * 2**20, 8


def blocks_of(url: str) -> Iterator[tuple[str, int, int]]:
    """Shard, offset and length of every block. ValueError that names the set if its manifest cannot be read."""
    from mmclip_shards.manifest import load_manifest
    from mmclip_shards.storage import join

    try:
        shards = load_manifest(url).shards
    except (OSError, ValueError) as error:
        raise ValueError(f"{url} cannot be read: {str(error).splitlines()[0]}") from None
    return (
        (join(url, shard.path), start, min(_BLOCK, shard.bytes - start))
        for shard in shards for start in range(0, shard.bytes, _BLOCK)
    )  # fmt: skip


def main(request: dict[str, Any]) -> dict[str, Any]:
    """bytes and seconds, or `fault`."""
    from mmclip_shards.storage import read_range

    try:
        with ThreadPoolExecutor(_READERS) as pool:
            blocks = cycle([block for several in pool.map(blocks_of, request["urls"]) for block in several])
            began, read = time.monotonic(), 0
            while time.monotonic() - began < request["seconds"]:
                several = [next(blocks) for _ in range(_READERS)]
                read += sum(len(part) for part in pool.map(lambda block: read_range(*block), several))
        return {"bytes": read, "seconds": time.monotonic() - began}
    except (OSError, ValueError) as error:
        return {"fault": str(error).splitlines()[0]}


if __name__ == "__main__":
    print("MMCLIP-ANSWER " + json.dumps(main(request)), flush=True)  # type: ignore[name-defined]  # noqa: F821 (the sender's)
