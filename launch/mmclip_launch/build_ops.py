"""Build, once at set-up, the small C++ op that DeepSpeed otherwise compiles at the first training run on a CPU."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import torch


def main() -> int:
    if torch.cuda.is_available():
        return 0  # the op serves ranks that share a CPU
    os.environ["DS_ACCELERATOR"] = "cpu"
    # ninja lies beside this interpreter, which need not be on the PATH.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    if shutil.which("g++") is None:
        print("error: g++ is missing (Debian: apt-get install g++)", file=sys.stderr)
        return 2
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

    ShareMemCommBuilder().load(verbose=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
