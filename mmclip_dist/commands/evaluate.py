"""`mmclip evaluate ...` and `mmclip report`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from mmclip_dist.commands.options import local_folder
from mmclip_dist.commands.progress import print_table, progress_bar

Report = Callable[[int, int], None]

if TYPE_CHECKING:
    from mmclip_dist.evaluate.tasks import Outcome

evaluate_app = typer.Typer(no_args_is_help=True, help="Evaluate a checkpoint.")


Data = Annotated[list[str], typer.Option(help="Packed set, or its split; may be given several times.")]
Protocol = Annotated[str, typer.Option(help="Name of a protocol, or a YAML file of the same form; `own`: the set's own labels.")]
Checkpoint = Annotated[
    str,
    typer.Argument(
        metavar="CKPT", help="A run, checkpoint or mirror's URL; hf:FOLDER_OR_ID of transformers; open_clip:MODEL[:PRETRAINED]."
    ),
]
Validation = Annotated[str | None, typer.Option(help="Set whose `val` split thresholds are chosen on.")]
Out = Annotated[
    Path | None, typer.Option(parser=local_folder, metavar="FILE", help="Write the result here, as JSON, and its rows as CSV.")
]
AllowLeak = Annotated[bool, typer.Option("--allow-leak", help="Evaluate on a set that was trained on; the result then says so.")]
Average = Annotated[bool, typer.Option("--average", help="Use the averaged weights of a run with optim.ema.")]
RemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run the code that an hf: model brings with it.")]


@evaluate_app.command("zeroshot")
def evaluate_zeroshot(
    words: Annotated[list[str], typer.Argument(metavar="CKPT", help="As for the other tasks. With --checkpoint: the sets.")],
    data: Annotated[list[str] | None, typer.Option(help="Packed, labelled set, or its split; may come several times.")] = None,
    protocol: Protocol = "own",
    checkpoint: Annotated[str | None, typer.Option(help="The model, where the arguments are the sets.")] = None,
    validation: Validation = None,
    out: Out = None,
    allow_leak: AllowLeak = False,
    average: Average = False,
    trust_remote_code: RemoteCode = False,
) -> None:
    """Classification by prompts: AUROC, average precision, F1 and accuracy, with bootstrap intervals over patients."""
    if checkpoint is None:
        if len(words) != 1:
            raise ValueError(f"name one model, found {len(words)} arguments: mmclip evaluate zeroshot CKPT --data URL")
        checkpoint, words = words[0], []
    urls = [*words, *(data or [])]
    if not urls:
        raise ValueError("name a set to evaluate on: --data URL")
    _run("zeroshot", checkpoint, urls, protocol, out, average, trust_remote_code, validation=validation, allow_leak=allow_leak)


@evaluate_app.command("probe")
def evaluate_probe(
    checkpoint: Checkpoint,
    data: Data,
    protocol: Protocol = "own",
    train: Annotated[str | None, typer.Option(help="Set whose `train` split is fitted on; by default the one of --data.")] = None,
    validation: Annotated[str | None, typer.Option(help="Set whose `val` split C and thresholds come from; likewise.")] = None,
    cache: Annotated[Path | None, typer.Option(help="Folder of features; by default ~/.cache/mmclip/features.")] = None,
    out: Out = None,
    allow_leak: AllowLeak = False,
    average: Average = False,
    trust_remote_code: RemoteCode = False,
) -> None:
    """Logistic regression on frozen features, fitted on 1, 10 and 100% of the patients of `train`."""
    _run(
        "probe", checkpoint, data, protocol, out, average, trust_remote_code, cache=cache, train=train, validation=validation,
        allow_leak=allow_leak,
    )  # fmt: skip


@evaluate_app.command("finetune")
def evaluate_finetune(
    checkpoint: Checkpoint,
    data: Data,
    protocol: Protocol = "own",
    recipe: Annotated[str, typer.Option(help="Name of a recipe, or a YAML file of the same form.")] = "mrm",
    share: Annotated[str, typer.Option(help="Shares of the labels of `train`.")] = "0.01,0.1,1.0",
    seeds: Annotated[str, typer.Option(help="Each draws its own patients, head and order of samples.")] = "1,2,3",
    train: Annotated[str | None, typer.Option(help="Set whose `train` split it trains on; by default the one of --data.")] = None,
    validation: Annotated[str | None, typer.Option(help="Set whose `val` split chooses the checkpoint; likewise.")] = None,
    folder: Annotated[
        Path | None, typer.Option(parser=local_folder, metavar="FOLDER", help="Where it works, and goes on; by default in runs/.")
    ] = None,
    out: Out = None,
    allow_leak: AllowLeak = False,
    average: Average = False,
) -> None:
    """Image encoder and a head, trained on 1, 10 and 100% of the labels of `train`, and tested once. Goes on where it stopped."""
    from mmclip_dist.config import config_hash
    from mmclip_dist.evaluate import finetune, tasks
    from mmclip_dist.evaluate.encoders import open_encoder
    from mmclip_dist.evaluate.protocol import load_protocol

    chosen, how = load_protocol(protocol), finetune.load_recipe(recipe)
    shares, numbers = finetune.parse_shares(share), finetune.parse_seeds(seeds)
    with open_encoder(checkpoint, average=average) as encoder, finetune.joined(finetune.threads_of(encoder)) as place:
        where = folder or Path("runs") / f"finetune-{chosen.name}-{how.name}-{config_hash(encoder.sha256, data)[:12]}"
        request = tasks.Request(encoder, data, chosen, validation=validation, train=train, allow_leak=allow_leak)
        try:
            found = tasks.finetune(request, how, where, shares, numbers, place)
        except finetune.Stopped as stopped:
            if place.rank == 0:
                print(f"{stopped}; run the same command again to go on", file=sys.stderr)
            raise typer.Exit(stopped.code) from None
        if place.rank == 0:
            _show(found, out)


@evaluate_app.command("retrieval")
def evaluate_retrieval(
    checkpoint: Checkpoint,
    data: Data,
    protocol: Protocol = "own",
    out: Out = None,
    allow_leak: AllowLeak = False,
    average: Average = False,
    trust_remote_code: RemoteCode = False,
) -> None:
    """Reports found by images and images by reports: R@1, R@5 and R@10, identical reports counted once and counted each."""
    _run("retrieval", checkpoint, data, protocol, out, average, trust_remote_code, allow_leak=allow_leak)


@evaluate_app.command("pointing")
def evaluate_pointing(
    checkpoint: Checkpoint,
    data: Data,
    protocol: Protocol = "own",
    out: Out = None,
    allow_leak: AllowLeak = False,
    average: Average = False,
    trust_remote_code: RemoteCode = False,
) -> None:
    """Patches that respond to a class's prompts against its boxes: maximum in box, share of attention, IoU, CNR."""
    _run("pointing", checkpoint, data, protocol, out, average, trust_remote_code, allow_leak=allow_leak)


def _bar(task: str) -> AbstractContextManager[Report | None]:
    """A bar of the first rank's, for all."""
    from mmclip_dist.evaluate import shared

    return nullcontext() if shared.place()[0] else progress_bar(task, "images")


def _run(
    task: str, checkpoint: str, urls: list[str], protocol: str, out: Path | None, average: bool, trust_remote_code: bool,
    *, cache: Path | None = None, **more: Any,
) -> None:  # fmt: skip
    from mmclip_dist.evaluate import shared, tasks
    from mmclip_dist.evaluate.encoders import open_encoder
    from mmclip_dist.evaluate.probe import cache_folder
    from mmclip_dist.evaluate.protocol import load_protocol

    chosen = load_protocol(protocol)
    opened = open_encoder(checkpoint, average=average, trust_remote_code=trust_remote_code)
    with shared.joined(), opened as encoder, _bar(task) as report:
        first = shared.place()[0] == 0
        request = tasks.Request(encoder, urls, chosen, report=report, **more)
        if task == "probe":
            found = tasks.linear_probe(request, cache or cache_folder())
        else:
            found = {"zeroshot": tasks.zeroshot, "retrieval": tasks.retrieval, "pointing": tasks.pointing}[task](request)
    if first:
        _show(found, out)


def _show(found: Outcome, out: Path | None) -> None:
    """Print the table and the notes of an outcome, and write its files."""
    from mmclip_dist.evaluate import result

    head, *rows = found.table
    table = Table(*head)
    for row in rows:
        table.add_row(*row, style="bold" if "macro" in row else None)
    print_table(table)
    for line in found.notes:
        print(line)
    if out:
        result.save(out, found.document, found.rows)


def report(
    runs: Annotated[
        list[Path], typer.Argument(parser=local_folder, metavar="RUN...", help="Folders of training runs or of quick starts.")
    ],
    data: Annotated[
        list[str] | None, typer.Option(help="Packed set, or its test split, whose images and reports the page may show.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(parser=local_folder, metavar="FILE", help="The page, if it should not lie in the (first) RUN.")
    ] = None,
) -> None:
    """Write RUN/report.html: curves, scores, held-out samples, settings. Of several runs: the first RUN/comparison.html."""
    from mmclip_dist.evaluate.report import build_comparison, build_report

    if len(runs) == 1:
        print(build_report(runs[0], data=data or (), out=out))
        return
    if data:
        raise ValueError("--data is for the page of one run: name one RUN, or leave --data out to compare several")
    print(build_comparison(runs, out))
