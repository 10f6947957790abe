"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer


def local_folder(text: str | Path) -> Path:
    """A path on this machine's file systems. A URL would silently become a folder with a name like `s3:`. A default is a Path."""
    if "://" in str(text):
        raise typer.BadParameter(f"{text} is a URL: name a local path, and copy what is written there afterwards")
    return Path(text)


Precision = Literal["fp32", "bf16", "fp16"]  # that of `mmclip_dist.config`, whose import would hold up every command
RecipeName = Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe's name or a YAML file.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Settings, as optim.lr=1e-4; `mmclip config RECIPE` prints all.")
]
Checkpoint = Annotated[
    str, typer.Argument(metavar="CKPT", help="A checkpoint folder, or a run folder or a mirror's URL for its newest one.")
]
SetUrl = Annotated[str, typer.Argument(metavar="SET", help="A packed set, or the folder of its splits.")]
Split = Annotated[str, typer.Argument(metavar="SET/SPLIT", help="A packed set.")]
Workers = Annotated[int, typer.Option(min=1, help="Processes.")]
