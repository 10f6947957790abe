"""How fast a host reads a set, and whether it may. Sent there as text; it needs mmclip_shards there, as training does.

`request` is set by the sender: url of a split (SET/train), seconds to read.
"""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle
from typing import Any

_BLOCK, _READERS = 4 * 2**20, 8


def main(request: dict[str, Any]) -> dict[str, Any]:
    """bytes and seconds, or `fault`."""
    from mmclip_shards.manifest import load_manifest
    from mmclip_shards.storage import join, read_range

    url = request["url"]
    try:
        shards = load_manifest(url).shards
        blocks = cycle(
            (join(url, shard.path), start, min(_BLOCK, shard.bytes - start))
            for shard in shards for start in range(0, shard.bytes, _BLOCK)
        )  # fmt: skip
        began, read = time.monotonic(), 0
        with ThreadPoolExecutor(_READERS) as pool:
            while time.monotonic() - began < request["seconds"]:
                several = [next(blocks) for _ in range(_READERS)]
                read += sum(len(part) for part in pool.map(lambda block: read_range(*block), several))
        return {"bytes": read, "seconds": time.monotonic() - began}
    except (OSError, ValueError) as error:
        return {"fault": str(error).splitlines()[0]}


if __name__ == "__main__":
    print("MMCLIP-ANSWER " + json.dumps(main(request)), flush=True)  # type: ignore[name-defined]  # noqa: F821 (the sender's)
