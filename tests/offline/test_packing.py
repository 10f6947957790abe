"""Packing on Ray gives the bytes of packing on one machine, also after a kill and where images are left out."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import ray
from mmclip_shards import storage
from mmclip_shards.datasets.table import read_table, table_hash
from mmclip_shards.journal import JOURNAL
from mmclip_shards.pack import pack
from mmclip_shards.rawpath import raw_path
from mmclip_shards.schema import Box, Record
from mmclip_shards.testing.s3_server import S3Server
from PIL import Image

from mmclip_dist.offline.packing import RayWorkers
from mmclip_dist.offline.stage import connect
from tests.conftest import wait_for

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def address(s3: S3Server) -> Iterator[str]:
    """Tasks have the environment, and so the credentials, of the process that starts the cluster."""
    connect(None)
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def records(folder: Path) -> list[Record]:
    """Two splits; images of every kind that a record may hold; one file is cut, so that all later borders of shards move."""
    found = []
    for number in range(23):
        image: object = np.full((20, 30), number, np.uint8)
        if number % 3 == 1:
            image = folder / f"{number}.png"
            Image.fromarray(np.full((20, 30), number, np.uint8)).save(image)
            if number == 4:
                image.write_bytes(image.read_bytes()[:40])
        found.append(
            Record(f"s{number:02d}", image, f"p{number}", f"{number}.png", f"Report {number}.", boxes=(Box("a", 1, 2, 3, 4),))  # type: ignore[arg-type]
        )
    return found


def options(**changes: object) -> dict:
    return {
        "dataset": "toy", "splits": {"train": 0.6, "test": 0.4}, "config_hash": "c", "patient_key": b"k", "max_bad_fraction": 0.1,
        "samples_per_shard": 3, **changes,
    }  # fmt: skip


def test_the_bytes_are_those_of_one_machine_also_where_images_are_left_out(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of = records(tmp_path)
    local = pack(of, tmp_path / "local", **options(workers=1))
    assert sum(len(manifest.shards) for manifest in local.values()) >= 7
    monkeypatch.chdir(tmp_path)  # workers have another folder
    seen: list[tuple[int, int]] = []
    relative = [Record(**{**vars(each), "image": Path(each.image.name)}) if isinstance(each.image, Path) else each for each in of]
    for name, count in (("one", 1), ("three", 3)):
        made = pack(relative, name, **options(workers=RayWorkers(count), progress=lambda *at: seen.append(at)))
        assert made == local
        assert files_in(tmp_path / name) == files_in(tmp_path / "local")
    assert seen[-1] == (23, 23)
    assert "quarantine.jsonl" in {path.name for path in (tmp_path / "local").rglob("*")}


def test_images_behind_a_url_are_read_by_the_tasks(address: str, tmp_path: Path, s3: S3Server) -> None:
    of = records(tmp_path)
    for image in tmp_path.glob("*.png"):
        storage.upload(image, f"{s3.url}/ray/{image.name}")
    raw = raw_path(f"{s3.url}/ray")
    remote = [replace(each, image=raw / each.image.name) if isinstance(each.image, Path) else each for each in of]
    pack(of, tmp_path / "local", **options())
    pack(remote, tmp_path / "ray", **options(workers=RayWorkers(2)))
    assert files_in(tmp_path / "ray") == files_in(tmp_path / "local")


def test_what_stops_a_pack_is_one_line(address: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="1 of 23 images cannot be used: s04"):
        pack(records(tmp_path), tmp_path / "set", **options(max_bad_fraction=0, workers=RayWorkers(2)))
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(OSError, match=r"finished shards are kept$") as found:
        pack(records(tmp_path)[:3], tmp_path / "file", **options(splits={"train": 1.0}, workers=RayWorkers(2)))
    assert "\n" not in str(found.value)


def test_a_killed_pack_goes_on_with_the_same_bytes(address: str, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (900, 900), np.uint8)
    rows = ["image,patient"]
    for number in range(24):
        Image.fromarray(np.roll(noise, number)).save(tmp_path / f"{number:02d}.png", compress_level=0)
        rows.append(f"{number:02d}.png,p{number}")
    table = tmp_path / "table.csv"
    table.write_text("\n".join(rows) + "\n")
    command = [
        sys.executable, "-m", "mmclip_dist.cli", "pack", "csv", "--table", str(table), "--images", str(tmp_path),
        "--dataset", "toy", "--image-column", "image", "--patient-column", "patient", "--splits", "train=1",
        "--samples-per-shard", "3", "--address", address, str(tmp_path / "ray"),
    ]  # fmt: skip

    def again(dest: str, workers: int | RayWorkers) -> None:
        columns: dict = {"image_column": "image", "patient_column": "patient"}
        unused = dict.fromkeys(("text_column", "labels_column", "view_column", "split_column", "key_column"))
        stated = {**columns, **unused, "labels_separator": "|", "empty_reports": "error"}
        pack(
            read_table(table, tmp_path, **columns), tmp_path / dest, dataset="toy", splits={"train": 1.0},
            config_hash=table_hash(table, **stated), samples_per_shard=3, workers=workers,
        )  # fmt: skip

    again("local", 1)
    journal = tmp_path / "ray" / "train" / JOURNAL
    with subprocess.Popen(command, start_new_session=True) as process:
        wait_for(journal.exists)
        os.killpg(process.pid, signal.SIGKILL)
    assert 0 < journal.read_text().count('"shard"') < 8
    again("ray", RayWorkers(2))
    assert files_in(tmp_path / "ray") == files_in(tmp_path / "local")
