"""`mmclip pack ...`: a raw data set becomes shards with a manifest."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from mmclip_shards.manifest import Manifest
from mmclip_shards.storage import join

from mmclip_dist.commands.options import Workers
from mmclip_dist.commands.progress import progress_bar

pack_app = typer.Typer(no_args_is_help=True, help="Turn a raw data set into shards with a manifest.")

Dest = Annotated[str, typer.Argument(help="Folder or URL to write to; one folder per split is made below it.")]
Splits = Annotated[str, typer.Option(help="Shares of the patients; a patient never crosses splits.")]
Seed = Annotated[int, typer.Option(help="Seed of the split (and of synthetic data).")]
ShortSide = Annotated[int, typer.Option(help="Shrink images to this short side, in pixels.")]
PerShard = Annotated[int, typer.Option(help="Samples of one shard.")]
MaxBad = Annotated[float, typer.Option(min=0, max=1, help="Share of missing or unreadable images that may be left out; 0: none.")]


def _print_splits(dest: str, manifests: dict[str, Manifest]) -> None:
    from mmclip_shards.journal import QUARANTINE, read_quarantine

    for split, manifest in manifests.items():
        folder = join(dest, split)
        left_out = len(read_quarantine(folder))
        told = f"; {left_out} left out, see {join(folder, QUARANTINE)}" if left_out else ""
        print(f"{folder}: {manifest.samples} samples in {len(manifest.shards)} shards{told}")


@pack_app.command("csv")
def pack_csv(
    dest: Dest,
    table: Annotated[Path, typer.Option(help="CSV or TSV with one image a row.")],
    images: Annotated[Path, typer.Option(help="Folder of the image column's relative paths.")],
    image_column: Annotated[str, typer.Option(help="Column of the image's path.")],
    patient_column: Annotated[str, typer.Option(help="Column of the patient's id; only a keyed hash is stored.")],
    text_column: Annotated[str | None, typer.Option(help="Column of the report; by default images are unpaired.")] = None,
    labels_column: Annotated[str | None, typer.Option(help="Column of the findings that are present.")] = None,
    labels_separator: Annotated[str, typer.Option(help="Separator of findings in one cell.")] = "|",
    view_column: Annotated[str | None, typer.Option(help="Column of the view (PA, AP, ...).")] = None,
    split_column: Annotated[str | None, typer.Option(help="Column of the split, instead of --splits.")] = None,
    key_column: Annotated[str | None, typer.Option(help="Column of a unique name; by default the image's.")] = None,
    empty_reports: Annotated[str, typer.Option(help="A row without text: error, drop or unpaired.")] = "error",
    dataset: Annotated[str | None, typer.Option(help="Name of the data set; by default DEST's last part.")] = None,
    splits: Splits = "train=.8,val=.1,test=.1",
    seed: Seed = 0,
    short_side: ShortSide = 512,
    samples_per_shard: PerShard = 1024,
    max_bad_fraction: MaxBad = 0.0,
    workers: Workers = 1,
) -> None:
    """Pack images and a table. One line per split says what was written. Packing again skips what is done, also after a kill."""
    from mmclip_shards.datasets.table import read_table, splits_of, table_hash
    from mmclip_shards.pack import pack
    from mmclip_shards.split import parse_splits

    options = dict(
        image_column=image_column, patient_column=patient_column, text_column=text_column, labels_column=labels_column,
        labels_separator=labels_separator, view_column=view_column, split_column=split_column, key_column=key_column,
        empty_reports=empty_reports,
    )  # fmt: skip
    records = read_table(table, images, **options)  # type: ignore[arg-type]
    with progress_bar("pack", "images") as report:
        manifests = pack(
            records, dest, dataset=dataset or Path(dest.rstrip("/")).name,
            splits=None if split_column else parse_splits(splits),
            split_of_record=splits_of(records) if split_column else None,
            seed=seed, short_side=short_side, samples_per_shard=samples_per_shard,
            config_hash=table_hash(table, **options), max_bad_fraction=max_bad_fraction, workers=workers, progress=report,
        )  # fmt: skip
    _print_splits(dest, manifests)


@pack_app.command("synthetic")
def pack_synthetic(
    dest: Dest,
    count: Annotated[int, typer.Option(min=1, help="Images.")] = 1000,
    unpaired: Annotated[bool, typer.Option("--unpaired", help="Labels without reports.")] = False,
    size: Annotated[int, typer.Option(min=32, help="Pixels, square.")] = 128,
    splits: Splits = "train=.8,val=.1,test=.1",
    seed: Seed = 0,
    samples_per_shard: PerShard = 256,
    workers: Workers = 1,
) -> None:
    """Pack synthetic chest radiographs with findings of known location, and reports. Never real data."""
    from mmclip_shards.datasets.synthetic.set import pack_synthetic as run
    from mmclip_shards.split import parse_splits

    with progress_bar("pack", "images") as report:
        manifests = run(
            dest, count, unpaired=unpaired, size=size, splits=parse_splits(splits), seed=seed,
            samples_per_shard=samples_per_shard, workers=workers, progress=report,
        )  # fmt: skip
    _print_splits(dest, manifests)
