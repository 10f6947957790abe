"""`mmclip pack ...`: a raw data set becomes shards with a manifest."""

from __future__ import annotations

import hashlib
import inspect
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from mmclip_shards.datasets.recipe import OFFICIAL, Recipe, find_recipe, recipe_names
from mmclip_shards.datasets.table import Records
from mmclip_shards.manifest import Manifest
from mmclip_shards.schema import Record
from mmclip_shards.storage import join, write_atomic
from typer.core import TyperGroup

from mmclip_dist.commands.options import Workers
from mmclip_dist.commands.progress import progress_bar

if TYPE_CHECKING:
    from mmclip_shards.images import Rendering

    from mmclip_dist.offline.packing import RayWorkers

RECIPE = "RECIPE"


class PackGroup(TyperGroup):
    """`pack csv`, `pack synthetic`, and `pack NAME` for each recipe; all recipes share one command."""

    def list_commands(self, ctx: Any) -> list[str]:
        return [*super().list_commands(ctx), *recipe_names()]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        known = super().get_command(ctx, cmd_name)
        command = super().get_command(ctx, RECIPE)
        if known is not None or command is None:
            return known
        command = copy(command)
        command.name, command.hidden = cmd_name, False
        if cmd_name in recipe_names():
            try:
                found = find_recipe(cmd_name)
            except ValueError as error:  # of another's package; the command itself ends with it
                command.short_help = str(error)
            else:
                told = (inspect.getdoc(found.read) or "").split("\n\n")  # Typer keeps a docstring's line breaks
                told = [re.sub(r"\n(?![-*] )", " ", paragraph) for paragraph in told]
                command.short_help, command.help = found.title, "\n\n".join([*told, str(command.help)])
        return command


pack_app = typer.Typer(
    cls=PackGroup, no_args_is_help=True, help="Turn a raw data set, on a disk or behind a URL, into shards with a manifest."
)

Dest = Annotated[str, typer.Argument(metavar="DEST", help="Folder or URL to write to; one folder per split is made below it.")]
SHARES = "train=.8,val=.1,test=.1"

Splits = Annotated[str, typer.Option(help="Shares of the patients; a patient never crosses splits.")]
Seed = Annotated[int, typer.Option(help="Seed of the split (and of synthetic data).")]
ShortSide = Annotated[int, typer.Option(help="Shrink images to this short side, in pixels.")]
PerShard = Annotated[int, typer.Option(help="Samples of one shard.")]
Check = Annotated[bool, typer.Option("--check", help="Only look at 20 samples; draw them in DEST-check.png.")]
ImageFormat = Annotated[str, typer.Option("--format", help="source (JPEG stays JPEG, all else: PNG), jpg, png, webp-lossless.")]
Quality = Annotated[int, typer.Option(help="Of JPEG, 1 to 100.")]
Window = Annotated[
    str | None, typer.Option(help="Two percentiles of an image's values, such as 1,99: what lies beyond becomes black and white.")
]
Clahe = Annotated[bool, typer.Option("--clahe", help="Contrast-limited adaptive histogram equalisation (8 x 8 tiles, limit 2).")]
Address = Annotated[
    str | None, typer.Option(help="Pack on this Ray cluster: auto, HOST:PORT or ray://HOST:PORT. By default on processes here.")
]
MaxBad = Annotated[float, typer.Option(min=0, max=1, help="Share of missing or unreadable images that may be left out; 0: none.")]
AllowPhi = Annotated[
    bool, typer.Option("--allow-phi-like", help="Pack reports that seem to hold names, numbers or dates that identify people.")
]
LabelsFromReports = Annotated[
    bool, typer.Option("--labels-from-reports", help="CheXpert's 14 observations, by rules on the reports, as the labels.")
]
PrivatePaths = Annotated[
    bool, typer.Option("--private-paths", help="Paths name patients: store keyed hashes in place of keys and paths.")
]
PatientsOf = Annotated[
    str | None,
    typer.Option(help="Collection that numbers the patients: equal ids elsewhere are other people. By default a recipe's own; "
                      "all your files share one."),
]  # fmt: skip


def _tell_named_patients(records: Sequence[Record]) -> None:
    from mmclip_shards.datasets.prepared import names_patient

    if named := sum(map(names_patient, records)):
        print(f"{named:,} of {len(records):,} paths hold the patient's id, and are stored; --private-paths stores hashes instead")


def _from_reports(records: Sequence[Record], config_hash: str) -> dict[str, Any]:
    """What `pack` needs to pack these records with labels from their reports."""
    from mmclip_dist.offline.labels import build_labeller, label_once, labeller_hash

    if not any(record.report.strip() for record in records):
        raise ValueError("--labels-from-reports needs reports, and no image has one: leave it out, or name their column")
    identity = labeller_hash()
    labels: list[dict[str, int | None]] = []
    with progress_bar("label", "reports") as report:
        for found in label_once((record.report for record in records), build_labeller()):
            labels.append(found)
            report(len(labels), len(records))
    return dict(
        records=Records(range(len(records)), lambda place: replace(records[place], labels=labels[place])),
        config_hash=hashlib.sha256(f"{config_hash} {identity}".encode()).hexdigest(),
        labels_by=f"mmclip_dist's rules for CheXpert's observations ({identity[:12]})",
    )


def _rendering(image_format: str, quality: int, window: str | None, clahe: bool) -> Rendering:
    from mmclip_shards.images import Rendering

    low_high = None
    if window is not None:
        try:
            low, high = map(float, window.split(","))
        except ValueError:
            raise ValueError(f"--window is {window!r}; two percentiles such as 1,99 are needed") from None
        low_high = low, high
    return Rendering(image_format, quality, low_high, clahe)  # type: ignore[arg-type]  # it checks the format


@contextmanager
def _crew(workers: int, address: str | None) -> Iterator[int | RayWorkers]:
    """Who packs: that many processes, or that many tasks at once of the cluster at `address`."""
    if address is None:
        yield workers
        return
    from mmclip_dist.commands.offline import cluster
    from mmclip_dist.offline.packing import RayWorkers

    with cluster(address):
        yield RayWorkers(workers)


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
    table: Annotated[str, typer.Option(help="CSV or TSV with one image a row; a file or URL.")],
    images: Annotated[str, typer.Option(help="Folder or URL of the image column's relative paths.")],
    image_column: Annotated[str, typer.Option(help="Column of the image's path.")],
    patient_column: Annotated[str, typer.Option(help="Column of the patient's id; only a keyed hash is stored.")],
    text_column: Annotated[str | None, typer.Option(help="Column of the report; by default images are unpaired.")] = None,
    findings_column: Annotated[str | None, typer.Option(help="Column of a report's findings, in place of --text-column.")] = None,
    impression_column: Annotated[str | None, typer.Option(help="Column of its impression, which follows the findings.")] = None,
    labels_column: Annotated[str | None, typer.Option(help="Column of the findings that are present.")] = None,
    labels_separator: Annotated[str, typer.Option(help="Separator of findings in one cell.")] = "|",
    view_column: Annotated[str | None, typer.Option(help="Column of the view (PA, AP, ...).")] = None,
    age_column: Annotated[str | None, typer.Option(help="Column of the age in years (58, 58.5, 58,5, 058Y).")] = None,
    split_column: Annotated[str | None, typer.Option(help="Column of the split, instead of --splits.")] = None,
    key_column: Annotated[str | None, typer.Option(help="Column of a unique name; by default the image's.")] = None,
    delimiter: Annotated[
        str | None, typer.Option(help='Between cells, such as ";". By default a comma, in .tsv and .tab files a tab.')
    ] = None,
    encoding: Annotated[str, typer.Option(help="Of the table, such as windows-1252.")] = "utf-8",
    normal_label: Annotated[str | None, typer.Option(help="Label of healthy patients, beside `No Finding` and `Normal`.")] = None,
    empty_reports: Annotated[str, typer.Option(help="A row without text: error, drop or unpaired.")] = "error",
    dataset: Annotated[str | None, typer.Option(help="Name of the data set; by default DEST's last part.")] = None,
    licence: Annotated[str | None, typer.Option(help="Licence of the data, for the manifests.")] = None,
    access: Annotated[str | None, typer.Option(help="Terms of access to the data, for the manifests.")] = None,
    check: Check = False,
    splits: Splits = SHARES,
    seed: Seed = 0,
    short_side: ShortSide = 512,
    image_format: ImageFormat = "source",
    quality: Quality = 95,
    window: Window = None,
    clahe: Clahe = False,
    samples_per_shard: PerShard = 1024,
    max_bad_fraction: MaxBad = 0.0,
    allow_phi_like: AllowPhi = False,
    labels_from_reports: LabelsFromReports = False,
    private_paths: PrivatePaths = False,
    patients_of: PatientsOf = None,
    workers: Workers = 1,
    address: Address = None,
) -> None:
    """Pack images and a table. One line per split says what was written. Packing again skips what is done, also after a kill."""
    from mmclip_shards.datasets.check import check_records
    from mmclip_shards.datasets.prepared import without_patient
    from mmclip_shards.datasets.table import read_table, splits_of, table_hash
    from mmclip_shards.pack import pack
    from mmclip_shards.split import parse_splits, patient_key

    options = dict(
        image_column=image_column, patient_column=patient_column, text_column=text_column, findings_column=findings_column,
        impression_column=impression_column, labels_column=labels_column, labels_separator=labels_separator,
        view_column=view_column, age_column=age_column, split_column=split_column, key_column=key_column,
        empty_reports=empty_reports, delimiter=delimiter, encoding=encoding, normal_label=normal_label,
    )  # fmt: skip
    rendering = _rendering(image_format, quality, window, clahe)
    records, identity = read_table(table, images, **options), table_hash(table, **options)  # type: ignore[arg-type]
    name, key = dataset or Path(dest.rstrip("/")).name, patient_key()
    if private_paths:
        records = Records(records, lambda record: without_patient(record, name, key))
        identity = hashlib.sha256(f"{identity} private paths of {name}".encode()).hexdigest()
    else:
        _tell_named_patients(records)
    if check:
        _print_check(dest, *check_records(records, short_side, rendering=rendering))
        return
    source: dict[str, Any] = dict(records=records, config_hash=identity)
    if labels_from_reports:
        source = _from_reports(**source)
    with _crew(workers, address) as crew, progress_bar("pack", "images") as report:
        manifests = pack(
            **source, dest=dest, dataset=name, patient_key=key, splits=None if split_column else parse_splits(splits),
            split_of_record=splits_of(records) if split_column else None,
            seed=seed, short_side=short_side, rendering=rendering, samples_per_shard=samples_per_shard,
            max_bad_fraction=max_bad_fraction, licence=licence, access=access, allow_phi_like=allow_phi_like,
            numbering=patients_of, workers=crew, progress=report,
        )  # fmt: skip
    _print_splits(dest, manifests)


@pack_app.command(RECIPE, hidden=True)
def pack_recipe(
    context: typer.Context,
    raw: Annotated[
        str, typer.Argument(metavar="RAW", help="Folder or URL (s3://, gs://, ...) of the data set, as it is published.")
    ],
    dest: Dest,
    split: Annotated[
        str | None, typer.Option(help="`official`, or NAME: lists in RAW/splits/NAME/train.txt and so on. By default official.")
    ] = None,
    splits: Annotated[str | None, typer.Option(help=f"Split patients by shares instead, for example {SHARES}.")] = None,
    sections: Annotated[
        str | None, typer.Option(help="Sections that become the report, in this order. By default findings,impression.")
    ] = None,
    check: Check = False,
    dataset: Annotated[str | None, typer.Option(help="Name of the data set; by default the recipe's.")] = None,
    seed: Seed = 0,
    short_side: ShortSide = 512,
    image_format: ImageFormat = "source",
    quality: Quality = 95,
    window: Window = None,
    clahe: Clahe = False,
    samples_per_shard: PerShard = 1024,
    max_bad_fraction: MaxBad = 0.0,
    allow_phi_like: AllowPhi = False,
    labels_from_reports: LabelsFromReports = False,
    private_paths: PrivatePaths = False,
    patients_of: PatientsOf = None,
    workers: Workers = 1,
    address: Address = None,
) -> None:
    """The terms are printed first, and stored. Packing again skips what is done, also after a kill."""
    from mmclip_shards.datasets.check import check_recipe
    from mmclip_shards.datasets.prepared import describe, prepare_records
    from mmclip_shards.datasets.sections import parse_choice
    from mmclip_shards.pack import pack
    from mmclip_shards.rawpath import raw_path
    from mmclip_shards.split import parse_splits, patient_key

    rendering = _rendering(image_format, quality, window, clahe)
    found = find_recipe(str(context.info_name))
    found = replace(found, private_paths=found.private_paths or private_paths)
    name = Path(str(context.info_name)).stem
    _print_terms(name, found)
    if split is not None and splits is not None:
        raise ValueError("--split names one of the data set's own splits, --splits shares of the patients: give one of them")
    split = split.removeprefix(f"{name}@") if split is not None else OFFICIAL if found.official and splits is None else None
    chosen = parse_choice(sections) if sections is not None else None
    if check:
        seen = check_recipe(found, raw_path(raw), split=split, sections=chosen, short_side=short_side, rendering=rendering)
        _print_check(dest, *seen)
        return
    key = patient_key()
    prepared = prepare_records(name, found, raw_path(raw), split=split, patient_key=key, sections=chosen)
    print("\n".join(describe(prepared)))
    if found.licence is None and not private_paths:  # published sets: the recipe knows
        _tell_named_patients(prepared.records)
    source: dict[str, Any] = dict(records=prepared.records, config_hash=prepared.config_hash)
    if labels_from_reports:
        source = _from_reports(**source)
    with _crew(workers, address) as crew, progress_bar("pack", "images") as report:
        manifests = pack(
            **source, dest=dest, dataset=dataset or name,
            splits=parse_splits(splits or SHARES) if split is None else None, split_of_record=prepared.split_of,
            seed=seed, short_side=short_side, rendering=rendering, samples_per_shard=samples_per_shard, patient_key=key,
            numbering=patients_of or found.numbering(name),
            max_bad_fraction=max_bad_fraction, licence=found.licence, access=found.access,
            allow_phi_like=allow_phi_like, workers=crew, progress=report,
        )  # fmt: skip
    _print_splits(dest, manifests)


def _print_check(dest: str, lines: list[str], sheet: bytes) -> None:
    write_atomic(target := f"{dest.rstrip('/')}-check.png", sheet)
    print("\n".join([*lines, f"contact sheet: {target}"]))


def _print_terms(name: str, found: Recipe) -> None:
    print(f"{name}: {found.title}")
    print(f"licence: {found.licence or 'not stated: your own files'}")
    print(f"access: {found.access or 'not stated'}")
    print(f"source: {found.source}")
    if found.same_images:
        print(f"shares images with: {', '.join(found.same_images)}; do not train on one and evaluate on the other")


@pack_app.command("synthetic")
def pack_synthetic(
    dest: Dest,
    count: Annotated[int, typer.Option(min=1, help="Images.")] = 1000,
    unpaired: Annotated[bool, typer.Option("--unpaired", help="Labels without reports.")] = False,
    size: Annotated[int, typer.Option(min=32, help="Pixels, square.")] = 128,
    splits: Splits = SHARES,
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
