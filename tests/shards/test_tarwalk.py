"""The strict walk: the same entries as tarfile's on whole archives, and no damage that passes for a shorter archive."""

from __future__ import annotations

import hashlib
import io
import tarfile
import uuid
from pathlib import Path

import pytest
from mmclip_shards import storage
from mmclip_shards.tarwalk import BLOCK, Entry, TarFault, TarWalk

FILES = {"a.jpg": b"x" * 700, "a.json": b"{}", "b.jpg": b"", "b.json": b"y" * 512}


def tar_of(files: dict[str, bytes], form: int = tarfile.USTAR_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def short_tar() -> bytes:
    """Without the padding to 10,240 bytes that tarfile adds."""
    blocks = 4 + sum(-(-len(data) // BLOCK) for data in FILES.values()) + 2
    return tar_of(FILES)[: blocks * BLOCK]


def walk(data: bytes, folder: Path) -> list[tuple[Entry, bytes]]:
    (folder / "t.tar").write_bytes(data)
    walker = TarWalk(folder / "t.tar")
    return [(entry, walker.data()) for entry in walker.entries()]


def header(name: str, size: int, kind: bytes = b"0") -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.USTAR_FORMAT)


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("piece", [BLOCK, 3 * BLOCK, 8 << 20])
def test_entries_are_those_of_tarfile(tmp_path: Path, form: int, piece: int) -> None:
    long = {"folder/" + "n" * 90 + ".jpg": b"p"} | (
        {} if form == tarfile.USTAR_FORMAT else {"d/" * 80 + "k.png": b"q" * 600, "ü" * 120 + ".txt": b"r"}
    )
    data = tar_of(FILES | long, form)
    (tmp_path / "t.tar").write_bytes(data)
    walker = TarWalk(tmp_path / "t.tar", piece)
    found = [(entry.name, entry.offset, entry.length, walker.data()) for entry in walker.entries()]
    with tarfile.open(tmp_path / "t.tar") as tar:
        members = [(m.name, m.offset_data, m.size, tar.extractfile(m).read()) for m in tar.getmembers()]  # type: ignore[union-attr]
    assert found == members and len(found) == 4 + len(long)
    assert walker.sha256() == hashlib.sha256(data).hexdigest() and walker.position == len(data)


def test_data_may_be_left_or_taken_in_part_and_remote_is_the_same() -> None:
    url = f"memory://{uuid.uuid4().hex}.tar"
    storage.write_atomic(url, tar_of(FILES))
    walker = TarWalk(url, 2 * BLOCK)
    taken = [next(walker.pieces(), b"") if entry.name == "a.jpg" else b"" for entry in walker.entries()]
    assert 0 < len(taken[0]) < 700 and len(taken) == 4
    assert walker.sha256() == hashlib.sha256(tar_of(FILES)).hexdigest()
    with pytest.raises(FileNotFoundError):
        TarWalk("/nowhere/t.tar")


def test_every_cut_is_a_fault_of_the_right_place(tmp_path: Path) -> None:
    """tarfile takes most of these for whole archives with fewer members."""
    data = short_tar()
    assert len(walk(data, tmp_path)) == 4
    silent = 0
    for cut in sorted({*range(0, len(data), 97), *range(0, len(data), BLOCK)}):
        with pytest.raises(TarFault, match=r"cut") as fault:
            walk(data[:cut], tmp_path)
        assert fault.value.offset <= cut
        try:
            with tarfile.open(tmp_path / "t.tar") as tar:
                silent += len(tar.getmembers()) < 4
        except tarfile.TarError:
            pass
    assert silent > 10


def test_the_zeros_that_pad_an_archive_may_be_short_or_long(tmp_path: Path) -> None:
    data = tar_of(FILES)
    assert walk(data, tmp_path) == walk(data[:-700], tmp_path) == walk(data + bytes(5000), tmp_path)


def test_every_flipped_bit_of_a_header_is_a_fault_or_harmless(tmp_path: Path) -> None:
    data = short_tar()
    whole = walk(data, tmp_path)
    harmless = 0
    for position in range(3 * BLOCK, 4 * BLOCK):
        broken = bytearray(data)
        broken[position] ^= 1 << position % 8
        try:
            assert walk(bytes(broken), tmp_path) == whole
            harmless += 1
        except TarFault as fault:
            assert fault.offset == 3 * BLOCK
    assert harmless <= 2  # a blank for the checksum's leading 0, and what follows its NUL


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "offset 0: the file ends without the two zero blocks"),
        (b"not a tar at all" * 64, "no number|checksum"),
        (header("a", 3) + b"abc".ljust(BLOCK, b"\0") + bytes(BLOCK), "offset 1024: .*one of the two zero blocks"),
        (bytes(BLOCK) + header("a", 0) + bytes(2 * BLOCK), "offset 0: zeros where a header should be"),
        (bytes(3 * BLOCK) + b"\0\1", "offset 1537: there are bytes after the end"),
        (header("a", 1 << 30) + bytes(2 * BLOCK), "offset 0: 'a' should end at 1073742336, but the file ends at 1536"),
        (header("a", 0, b"S") + bytes(2 * BLOCK), "sparse"),
        (header("x", 1 << 28, b"x") + bytes(2 * BLOCK), "long name or pax record of 268435456 bytes"),
        (header("x", 12, b"x") + b"99 path=abc\n".ljust(BLOCK, b"\0") + bytes(2 * BLOCK), "pax records are damaged"),
        (header("x", 12, b"x") + b"12 path=abc\n".ljust(BLOCK, b"\0") + bytes(2 * BLOCK), "does not follow"),
        (
            header("x", 24, b"x") + b"24 GNU.sparse.major=100\n".ljust(BLOCK, b"\0") + header("a", 0) + bytes(2 * BLOCK),
            "sparse",
        ),
        (header("x", 10, b"x") + b"10 size=x\n".ljust(BLOCK, b"\0") + header("a", 0) + bytes(2 * BLOCK), "not a number"),
    ],
)  # fmt: skip
def test_damage_names_offset_and_cause(tmp_path: Path, data: bytes, message: str) -> None:
    with pytest.raises(TarFault, match=message):
        walk(data, tmp_path)


def test_pax_path_and_size_override_and_links_hold_no_data(tmp_path: Path) -> None:
    records = b"12 path=b/c\n10 size=5\n"
    data = (
        header("folder/", 0, b"5") + header("l", 77, b"2") + header("h", 0, b"1") + header("d", 0, b"3")
        + header("x", 22, b"x") + records.ljust(BLOCK, b"\0") + header("a", 0) + b"hello".ljust(BLOCK, b"\0")
        + header("old/", 0, b"\0") + bytes(4 * BLOCK)
    )  # fmt: skip
    found = walk(data, tmp_path)
    assert [(entry.name, entry.kind, content) for entry, content in found] == [
        ("folder/", "folder", b""), ("l", "link", b""), ("h", "link", b""), ("d", "device", b""), ("b/c", "file", b"hello"),
        ("old/", "folder", b""),
    ]  # fmt: skip


def test_after_a_fault_the_walk_goes_on_where_it_is_led(tmp_path: Path) -> None:
    data = bytearray(short_tar())
    data[3 * BLOCK] ^= 1  # the header of a.json
    (tmp_path / "t.tar").write_bytes(data)
    walker = TarWalk(tmp_path / "t.tar")
    names = []
    with pytest.raises(TarFault):
        names += [entry.name for entry in walker.entries()]
    assert walker.position == 4 * BLOCK
    walker.seek(4 * BLOCK, 2)
    assert walker.data() == b"{}"
    assert [entry.name for entry in walker.entries()] == ["b.jpg", "b.json"]
    assert walker.sha256() == hashlib.sha256(data).hexdigest()
