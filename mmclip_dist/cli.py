"""The command line: `mmclip ...`. Parses, calls one function; what a user can mend prints one line and exits with 2."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from mmclip_shards.manifest import Manifest
from mmclip_shards.storage import join
from rich.console import Console
from rich.table import Table

from mmclip_dist import plan_command, set_commands
from mmclip_dist.progress import progress_bar

app = typer.Typer(
    name="mmclip", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    help="Pretrain MMCLIP models: masked medical contrastive language-image pretraining.",
)  # fmt: skip
pack_app = typer.Typer(no_args_is_help=True, help="Turn a raw data set into shards with a manifest.")
evaluate_app = typer.Typer(no_args_is_help=True, help="Evaluate a checkpoint.")
app.add_typer(pack_app, name="pack")
app.add_typer(evaluate_app, name="evaluate")
for command in (set_commands.verify, set_commands.stats, set_commands.index, plan_command.plan):
    app.command()(command)

Dest = Annotated[str, typer.Argument(help="Folder or URL to write to; one folder per split is made below it.")]
Splits = Annotated[str, typer.Option(help="Shares of the patients; a patient never crosses splits.")]
Seed = Annotated[int, typer.Option(help="Of the split (and of synthetic data).")]
ShortSide = Annotated[int, typer.Option(help="Images are shrunk to this short side, in pixels.")]
PerShard = Annotated[int, typer.Option(help="Samples of one shard.")]
Workers = Annotated[int, typer.Option(min=1, help="Processes.")]
Address = Annotated[
    str | None, typer.Option(help="Ray cluster; by default the job's own or RAY_ADDRESS, else one is started here.")
]


def _print_splits(dest: str, manifests: dict[str, Manifest]) -> None:
    for split, manifest in manifests.items():
        print(f"{join(dest, split)}: {manifest.samples} samples in {len(manifest.shards)} shards")


@pack_app.command("csv")
def pack_csv(
    dest: Dest,
    table: Annotated[Path, typer.Option(help="CSV or TSV with one image a row.")],
    images: Annotated[Path, typer.Option(help="Folder that the image column is relative to.")],
    image_column: Annotated[str, typer.Option(help="Column of the image's path.")],
    patient_column: Annotated[str, typer.Option(help="Column of the patient's id; only a keyed hash is stored.")],
    text_column: Annotated[str | None, typer.Option(help="Column of the report; none: unpaired images.")] = None,
    labels_column: Annotated[str | None, typer.Option(help="Column of the findings that are present.")] = None,
    labels_separator: Annotated[str, typer.Option(help="Between findings in one cell.")] = "|",
    view_column: Annotated[str | None, typer.Option(help="Column of the view (PA, AP, ...).")] = None,
    split_column: Annotated[str | None, typer.Option(help="Column of the split, instead of --splits.")] = None,
    key_column: Annotated[str | None, typer.Option(help="Column of a unique name; by default the image's.")] = None,
    empty_reports: Annotated[str, typer.Option(help="A row without text: error, drop or unpaired.")] = "error",
    dataset: Annotated[str | None, typer.Option(help="Name of the data set; by default DEST's last part.")] = None,
    splits: Splits = "train=.8,val=.1,test=.1",
    seed: Seed = 0,
    short_side: ShortSide = 512,
    samples_per_shard: PerShard = 1024,
    workers: Workers = 1,
) -> None:
    """Pack images and a table. One line per split says what was written; packing again skips what is done."""
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
            config_hash=table_hash(table, **options), workers=workers, progress=report,
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
    """Pack drawn chest radiographs with findings of known place, and reports. Never real data."""
    from mmclip_shards.datasets.synthetic_set import pack_synthetic as run
    from mmclip_shards.split import parse_splits

    with progress_bar("pack", "images") as report:
        manifests = run(
            dest, count, unpaired=unpaired, size=size, splits=parse_splits(splits), seed=seed,
            samples_per_shard=samples_per_shard, workers=workers, progress=report,
        )  # fmt: skip
    _print_splits(dest, manifests)


@app.command()
def tokenizer(
    urls: Annotated[list[str], typer.Argument(help="Packed sets whose reports it is trained on.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    vocabulary: Annotated[int, typer.Option(min=100, help="Tokens at most.")] = 8192,
) -> None:
    """Train a WordPiece tokenizer on packed reports. Any tokenizer of transformers can be used instead."""
    from mmclip_shards.manifest import find_split

    from mmclip_dist.data.tokenizer import save_tokenizer, tokenizer_of_sets

    trained = tokenizer_of_sets([find_split(url, "train") for url in urls], vocabulary)
    save_tokenizer(trained, out)
    print(f"{out}: {len(trained)} tokens")


@app.command()
def config(
    recipe: Annotated[str, typer.Argument(help="A recipe's name or a YAML file.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key.sub=value")] = None,
) -> None:
    """Print the resolved configuration of a recipe."""
    from mmclip_dist.config import dump_config, load_config

    print(dump_config(load_config(recipe, overrides or [])), end="")


@app.command()
def entities(
    base: Annotated[str, typer.Argument(help="Packed set, SET/SPLIT.")],
    out: Annotated[str | None, typer.Option(help="Sidecars; by default BASE/entities.")] = None,
    model: Annotated[str, typer.Option(help="`lexicon`, or an installed spaCy or scispaCy model.")] = "lexicon",
    workers: Workers = 2,
    address: Address = None,
) -> None:
    """Find the medical entities of every report, on Ray."""
    from mmclip_dist.offline.entities import entities_stage
    from mmclip_dist.offline.stage import connect, progress_line, run_stage

    stage = entities_stage(base, out or join(base, "entities"), model)
    with _ray(connect, address):
        manifest = run_stage(stage, workers=workers, report=progress_line("shards"))
    print(f"{stage.out}: entities of {manifest.samples} samples")


@app.command()
def attention(
    base: Annotated[str, typer.Argument(help="Packed set, SET/SPLIT.")],
    checkpoint: Annotated[str, typer.Option(help="A checkpoint folder, or a run folder for its newest one.")],
    entities: Annotated[str | None, typer.Option(help="Entity sidecars, whose words guide the scores.")] = None,
    out: Annotated[str | None, typer.Option(help="Sidecars; by default BASE/attention.")] = None,
    workers: Workers = 2,
    gpus: Annotated[float, typer.Option(min=0, help="GPUs of each process; without, it runs on the CPU.")] = 0,
    address: Address = None,
) -> None:
    """Score how strongly each patch responds to the report, on Ray."""
    from mmclip_dist.offline.attention import attention_stage
    from mmclip_dist.offline.stage import connect, progress_line, run_stage

    stage = attention_stage(base, out or join(base, "attention"), checkpoint, entities, gpus)
    with _ray(connect, address):
        manifest = run_stage(stage, workers=workers, report=progress_line("shards"))
    print(f"{stage.out}: attention scores of {manifest.samples} samples")


@app.command("bench-loader")
def bench_loader(
    urls: Annotated[list[str], typer.Argument(help="Packed sets, SET/SPLIT.")],
    size: Annotated[
        int | None, typer.Option(min=1, help="Decode to so many pixels; without, nothing is decoded.")
    ] = None,
    workers: Annotated[int, typer.Option(min=0, help="Loader processes.")] = 0,
    streams: Annotated[int, typer.Option(min=1, help="Streams of this rank.")] = 32,
    seconds: Annotated[float, typer.Option(min=0.1, help="How long.")] = 10.0,
    cache: Annotated[str | None, typer.Option(help="Folder on a local disk for what is fetched.")] = None,
) -> None:
    """How fast sets are read in training order, every byte checked: samples/s, MB/s, waiting for the store."""
    from mmclip_shards.manifest import find_split

    from mmclip_dist.bench.loader import measure
    from mmclip_dist.config import Data, Reading, Source

    sources = [Source(url=find_split(url, "train")) for url in urls]
    data = Data(streams=streams, workers=workers, reading=Reading(cache=cache))
    rate = measure(sources, data, seconds=seconds, size=size, batch=8 * streams)
    print(
        f"{rate.samples_per_s:,.0f} samples/s, {rate.mb_per_s:,.1f} MB/s, {rate.wait:.0%} of the time waiting for the store "
        f"({rate.read.requests} requests, {rate.read.retries} retries, {rate.read.cache_hits} cache hits)"
    )


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="Folder of a training run or of a quick start.")],
    images: Annotated[list[str] | None, typer.Option(help="Packed set whose first images are shown.")] = None,
) -> None:
    """Write RUN/report.html: losses, scores, attention on some images, and what made the run."""
    from mmclip_dist.evaluate.report import build_report

    print(build_report(run, images=images or ()))


@contextmanager
def _ray(connect: Callable[[str | None], None], address: str | None) -> Iterator[None]:
    import ray

    connect(address)
    try:
        yield
    finally:
        ray.shutdown()


@evaluate_app.command("zeroshot")
def evaluate_zeroshot(
    urls: Annotated[list[str], typer.Argument(help="Packed, labelled sets that were not trained on.")],
    checkpoint: Annotated[str, typer.Option(help="A checkpoint folder, or a run folder for its newest one.")],
    out: Annotated[Path | None, typer.Option(help="Write the result here, as JSON.")] = None,
    allow_leak: Annotated[bool, typer.Option("--allow-leak", help="Evaluate on a set that was trained on.")] = False,
    average: Annotated[bool, typer.Option("--average", help="Use the averaged weights of a run with optim.ema.")] = False,
) -> None:
    """Zero-shot classification by disease prompts: AUC per class, with a bootstrap interval over patients."""
    from mmclip_shards.manifest import find_split

    from mmclip_dist.evaluate.zeroshot import save_result, zero_shot

    with progress_bar("zero-shot", "images") as report:
        sets = [find_split(url, "test") for url in urls]
        result = zero_shot(checkpoint, sets, allow_leak=allow_leak, average=average, report=report)
    table = Table("class", "AUC")
    for name, auc in result.per_class.items():
        table.add_row(name, f"{auc:.3f}")
    low, high = result.auc_macro_ci95
    table.add_row("macro", f"{result.auc_macro:.3f}  (95% {low:.3f} to {high:.3f})", style="bold")
    Console().print(table)
    if result.left_out:
        print(f"left out, for lack of positives or negatives: {', '.join(result.left_out)}")
    if result.undecodable:
        print(f"left out, {len(result.undecodable)} images that cannot be decoded: {', '.join(result.undecodable[:5])}")
    if out:
        save_result(result, out)


def run(application: typer.Typer) -> int:
    """Run the command line; 2 and one line for a fault that the user can mend, 130 after Ctrl-C."""
    try:
        application()
    except (ValueError, FileNotFoundError, PermissionError, NotADirectoryError) as error:
        if "MMCLIP_DEBUG" in os.environ:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # a cluster, a disk or a child process failed: nothing that another argument would mend
        if "MMCLIP_DEBUG" in os.environ:
            raise
        print(f"failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; run the same command again to go on", file=sys.stderr)
        return 130
    return 0


def main() -> int:
    return run(app)


if __name__ == "__main__":
    sys.exit(main())
