"""Shards written and read back: bytes, order, other programs' readers, and every way a shard can be damaged."""

from __future__ import annotations

import hashlib
import os
import pickle
import tarfile
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import webdataset
from mmclip_shards import storage
from mmclip_shards.manifest import Manifest, load_index, load_manifest, save_manifest
from mmclip_shards.reader import ShardReader, iterate
from mmclip_shards.writer import ShardWriter, write_shard

SAMPLES = [(f"k-{n:02d}", {"jpg": bytes([n]) * (500 + 40 * n), "json": b'{"n":%d}' % n}) for n in range(10)]


def write(folder: str | Path, samples_per_shard: int = 4) -> Manifest:
    with ShardWriter(
        folder, kind="base", dataset="toy", split="train", config_hash="c", samples_per_shard=samples_per_shard
    ) as writer:
        for key, files in SAMPLES:
            writer.add(key, files)
    return load_manifest(folder)


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("remote", [False, True])
def test_round_trip(tmp_path: Path, remote: bool) -> None:
    url = f"memory://{tmp_path.name}-round" if remote else str(tmp_path / "set")
    manifest = write(url)
    assert [shard.samples for shard in manifest.shards] == [4, 4, 2]
    assert manifest.samples == 10
    assert list(iterate(url)) == SAMPLES
    reader = ShardReader(url, manifest)
    assert reader.keys(1) == ["k-04", "k-05", "k-06", "k-07"]
    assert reader.read(2, "k-09") == SAMPLES[9][1]
    for shard in manifest.shards:
        tar = storage.read_bytes(storage.join(url, shard.path))
        assert (len(tar), hashlib.sha256(tar).hexdigest()) == (shard.bytes, shard.sha256)


def test_the_same_input_is_the_same_bytes(tmp_path: Path) -> None:
    write(tmp_path / "a")
    write(tmp_path / "b")
    assert files_in(tmp_path / "a") == files_in(tmp_path / "b")
    assert len(files_in(tmp_path / "a")) == 7
    reversed_files = [(key, dict(reversed(files.items()))) for key, files in SAMPLES[:4]]
    assert write_shard(tmp_path / "c", 0, reversed_files) == load_manifest(tmp_path / "a").shards[0]


def test_shards_are_plain_ustar_without_clock_or_user(tmp_path: Path) -> None:
    write(tmp_path)
    with tarfile.open(tmp_path / "000000.tar", "r:") as tar:
        members = tar.getmembers()
        assert [member.name for member in members[:2]] == ["k-00.jpg", "k-00.json"]
        assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in members} == {(0, 0, 0, "", "", 0o644)}
        index = load_index(tmp_path, load_manifest(tmp_path).shards[0])
        assert [m.offset_data for m in members] == [
            offset for row in range(len(index.keys)) for _, offset, _, _ in index.sample(row)
        ]
    data = (tmp_path / "000000.tar").read_bytes()
    assert data[257:265] == b"ustar\x0000"
    assert data[-1024:] == bytes(1024)


def test_webdataset_reads_our_shards(tmp_path: Path) -> None:
    write(tmp_path)
    urls = [str(path) for path in sorted(tmp_path.glob("*.tar"))]
    read = [
        (sample["__key__"], {name: data for name, data in sample.items() if not name.startswith("__")})
        for sample in webdataset.WebDataset(urls, shardshuffle=False, empty_check=False)
    ]
    assert read == SAMPLES


def test_duplicate_unsorted_dotted_and_pickled_members_are_refused_and_nothing_stays(tmp_path: Path) -> None:
    bad = {
        "comes twice": ("k-09", {"jpg": b""}),
        "sorted by key": ("k-00", {"jpg": b""}),
        "sample key 'k.10'": ("k.10", {"jpg": b""}),
        "suffix 'pkl'": ("k-10", {"pkl": b""}),
        "no members": ("k-10", {}),
    }
    for message, (key, files) in bad.items():
        folder = tmp_path / "set"
        with (
            pytest.raises(ValueError, match=message),
            ShardWriter(folder, kind="base", dataset="d", split="s", config_hash="c", samples_per_shard=2) as writer,
        ):
            for sample_key, sample_files in SAMPLES:
                writer.add(sample_key, sample_files)
            assert (folder / "000004.tar").exists()
            writer.add(key, files)
        assert not folder.exists()


def test_a_sidecar_shard_keeps_the_order_of_its_base(tmp_path: Path) -> None:
    """Shards of others are not sorted by key, and their sidecars must match them row by row."""
    shard = write_shard(tmp_path, 0, [("b", {"json": b"1"}), ("a", {"json": b"2"})])
    assert load_index(tmp_path, shard).keys == ["b", "a"]
    with pytest.raises(ValueError, match="comes twice"):
        write_shard(tmp_path, 1, [("b", {"json": b"1"}), ("a", {"json": b"2"}), ("b", {"json": b"3"})])


def test_an_interrupt_removes_only_what_this_writer_published(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    with (
        pytest.raises(KeyboardInterrupt),
        ShardWriter(tmp_path, kind="base", dataset="d", split="s", config_hash="c", samples_per_shard=1) as writer,
    ):
        writer.add("a", {"jpg": b"x"})
        raise KeyboardInterrupt
    assert list(files_in(tmp_path)) == ["mine.txt"]


def test_an_empty_set_and_a_finished_folder_are_refused(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match="none was added"),
        ShardWriter(tmp_path / "empty", kind="base", dataset="d", split="s", config_hash="c"),
    ):
        pass
    assert not (tmp_path / "empty").exists()
    write(tmp_path)
    before = files_in(tmp_path)
    with pytest.raises(ValueError, match="finished set"):
        ShardWriter(tmp_path, kind="base", dataset="d", split="s", config_hash="c")
    assert files_in(tmp_path) == before


def test_sidecars_are_written_shard_by_shard(tmp_path: Path) -> None:
    base = write(tmp_path / "base")
    rows = []
    for number in (2, 0, 1):  # workers finish in any order
        keys = ShardReader(tmp_path / "base", base).keys(number)
        rows.append(write_shard(tmp_path / "side", number, ((key, {"entities.json": b"[]\n"}) for key in keys)))
    side = Manifest(
        kind="entities",
        dataset="toy",
        split="train",
        shards=tuple(sorted(rows, key=lambda row: row.path)),
        config_hash="e",
        base={shard.path: shard.sha256 for shard in base.shards},
    )
    save_manifest(tmp_path / "side", side)
    assert [key for key, _ in iterate(tmp_path / "side")] == [key for key, _ in SAMPLES]
    assert ShardReader(tmp_path / "side", side).read(1, "k-05") == {"entities.json": b"[]\n"}


# ---- damage


def read_all(url: str | Path) -> int:
    return sum(1 for _ in iterate(url))


def test_every_flipped_bit_of_a_sample_is_noticed(tmp_path: Path) -> None:
    manifest = write(tmp_path)
    tar = tmp_path / "000000.tar"
    whole = tar.read_bytes()
    members = load_index(tmp_path, manifest.shards[0]).sample(1)
    for suffix, offset, length, _ in members:
        for position in (offset, offset + length // 2, offset + length - 1):
            broken = bytearray(whole)
            broken[position] ^= 1
            tar.write_bytes(broken)
            with pytest.raises(ValueError, match=rf"000000\.tar, key k-01, offset {offset}.*k-01\.{suffix}.*hash"):
                ShardReader(tmp_path, manifest).read(0, "k-01")
            assert ShardReader(tmp_path, manifest).read(0, "k-00") == SAMPLES[0][1]
    broken = bytearray(whole)
    broken[members[0][1] - 512] ^= 1  # the name in the tar header, which an indexed read does not need
    tar.write_bytes(broken)
    assert ShardReader(tmp_path, manifest).read(0, "k-01") == SAMPLES[1][1]


@pytest.mark.parametrize("remote", [False, True])
def test_a_tar_cut_at_an_entry_boundary_is_noticed(tmp_path: Path, remote: bool) -> None:
    """Tar readers take this for a shorter archive: half of the samples vanish without an error."""
    url = f"memory://{tmp_path.name}-cut-{remote}" if remote else str(tmp_path)
    manifest = write(url)
    shard = storage.join(url, "000000.tar")
    offset, _ = load_index(url, manifest.shards[0]).span(2, 3)
    storage.write_atomic(shard, storage.read_bytes(shard)[: offset - 512])
    with pytest.raises(ValueError, match=r"000000\.tar, key k-0\d, offset \d+: cannot be read: .*(promises|wanted)"):
        read_all(url)


def test_missing_and_replaced_shards_are_noticed(tmp_path: Path) -> None:
    manifest = write(tmp_path)
    (tmp_path / "000001.tar").unlink()
    with pytest.raises(FileNotFoundError, match=r"000001\.tar, key k-04, offset 512: cannot be read"):
        ShardReader(tmp_path, manifest).read(1, "k-04")
    write_shard(tmp_path, 1, [(key, {"jpg": files["jpg"][::-1], "json": b"{}"}) for key, files in SAMPLES[4:8]])
    assert (tmp_path / "000001.tar").stat().st_size == manifest.shards[1].bytes
    with pytest.raises(ValueError, match="another build of the shard"):
        read_all(tmp_path)


def test_a_shard_that_grew_is_noticed(tmp_path: Path) -> None:
    manifest = write(tmp_path)
    with (tmp_path / "000000.tar").open("ab") as file:
        file.write(bytes(512))
    with pytest.raises(ValueError, match="its manifest promises"):
        ShardReader(tmp_path, manifest).read(0, "k-00")


def test_a_disk_that_fails_is_no_fault_of_the_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = write(tmp_path)

    def fail(*arguments: object) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "pread", fail)
    with pytest.raises(OSError, match=r"000000\.tar, key k-00, offset 512: cannot be read: .*Input/output") as caught:
        ShardReader(tmp_path, manifest).read(0, "k-00")
    assert not isinstance(caught.value, ValueError)


def test_an_index_of_another_shard_is_noticed(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "000000.index.json").write_bytes((tmp_path / "000001.index.json").read_bytes())
    with pytest.raises(ValueError, match="another build of the shard"):
        read_all(tmp_path)


def test_an_unknown_key_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="k-99: no such sample"):
        ShardReader(tmp_path, write(tmp_path)).read(0, "k-99")


def test_a_manifest_that_promises_more_is_noticed(tmp_path: Path) -> None:
    manifest = write(tmp_path)
    more = replace(manifest, shards=(replace(manifest.shards[0], samples=5), *manifest.shards[1:]))
    with pytest.raises(ValueError, match="4 samples, but the manifest promises 5"):
        ShardReader(tmp_path, more).keys(0)


# ---- open files


def test_open_files_are_bounded_and_threads_may_share_a_reader(tmp_path: Path) -> None:
    manifest = write(tmp_path, samples_per_shard=1)
    reader = ShardReader(tmp_path, manifest, open_shards=2)
    failures: list[BaseException] = []

    def read_many(start: int) -> None:
        try:
            for step in range(200):
                number = (start + step * 3) % 10
                assert reader.read(number, SAMPLES[number][0]) == SAMPLES[number][1]
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=read_many, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    targets = [path.readlink() for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    assert sum(target.parent == tmp_path for target in targets) == 2


def test_a_reader_can_be_sent_to_another_process(tmp_path: Path) -> None:
    reader = ShardReader(tmp_path, write(tmp_path))
    reader.read(0, "k-00")
    assert pickle.loads(pickle.dumps(reader)).read(2, "k-08") == SAMPLES[8][1]  # noqa: S301


def test_a_chunk_of_no_bytes_is_refused(tmp_path: Path) -> None:
    manifest = write(tmp_path)
    with pytest.raises(ValueError, match="chunk_bytes is 0"):
        ShardReader(tmp_path, manifest, chunk_bytes=0)
