"""The command line: `mmclip ...`. Assembles the commands. An error that the user can mend prints one line and exits with 2."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

import mmclip_dist
from mmclip_dist import errors
from mmclip_dist.commands import demo, evaluate, export, offline, pack, plan, rewrite, sets, training

app = typer.Typer(
    name="mmclip", no_args_is_help=True, pretty_exceptions_enable=False,
    help="Pretrain MMCLIP models: masked medical contrastive language-image pretraining.",
)  # fmt: skip
app.add_typer(pack.pack_app, name="pack")
app.add_typer(evaluate.evaluate_app, name="evaluate")
for command in (
    sets.verify, sets.stats, sets.view, sets.index, rewrite.reshard, rewrite.merge, rewrite.split,
    rewrite.duplicates, training.tokenizer, training.config, offline.entities, offline.attention, offline.labels,
    plan.plan, evaluate.report, export.export, demo.demo,
):  # fmt: skip
    app.command()(command)
app.command("filter")(rewrite.filter_)
app.command("bench-loader")(sets.bench_loader)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"mmclip-dist {mmclip_dist.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version and exit.")
    ] = False,
) -> None:
    """What `mmclip` takes before a command."""


def run(application: typer.Typer) -> int:
    """Run the command line. The exit code is as in `mmclip_dist.errors`, and 130 after Ctrl-C."""
    try:
        application()
    except KeyboardInterrupt:
        print("stopped; run the same command again to go on", file=sys.stderr)
        return 130
    except Exception as error:
        code = errors.exit_code(error)
        if code is None or "MMCLIP_DEBUG" in os.environ:
            raise
        print(errors.line(error), file=sys.stderr)
        return code
    return 0


def main() -> int:
    return run(app)


if __name__ == "__main__":
    sys.exit(main())
