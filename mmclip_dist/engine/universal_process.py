"""`python -m mmclip_dist.engine.universal_process CHECKPOINT OUT`: DeepSpeed's conversion, alone in its process."""

from __future__ import annotations

import sys
from argparse import Namespace

from deepspeed.checkpoint import ds_to_universal


def main(checkpoint: str, out: str) -> None:
    ds_to_universal.main(
        Namespace(
            input_folder=checkpoint, output_folder=out, num_extract_workers=4, num_merge_workers=2, keep_temp_folder=False,
            strict=True, inject_missing_state=False,
        )
    )  # fmt: skip


if __name__ == "__main__":
    main(*sys.argv[1:])
