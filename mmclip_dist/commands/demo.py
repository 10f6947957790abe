"""`mmclip demo`."""

from __future__ import annotations

from typing import Annotated

import typer

from mmclip_dist.commands.options import Checkpoint
from mmclip_dist.commands.progress import progress_bar


def demo(
    checkpoint: Checkpoint,
    data: Annotated[str | None, typer.Option(help="A packed set, SET/SPLIT: the reports nearest to the image are shown.")] = None,
    findings: Annotated[str | None, typer.Option(help="Findings in the form at first, with commas between them.")] = None,
    average: Annotated[bool, typer.Option("--average", help="Use the averaged weights of a run with optim.ema.")] = False,
    host: Annotated[
        str, typer.Option(help="Address to listen on. Others than 127.0.0.1 can be reached from the network.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8080,
) -> None:
    """Serve a page on this machine: drop a radiograph, name findings, see scores, attention and near reports."""
    try:
        from mmclip_dist.demo.serve import serve
    except ImportError as error:
        raise ValueError(f'{error.name} is missing: pip install "mmclip-dist[demo]"') from error
    serve(checkpoint, data=data, findings=findings, average=average, host=host, port=port, progress=progress_bar)
