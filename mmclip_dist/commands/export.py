"""`mmclip export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mmclip_dist.commands.options import Checkpoint, local_folder


def export(
    checkpoint: Checkpoint,
    destination: Annotated[Path, typer.Argument(parser=local_folder, metavar="DEST", help="A new or empty folder.")],
    format: Annotated[str, typer.Option("--format", help="hf, siglip-tower, open_clip, onnx or all.")] = "hf",
    average: Annotated[bool, typer.Option("--average", help="Use the averaged weights of a run with optim.ema.")] = False,
    license: Annotated[
        str | None, typer.Option("--license", help="Licence of the weights for the card, once you know that the data allow it.")
    ] = None,
    metrics: Annotated[
        Path | None,
        typer.Option(parser=local_folder, metavar="FILE", help="Result of `mmclip evaluate zeroshot --out`, for the card."),
    ] = None,
) -> None:
    """Write a checkpoint in a form that other programs load: safetensors or ONNX, with a model card."""
    from mmclip_dist.evaluate.zeroshot import load_result
    from mmclip_dist.export.export import export as write

    result = load_result(metrics) if metrics else None
    for line in write(checkpoint, destination, format, average=average, license=license, result=result):
        print(line)
