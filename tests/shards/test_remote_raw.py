"""Raw data behind URLs: every recipe, the bytes of a local pack, one request an image, faults, refusals, kills."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
import threading
import uuid
import zipfile
from collections import Counter
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
from mmclip_shards import storage
from mmclip_shards.datasets.prepared import prepare_records
from mmclip_shards.datasets.recipe import find_recipe
from mmclip_shards.datasets.table import read_table
from mmclip_shards.faults import Patience
from mmclip_shards.pack import pack
from mmclip_shards.rawpath import LOOKED_FOR, RawPath, RemotePath, ahead, matching, raw_path, seekable, walk
from mmclip_shards.schema import Record
from mmclip_shards.testing.fault_proxy import Fault, FaultProxy, Request
from mmclip_shards.testing.s3_server import S3Server
from PIL import Image

from tests.miniatures import MINIATURES, call, dicom_file, write
from tests.object_store import client_environment

KEY = b"k" * 32
QUICK = Patience(budget_s=20.0, stall_s=1.0, first_wait_s=0.01, longest_wait_s=0.1)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "PATIENCE", QUICK)
    monkeypatch.setenv("MMCLIP_PATIENT_KEY", "k" * 32)


@pytest.fixture
def url(s3: S3Server) -> str:
    return f"{s3.url}/{uuid.uuid4().hex}"


def upload(folder: Path, url: str) -> str:
    """Copy a tree to the store -> its URL there."""
    for file in folder.rglob("*"):
        if file.is_file():
            storage.upload(file, storage.join(url, file.relative_to(folder).as_posix()))
    return url


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def draw(path: Path, seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (12, 16), np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix.lower() in (".png", ".jpg"):
        Image.fromarray(pixels).save(path)
    else:
        dicom_file(path, "MONOCHROME2", pixels)


def pack_recipe(name: str, raw: RawPath, dest: Path, **options: object) -> dict[str, bytes]:
    found = find_recipe(name)
    split = "official" if found.official and name != "rexgradient" else None  # whose miniature has one patient
    prepared = prepare_records(name, found, raw, split=split, patient_key=KEY)
    pack(
        prepared.records, dest, dataset=name, splits=None if split else {"train": 1.0}, split_of_record=prepared.split_of,
        config_hash=prepared.config_hash, patient_key=KEY, short_side=8, samples_per_shard=2,
        **({"max_bad_fraction": 0.6} | options),
    )  # fmt: skip
    return files_in(dest)


@pytest.mark.parametrize("name", MINIATURES)
def test_every_recipe_packs_the_bytes_of_the_local_tree(name: str, tmp_path: Path, url: str) -> None:
    """A missing and a damaged image are among them, and are told alike."""
    found = find_recipe(name)
    if found.needs is not None:
        pytest.importorskip(found.needs[0], reason=f'{name} IS NOT TESTED: pip install "mmclip-dist[{found.needs[1]}]"')
    (tmp_path / "raw").mkdir()
    raw = MINIATURES[name](tmp_path / "raw")
    records = prepare_records(name, found, raw, split=None, patient_key=KEY).records
    for number, record in enumerate(records):
        if isinstance(record.image, Path) and (number != 1 or len(records) < 5):
            draw(record.image, number)
    if len(records) >= 5:
        damaged = next(record.image for record in records[2:] if isinstance(record.image, Path))
        damaged.write_bytes(damaged.read_bytes()[:140])
    local = pack_recipe(name, raw, tmp_path / "local")
    assert sum(file.endswith(".tar") for file in local) >= 1
    assert any("quarantine" in file for file in local) == (len(records) >= 5)
    assert pack_recipe(name, raw_path(upload(raw, f"{url}/raw")), tmp_path / "remote") == local


def test_the_archives_of_reports_are_read_from_a_store(tmp_path: Path, url: str) -> None:
    raw = MINIATURES["openi"](tmp_path)
    with tarfile.open(raw / "NLMCXR_reports.tgz", "w:gz") as tar:
        tar.add(raw / "ecgen-radiology", "ecgen-radiology")
    mimic = MINIATURES["mimic-cxr-jpg"](tmp_path / "mimic")
    with zipfile.ZipFile(mimic / "mimic-cxr-reports.zip", "w") as archive:
        for path in matching(mimic, "mimic-cxr-reports/files/*/*/*.txt"):
            archive.write(path, path.relative_to(mimic / "mimic-cxr-reports").as_posix())
    for name, tree, part in (("openi", raw, "NLMCXR_reports.tgz"), ("mimic-cxr-jpg", mimic, "mimic-cxr-reports.zip")):
        remote = upload(tree, f"{url}/{name}")
        wanted = prepare_records(name, find_recipe(name), tree, split=None, patient_key=KEY)
        for path in raw_path(remote).glob("**/*"):
            if path.suffix in (".xml", ".txt"):
                storage.remove(path)
        found = prepare_records(name, find_recipe(name), raw_path(remote), split=None, patient_key=KEY)
        assert storage.exists(f"{remote}/{part}")
        assert [record.report for record in found.records] == [record.report for record in wanted.records]
        assert found.config_hash == wanted.config_hash and found.without_report < len(found.records)


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *arguments: object) -> None:
        pass


def test_a_tree_of_a_web_server_that_lists_its_folders(tmp_path: Path) -> None:
    """As `wget -r` would fetch it."""
    raw = MINIATURES["nih"](tmp_path / "raw")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(raw))) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        web = raw_path(f"http://127.0.0.1:{server.server_port}/")
        assert pack_recipe("nih", web, tmp_path / "remote") == pack_recipe("nih", raw, tmp_path / "local")
        server.shutdown()


# -- the command --------------------------------------------------------------------------------------------------------------


def table_set(folder: Path, count: int = 30) -> Path:
    """folder/table.csv and folder/images; the paths of the table begin with the image folder's own name."""
    rows = ["image,patient,report,split"]
    for number in range(count):
        draw(folder / "images" / f"p{number // 2:03d}" / f"{number}.png", number)
        split = "test" if number // 2 % 4 == 0 else "train"
        rows.append(f'images/p{number // 2:03d}/{number}.png,p{number // 2:03d},"Report {number}.\nStable.",{split}')
    write(folder, {"table.csv": "\n".join(rows) + "\n"})
    return folder


def of_table(where: str, *more: str) -> list[str]:
    return [
        "csv", "--table", f"{where}/table.csv", "--images", f"{where}/images", "--image-column", "image", "--patient-column",
        "patient", "--text-column", "report", "--dataset", "toy", "--samples-per-shard", "7", *more,
    ]  # fmt: skip


@pytest.mark.parametrize("private", [False, True])
def test_a_table_of_a_store_packs_the_same_bytes_and_asks_once_for_an_image(
    private: bool, tmp_path: Path, url: str, faulty: FaultProxy, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    more = ["--split-column", "split", *(["--private-paths"] if private else [])]
    raw = table_set(tmp_path / "raw")
    upload(raw, url)
    faulty.requests.clear()
    for where, dest in ((str(raw), "local"), (url, "remote")):
        code, _, err = call(capsys, monkeypatch, *of_table(where, *more), str(tmp_path / dest))
        assert code == 0, err
    assert files_in(tmp_path / "remote") == files_in(tmp_path / "local")
    of_images = {asked: count for asked, count in faulty.requests.items() if asked[1].endswith(".png")}
    assert Counter(count for (method, _), count in of_images.items() if method == "GET") == {1: 30}
    looks = sum(count for (method, _), count in of_images.items() if method == "HEAD")
    assert looks <= 2 * LOOKED_FOR + 1  # of the table's paths, which are tried in two ways; and one before the pack
    # The table is read twice, for its rows and its hash, and never a row at a time.
    assert sum(count for (method, path), count in faulty.requests.items() if method == "GET" and path.endswith("csv")) == 2


def test_look_first(
    tmp_path: Path, url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = MINIATURES["nih"](tmp_path / "raw")
    upload(raw, url)
    monkeypatch.chdir(tmp_path)
    told = [call(capsys, monkeypatch, "nih", where, "set", "--check") for where in (str(raw), url)]
    assert told[0] == told[1] and told[0][0] == 0 and "looked at 4 records of 3 patients" in told[0][1]
    assert not Path("set").exists()


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("s3://no-such-bucket/raw", "there is no folder s3://no-such-bucket/raw"),
        ("{url}/nowhere", "there is no folder {url}/nowhere"),
        ("nosuch://bucket/raw", "nosuch"),
    ],
)
def test_a_wrong_address_is_one_line(
    place: str, message: str, tmp_path: Path, url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, _, err = call(capsys, monkeypatch, "nih", place.format(url=url), str(tmp_path / "set"))
    assert code == 2 and message.format(url=url) in err and err.count("\n") == 1, err
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize("name", ["nih", "csv"])
def test_wrong_keys_are_one_line(
    name: str, tmp_path: Path, s3: S3Server, url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    upload(table_set(tmp_path / "raw", 2), url)
    arguments = of_table(url) if name == "csv" else [name, url]
    with client_environment(s3.environment() | {"AWS_SECRET_ACCESS_KEY": "wrong"}):
        code, _, err = call(capsys, monkeypatch, *arguments, str(tmp_path / "set"))
    assert code == 2 and "the keys" in err and err.count("\n") == 1, err
    assert not (tmp_path / "set").exists()


def test_a_folder_without_the_images_is_told_before_anything_is_read(tmp_path: Path, url: str) -> None:
    raw = raw_path(url)
    of = [Record(f"k{n}", raw / f"{n}.png", f"p{n}", f"{n}.png") for n in range(300)]
    with pytest.raises(ValueError, match=r"none of 20 images that were looked for is there, the first one 0\.png"):
        pack(of, tmp_path / "set", dataset="d", splits={"train": 1.0}, config_hash="c", patient_key=KEY)
    assert not (tmp_path / "set").exists()
    write(tmp_path, {"table.csv": "image,patient\n" + "".join(f"{n}.png,{n}\n" for n in range(300)), "images/other.png": ""})
    upload(tmp_path, url)
    with pytest.raises(ValueError, match=r"none of the 20 images of s3://.*/table\.csv that were looked for are in s3://"):
        read_table(f"{url}/table.csv", f"{url}/images", image_column="image", patient_column="patient")


# -- faults and kills ---------------------------------------------------------------------------------------------------------


def toy(raw: RawPath, count: int = 12) -> list[Record]:
    return [Record(f"k{n:02d}", raw / f"{n}.png", f"p{n}", f"{n}.png", f"Report {n}.") for n in range(count)]


def pack_toy(raw: RawPath, dest: Path, **options: object) -> dict[str, bytes]:
    settings: dict = {"dataset": "toy", "splits": {"train": 1.0}, "config_hash": "c", "patient_key": KEY, "samples_per_shard": 3}
    pack(toy(raw), dest, **(settings | options))
    return files_in(dest)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for number in range(12):
        draw(tmp_path / "raw" / f"{number}.png", number)
    return tmp_path / "raw"


FAULTS = (
    Fault("error", status=503, code="SlowDown"), Fault("error", status=500, code="InternalError"), Fault("close", 100),
    Fault("reset", 100), Fault("short", 100), Fault("stall", 100), Fault("silence"), Fault("empty"), Fault("zeros", 60),
    Fault("error", status=404, code="NoSuchKey"),
)  # fmt: skip


def test_faults_that_pass_change_no_byte(tree: Path, tmp_path: Path, url: str, faulty: FaultProxy) -> None:
    """Each image meets two: a broken answer to its first two requests."""
    raw = raw_path(upload(tree, url))

    def plan(request: Request) -> Fault | None:
        if request.method != "GET" or not request.path.endswith(".png") or request.number > 1:
            return None
        return FAULTS[(int(PurePosixPath(request.path).stem) + request.number) % len(FAULTS)]

    faulty.plan = plan
    assert pack_toy(raw, tmp_path / "remote") == pack_toy(tree, tmp_path / "local")
    assert faulty.injected.total() == 24 and len(faulty.injected) == len(FAULTS)


def test_a_store_that_fails_for_good_ends_the_pack_and_blames_no_image(
    tree: Path, tmp_path: Path, url: str, faulty: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = raw_path(upload(tree, url))
    monkeypatch.setattr(storage, "PATIENCE", replace(QUICK, budget_s=0.5))
    faulty.plan = lambda request: FAULTS[0] if request.method == "GET" and request.path.endswith("/7.png") else None
    with pytest.raises(OSError, match=r"/7\.png: tried \d+ times .*SlowDown"):
        pack_toy(raw, tmp_path / "remote", max_bad_fraction=0.5)
    assert not list(tmp_path.rglob("quarantine.jsonl"))
    faulty.plan = None
    assert pack_toy(raw, tmp_path / "remote", max_bad_fraction=0.5) == pack_toy(tree, tmp_path / "local")


KILLED = """
import os, signal, sys
from pathlib import Path

def kill(done, total):
    if done == 10:
        os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    sys.path[:0] = sys.argv[1:3]
    from mmclip_shards.rawpath import raw_path
    from test_remote_raw import pack_toy
    pack_toy(raw_path(sys.argv[3]), Path(sys.argv[4]), workers=2, progress=kill)
"""


def test_a_killed_pack_goes_on_without_reading_again_what_it_has(
    tree: Path, tmp_path: Path, url: str, faulty: FaultProxy
) -> None:
    raw = raw_path(upload(tree, url))
    (tmp_path / "killed.py").write_text(KILLED)
    here = Path(__file__)
    command = [sys.executable, tmp_path / "killed.py", here.parents[2], here.parent, url, tmp_path / "remote"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, env={**os.environ, "PYTHONWARNINGS": "ignore"})
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert len(list(tmp_path.glob("remote/train/*.tar"))) in (2, 3)  # on a busy machine the third was still on its way
    faulty.requests.clear()
    totals = set()
    made = pack_toy(raw, tmp_path / "remote", progress=lambda done, total: totals.add(total))
    read = {path: count for (method, path), count in faulty.requests.items() if method == "GET" and path.endswith(".png")}
    names = {PurePosixPath(path).stem for path in read}
    assert names in ({"9", "10", "11"}, {"6", "7", "8", "9", "10", "11"})  # the third shard may have been on its way still
    assert set(read.values()) == {1} and totals == {len(names)}
    assert made == pack_toy(tree, tmp_path / "local")


def test_an_image_that_is_replaced_in_the_store_is_packed_again(tree: Path, tmp_path: Path, url: str) -> None:
    raw = raw_path(upload(tree, url))

    def stop(done: int, total: int) -> None:
        if done == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack_toy(raw, tmp_path / "remote", progress=stop)
    draw(tree / "4.png", 99)
    storage.upload(tree / "4.png", raw / "4.png")
    totals = set()
    pack_toy(raw, tmp_path / "remote", progress=lambda done, total: totals.add(total))
    assert totals == {9} and files_in(tmp_path / "remote") == pack_toy(tree, tmp_path / "local")


# -- paths --------------------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["memory", "s3"])
def both(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, RemotePath]:
    """The same tree on the disk and in a store."""
    folder = write(
        tmp_path / "tree",
        {"a.csv": "x,y\r\n1,ü\r\n", "b.csv": "", "a/1.png": "1", "a/b/2.png": "2", "a-b/3.txt": "3", "a/c/d/4.png": "4",
         "images_2/images/5.png": "5", "images_1/images/6.png": "6", "images_1/7[x].png": "7"},
    )  # fmt: skip
    if request.param == "s3":
        url = f"{request.getfixturevalue('s3').url}/{uuid.uuid4().hex}/tree"
        request.getfixturevalue("s3").client().put_object(Bucket=S3Server.bucket, Key=url.split("/", 3)[3] + "/a/", Body=b"")
    else:
        url = f"memory://{uuid.uuid4().hex}/tree"
    path = raw_path(upload(folder, url))
    assert isinstance(path, RemotePath)
    return folder, path


def test_a_remote_path_is_as_a_path(both: tuple[Path, RemotePath]) -> None:
    local, remote = both

    def names(paths: object, root: RawPath) -> list[str]:
        return [path.relative_to(root).as_posix() for path in paths]  # type: ignore[attr-defined]

    patterns = ("*.csv", "*", "a/*", "images_*/images", "images_*/images/*.png", "a/**/*.png", "a/b", "none/*", "no", "?.csv")
    for pattern in patterns:
        assert names(matching(remote, pattern), remote) == names(matching(local, pattern), local), pattern
    there, here = ([(at.relative_to(root).as_posix(), found) for at, found in walk(root)] for root in (remote, local))
    assert there == here and len(here) == 10
    assert sorted(path.name for path in remote.iterdir()) == sorted(path.name for path in local.iterdir())
    for each in ("a.csv", "a", "a/b/2.png", "none", ""):
        here, there = local / each, remote / each
        assert (there.is_file(), there.is_dir(), there.exists()) == (here.is_file(), here.is_dir(), here.exists()), each
        assert (there.name, there.stem, there.suffix) == (here.name, here.stem, here.suffix)
    for how in ({}, {"newline": ""}):
        with (local / "a.csv").open(encoding="utf-8", **how) as here, (remote / "a.csv").open(encoding="utf-8", **how) as there:
            assert there.read() == here.read()
    assert (remote / "a.csv").read_text(encoding="utf-8") == (local / "a.csv").read_text(encoding="utf-8")
    with seekable(remote / "a.csv") as file:
        assert file.seek(3) == 3 and file.read(3) == b"\r\n1"
    with pytest.raises(FileNotFoundError):
        (remote / "none").open()
    with pytest.raises(ValueError, match="only read"):
        (remote / "a.csv").open("w")
    assert raw_path(local) == raw_path(f"file://{local}") == local and raw_path(remote) == remote


def test_a_long_listing_comes_by_pages_and_a_page_that_fails_is_asked_for_again(
    url: str, s3: S3Server, faulty: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "_PAGE", 10)
    names = [f"{number}.png" for number in range(10, 23)]
    for name in names:
        storage.write_atomic(f"{url}/{name}", b"")
    failed = iter([None, FAULTS[0], FAULTS[2], None])
    faulty.plan = lambda request: next(failed) if request.path.rstrip("/") == f"/{s3.bucket}" else None
    assert [name for name, _ in storage.scan_remote(url)] == names
    assert faulty.injected.total() == 2 and next(failed, "none") == "none"


def test_remote_files_are_read_ahead_in_order_and_an_error_comes_at_its_place(tmp_path: Path) -> None:
    raw = raw_path("memory://x")

    def read(path: RawPath) -> str:
        if path.name == "3":
            raise ValueError("damaged")
        return path.name

    for root in (raw, tmp_path):
        found: list[tuple[int, str]] = []
        with pytest.raises(ValueError, match="damaged"):
            found.extend(ahead(read, ((n, root / str(n)) for n in range(40))))
        assert found == [(0, "0"), (1, "1"), (2, "2")]
        assert list(ahead(read, ((n, root / str(n + 10)) for n in range(40)))) == [(n, str(n + 10)) for n in range(40)]


def test_reasons_of_a_store_name_no_path(tree: Path, tmp_path: Path, url: str) -> None:
    raw = raw_path(upload(tree, url))
    storage.remove(raw / "3.png")
    pack_toy(raw, tmp_path / "set", max_bad_fraction=0.1)
    (bad,) = (json.loads(line) for line in (tmp_path / "set/train/quarantine.jsonl").read_text().splitlines())
    assert bad == {"key": "k03", "reason": "not a usable JPEG, PNG or WebP: No such file or directory"}
