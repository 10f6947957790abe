"""`mmclip evaluate ...` and `mmclip report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from mmclip_dist.commands.options import local_folder
from mmclip_dist.commands.progress import progress_bar

evaluate_app = typer.Typer(no_args_is_help=True, help="Evaluate a checkpoint.")


@evaluate_app.command("zeroshot")
def evaluate_zeroshot(
    urls: Annotated[list[str], typer.Argument(help="Packed, labelled sets that the model was not trained on.")],
    checkpoint: Annotated[str, typer.Option(help="A checkpoint folder, or a run folder or a mirror's URL for its newest one.")],
    out: Annotated[Path | None, typer.Option(parser=local_folder, metavar="FILE", help="Write the result here, as JSON.")] = None,
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


def report(
    run: Annotated[
        Path, typer.Argument(parser=local_folder, metavar="RUN", help="Folder of a training run or of a quick start.")
    ],
    images: Annotated[list[str] | None, typer.Option(help="Packed set; the report shows its first images.")] = None,
) -> None:
    """Write RUN/report.html: losses, scores, attention on some images, configuration and versions."""
    from mmclip_dist.evaluate.report import build_report

    print(build_report(run, images=images or ()))
