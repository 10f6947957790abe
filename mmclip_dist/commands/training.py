"""What a training run needs first: `mmclip config`, `mmclip tokenizer`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mmclip_dist.commands.options import local_folder


def config(
    recipe: Annotated[str, typer.Argument(help="A recipe's name or a YAML file.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key.sub=value")] = None,
) -> None:
    """Print the resolved configuration of a recipe."""
    from mmclip_dist.config import dump_config, load_config

    print(dump_config(load_config(recipe, overrides or [])), end="")


def tokenizer(
    urls: Annotated[list[str], typer.Argument(help="Packed sets with the reports to train on.")],
    out: Annotated[Path, typer.Option(parser=local_folder, metavar="FOLDER", help="Folder to write.")],
    vocabulary: Annotated[int, typer.Option(min=100, help="Maximal size of the vocabulary.")] = 8192,
) -> None:
    """Train a WordPiece tokenizer on packed reports. Any tokenizer of transformers can be used instead."""
    from mmclip_shards.manifest import find_split

    from mmclip_dist.data.tokenizer import save_tokenizer, tokenizer_of_sets

    trained = tokenizer_of_sets([find_split(url, "train") for url in urls], vocabulary)
    save_tokenizer(trained, out)
    print(f"{out}: {len(trained)} tokens")
