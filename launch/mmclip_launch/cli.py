"""The `mmclip` command: the stages of mmclip_dist, and the jobs that span several of them."""

from __future__ import annotations

import sys

from mmclip_dist.cli import app, run


def main() -> int:
    return run(app)


if __name__ == "__main__":
    sys.exit(main())
