from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from mmclip_shards.datasets.jsonl import record_of
from mmclip_shards.datasets.recipe import recipe
from mmclip_shards.rawpath import RawPath, matching
from mmclip_shards.schema import Record


@recipe(licence=None, access=None, source="your own files", needs=("pyarrow", "parquet"))
def parquet(raw: RawPath) -> Iterator[Record]:
    """Parquet tables: every RAW/*.parquet, with the columns that `jsonl` has as fields.

    `image` may also be a struct of `bytes` and `path`, as Hugging Face stores it; the bytes then lie in the temporary folder
    (TMPDIR) until the pack is done. Rows are read in batches of 256.
    """
    files = matching(raw, "*.parquet")
    if not files:
        raise ValueError(f"{raw} holds no *.parquet")
    for file in files:
        for number, row in enumerate(_rows(file), 1):
            yield _record(row, raw, f"{file}, row {number}", f"{file.stem}/{number}")


def _rows(file: RawPath) -> Iterator[dict[str, Any]]:
    """ValueError that names the file when it is cut or damaged, which pyarrow may find in the middle."""
    import pyarrow.parquet

    try:
        with file.open("rb") as opened:
            for batch in pyarrow.parquet.ParquetFile(opened).iter_batches(batch_size=256):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{file} is no Parquet file, or damaged ({' '.join(str(error).split())}): write it again") from error


def _record(row: dict[str, Any], raw: RawPath, where: str, name: str) -> Record:
    embedded = row["image"] if isinstance(row.get("image"), dict) else None
    if embedded is None or embedded.get("bytes") is None:
        return record_of({**row, "image": (embedded or {}).get("path") if embedded else row.get("image")}, raw, where)
    # Not the name that the struct gives: it may repeat, and it may be a path of another machine.
    return replace(record_of({**row, "image": name}, raw, where), image=embedded["bytes"])
