"""Shards of another program: indexed where they lie, read byte for byte, trained on; never a pickle, never a lost sample."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
import uuid
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from mmclip_shards import storage
from mmclip_shards.document import read_document
from mmclip_shards.foreign import foreign_member, index_set, is_foreign, may_hold
from mmclip_shards.manifest import load_index, load_manifest
from mmclip_shards.reader import ShardReader, iterate
from mmclip_shards.schema import make_key
from mmclip_shards.verify import verify
from PIL import Image

from mmclip_dist.data.example import ExampleMaker
from mmclip_dist.data.tokenizer import reports_of


def picture(seed: int, form: str = "JPEG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (24, 20), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, form)
    return buffer.getvalue()


def write_tar(
    url: str | Path, members: list[tuple[str, bytes | tarfile.TarInfo]], form: int = tarfile.PAX_FORMAT
) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for name, data in members:
            info = data if isinstance(data, tarfile.TarInfo) else tarfile.TarInfo(name)
            if isinstance(data, bytes):
                info.size = len(data)
            tar.addfile(info, io.BytesIO(data) if isinstance(data, bytes) else None)
    storage.write_atomic(url, buffer.getvalue())


def link(name: str, target: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = tarfile.SYMTYPE, target
    return info


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def captions(tmp_path: Path) -> Path:
    """Written by the webdataset library: jpeg and txt, four samples a shard."""
    folder = tmp_path / "captions"
    folder.mkdir()
    with webdataset.ShardWriter(str(folder / "cc-%03d.tar"), maxcount=4, verbose=0) as writer:
        for number in range(10):
            writer.write({"__key__": f"{number:06d}", "jpeg": picture(number), "txt": f"No effusion. Case {number}."})
    return folder


@pytest.mark.parametrize("remote", [False, True])
def test_shards_of_the_webdataset_library_are_read_byte_for_byte(captions: Path, remote: bool) -> None:
    url = str(captions)
    if remote:
        url = f"memory://{uuid.uuid4().hex}/captions"
        for path in captions.iterdir():
            storage.write_atomic(storage.join(url, path.name), path.read_bytes())
    before = {name: storage.read_bytes(storage.join(url, name)) for name in storage.list_folder(url)}
    found = index_set(url)
    manifest = load_manifest(url)
    assert found.manifest == manifest and is_foreign(manifest) and not found.left_out
    assert (manifest.dataset, manifest.split, manifest.labels) == ("captions", "train", ())
    assert [(shard.path, shard.samples) for shard in manifest.shards] == [
        ("cc-000.tar", 4), ("cc-001.tar", 4), ("cc-002.tar", 2)
    ]  # fmt: skip
    theirs = webdataset.WebDataset([str(path) for path in sorted(captions.glob("*.tar"))], shardshuffle=False)
    wanted = [(sample["__key__"], {"jpg": sample["jpeg"], "txt": sample["txt"]}) for sample in theirs]
    assert list(iterate(url)) == wanted and len(wanted) == 10
    assert ShardReader(url, manifest).read(1, "000006")["jpg"] == picture(6)
    assert all(storage.read_bytes(storage.join(url, name)) == data for name, data in before.items())
    assert not verify(url).findings


def test_they_are_trained_on(captions: Path, sets, tokenizer) -> None:
    index_set(captions)
    config = sets.config()
    maker = ExampleMaker(
        tokenizer, ("Edema",), config.model.image.size, config.model.image.grid, config.model.text.max_tokens,
        config.entmlm, config.data.augment,
    )  # fmt: skip
    examples = [maker(key, members, epoch=0) for key, members in iterate(captions)]
    assert examples[3]["image"].shape == (1, 32, 32) and examples[3]["labels"].tolist() == [-1]
    assert len({example["report_id"] for example in examples}) == 10 and min(e["report_id"] for e in examples) >= 0
    assert torch.equal(
        examples[3]["tokens"],
        torch.tensor(tokenizer("No effusion. Case 3.", max_length=48, truncation=True)["input_ids"]),
    )
    assert list(reports_of([str(captions)])) == [f"No effusion. Case {number}." for number in range(10)]


@pytest.mark.parametrize(
    ("members", "report", "labels"),
    [
        ({}, "", {}),
        ({"txt": b"  \n"}, "", {}),
        ({"txt": "Größe".encode()}, "Größe", {}),
        ({"json": b'{"report": {"text": "ours"}, "labels": {"a": 1, "b": null}}', "txt": b"x"}, "ours", {"a": 1, "b": None}),
        ({"json": b'{"report": null, "caption": 3}'}, "", {}),
        ({"json": b'{"caption": "c", "text": "t", "labels": {"a": -1.0}}'}, "t", {"a": -1}),
        ({"json": b'{"caption": "c", "labels": {"a": "yes"}}'}, "c", {}),
        ({"json": b'{"report": "r", "labels": {"a": true}}'}, "r", {}),
        ({"json": b'{"report": "r", "labels": [1]}', "txt": b"x"}, "x", {}),
        ({"json": b"[1, 2]"}, "", {}),
    ],
)  # fmt: skip
def test_what_a_sample_says(members: dict[str, bytes], report: str, labels: dict[str, int | None]) -> None:
    document = read_document(members)
    assert (document.report, document.labels) == (report, labels)


@pytest.mark.parametrize(
    "members", [{"json": b"{"}, {"json": b"[" * 100_000}, {"txt": b"\xff"}, {"json": b"\xff\xfe{"}]
)
def test_text_that_cannot_be_read_is_a_value_error(members: dict[str, bytes]) -> None:
    with pytest.raises(ValueError, match="mmclip verify"):
        read_document(members)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a/b.c/k.x.JPEG", ("a/b.c/k", "x.jpg")),
        ("k.seg.png", ("k", "seg.png")),
        ("./k.jpg", ("./k", "jpg")),
        ("k.", ("k", "")),
        ("README", None),
        (".hidden.jpg", None),
        ("a/._k.jpg", None),
        ("__meta__/k.json", None),
        ("/etc/k.jpg", None),
        ("../k.jpg", None),
        ("a/../k.jpg", None),
    ],
)
def test_key_and_suffix_are_divided_as_webdataset_does(name: str, expected: tuple[str, str] | None) -> None:
    assert foreign_member(name) == expected


AWKWARD = (
    "a.b/c.d/k.jpg", "a.b/c.d/k.txt", "./dot/k.JPG", "./dot/k.x.y.txt", "sp ace/k 1.jpeg", "sp ace/k 1.Seg.Png", "ünï/größe.png",
    "line\nbreak/k.jpg", "d.ot\nted/k.jpg", "tail.jpg\n", "dir/no-suffix", "dir/ends.", "UPPER.PNG", "a..png", "x/__y__/k.png",
    "__meta__/k.jpg", "__info__", "__k.jpg", "1.2.840.jpg", "k-1.jpg", "k-1.json", "k.1.png", "same/one.jpg", "same/two.jpg",
    "only.txt", "a/._k.txt",
)  # fmt: skip


def test_webdataset_and_our_index_agree_on_awkward_names(tmp_path: Path) -> None:
    """Keys, suffixes and bytes of every sample with an image; webdataset alone decides what belongs together."""
    write_tar(tmp_path / "odd.tar", [(name, f"of {name}".encode()) for name in AWKWARD])
    index_set(tmp_path)
    theirs = {}
    for sample in webdataset.WebDataset(str(tmp_path / "odd.tar"), shardshuffle=False):
        suffixes = {name: name.replace("jpeg", "jpg") for name in sample if not name.startswith("__")}
        members = {ours: sample[name] for name, ours in suffixes.items() if may_hold(ours)}
        if not members.keys().isdisjoint({"jpg", "png"}):
            theirs[make_key(sample["__key__"])] = members
    ours = dict(iterate(tmp_path))
    assert ours == theirs
    assert len(ours) == 11 and ours[make_key("sp ace/k 1")].keys() == {"jpg", "seg.png"}


@pytest.mark.parametrize("name", ["k.__bad__", "k.__key__", "k.__url__"])
def test_a_name_that_webdataset_keeps_for_itself_costs_no_sample(tmp_path: Path, name: str) -> None:
    write_tar(tmp_path / "a.tar", [("k.jpg", picture(1)), (name, b"1")])
    found = index_set(tmp_path)
    assert list(iterate(tmp_path)) == [("k", {"jpg": picture(1)})]
    assert dict(found.left_out) == {"files whose name is unsafe or no KEY.SUFFIX": 1}


def test_hidden_files_beside_their_images_are_left_out(tmp_path: Path) -> None:
    """What macOS adds to a tar. webdataset takes the folder for their key, which then seems to come twice."""
    names = ["s/._a.jpg", "s/a.jpg", "s/._b.jpg", "s/b.jpg", "s/.jpg"]
    write_tar(tmp_path / "a.tar", [(name, picture(number)) for number, name in enumerate(names)])
    index_set(tmp_path)
    assert dict(iterate(tmp_path)) == {make_key("s/a"): {"jpg": picture(1)}, make_key("s/b"): {"jpg": picture(3)}}


class Bomb:
    def __reduce__(self) -> tuple[object, ...]:
        return exec, ("raise SystemExit('unpickled')",)


def test_what_may_not_be_decoded_is_left_out_and_counted(tmp_path: Path) -> None:
    long = "study/" + "s" * 150
    evil = pickle.dumps(Bomb())
    write_tar(
        tmp_path / "odd.tar",
        [
            ("README", b"hello"),
            (f"{long}.JPG", picture(1)), (f"{long}.pyd", evil), (f"{long}.pickle", evil), (f"{long}.pkl", evil),
            (f"{long}.json", b'{"labels": {"Edema": 1, "Mass": 0}, "text": "Wet."}'),
            ("1.2.840.jpg", picture(2)),
            ("only-text.txt", b"no image"),
            ("loose.png", link("loose.png", "/etc/passwd")),
            ("/abs.png", picture(3)), ("../up.png", picture(4)),
            ("z.png", picture(5, "PNG")), ("z.cls", b"1"), ("z.json", b'{"labels": {"Edema": "yes"}}'),
        ],
    )  # fmt: skip
    write_tar(tmp_path / "nothing.tar", [("a.txt", b"x")])
    found = index_set(tmp_path, dataset="odd", split="test")
    assert dict(found.left_out) == {
        "files whose name is unsafe or no KEY.SUFFIX": 3, "members .pyd": 1, "members .pickle": 1, "members .pkl": 1,
        "members .2.840.jpg": 1, "samples without jpg or png": 3, "links, devices and the like": 1, "members .cls": 1,
        "`labels` in another form than {name: 1 | 0 | -1 | null}": 1, "shards without a sample": 1,
    }  # fmt: skip
    assert (found.manifest.dataset, found.manifest.split, found.manifest.labels) == ("odd", "test", ("Edema", "Mass"))
    samples = dict(iterate(tmp_path))
    assert list(samples) == [make_key(long), "z"] and len(make_key(long)) == 80
    assert set(samples[make_key(long)]) == {"jpg", "json"} and set(samples["z"]) == {"png", "json"}
    assert samples[make_key(long)]["jpg"] == picture(1)
    assert not verify(tmp_path).findings
    assert names_in(tmp_path) == ["manifest.json", "nothing.tar", "odd.index.json", "odd.tar"]


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_long_names_of_every_tar_format_work(tmp_path: Path, form: int) -> None:
    key = "p/" * 40 + "k" * 60 + ("" if form == tarfile.USTAR_FORMAT else "y" * 200)
    write_tar(tmp_path / "a.tar", [(f"{key}.jpg", picture(1)), (f"{key}.txt", b"t")], form)
    index_set(tmp_path)
    assert list(iterate(tmp_path)) == [(make_key(key), {"jpg": picture(1), "txt": b"t"})]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a.jpg", b""), ("a.jpg", b"")], "bad.tar.*'a' has two members .jpg"),
        ([("a.jpg", b""), ("a.JPEG", b"")], "bad.tar.*'a' has two members .jpg"),
        ([("a.jpg", b""), ("b.jpg", b""), ("a.txt", b"")], "bad.tar.*'a' comes twice.*lie together"),
        ([("a.jpg", b""), ("b.cls", b""), ("a.jpg", b"")], "bad.tar.*'a' comes twice"),
        ([("a.jpg", b""), *((f"a.x{n}.txt", b"") for n in range(300))], "bad.tar.*301 different suffixes; 256 can"),
        ([("a.txt", b"")], "no sample with a jpg or png.*samples without jpg or png"),
    ],
)
def test_samples_that_would_merge_are_refused_and_nothing_stays(
    tmp_path: Path, members: list[tuple[str, bytes]], message: str
) -> None:
    if "no sample" not in message:
        write_tar(tmp_path / "a-good.tar", [("g.jpg", picture(1))])
    write_tar(tmp_path / "bad.tar", members)  # type: ignore[arg-type]
    before = names_in(tmp_path)
    with pytest.raises(ValueError, match=message):
        index_set(tmp_path)
    assert names_in(tmp_path) == before


@pytest.mark.parametrize("where", ["data", "header", "entry", "bit"])
def test_damaged_tars_are_refused_and_nothing_stays(captions: Path, where: str) -> None:
    path = captions / "cc-002.tar"
    data = path.read_bytes()
    with tarfile.open(path) as tar:
        second = tar.getmembers()[1]
    cut = {"data": second.offset_data + 3, "header": second.offset + 100, "entry": second.offset}
    if where == "bit":
        data = data[: second.offset + 5] + bytes([data[second.offset + 5] ^ 4]) + data[second.offset + 6 :]
    else:
        data = data[: cut[where]]
    path.write_bytes(data)
    before = names_in(captions)
    with pytest.raises(ValueError, match=r"cc-002\.tar, offset \d+: .*nothing was written"):
        index_set(captions)
    assert names_in(captions) == before


def test_a_folder_that_cannot_be_indexed_says_why(tmp_path: Path, captions: Path) -> None:
    with pytest.raises(ValueError, match=r"no \*\.tar in .*name the folder"):
        index_set(tmp_path)
    (tmp_path / "x.tar.gz").write_bytes(b"")
    with pytest.raises(ValueError, match=r"unpack x\.tar\.gz"):
        index_set(tmp_path)
    write_tar(tmp_path / "x 1.tar", [("a.jpg", picture(1))])
    with pytest.raises(ValueError, match=r"holds 'x 1\.tar': rename"):
        index_set(tmp_path)
    with pytest.raises(ValueError, match="split name"):
        index_set(captions, split="a/b")
    (captions / "cc-001.index.json").write_text('{"mine": 1}')
    with pytest.raises(ValueError, match=r"cc-001\.index\.json is in the way"):
        index_set(captions)
    assert names_in(captions) == ["cc-000.tar", "cc-001.index.json", "cc-001.tar", "cc-002.tar"]
    (captions / "cc-001.index.json").unlink()
    index_set(captions)
    with pytest.raises(ValueError, match=r"has a manifest\.json already"):
        index_set(captions)


def test_the_same_shards_are_indexed_to_the_same_bytes(captions: Path) -> None:
    index_set(captions)
    first = {path.name: path.read_bytes() for path in captions.iterdir()}
    (captions / "manifest.json").unlink()  # what a killed run leaves: indexes, no manifest
    index_set(captions)
    assert {path.name: path.read_bytes() for path in captions.iterdir()} == first
    assert json.loads(first["cc-000.index.json"])["members"][0][0] == "000000.jpg"
    assert load_index(captions, load_manifest(captions).shards[2]).keys == ["000008", "000009"]
