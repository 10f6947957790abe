"""What a training run needs first: `mmclip config`, `mmclip tokenizer`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mmclip_dist.commands.options import Overrides, RecipeName, local_folder


def config(
    recipe: RecipeName,
    overrides: Overrides = None,
) -> None:
    """Print the resolved configuration of a recipe."""
    from mmclip_dist.config import dump_config, load_config

    print(dump_config(load_config(recipe, overrides or [])), end="")


def train(words: Annotated[list[str] | None, typer.Argument()] = None) -> None:
    """What many type first."""
    given = " ".join(words or ["RECIPE", "key=value", "..."])
    raise ValueError(f"runs are started by a launcher: `mmclip launch deepspeed {given}` on this machine; see `mmclip launch -h`")


def tokenizer(
    urls: Annotated[list[str], typer.Argument(metavar="SET...", help="Packed sets with the reports to train on.")],
    out: Annotated[Path, typer.Option(parser=local_folder, metavar="FOLDER", help="Folder to write.")],
    vocabulary: Annotated[int, typer.Option(min=100, help="Maximal size of the vocabulary.")] = 8192,
) -> None:
    """Train a WordPiece tokenizer on packed reports. Any tokenizer of transformers can be used instead."""
    from mmclip_shards.manifest import find_split

    from mmclip_dist.data.tokenizer import save_tokenizer, tokenizer_of_sets

    trained = tokenizer_of_sets([find_split(url, "train") for url in urls], vocabulary)
    save_tokenizer(trained, out)
    print(f"{out}: {len(trained)} tokens")
