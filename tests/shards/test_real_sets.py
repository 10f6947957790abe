"""The two real sets as a pack makes them: the same bytes from one process, from four, and after a kill."""

from __future__ import annotations

import hashlib
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from mmclip_shards.datasets.table import read_table, table_hash
from mmclip_shards.manifest import Manifest, load_manifest
from mmclip_shards.pack import pack

COLUMNS: dict[str, dict[str, str]] = {
    "covid_cxr/pairs.csv": {
        "image_column": "image", "text_column": "clinical_notes", "patient_column": "patientid", "view_column": "view",
        "age_column": "age",
    },
    "nih_cxr1000/labels.csv": {
        "image_column": "image", "labels_column": "finding_labels", "patient_column": "patient_id", "view_column": "view",
        "age_column": "age",
    },
}  # fmt: skip

KILLED = """
import os, signal, sys
from pathlib import Path

def kill(done, total):
    if done == total // 2:
        os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    sys.path.insert(0, sys.argv[1])
    from test_real_sets import pack_table
    pack_table(Path(sys.argv[2]), sys.argv[3], Path(sys.argv[4]), workers=4, progress=kill)
"""


def pack_table(real_data: Path, table: str, dest: Path, **options: object) -> dict[str, Manifest]:
    path, columns = real_data / table, COLUMNS[table]
    return pack(
        read_table(path, path.parent, **columns), dest, dataset=path.parent.name, splits={"train": 0.8, "test": 0.2},  # type: ignore[arg-type]
        config_hash=table_hash(path, **columns), patient_key=b"k" * 32, short_side=64, samples_per_shard=64, **options,  # type: ignore[arg-type]
    )  # fmt: skip


def sums(folder: Path) -> dict[str, str]:
    """sha256 of every file of a set, by name."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize(("table", "samples"), [("covid_cxr/pairs.csv", 296), ("nih_cxr1000/labels.csv", 1000)])
def test_one_process_four_and_a_killed_pack_give_the_same_bytes(
    real_data: Path, tmp_path: Path, table: str, samples: int
) -> None:
    made = pack_table(real_data, table, tmp_path / "one")
    assert sum(manifest.samples for manifest in made.values()) == samples
    pack_table(real_data, table, tmp_path / "four", workers=4)
    (tmp_path / "killed.py").write_text(KILLED)
    command = [sys.executable, tmp_path / "killed.py", Path(__file__).parent, real_data, table, tmp_path / "again"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    left = sums(tmp_path / "again")
    assert "train/pack.jsonl" in left and "train/000000.tar" in left and "train/manifest.json" not in left
    pack_table(real_data, table, tmp_path / "again")
    assert sums(tmp_path / "one") == sums(tmp_path / "four") == sums(tmp_path / "again")
    assert {split: load_manifest(tmp_path / "again" / split) for split in made} == made
