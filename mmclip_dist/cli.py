"""The command line: `mmclip ...`. Assembles the commands. An error that the user can mend prints one line and exits with 2."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import mmclip_dist
from mmclip_dist import errors
from mmclip_dist.commands import demo, evaluate, export, offline, pack, plan, rewrite, sets, training


class Commands(TyperGroup):
    """All commands: what Ctrl-C says, and their order in the help."""

    def invoke(self, ctx: Any) -> Any:
        try:
            if ctx.obj:
                ctx.obj()
            return super().invoke(ctx)
        except KeyboardInterrupt:  # here, since Typer would end without a word
            print("stopped; run the same command again to go on", file=sys.stderr)
            raise typer.Exit(130) from None

    def list_commands(self, ctx: Any) -> list[str]:
        """The parts in the order of the work, each with the command that most begin with first."""
        first = ("pack", "tokenizer", "quickstart", "evaluate")
        return sorted(super().list_commands(ctx), key=lambda name: first.index(name) if name in first else len(first))


app = typer.Typer(
    cls=Commands, name="mmclip", no_args_is_help=True, pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Pretrain MMCLIP models: masked medical contrastive language-image pretraining.",
)  # fmt: skip
SETS, BEFORE, TRAINING, MODELS = "Data sets", "Before training", "Training", "Models"
"""The parts of `mmclip --help`."""
app.add_typer(pack.pack_app, name="pack", rich_help_panel=SETS)
app.add_typer(evaluate.evaluate_app, name="evaluate", rich_help_panel=MODELS)
for part, commands in {
    SETS: (
        sets.index, sets.verify, sets.stats, sets.view, rewrite.duplicates, rewrite.filter_, rewrite.split, rewrite.merge,
        rewrite.reshard, offline.labels, sets.bench_loader,
    ),
    BEFORE: (training.tokenizer, offline.entities, offline.attention),
    TRAINING: (training.config, plan.plan),
    MODELS: (evaluate.report, export.export, demo.demo),
}.items():  # fmt: skip
    for command in commands:
        app.command(command.__name__.strip("_").replace("_", "-"), rich_help_panel=part)(command)
app.command("train", hidden=True, context_settings={"ignore_unknown_options": True})(training.train)


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


def run(application: typer.Typer, begins: Callable[[], object] = lambda: None) -> int:
    """Run the command line. The exit code is as in `mmclip_dist.errors`, and 130 after Ctrl-C. begins: called before the command,
    once the command line is read."""
    try:
        application(obj=begins)
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
