"""The command line: `mmclip ...`. Assembles the commands; what a user can mend prints one line and exits with 2."""

from __future__ import annotations

import os
import sys

import typer

from mmclip_dist.commands import evaluate, offline, pack, plan, sets, training

app = typer.Typer(
    name="mmclip", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    help="Pretrain MMCLIP models: masked medical contrastive language-image pretraining.",
)  # fmt: skip
app.add_typer(pack.pack_app, name="pack")
app.add_typer(evaluate.evaluate_app, name="evaluate")
for command in (
    sets.verify, sets.stats, sets.index, training.tokenizer, training.config, offline.entities, offline.attention, plan.plan,
    evaluate.report,
):  # fmt: skip
    app.command()(command)
app.command("bench-loader")(sets.bench_loader)


def run(application: typer.Typer) -> int:
    """Run the command line; 2 and one line for a fault that the user can mend, 130 after Ctrl-C."""
    try:
        application()
    except (ValueError, FileNotFoundError, PermissionError, NotADirectoryError) as error:
        if "MMCLIP_DEBUG" in os.environ:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # a cluster, a disk or a child process failed: nothing that another argument would mend
        if "MMCLIP_DEBUG" in os.environ:
            raise
        print(f"failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; run the same command again to go on", file=sys.stderr)
        return 130
    return 0


def main() -> int:
    return run(app)


if __name__ == "__main__":
    sys.exit(main())
