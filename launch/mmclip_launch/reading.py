"""Whether a host may read sets, and how fast. Sent there as text; it needs mmclip_shards there, as training does.

`request` is set by the sender: urls of splits and sidecars (SET/train), seconds to read, 0 to look at the manifests alone.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from itertools import chain, cycle
from typing import Any

_BLOCK, _READERS = 4 * 2**20, 8
_ANSWER_S = 15.0  # a file system whose server is gone never answers


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
    """bytes and seconds, or `faults`, one for each set that cannot be read. A thread may be left that waits for a dead disk."""
    from mmclip_shards.storage import read_range

    pool = ThreadPoolExecutor(_READERS + len(request["urls"]))
    looks = {url: pool.submit(blocks_of, url) for url in request["urls"]}
    wait(looks.values(), timeout=_ANSWER_S)
    faults, found = [], []
    for url, look in looks.items():
        try:
            found.append(look.result(timeout=0))
        except TimeoutError:
            faults.append(
                f"{url} cannot be read: it does not answer within {_ANSWER_S:g} s: is its disk or its store gone?"
            )
        except ValueError as error:
            faults.append(str(error))
    if faults:
        return {"faults": faults}
    blocks, began, read = cycle(chain.from_iterable(found)), time.monotonic(), 0
    try:
        while time.monotonic() - began < request["seconds"]:
            several = [next(blocks) for _ in range(_READERS)]
            read += sum(len(part) for part in pool.map(lambda block: read_range(*block), several, timeout=_ANSWER_S))
    except TimeoutError:
        return {"faults": [f"a block was not read within {_ANSWER_S:g} s"]}
    except (OSError, ValueError) as error:
        return {"faults": [str(error).splitlines()[0]]}
    return {"bytes": read, "seconds": time.monotonic() - began}


if __name__ == "__main__":
    print("MMCLIP-ANSWER " + json.dumps(main(request)), flush=True)  # type: ignore[name-defined]  # noqa: F821 (the sender's)
    os._exit(0)
