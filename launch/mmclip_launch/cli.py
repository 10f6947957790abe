"""The `mmclip` command. Nothing is imported at the top that takes time: Ctrl-C shall print no traceback while the rest is."""

import os
import signal
import sys


def main() -> int:
    """Run the command line -> its exit code (`mmclip_dist.errors`); 130 after Ctrl-C, without a word before a command begins."""
    usual = signal.getsignal(signal.SIGINT)
    if usual is signal.default_int_handler:  # else Ctrl-C is ignored, as after `nohup`
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    from mmclip_dist.cli import run
    from mmclip_launch.commands import app

    return run(app, begins=lambda: signal.signal(signal.SIGINT, usual))


if __name__ == "__main__":
    sys.exit(main())
