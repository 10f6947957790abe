"""The `mmclip` command: all stages of mmclip_dist, and `quickstart`, which runs them one after another."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from mmclip_dist.cli import app, run
from mmclip_dist.commands.options import local_folder

Urls = list[str] | None


@app.command()
def quickstart(
    out: Annotated[
        Path, typer.Option(parser=local_folder, metavar="FOLDER", help="Folder for all output.")
    ] = Path("runs/quickstart"),
    paired: Annotated[Urls, typer.Option(help="Packed set with reports; may be repeated.")] = None,
    unpaired: Annotated[Urls, typer.Option(help="Packed set without reports; may be repeated.")] = None,
    evaluation: Annotated[Urls, typer.Option("--eval", help="Packed, labelled set; may be repeated.")] = None,
    overrides: Annotated[Urls, typer.Argument(help="key.sub=value of the quickstart recipe.")] = None,
) -> None:
    """The whole job on this machine: pack, entities, warm-up, attention, MMCLIP training, a control, zero-shot, report.

    Without sets it draws synthetic radiographs. Run it again to go on where it stopped.
    """
    from mmclip_launch.quickstart import Job
    from mmclip_launch.quickstart import quickstart as start

    summary = start(
        Job(out, tuple(paired or ()), tuple(unpaired or ()), tuple(evaluation or ()), tuple(overrides or ()))
    )
    table = Table("quick start", "")
    for stage in summary["stages"]:
        table.add_row(stage["name"], f"{stage['seconds']:.0f} s")
    for term, values in summary["loss"].items():
        table.add_row(f"loss, {term}", f"{values['first']:.3f} to {values['last']:.3f}")
    for name, shot in (("MMCLIP", summary["zero_shot"]), ("contrastive alone, same time", summary["control"]["zero_shot"])):
        low, high = shot["auc_macro_ci95"]
        table.add_row(f"zero-shot macro AUC, {name}", f"{shot['auc_macro']:.3f}  (95% {low:.3f} to {high:.3f})")
    table.add_row("report", summary["report"])
    Console().print(table)


def main() -> int:
    return run(app)


if __name__ == "__main__":
    sys.exit(main())
