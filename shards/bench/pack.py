"""How fast `pack` is, beside webdataset's ShardWriter doing the same work, and what it holds in memory.

    python shards/bench/pack.py --metadata DIR

DIR holds PadChest's table as torchxrayvision 1.5.7 ships it (DIR/torchxrayvision/data); without it that part is left out.
`--only` runs one part; results/pack.json keeps the others. All images are drawn.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import io
import json
import multiprocessing
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from mmclip_shards import preparation, storage
from mmclip_shards.datasets.prepared import prepare_records
from mmclip_shards.datasets.recipe import find_recipe
from mmclip_shards.datasets.table import read_table
from mmclip_shards.images import AS_PUBLISHED, decode_image, prepare_image
from mmclip_shards.pack import SHORT_SIDE, pack
from mmclip_shards.rawpath import raw_path
from mmclip_shards.schema import Record
from mmclip_shards.testing.fault_proxy import Fault, FaultProxy
from mmclip_shards.testing.s3_server import S3Server
from PIL import Image

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("pillow", "numpy", "webdataset")
MIMIC, NIH = (2544, 3056), (1024, 1024)
FILES = 8  # different images; sets repeat them
REPEATS = 41
TURNS = 3
ROUNDS = 3  # of each row of `store`; medians are told
LATE_S = 0.03  # what a store of the same region takes to answer
PARTS_OF_RATE = ("whole", "steady")
RATIOS = (
    ("pack, 1 process", "webdataset"), ("pack, 2 processes", "pack, 1 process"), ("2 packs side by side", "pack, 1 process"),
    ("pack, 2 processes", "2 packs side by side"),
)  # fmt: skip
WARM = 0.2  # share of a set before which the start of processes counts, and after which the steady rate is taken
TABLES, LOOKED_AT = (1_000, 100_000, 400_000), 900  # rows; samples after which the memory is looked at
PADCHEST = "PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv.gz"


def drawn(size: tuple[int, int], seed: int) -> bytes:
    """A JPEG of about 2 bits a pixel, as those of MIMIC-CXR-JPG are: slow shapes, ribs and noise."""
    random = np.random.default_rng(seed)
    x, y = np.arange(size[0], dtype=np.float32)[None], np.arange(size[1], dtype=np.float32)[:, None]
    slow = 120 + 60 * np.sin(x / 300 + seed) + 40 * np.cos(y / 410) + 25 * np.sin(x / 37 + y / 53)
    values = slow + random.normal(0, 5, slow.shape).astype(np.float32)
    buffer = io.BytesIO()
    Image.fromarray(np.clip(values, 0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def make_records(folder: Path, size: tuple[int, int], count: int) -> list[Record]:
    files = [folder / f"{size[0]}-{number}.jpg" for number in range(FILES)]
    for number, file in enumerate(files):
        if not file.exists():
            file.write_bytes(drawn(size, number))
    return [
        Record(f"k{number:06d}", files[number % FILES], f"p{number}", f"{number}.jpg", "No acute findings. " * 8)
        for number in range(count)
    ]


def rate(count: int, run: Callable[[Callable[[int, int], None]], object]) -> dict[str, float]:
    """Images a second of a run: of all of it, and after its first `WARM`."""
    marks: list[float] = []
    began = time.perf_counter()
    run(lambda done, total: marks.append(time.perf_counter()))
    ended = time.perf_counter()
    first = int(WARM * count)
    return {"whole": round(count / (ended - began), 2), "steady": round((count - first) / (ended - marks[first - 1]), 2)}


def throughput(folder: Path, _: Path | None) -> dict[str, Any]:
    """Rates of one process, of two, and of two packs that know nothing of each other (what the machine gives), in turns."""
    found: dict[str, Any] = {}
    for name, size, count in (("2544 x 3056", MIMIC, 80), ("1024 x 1024", NIH, 400)):
        records = make_records(folder, size, count)
        turns = [
            {
                "webdataset": rate(count, lambda report: theirs(folder, records, report)),  # noqa: B023 - it is called at once
                "pack, 1 process": ours(folder, records, 1),
                "pack, 2 processes": ours(folder, records, 2),
                "2 packs side by side": side_by_side(folder, records),
            }
            for _ in range(TURNS)
        ]
        found[name] = {
            "images": count,
            "turns": TURNS,
            **{arm: {part: middle(turn[arm][part] for turn in turns) for part in PARTS_OF_RATE} for arm in turns[0]},
            "times": {
                f"{arm} / {base}": {part: middle(turn[arm][part] / turn[base][part] for turn in turns) for part in PARTS_OF_RATE}
                for arm, base in RATIOS
            },
        }
    return found


def store(folder: Path, _: Path | None) -> dict[str, Any]:
    """The same images from the disk and from an S3 server of this machine; and where its answers come `LATE_S` later, with and
    without reading ahead."""
    found: dict[str, Any] = {}
    with S3Server() as server, FaultProxy(server) as proxy:
        for name, size, count in (("2544 x 3056", MIMIC, 64), ("1024 x 1024", NIH, 160)):
            records = make_records(folder, size, count)
            os.environ |= server.environment()
            for image in {record.image for record in records}:
                storage.upload(image, f"{server.url}/{image.name}")  # type: ignore[arg-type,union-attr]
            raw = raw_path(server.url)
            remote = [replace(record, image=raw / record.image.name) for record in records]  # type: ignore[union-attr]

            def ours(of: list[Record], workers: int = 1, at_once: int = preparation._READ_AHEAD) -> dict[str, float]:
                with mock.patch.object(preparation, "_READ_AHEAD", at_once):  # of this process alone
                    told = rate(len(of), lambda report: pack(
                        of, folder / "ours", dataset="bench", splits={"train": 1.0}, config_hash="bench", patient_key=b"k",
                        samples_per_shard=100, workers=workers, progress=report,
                    ))  # fmt: skip
                shutil.rmtree(folder / "ours")
                return told

            rounds: dict[str, list[float]] = {}
            for _round in range(ROUNDS):
                for workers in (1, 2):
                    for where, of in (("disk", records), ("store", remote)):
                        rounds.setdefault(f"{where}, {workers}", []).append(ours(of, workers)["steady"])
            os.environ |= server.environment(proxy.endpoint)
            storage._filesystems.clear()
            proxy.plan = lambda request: Fault("late", wait_s=LATE_S) if request.path.endswith(".jpg") else None
            for _round in range(ROUNDS):
                for at_once in (1, preparation._READ_AHEAD):
                    proxy.requests.clear()
                    rounds.setdefault(f"late, {at_once} at once", []).append(ours(remote, 1, at_once)["steady"])
                    gets = sum(n for (method, path), n in proxy.requests.items() if method == "GET" and path.endswith(".jpg"))
            storage._filesystems.clear()
            found[name] = {"images": count, "gets an image": round(gets / count, 3)}
            found[name] |= {row: round(statistics.median(rates), 1) for row, rates in rounds.items()}
    return found


def middle(values: Iterable[float]) -> float:
    return round(statistics.median(values), 2)


def ours(folder: Path, records: list[Record], workers: int) -> dict[str, float]:
    def run(report: Callable[[int, int], None]) -> None:
        pack(
            records, folder / "ours", dataset="bench", splits={"train": 1.0}, config_hash="bench", patient_key=b"k",
            samples_per_shard=100, workers=workers, progress=report,
        )  # fmt: skip

    found = rate(len(records), run)
    shutil.rmtree(folder / "ours")
    return found


def side_by_side(folder: Path, records: list[Record]) -> dict[str, float]:
    """The sum of two packs of half the records each, in processes of their own that begin together."""
    context = multiprocessing.get_context("spawn")
    begin, told = context.Barrier(2), context.SimpleQueue()
    folders = [folder / "first", folder / "second"]
    packs = []
    for part, where in enumerate(folders):
        where.mkdir()
        packs.append(context.Process(target=one_of_two, args=(where, records[part::2], begin, told)))
        packs[-1].start()
    found = [told.get() for _ in packs]
    for each, where in zip(packs, folders, strict=True):
        each.join()
        where.rmdir()
    return {part: round(sum(each[part] for each in found), 2) for part in PARTS_OF_RATE}


def one_of_two(folder: Path, records: list[Record], begin: Any, told: Any) -> None:
    begin.wait()
    told.put(ours(folder, records, 1))


def theirs(folder: Path, records: list[Record], report: Callable[[int, int], None]) -> None:
    """The same images, texts and size of shards by webdataset and Pillow: no hashes, index, manifest or journal."""
    import webdataset

    (folder / "theirs").mkdir()
    with webdataset.ShardWriter(f"{folder}/theirs/%06d.tar", maxcount=100, verbose=0) as writer:
        for number, record in enumerate(records, 1):
            with Image.open(record.image) as image:  # type: ignore[arg-type]
                grey = image.convert("L")
            scale = SHORT_SIDE / min(grey.size)
            grey = grey.resize((round(grey.width * scale), round(grey.height * scale)), Image.Resampling.LANCZOS)
            buffer = io.BytesIO()
            grey.save(buffer, "JPEG", quality=AS_PUBLISHED.quality)
            writer.write({"__key__": record.key, "jpg": buffer.getvalue(), "json": {"report": record.report}})
            report(number, len(records))
    shutil.rmtree(folder / "theirs")


def one_image(*_: object) -> dict[str, Any]:
    """A full-size JPEG beside its bare decoding and the encoding of the reduced image, and how far it is from the exact one.

    bare: decoded whole; scaled: decoded at the half that ours asks the decoder for. Neither reduces the image any further.
    """
    data = drawn(MIMIC, 0)
    whole = decode_image(data)
    found = prepare_image(data, SHORT_SIDE)
    exact = whole.resize((found.width, found.height), Image.Resampling.LANCZOS)

    def bare(scale: int = 1) -> None:
        with Image.open(io.BytesIO(data)) as image:
            image.draft(None, (image.width // scale, image.height // scale))
            image.load()
        exact.save(io.BytesIO(), "JPEG", quality=AS_PUBLISHED.quality)

    calls: dict[str, Callable[[], object]] = {
        "bare": bare, "scaled": lambda: bare(2), "ours": lambda: prepare_image(data, SHORT_SIDE),
    }  # fmt: skip
    turns = [{name: timed(call) for name, call in calls.items()} for _ in range(REPEATS)]
    stored = io.BytesIO()
    exact.save(stored, "JPEG", quality=AS_PUBLISHED.quality)
    return {
        "bytes": len(data),
        **{f"{name}_ms": middle(turn[name] for turn in turns) for name in calls},
        "times": middle(turn["ours"] / turn["bare"] for turn in turns),
        "times_scaled": middle(turn["ours"] / turn["scaled"] for turn in turns),
        "psnr_db": round(psnr(decode_image(found.data), exact), 1),
        "psnr_db_of_exact": round(psnr(decode_image(stored.getvalue()), exact), 1),
    }


def timed(call: Callable[[], object]) -> float:
    """ms of the processor, which other programs of the machine hardly change."""
    began = time.process_time()
    call()
    return 1000 * (time.process_time() - began)


def psnr(one: Image.Image, other: Image.Image) -> float:
    difference = np.asarray(one, np.float64) - np.asarray(other, np.float64)
    return float(10 * np.log10(255**2 / np.mean(difference**2)))


def padchest(folder: Path, metadata: Path | None) -> dict[str, Any] | None:
    """The real table of PadChest through its recipe, in a process of its own."""
    if metadata is None:
        return None
    raw = folder / "padchest"
    raw.mkdir()
    shutil.copy(next(metadata.rglob(PADCHEST)), raw)
    return in_process("padchest", raw)


def read_padchest(raw: Path) -> dict[str, Any]:
    began = time.perf_counter()
    found = prepare_records("padchest", find_recipe("padchest"), raw, split=None, patient_key=b"k" * 32)
    seconds = time.perf_counter() - began
    rows = len(found.records) + sum(found.skipped.values())
    return {"rows": rows, "records": len(found.records), "seconds": round(seconds, 1), "peak_mib": peak_mib()}


def memory(folder: Path, _: Path | None) -> dict[str, Any]:
    """Peaks of the packing process and of its two workers, in tables of three sizes; each image is one of eight small files."""
    found = {}
    for rows in TABLES:
        raw = folder / f"table-{rows}"
        raw.mkdir()
        for number in range(FILES):
            Image.fromarray(np.full((64, 64), number, np.uint8)).save(raw / f"{number}.png")
        with (raw / "table.csv").open("w") as table:
            table.write("key,image,patient,text\n")
            table.writelines(f"k{n:06d},{n % FILES}.png,p{n // 3},No acute findings in row {n}.\n" for n in range(rows))
        found[f"{rows:,} rows"] = in_process("memory", raw)
    return found


def pack_some(raw: Path) -> dict[str, Any]:
    """Pack the first of a table, and look at the workers before they end."""
    records = read_table(
        raw / "table.csv", raw, image_column="image", patient_column="patient", text_column="text", key_column="key"
    )
    found: dict[str, Any] = {}

    class EnoughError(Exception):
        pass

    def look(done: int, total: int) -> None:
        if done >= LOOKED_AT:
            found["worker_mib"] = [peak_mib(child.pid) for child in multiprocessing.active_children()]
            raise EnoughError

    with contextlib.suppress(EnoughError):
        pack(
            records, raw / "set", dataset="bench", splits={"train": 1.0}, config_hash="bench", patient_key=b"k",
            samples_per_shard=250, workers=2, progress=look,
        )  # fmt: skip
    return {**found, "packing_mib": peak_mib()}


def peak_mib(pid: int | None = None) -> int:
    if pid is None:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) // 1024


CHILDREN = {"padchest": read_padchest, "memory": pack_some}
PARTS: dict[str, Callable[[Path, Path | None], dict[str, Any] | None]] = {
    "throughput": throughput, "store": store, "one image": one_image, "padchest": padchest, "memory": memory,
}  # fmt: skip


def in_process(child: str, raw: Path) -> dict[str, Any]:
    told = subprocess.run([sys.executable, __file__, "--child", child, str(raw)], check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(told.stdout.splitlines()[-1])
    return found


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--metadata", type=Path, help="folder that holds torchxrayvision's data")
    arguments.add_argument("--only", choices=PARTS)
    arguments.add_argument("--out", type=Path, default=RESULTS)
    arguments.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    chosen = arguments.parse_args()
    if chosen.child:
        print(json.dumps(CHILDREN[chosen.child[0]](Path(chosen.child[1]))))
        return
    where = chosen.out / "pack.json"
    found: dict[str, Any] = json.loads(where.read_text()) if where.exists() else {"parts": {}}
    for name, part in PARTS.items():
        if chosen.only in (None, name):
            with tempfile.TemporaryDirectory() as folder:
                if (made := part(Path(folder), chosen.metadata)) is not None:
                    found["parts"][name] = made
                    print(name, json.dumps(made), flush=True)
    found |= {
        "command": "python shards/bench/pack.py --metadata DIR",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
        "cores": os.cpu_count(),
    }
    where.write_text(json.dumps(found, indent=1) + "\n")
    (chosen.out / "pack.md").write_text(table(found))


def head(*names: str) -> list[str]:
    return [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]


def table(found: dict[str, Any]) -> str:
    parts = found["parts"]
    lines = [
        "# Packing", "",
        f"`{found['command']}`, {found['date']}, {found['cores']} cores; "
        + ", ".join(f"{name} {text}" for name, text in found["versions"].items()) + ".", "",
    ]  # fmt: skip
    if rates := parts.get("throughput"):
        first = next(iter(rates.values()))
        arms, ratios = [arm for arm in first if isinstance(first[arm], dict) and arm != "times"], list(first["times"])
        lines += [
            f"Drawn JPEGs to {SHORT_SIDE} pixels and JPEG {AS_PUBLISHED.quality}, images/s: of all, with the start of processes; "
            f"and after the first {WARM:.0%}. webdataset is its `ShardWriter` and Pillow doing the same decoding, filter and "
            f"encoding in one process, without hashes, index, manifest and journal. Medians; turns: {first['turns']}.", "",
            *head("images", *arms),
            *(f"| {name} | " + " | ".join(f"{row[arm]['whole']:g}; {row[arm]['steady']:g}" for arm in arms) + " |"
              for name, row in rates.items()),
            "", "How many times the other. Two packs of one process, side by side, are what the machine gives.", "",
            *head("images", *ratios),
            *(f"| {name} | " + " | ".join(f"{each['whole']:.2f}; {each['steady']:.2f}" for each in row["times"].values()) + " |"
              for name, row in rates.items()),
        ]  # fmt: skip
    if rows := parts.get("store"):
        late = [f"late, {at_once} at once" for at_once in (1, preparation._READ_AHEAD)]
        lines += ["", (
            f"From an S3 server of the same machine (`--only store`), images/s after the first {WARM:.0%}, medians of {ROUNDS} "
            f"rounds. Late: through a proxy of the same machine whose answers come {1000 * LATE_S:g} ms later, one process "
            f"that reads one image at a time; ahead: the same, {preparation._READ_AHEAD} at a time, as `pack` does."
        ), "",
            "| images | GETs an image | disk, 1 process | store | of disk | disk, 2 processes | store | of disk | late | ahead |",
            "|---" * 10 + "|",
        ]  # fmt: skip
        for name, row in rows.items():
            cells = [row["gets an image"]]
            for workers in (1, 2):
                disk, remote = row[f"disk, {workers}"], row[f"store, {workers}"]
                cells += [disk, remote, f"{remote / disk:.2f}"]
            lines.append("| " + " | ".join(map(str, [name, *cells, *(row[each] for each in late)])) + " |")
    if one := parts.get("one image"):
        lines += ["", (
            f"A JPEG of {MIMIC[0]:,} x {MIMIC[1]:,} pixels, {one['bytes'] / 1e6:.1f} MB: "
            f"{one['ours_ms']} ms of a processor for all, {one['bare_ms']} ms for its bare decoding and the encoding of the "
            f"reduced image ({one['times']} times), "
            f"{one['scaled_ms']} ms where the decoder halves it ({one['times_scaled']} times). The stored "
            f"JPEG is {one['psnr_db']} dB from the exact reduction, and the JPEG of that is {one['psnr_db_of_exact']} dB from it."
        )]  # fmt: skip
    if rows := parts.get("padchest"):
        lines += ["", f"PadChest's real table: {rows['rows']:,} rows in {rows['seconds']} s, peak {rows['peak_mib']:,} MiB."]
    if sizes := parts.get("memory"):
        lines += ["", "| table | peak of each worker, MiB | peak of the packing process, MiB |", "|---|---|---|"]
        for name, row in sizes.items():
            lines.append(f"| {name} | {', '.join(map(str, row['worker_mib']))} | {row['packing_mib']} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
