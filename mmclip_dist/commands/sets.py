"""The commands about sets of shards: `mmclip verify`, `mmclip stats`, `mmclip view`, `mmclip index`, `mmclip bench-loader`."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from mmclip_dist.commands.options import SetUrl
from mmclip_dist.commands.progress import print_table, progress_bar

if TYPE_CHECKING:
    from mmclip_shards.stats import SetStats, SplitStats

_VIEWS = 8  # printed of one split


def verify(
    url: SetUrl,
    base: Annotated[str | None, typer.Option(help="The packed set that the sidecars at URL belong to.")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Shards checked at once.")] = 1,
    allow_phi_like: Annotated[
        bool, typer.Option("--allow-phi-like", help="Reports may seem to identify people, whatever the manifest says.")
    ] = False,
) -> None:
    """Check every byte of a set and of its sidecars. One line for each problem; exit code 1 if there is any."""
    from mmclip_shards.verify import verify as check

    with progress_bar("verify", "shards") as report:
        verdict = check(url, base=base, workers=workers, allow_phi_like=allow_phi_like, progress=report)
    for finding in verdict.findings:
        print(finding)
    for folder in verdict.unjoined:
        print(f"{folder}: not held against its base; name it with --base to do so")
    read = f"{verdict.samples} samples, {verdict.bytes:,} bytes, in {verdict.shards} shards of {verdict.sets} sets"
    print(f"{url}: {len(verdict.findings) or 'no'} finding{'s' * (len(verdict.findings) != 1)}; {read} were checked")
    if verdict.findings:
        raise typer.Exit(1)


def stats(
    url: SetUrl,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    html: Annotated[Path | None, typer.Option(help="Write a data card instead: one self-contained page.")] = None,
) -> None:
    """Count a set: samples, labels, reports, images, patients, and patients in more than one split."""
    if as_json and html is not None:
        raise ValueError("--json prints and --html writes a page: give one of them")
    from mmclip_shards.stats import collect_stats

    with progress_bar("stats", "samples") as report:
        found = collect_stats(url, report)
    if html is not None:
        from mmclip_dist.evaluate.report.card import build_card

        build_card(found, html)
        print(f"{html}: {sum(split.samples for split in found.splits)} samples in {len(found.splits)} splits")
        return
    if as_json:
        print(json.dumps(asdict(found), indent=2))
        return
    print_table(*_tables(found))
    several = found.patients_in_several_splits
    if several:
        print(
            f"WRONG: {several} patients are in more than one split, so an evaluation would see patients of the training"
        )
    elif len(found.splits) > 1:
        print("no patient is in more than one split")


def index(
    url: Annotated[str, typer.Argument(metavar="FOLDER", help="Folder of WebDataset shards (*.tar) that another program wrote.")],
    dataset: Annotated[str | None, typer.Option(help="Name of the data set; by default the folder's.")] = None,
    split: Annotated[str, typer.Option(help="Name of the split that these shards are.")] = "train",
) -> None:
    """Write a manifest and offset indexes beside shards of another program, so that they can be read as they are."""
    from mmclip_shards.foreign import index_set, listed

    with progress_bar("index", "shards") as report:
        found = index_set(url, dataset=dataset, split=split, progress=report)
    manifest = found.manifest
    print(f"{url}: {manifest.samples} samples in {len(manifest.shards)} shards; labels: {len(manifest.labels)}")
    print(f"left out: {listed(found.left_out)}")


def view(
    url: SetUrl,
    out: Annotated[Path, typer.Option(help="The page.")] = Path("view.html"),
    count: Annotated[int, typer.Option(min=1, help="Samples, evenly spread over the set.")] = 24,
    label: Annotated[str | None, typer.Option(help="The first samples in which this label is present instead.")] = None,
    key: Annotated[list[str] | None, typer.Option(help="This sample instead; may be repeated.")] = None,
    split: Annotated[str, typer.Option(help="Split, where URL is the folder of several.")] = "train",
    entities: Annotated[str | None, typer.Option(help="Entity sidecar; by default the set's own folder `entities`.")] = None,
    attention: Annotated[str | None, typer.Option(help="Attention sidecar; by default the set's own folder `attention`.")] = None,
) -> None:
    """Look at samples of a set: image, boxes, attention, report with entities, labels. One self-contained HTML file."""
    from mmclip_shards.manifest import find_split

    from mmclip_dist.config import Source
    from mmclip_dist.data.join import with_sidecars
    from mmclip_dist.evaluate.report.view import build_view

    if key and label is not None:
        raise ValueError("--key and --label both choose the samples: give one of them")
    found = with_sidecars(Source(url=find_split(url, split)))
    named = {kind: sidecar for kind, sidecar in (("entities", entities), ("attention", attention)) if sidecar is not None}
    shown = build_view(found.model_copy(update=named), out, count=count, keys=key or (), label=label)
    print(f"{out}: {len(shown)} samples")


def _tables(found: SetStats) -> Iterable[Table]:
    """One table of facts, a column a split, and one of labels for each split that has some."""
    facts = Table("", *(split.split for split in found.splits), caption="* minimum / median / 95% / maximum")
    columns = [_facts(split) for split in found.splits]
    for name in columns[0]:
        facts.add_row(name, *(column[name] for column in columns))
    yield facts
    for split in found.splits:
        if split.labels:
            labels = Table(f"label, {split.split}", "present", "absent", "uncertain", "not mentioned")
            for name, counts in split.labels.items():
                labels.add_row(name, *map(str, asdict(counts).values()))
            yield labels


def _facts(split: SplitStats) -> dict[str, str]:
    views = [f"{view} {count}" for view, count in list(split.views.items())[:_VIEWS]]
    return {
        "data set": split.dataset,
        "licence": split.licence or "not stated",
        "access": split.access or "not stated",
        "identifying reports": _phi(split),
        "labels made by": split.labels_by or "the data set",
        "samples": str(split.samples),
        "shards": str(split.shards),
        "bytes": f"{split.bytes:,}",
        "without report": str(split.without_report),
        "words of a report*": str(split.words or "-"),
        "image widths*": str(split.widths or "-"),
        "image heights*": str(split.heights or "-"),
        "ages*": str(split.ages or "-"),
        "views": ", ".join([*views, *(["..."] if len(split.views) > _VIEWS else [])]),
        "patients": str(split.patients),
        "images of a patient*": str(split.images_per_patient or "-"),
        "without patient": str(split.without_patient),
        "unreadable text or JSON": str(split.unreadable),
        "unusable images": str(split.undecodable),
    }


def _phi(split: SplitStats) -> str:
    if split.phi_scan is None:
        return "not scanned"
    return ", ".join(f"{count} {kind}" for kind, count in split.phi_scan.items() if kind != "version") or "none found"


def bench_loader(
    urls: Annotated[list[str], typer.Argument(metavar="SET/SPLIT...", help="Packed sets.")],
    size: Annotated[
        int | None, typer.Option(min=1, help="Make full examples of this many pixels; by default only read.")
    ] = None,
    workers: Annotated[int, typer.Option(min=0, help="Loader workers (processes).")] = 0,
    streams: Annotated[int, typer.Option(min=1, help="Streams of this rank.")] = 32,
    seconds: Annotated[float, typer.Option(min=0.1, help="Duration of the measurement.")] = 10.0,
    cache: Annotated[str | None, typer.Option(help="Folder on a local disk that caches fetched shards.")] = None,
) -> None:
    """How fast sets are read in training order, every byte checked: samples/s, MB/s, waiting for the store."""
    from mmclip_shards.manifest import find_split

    from mmclip_dist.bench.loader import measure
    from mmclip_dist.config import Data, Reading, Source
    from mmclip_dist.data.join import with_sidecars

    sources = [Source(url=find_split(url, "train")) for url in urls]
    if size:
        sources = [with_sidecars(source) for source in sources]
    data = Data(streams=streams, workers=workers, reading=Reading(cache=cache))
    rate = measure(sources, data, seconds=seconds, size=size, batch=8 * streams)
    print(
        f"{rate.samples_per_s:,.0f} samples/s, {rate.mb_per_s:,.1f} MB/s, {rate.wait:.0%} of the time waiting for the store "
        f"({rate.read.requests} requests, {rate.read.retries} retries, {rate.read.cache_hits} cache hits), "
        f"{rate.main_ms:.2f} ms of the main thread a sample"
    )
