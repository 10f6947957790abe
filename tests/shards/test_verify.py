"""Every way a set can be damaged is found and named; a whole one is clean."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import re
import shutil
import struct
import tarfile
import uuid
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import xxhash
from mmclip_shards import storage
from mmclip_shards.manifest import Manifest, Member, Shard, index_bytes, load_index, load_manifest, save_manifest
from mmclip_shards.pack import pack
from mmclip_shards.schema import Box, Record, canonical_json, encode_npy
from mmclip_shards.shardcheck import Finding
from mmclip_shards.verify import verify
from mmclip_shards.writer import write_shard
from PIL import Image

KEY = b"the key of these tests"
SPAN = {"start": 3, "end": 11, "text": "effusion", "label": "FINDING", "negated": True, "cui": "C1"}


def records() -> list[Record]:
    rng = np.random.default_rng(0)
    return [
        Record(
            key=f"k{number:02d}", image=rng.integers(0, 256, (20, 16), dtype=np.uint8), patient=f"p{number // 2}",
            source=f"{number}.png", report="" if number == 3 else "No effusion.", labels={"Edema": number % 2}, view="PA",
            boxes=(Box("Edema", 1, 2, 3, 4.5),),
        )
        for number in range(10)
    ]  # fmt: skip


def sidecar(base: str, out: str, kind: str, data: bytes) -> None:
    manifest = load_manifest(base)
    suffix = {"entities": "entities.json", "attention": "attention.npy"}[kind]
    rows = tuple(
        write_shard(out, number, [(key, {suffix: data}) for key in load_index(base, shard).keys])
        for number, shard in enumerate(manifest.shards)
    )
    save_manifest(
        out,
        Manifest(
            kind=kind, dataset=manifest.dataset, split=manifest.split, shards=rows, config_hash="c",  # type: ignore[arg-type]
            base={shard.path: shard.sha256 for shard in manifest.shards},
        ),
    )  # fmt: skip


def build(url: str) -> str:
    """Two splits of 4 and 6 samples, three a shard; `train` with both sidecars inside."""
    rows = records()
    split_of_record = {row.key: "test" if row.patient in ("p0", "p3") else "train" for row in rows}
    pack(
        rows, url, dataset="toy", splits=None, split_of_record=split_of_record, samples_per_shard=3, config_hash="c",
        patient_key=KEY,
    )  # fmt: skip
    train = storage.join(url, "train")
    sidecar(train, storage.join(train, "entities"), "entities", canonical_json([SPAN]))
    sidecar(train, storage.join(train, "attention"), "attention", encode_npy(np.ones((2, 2), np.float16)))
    return url


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(build(str(tmp_path_factory.mktemp("whole") / "set")))


@pytest.fixture
def toy(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "set"))


def found(url: str | Path, **options: str) -> list[str]:
    return [f"{Path(where).name} {member}: {problem}" for where, member, problem in verify(url, **options).findings]  # type: ignore[arg-type]


def only(findings: list[str]) -> str:
    assert len(findings) == 1, findings
    return findings[0]


def test_a_whole_set_is_clean_and_counted(whole: Path) -> None:
    seen: list[tuple[int, int]] = []
    verdict = verify(whole, workers=2, progress=lambda done, total: seen.append((done, total)))
    assert not verdict.findings and not verdict.unjoined
    assert (verdict.sets, verdict.shards, verdict.samples) == (4, 8, 22)
    assert verdict.bytes == sum(path.stat().st_size for path in whole.rglob("*.tar"))
    assert seen == [(number, 8) for number in range(1, 9)]
    assert verify(whole / "test").samples == 4


def test_remote_sets_are_checked_alike() -> None:
    url = build(f"memory://{uuid.uuid4().hex}/set")
    assert not verify(url).findings and verify(url).samples == 22
    shard = storage.join(url, "train", "000001.tar")
    data = bytearray(storage.read_bytes(shard))
    data[600] ^= 1
    storage.write_atomic(shard, bytes(data))
    assert len(verify(url).findings) == 2


def test_a_flipped_bit_anywhere_is_found(toy: Path) -> None:
    shard = load_manifest(toy / "train").shards[0]
    path = toy / "train" / shard.path
    data = path.read_bytes()
    index = load_index(toy / "train", shard)
    for row, key in enumerate(index.keys):
        for suffix, offset, length, _ in index.sample(row):
            for position, message in (
                (offset + length // 2, rf"000000.tar {key}.{suffix}: its bytes are damaged"),
                (offset - 512 + 3, rf"000000.tar : offset {offset - 512}: the checksum of a header is wrong"),
            ):
                broken = bytearray(data)
                broken[position] ^= 16
                path.write_bytes(broken)
                first, second = found(toy)
                assert first.startswith(message)
                assert second == "000000.tar : its sha256 is not the manifest's: copy it again"


@pytest.mark.parametrize("place", ["data", "header", "between", "end"])
def test_a_cut_anywhere_is_found(toy: Path, place: str) -> None:
    shard = load_manifest(toy / "train").shards[1]
    index = load_index(toy / "train", shard)
    begin, length = index.span(2, 3)
    cut = {"data": begin + length - 5, "header": begin - 100, "between": begin - 512, "end": shard.bytes - 512}[place]
    path = toy / "train" / shard.path
    path.write_bytes(path.read_bytes()[:cut])
    findings = found(toy)
    assert findings[0] == f"000001.tar : it has {cut} bytes, the manifest promises {shard.bytes}: copy it again"
    assert "it was cut" in findings[1]
    if place == "end":
        assert len(findings) == 2
    else:
        lost = 1 if place == "data" else 2
        assert f"the first of {lost} members that the index names and the tar does not hold" in findings[2]
        assert len(findings) == 3


def test_a_shard_that_is_gone_empty_or_grew_is_found(toy: Path) -> None:
    path = toy / "test" / "000000.tar"
    data = path.read_bytes()
    path.unlink()
    assert only(found(toy / "test")) == "000000.tar : the shard is missing: copy it again"
    path.write_bytes(bytes(10240))
    assert [line.partition(": ")[2].split(",")[0] for line in found(toy / "test")] == [
        "it has 10240 bytes", "the first of 6 members that the index names and the tar does not hold",
    ]  # fmt: skip
    path.write_bytes(data + bytes(512))
    assert "the manifest promises" in only(found(toy / "test"))
    path.write_bytes(data + b"more")
    assert "there are bytes after the end of the archive" in found(toy / "test")[1]


def test_a_missing_or_damaged_index_is_found_and_the_tar_checked_all_the_same(toy: Path) -> None:
    path = toy / "test" / "000000.index.json"
    data = path.read_bytes()
    path.unlink()
    assert "000000.index.json : index" in only(found(toy)) and "is missing" in only(found(toy))
    path.write_bytes(data[:-30])
    assert "does not fit shard" in only(found(toy))
    path.write_bytes(data.replace(b'"k01.json"', b'"k09.json"'))
    assert only(found(toy)).startswith("000000.index.json : index")
    tar = toy / "test" / "000000.tar"
    tar.write_bytes(bytes(2048))
    assert any("it has 0 samples, the manifest promises 3" in line for line in found(toy))


def test_a_manifest_that_the_store_does_not_give_is_a_finding(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = storage.read_parsed

    def failing(url: storage.Url, *arguments: object) -> object:
        if str(url).endswith("train/manifest.json"):
            raise OSError("timed out")
        return read(url, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(storage, "read_parsed", failing)
    verdict = verify(whole)
    assert [finding.problem for finding in verdict.findings] == ["timed out"] and verdict.samples == 4


def test_a_manifest_that_is_damaged_is_a_finding_and_none_at_all_an_error(toy: Path, tmp_path: Path) -> None:
    path = toy / "train" / "manifest.json"
    path.write_bytes(path.read_bytes().replace(b'"samples":3', b'"samples":4'))
    verdict = verify(toy)
    assert "not a usable manifest" in verdict.findings[0].problem and verdict.samples == 4
    with pytest.raises(ValueError, match=r"no manifest\.json in .*correct the path"):
        verify(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="holds no sidecars"):
        verify(toy / "test", base=str(toy))


# ---- content: shards whose hashes are right


def rebuild(folder: Path, samples: list[tuple[str, dict[str, bytes]]], kind: str = "base", **fields: object) -> Path:
    row = write_shard(folder, 0, samples)
    save_manifest(
        folder,
        Manifest(
            kind=kind, dataset="toy", split="train", shards=(row,), config_hash="c", labels=("Edema",),  # type: ignore[arg-type]
            **fields,  # type: ignore[arg-type]
        ),
    )  # fmt: skip
    return folder


def png(width: int = 16, height: int = 20) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((height, width), np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def bomb() -> bytes:
    """A PNG of some hundred bytes that claims 60,000 x 60,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    size = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0)
    pixels = zlib.compress(bytes(100_000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def fields(**changes: object) -> bytes:
    good = {
        "report": {"text": "No effusion."}, "labels": {"Edema": 1}, "patient": "0" * 32, "view": None, "dataset": "toy",
        "source": "a/0.png", "width": 16, "height": 20,
    }  # fmt: skip
    return json.dumps({name: value for name, value in {**good, **changes}.items() if value != "gone"}).encode()


def sample(**changes: bytes) -> dict[str, bytes]:
    return {"png": png(), "json": fields()} | changes


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (sample(png=bomb()), r"k\.png: not a usable JPEG, PNG or WebP: .*pixels"),
        (sample(png=png()[:40]), r"k\.png: not a usable JPEG, PNG or WebP"),
        (sample(png=b""), r"k\.png: not a usable JPEG, PNG or WebP: it has another format"),
        ({"jpg": png(), "json": fields()}, r"k\.jpg: a png of mode L, not an 8-bit single-channel jpg"),
        ({"png": png()}, "k: its members are png; it needs a json and one of jpg, png, webp"),
        ({"json": fields()}, "k: its members are json; it needs"),
        (sample(json=b"{"), r"k\.json: not usable JSON, JSONDecodeError at character 1"),
        (sample(json=b"[" * 100_000), r"k\.json: not usable JSON, RecursionError"),
        (sample(json=b"[]"), r"k\.json: it is not a JSON object"),
        (sample(json=fields(width=17)), "k: its image has 16 x 20 pixels, its json says 17 x 20"),
        (sample(json=fields(width=0)), r"k\.json: `width` and `height`"),
        (sample(json=fields(report="gone")), r"k\.json: `report`"),
        (sample(json=fields(report={"text": " "})), r"k\.json: `report`"),
        (sample(json=fields(labels={"Edema": 2})), r"k\.json: `labels`"),
        (sample(json=fields(labels={})), r"k\.json: `labels`"),
        (sample(json=fields(patient="Doe, John")), r"k\.json: `patient` must be a keyed hash, 32 hex digits$"),
        (sample(json=fields(dataset="other")), r"k\.json: `dataset`"),
        (sample(json=fields(view="gone")), r"k\.json: `view`"),
        (sample(json=fields(source="/etc/x")), r"k\.json: `source`"),
        (sample(json=fields(age=91)), r"k\.json: `age` must be whole years, those above 89 as 90"),
        (sample(json=fields(boxes=3)), r"k\.json: `boxes`"),
        (sample(json=fields(boxes=[{"label": "a", "x": 1}])), r"k\.json: a box lacks"),
        (sample(txt=b"\xff"), r"k\.txt: not UTF-8 text, at byte 0"),
        (sample(**{"x.npy": b"\x93NUMPY"}), r"k\.x\.npy: not \.npy data"),
    ],
)  # fmt: skip
def test_content_of_base_shards(tmp_path: Path, members: dict[str, bytes], message: str) -> None:
    assert not found(rebuild(tmp_path / "good", [("k", sample())]))
    line = only(found(rebuild(tmp_path / "bad", [("j", sample()), ("k", members)])))
    assert re.search(message, line), line


def test_arrays_of_objects_are_never_unpickled(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, ...]:
            return exec, ("raise SystemExit('unpickled')",)

    buffer = io.BytesIO()
    np.save(buffer, np.array([Trap()], dtype=object), allow_pickle=True)
    folder = rebuild(
        tmp_path, [("k", {"attention.npy": buffer.getvalue()})], "attention", base={"000000.tar": "0" * 64}
    )
    assert "a .npy of Python objects is refused" in only(found(folder))


@pytest.mark.parametrize(
    ("kind", "data", "message"),
    [
        ("entities", b"{}", "not a list of spans"),
        ("entities", canonical_json([{**SPAN, "start": 11}]), "span 0: `start` and `end`"),
        ("entities", canonical_json([SPAN, {**SPAN, "start": True}]), "span 1: `start` and `end`"),
        ("entities", canonical_json([{**SPAN, "text": "effusio"}]), "span 0: `text`"),
        ("entities", canonical_json([{**SPAN, "negated": None}]), "span 0: `label`"),
        ("entities", canonical_json([{**SPAN, "uncertain": 1}]), "span 0: `uncertain` and `background`"),
        ("entities", canonical_json([{**SPAN, "cui": 3}]), "span 0: `cui`"),
        ("entities", canonical_json([7]), "span 0 is not an object"),
        ("attention", encode_npy(np.ones((2, 2), np.float32)), r"shape \(2, 2\) and type float32"),
        ("attention", encode_npy(np.ones(4, np.float16)), r"shape \(4,\)"),
        ("attention", encode_npy(np.full((2, 2), np.nan, np.float16)), "not finite"),
    ],
)
def test_content_of_sidecars(tmp_path: Path, kind: str, data: bytes, message: str) -> None:
    suffix = {"entities": "entities.json", "attention": "attention.npy"}[kind]
    line = only(found(rebuild(tmp_path, [("k", {suffix: data})], kind, base={"000000.tar": "0" * 64})))
    assert re.search(message, line), line


# ---- tars that our writer would never make, with manifest and index to match


def write_tar(
    folder: Path, members: list[tuple[str, bytes]], indexed: Callable[[str], bool] = lambda name: True
) -> Path:
    """A base set of one shard with any members; those that `indexed` picks are in its index."""
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(folder / "000000.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            if name.startswith("link"):
                info.type, info.linkname, info.size = tarfile.SYMTYPE, "/etc/passwd", 0
            tar.addfile(info, io.BytesIO(data))
    with tarfile.open(folder / "000000.tar") as tar:
        places = [(m.name, m.offset_data, m.size) for m in tar.getmembers() if m.isfile()]
    data = (folder / "000000.tar").read_bytes()
    rows = [
        (name, Member(offset, size, xxhash.xxh3_64_hexdigest(data[offset : offset + size])))
        for name, offset, size in places
        if indexed(name)
    ]
    sha256 = hashlib.sha256(data).hexdigest()
    index = index_bytes(rows, sha256)
    (folder / "000000.index.json").write_bytes(index)
    samples = len({name.partition(".")[0] for name, _ in rows})
    row = Shard("000000.tar", samples, len(data), sha256, "000000.index.json", hashlib.sha256(index).hexdigest())
    save_manifest(folder, Manifest("base", "toy", "train", (row,), "c", ("Edema",)))
    return folder


GOOD = [("a.json", fields()), ("a.png", png()), ("b.json", fields()), ("b.png", png())]


def test_members_that_no_shard_may_hold_are_named_and_not_read(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, ...]:
            return exec, ("raise SystemExit('unpickled')",)

    evil = pickle.dumps(Trap())
    odd = [
        ("b.pyd", evil),
        ("b.pkl", evil),
        ("1.2.840.png", png()),
        ("../up.png", png()),
        ("link.png", b""),
        ("b.x.png", png()),
    ]
    assert not found(write_tar(tmp_path / "good", GOOD))
    findings = found(write_tar(tmp_path / "bad", GOOD + odd, lambda name: name in dict(GOOD)))
    assert [line.partition(":")[0].removeprefix("000000.tar ") for line in findings] == [
        "'b.pyd'", "'b.pkl'", "'1.2.840.png'", "'../up.png'", "'link.png'", "b.x.png",
    ]  # fmt: skip
    assert "member suffix 'pyd' is refused" in findings[0] and "it was not read" in findings[0]
    assert "member suffix '2.840.png' is refused" in findings[2] and "a link: only plain files" in findings[4]
    assert findings[5].endswith("the index does not name it")


def test_duplicate_and_unsorted_keys_are_found(tmp_path: Path) -> None:
    def without_index(name: str, members: list[tuple[str, bytes]]) -> str:
        folder = write_tar(tmp_path / name, members)
        (folder / "000000.index.json").unlink()
        return "; ".join(found(folder))

    assert "a.png: it comes twice" in without_index("twice", [*GOOD, ("a.png", png())])
    assert "a: the key comes twice, or the members of the sample do not lie" in without_index(
        "apart", [GOOD[0], *GOOD[2:], GOOD[1]]
    )
    assert "a: it comes after 'b': keys must be sorted" in only(
        found(write_tar(tmp_path / "order", GOOD[2:] + GOOD[:2]))
    )


def test_keys_that_fall_from_shard_to_shard_are_found(tmp_path: Path) -> None:
    rows = [write_shard(tmp_path, number, [(key, sample())]) for number, key in enumerate("bab")]
    save_manifest(tmp_path, Manifest("base", "toy", "train", tuple(rows), "c", ("Edema",)))
    first, second = verify(tmp_path).findings
    assert (Path(first.where).name, first.member) == ("000001.tar", "a") and "does not come after 'b'" in first.problem
    assert (Path(second.where).name, second.member) == ("000002.tar", "b")


def test_an_index_that_points_elsewhere_is_found(tmp_path: Path) -> None:
    """Index and manifest agree with each other, but not with the tar."""
    folder = write_tar(tmp_path, GOOD)
    index = json.loads((folder / "000000.index.json").read_text())
    index["members"][1][2] -= 7
    save_index(folder, index)
    findings = found(folder)
    assert "a.png: it has" in findings[0] and "bytes at 1536, the index says" in findings[0]
    index["members"][1][2] += 7
    index["members"][3][3] = "0" * 16
    save_index(folder, index)
    assert only(found(folder)).startswith("000000.tar b.png: its bytes are damaged")


def save_index(folder: Path, index: dict[str, object]) -> None:
    data = canonical_json(index)
    (folder / "000000.index.json").write_bytes(data)
    manifest = load_manifest(folder)
    row = replace(manifest.shards[0], index_sha256=hashlib.sha256(data).hexdigest())
    save_manifest(folder, replace(manifest, shards=(row,)))


# ---- sidecars and their base


def test_sidecars_alone_are_held_against_the_base_that_is_named(toy: Path) -> None:
    verdict = verify(toy / "train" / "entities")
    assert not verdict.findings and verdict.unjoined == [str(toy / "train" / "entities")]
    for base in (toy / "train", toy):
        verdict = verify(toy / "train" / "entities", base=str(base))
        assert not verdict.findings and not verdict.unjoined
    with pytest.raises(ValueError, match="holds attention sidecars"):
        verify(toy / "train" / "entities", base=str(toy / "train" / "attention"))
    with pytest.raises(ValueError, match=r"no manifest\.json"):
        verify(toy / "train" / "entities", base="/nowhere")


def test_a_missing_row_and_an_added_one_are_found(toy: Path) -> None:
    folder = toy / "train" / "entities"
    manifest = load_manifest(folder)
    keys = load_index(folder, manifest.shards[1]).keys
    row = write_shard(folder, 1, [(key, {"entities.json": b"[]"}) for key in [*keys[:1], "zz"]])
    save_manifest(folder, replace(manifest, shards=(manifest.shards[0], row)))
    findings = found(toy)
    assert f"manifest.json : shard 1 has 2 samples, that of {toy / 'train'} has 3" in findings[0]
    assert findings[1] == f"000001.tar {keys[1]}: the first of 2 samples of the base that have no row here"
    assert findings[2] == "000001.tar zz: the first of 1 rows of samples that the base does not have"
    save_manifest(folder, replace(manifest, shards=manifest.shards[:1], base=manifest.base))
    assert "shard 1 has no samples" in only(found(toy))


def test_sidecars_of_another_base_are_found(toy: Path) -> None:
    folder = toy / "train" / "attention"
    manifest = load_manifest(folder)
    save_manifest(folder, replace(manifest, base={**(manifest.base or {}), "000001.tar": "0" * 64}))
    assert "made from other shards" in only(found(toy)) and "(1 differ)" in only(found(toy))
    shutil.rmtree(folder)
    shutil.move(toy / "train" / "entities", toy / "entities")
    rebuild(toy / "other", [(key, sample()) for key in ("a", "b", "c")])
    findings = found(toy / "entities", base=str(toy / "other"))
    assert "made from other shards" in findings[0] and any("have no row here" in line for line in findings)


def test_a_sidecar_with_other_members_is_found(tmp_path: Path) -> None:
    folder = rebuild(
        tmp_path, [("k", {"entities.json": b"[]", "txt": b"x"})], "entities", base={"000000.tar": "0" * 64}
    )
    assert "k: its members are entities.json, txt; a sidecar of kind entities has one" in only(found(folder))


def test_findings_read_well() -> None:
    assert str(Finding("s.tar", "", "gone")) == "s.tar: gone" and str(Finding("s.tar", "k", "bad")) == "s.tar, k: bad"
