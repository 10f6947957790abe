"""Which checkpoints are whole, which are kept, and what is found when one is torn."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from mmclip_shards.storage import exists, join, remove, write_atomic

from mmclip_dist.checkpoint import mirror as mirror_module
from mmclip_dist.checkpoint.folder import (
    MANIFEST,
    META,
    Meta,
    checkpoint_path,
    checkpoints_of,
    entry_of,
    fault,
    kept_by,
    parse_manifest,
    read_meta,
    scores_of,
    to_keep,
    write_manifest,
)  # fmt: skip
from mmclip_dist.checkpoint.mirror import fetch_newest, local_checkpoint, mirror
from mmclip_dist.checkpoint.store import newest_whole
from mmclip_dist.config import Checkpoint


def make(run: Path, step: int, score: float | None = None) -> Path:
    """A whole checkpoint, with contents of its own."""
    folder = checkpoint_path(run, step)
    (folder / "tokenizer").mkdir(parents=True)
    (folder / META).write_text(json.dumps(vars(Meta(step, 2, 1, ("a",), ("b",), score))))
    (folder / "tokenizer" / "vocabulary").write_text(f"words of {step}")
    (folder / "state.pt").write_bytes(step.to_bytes(4, "big") * 1000)
    write_manifest(folder, {str(p.relative_to(folder)): entry_of(p) for p in folder.rglob("*") if p.is_file()})
    return folder


def tear(folder: Path, how: str) -> None:
    state = folder / "state.pt"
    if how == "missing":
        state.unlink()
    elif how == "short":
        state.write_bytes(state.read_bytes()[:-1])
    elif how == "changed":
        state.write_bytes(state.read_bytes()[:-1] + b"?")
    elif how == "no manifest":
        (folder / MANIFEST).unlink()
    else:
        (folder / MANIFEST).write_text(how)


TEARS = {
    "missing": "state.pt: No such file",
    "short": "state.pt has 3999 bytes instead of 4000",
    "changed": "state.pt has changed since",
    "no manifest": "checkpoint.json: ",
    "{": "checkpoint.json: ",
    "[]": "checkpoint.json: not a manifest",
    '{"files": {}}': "checkpoint.json names no meta.json",
}


@pytest.mark.parametrize("how", TEARS)
def test_a_torn_checkpoint_is_passed_over_and_said(tmp_path: Path, how: str, capsys: pytest.CaptureFixture[str]) -> None:
    older, newer = make(tmp_path, 4), make(tmp_path, 8)
    assert fault(older) is None and fault(newer) is None
    tear(newer, how)
    told = fault(newer)
    assert told is not None and told.startswith(TEARS[how])
    assert newest_whole(tmp_path, Checkpoint()) == older
    assert f"passing over {newer}, which is torn: {told}" in capsys.readouterr().err
    assert not newer.exists() and newer.with_name("step-00000008.torn").is_dir()  # it no longer counts as one to keep
    assert newest_whole(tmp_path, Checkpoint()) == older and capsys.readouterr().err == ""


def test_what_a_killed_save_left_is_removed(tmp_path: Path) -> None:
    whole = make(tmp_path, 4)
    left = [whole.with_name(f".step-00000008.{doing}") for doing in ("writing", "converting", "fetching", "replaced")]
    for folder in left:
        folder.mkdir()
    assert newest_whole(tmp_path, Checkpoint()) == whole
    assert not any(folder.exists() for folder in left)


def test_a_torn_start_is_refused(tmp_path: Path) -> None:
    tear(make(tmp_path / "first", 8), "short")
    with pytest.raises(ValueError, match=r"step-00000008 is torn: state.pt has 3999"):
        newest_whole(tmp_path / "second", Checkpoint(start_from=str(tmp_path / "first")))


def test_the_newest_every_nth_and_the_best_are_kept() -> None:
    scores: dict[int, float | None] = dict.fromkeys(range(10, 110, 10))
    assert to_keep(scores, newest=2, every=None, best=1) == {90, 100}
    assert to_keep(scores, newest=1, every=40, best=1) == {40, 80, 100}
    scores |= {20: 0.7, 30: 0.9, 60: 0.9, 70: 0.1}
    assert to_keep(scores, newest=1, every=None, best=1) == {60, 100}  # of equals, the newer
    assert to_keep(scores, newest=1, every=None, best=3) == {20, 30, 60, 100}
    assert to_keep({}, newest=1, every=10, best=1) == set()


def test_scores_are_read_and_a_damaged_checkpoint_has_none(tmp_path: Path) -> None:
    paths = [make(tmp_path, 4, 0.5), make(tmp_path, 8, 0.7), make(tmp_path, 12)]
    (paths[1] / META).unlink()
    assert scores_of(paths) == {4: 0.5, 8: None, 12: None}


@pytest.fixture(params=["s3", "folder"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A URL that nothing is at yet."""
    if request.param == "folder":
        return str(tmp_path / "store")
    return f"{request.getfixturevalue('s3').url}/{tmp_path.name}"


def test_a_mirror_holds_what_is_kept_and_gives_it_back(tmp_path: Path, store: str) -> None:
    keep = kept_by(Checkpoint(keep=1))
    run, other = tmp_path / "run", tmp_path / "other"
    make(run, 4, score=0.9)
    mirror(run, store, keep)
    make(run, 8, score=0.1)
    mirror(run, store, keep)
    make(run, 12)
    mirror(run, store, keep)
    if "://" not in store:
        assert sorted(path.name for path in Path(store).iterdir()) == ["step-00000004", "step-00000012"]
    said: list[str] = []
    found = newest_whole(other, Checkpoint(url=store))
    assert found == checkpoint_path(other, 12) and fault(found) is None and read_meta(found).step == 12
    assert (found / "tokenizer" / "vocabulary").read_text() == "words of 12"
    assert newest_whole(other, Checkpoint(url=f"{store}/not/looked/at")) == found  # the local one is taken first
    for step in (12, 4):  # 8 is neither the newest nor the best
        assert fetch_newest(store, tmp_path / str(step), said.append) == checkpoint_path(tmp_path / str(step), step)
        remove(join(store, f"step-{step:08d}", MANIFEST))
    assert fetch_newest(store, tmp_path / "none", said.append) is None
    assert len([line for line in said if "step-00000012, which is torn" in line]) == 2


def test_a_mirrored_checkpoint_of_another_version_stops_no_run(tmp_path: Path, store: str) -> None:
    """It has no score and is kept or deleted as others are; to go on from it is refused with the reason."""
    run = tmp_path / "run"
    other = make(run, 4)
    (other / META).write_text(json.dumps(vars(Meta(4, 2, 1, ("a",), ("b",))) | {"optimizer": "of the future"}))
    files = [path for path in other.rglob("*") if path.is_file() and path.name != MANIFEST]
    write_manifest(other, {str(path.relative_to(other)): entry_of(path) for path in files})
    mirror(run, store, kept_by(Checkpoint(keep=2)))
    make(run, 8, score=0.5)
    mirror(run, store, kept_by(Checkpoint(keep=2)))
    assert scores_of(checkpoints_of(run)) == {4: None, 8: 0.5}
    remove(join(store, "step-00000008", MANIFEST))
    found = fetch_newest(store, tmp_path / "elsewhere", print)
    assert found == checkpoint_path(tmp_path / "elsewhere", 4)
    with pytest.raises(ValueError, match=r"step-00000004: meta.json is not that of this version.*optimizer.*use the version"):
        read_meta(found)
    make(run, 12)
    make(run, 16)
    mirror(run, store, kept_by(Checkpoint(keep=2)))  # and it goes as any old one does
    assert fetch_newest(store, tmp_path / "last", print) == checkpoint_path(tmp_path / "last", 16)
    assert not exists(join(store, "step-00000004", MANIFEST))


@pytest.mark.parametrize("named", [True, False])
def test_a_mirrored_checkpoint_that_says_nothing_of_itself_is_passed_over_and_goes_as_others_do(
    tmp_path: Path, store: str, named: bool
) -> None:
    """Its manifest is there, its meta.json is not."""
    run = tmp_path / "run"
    make(run, 4)
    odd = make(run, 8)
    mirror(run, store, kept_by(Checkpoint()))
    remove(join(store, "step-00000008", META))
    if not named:
        files = [path for path in odd.rglob("*") if path.is_file() and path.name not in (MANIFEST, META)]
        write_manifest(odd, {str(path.relative_to(odd)): entry_of(path) for path in files})
        write_atomic(join(store, "step-00000008", MANIFEST), (odd / MANIFEST).read_bytes())
    said: list[str] = []
    assert fetch_newest(store, tmp_path / "other", said.append) == checkpoint_path(tmp_path / "other", 4)
    assert len(said) == 1 and "step-00000008, which is torn" in said[0] and META in said[0]
    make(run, 12)
    mirror(run, store, kept_by(Checkpoint(keep=1)))
    assert [step for step in (4, 8, 12) if exists(join(store, f"step-{step:08d}", MANIFEST))] == [12]


@pytest.mark.parametrize("content", [b"", b"[]", b'{"step": 4', b"\xcc", b'{"step": 4}'])
def test_a_spoiled_meta_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / META).write_bytes(content)
    with pytest.raises(ValueError, match=f"{tmp_path}: meta.json is not that of this version"):
        read_meta(tmp_path)


def test_a_damaged_upload_is_passed_over(tmp_path: Path, store: str) -> None:
    make(tmp_path / "run", 4)
    make(tmp_path / "run", 8)
    mirror(tmp_path / "run", store, kept_by(Checkpoint()))
    write_atomic(join(store, "step-00000008", "state.pt"), b"\0" * 4000)
    said: list[str] = []
    assert fetch_newest(store, tmp_path / "other", said.append) == checkpoint_path(tmp_path / "other", 4)
    assert len(said) == 1 and "state.pt has changed" in said[0]
    assert [path.name for path in (tmp_path / "other" / "checkpoints").iterdir()] == ["step-00000004"]


def test_an_upload_that_is_cut_off_is_torn_until_the_next_one_completes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A link to the store that breaks at one file, then holds."""
    run, there, said = tmp_path / "run", str(tmp_path / "store"), []
    upload, keep = mirror_module.upload, kept_by(Checkpoint())
    make(run, 4)

    def breaking(source: Path, url: str) -> None:
        if source.name == "state.pt":
            raise OSError("no answer from the store")
        upload(source, url)

    monkeypatch.setattr(mirror_module, "upload", breaking)
    with pytest.raises(OSError, match="no answer"):
        mirror(run, there, keep)
    assert exists(join(there, "step-00000004", META)) and fetch_newest(there, tmp_path / "first", said.append) is None
    assert len(said) == 1 and "step-00000004, which is torn" in said[0]
    monkeypatch.setattr(mirror_module, "upload", upload)
    mirror(run, there, keep)
    assert fetch_newest(there, tmp_path / "second", said.append) == checkpoint_path(tmp_path / "second", 4)


def test_a_deletion_that_is_cut_off_leaves_nothing_that_claims_to_be_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, there = tmp_path / "run", str(tmp_path / "store")
    removing = mirror_module.remove
    make(run, 4)
    mirror(run, there, kept_by(Checkpoint()))

    def breaking(url: str) -> None:
        if url.endswith("state.pt"):
            raise OSError("no answer from the store")
        removing(url)

    monkeypatch.setattr(mirror_module, "remove", breaking)
    make(run, 8)
    with pytest.raises(OSError, match="no answer"):
        mirror(run, there, kept_by(Checkpoint(keep=1)))
    assert exists(join(there, "step-00000004", "state.pt")) and not exists(join(there, "step-00000004", MANIFEST))
    assert fetch_newest(there, tmp_path / "other", print) == checkpoint_path(tmp_path / "other", 8)


def test_nothing_at_the_url_is_no_fault(tmp_path: Path, store: str) -> None:
    assert newest_whole(tmp_path / "run", Checkpoint(url=store)) is None


@pytest.mark.parametrize("end", ["", "/", "/step-00000004"])
def test_a_mirror_is_read_by_its_url(tmp_path: Path, store: str, end: str) -> None:
    make(tmp_path / "run", 4)
    make(tmp_path / "run", 8)
    mirror(tmp_path / "run", store, kept_by(Checkpoint(keep=2)))
    with local_checkpoint(store + end) as folder:
        assert folder.name == ("step-00000004" if "step" in end else "step-00000008") and fault(folder) is None
    assert folder.exists() == ("://" not in store)  # the copy of a URL goes, a folder stays
    start = newest_whole(tmp_path / "new", Checkpoint(start_from=store + end))
    assert start is not None and start.name == folder.name and fault(start) is None
    assert start.parent.parent != tmp_path / "new"  # it is no checkpoint of the run that starts from it


def test_a_url_without_a_whole_checkpoint_is_told(tmp_path: Path, s3) -> None:
    url = f"{s3.url}/{tmp_path.name}"
    for name in (url, f"{url}/step-00000004"):
        with pytest.raises(ValueError, match=f"no whole checkpoint at {name}: name the checkpoint.url of a run"):
            local_checkpoint(name).__enter__()


EVIL = (
    "../../evil", "/etc/evil", "a/../evil", "./evil", "a//evil", "evil/", "", "..", "a\\..\\evil", "c:evil", "a\nevil", MANIFEST,
)  # fmt: skip


@pytest.mark.parametrize("name", EVIL)
def test_a_manifest_cannot_name_a_file_outside_its_folder(name: str) -> None:
    rows = {"model.safetensors": {"bytes": 1, "xxh3": "0"}, name: {"bytes": 1, "xxh3": "0"}}
    with pytest.raises(ValueError, match="which is no file of a checkpoint"):
        parse_manifest(json.dumps({"files": rows}).encode())


def test_a_fetch_writes_nothing_outside_the_run_folder(tmp_path: Path, store: str) -> None:
    """The file of the trial: it lay two folders above the checkpoint."""
    make(tmp_path / "run", 4)
    mirror(tmp_path / "run", store, kept_by(Checkpoint()))
    write_atomic(join(store, "evil"), b"evil")
    evil = {"files": {"../evil": {"bytes": 4, "xxh3": "0"}}}
    write_atomic(join(store, "step-00000004", MANIFEST), json.dumps(evil).encode())
    said: list[str] = []
    assert fetch_newest(store, tmp_path / "other", said.append) is None
    assert "it names '../evil', which is no file of a checkpoint" in said[0]
    assert not [path for path in (tmp_path / "other").rglob("*") if path.is_file()]
