"""Shards on object storage: a real S3 server, and a proxy in front of it that breaks its answers in every way we know."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import random
import re
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from mmclip_shards import faults as storage_faults
from mmclip_shards import storage
from mmclip_shards.chunks import ChunkReader, Reading
from mmclip_shards.faults import Patience
from mmclip_shards.manifest import Manifest, load_index, load_manifest
from mmclip_shards.reader import ShardReader, iterate
from mmclip_shards.testing.fault_proxy import Fault, FaultProxy, Request, on_reads
from mmclip_shards.testing.s3_faults import Places, faults, lasting_error, places
from mmclip_shards.testing.s3_server import S3Server
from mmclip_shards.writer import Sample, ShardWriter

from tests.object_store import client_environment

QUICK = Patience(budget_s=2.0, stall_s=1.0, first_wait_s=0.05, longest_wait_s=0.5)
STEADY = Patience(budget_s=30.0, stall_s=1.0, first_wait_s=0.02, longest_wait_s=0.2)
CHUNK = 64 * 1024
NAMES = tuple(faults(Places(0, 0, 0)))
HARMLESS = {"flipped bit in a header", "flipped bit in a header, true checksum sent"}  # nothing there is believed
CAUSES = {
    "silence": "no byte for", "stall": "no byte for", "trickle": "no byte for", "close": "not completed", "reset": "[Rr]eset",
    "short": "bytes wanted", "short_range": "InvalidRange", "unsized": "bytes wanted", "flip": "damaged",
    "flip_checksum": "damaged", "zeros": "damaged", "empty": "no range", "page": "no range", "whole": "no range",
}  # fmt: skip
CAUSES_OF_OBSTORE = {
    "trickle": "no answer within", "close": "body error", "reset": "body error: Connection reset", "unsized": "Content-Length",
    "empty": "non-partial response", "page": "non-partial response", "whole": "non-partial response",
}  # fmt: skip


def make_samples(count: int, size: int, seed: int = 1) -> list[Sample]:
    draw = random.Random(seed)
    return [
        (
            f"k-{n:03d}",
            {"jpg": draw.randbytes(size + 37 * (n % 5)), "json": b'{"n":%d}' % n, "txt": draw.randbytes(200)},
        )
        for n in range(count)
    ]


def write(url: str | Path, samples: list[Sample], samples_per_shard: int) -> Manifest:
    with ShardWriter(
        url, kind="base", dataset="d", split="s", config_hash="c", samples_per_shard=samples_per_shard
    ) as writer:
        for key, files in samples:
            writer.add(key, files)
    return load_manifest(url)


def read_all(reader: ShardReader) -> list[Sample]:
    return [sample for number in range(len(reader.manifest.shards)) for sample in reader.samples(number)]


def reader_of(
    url: str, manifest: Manifest, chunk_bytes: int | None = CHUNK, patience: Patience = QUICK, **reading: object
) -> ShardReader:
    chunks = ChunkReader(Reading(patience=patience, **reading))  # type: ignore[arg-type]
    return ShardReader(url, manifest, chunks=chunks, chunk_bytes=chunk_bytes)


@pytest.fixture
def url(s3: S3Server) -> str:
    """A folder on the server that nobody has used."""
    return f"{s3.url}/{uuid.uuid4().hex}"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole files and lists must not take minutes when a test goes wrong."""
    monkeypatch.setattr(storage, "PATIENCE", STEADY)


SAMPLES = make_samples(24, 20_000)


@pytest.fixture(scope="module")
def packed(s3: S3Server) -> tuple[str, Manifest]:
    url = f"{s3.url}/{uuid.uuid4().hex}"
    return url, write(url, SAMPLES, 8)


# ---- the store itself


def test_write_read_list_remove(url: str) -> None:
    where = storage.join(url, "train", "a.bin")
    assert not storage.exists(where) and not storage.exists(storage.join(url, "train"))
    assert storage.list_folder(storage.join(url, "train")) == []
    with pytest.raises(FileNotFoundError, match=r"a\.bin"):
        storage.read_bytes(where)
    for data in (b"0123456789", b"new", b""):
        storage.write_atomic(where, data)
        assert storage.exists(where) and storage.exists(storage.join(url, "train"))
        assert (storage.read_bytes(where), storage.file_size(where)) == (data, len(data))
    storage.write_atomic(storage.join(url, "train", "b.bin"), b"b")
    assert storage.list_folder(storage.join(url, "train")) == ["a.bin", "b.bin"]
    assert storage.list_folder(url) == ["train"]
    storage.remove(where)
    storage.remove(where)
    assert storage.list_folder(storage.join(url, "train")) == ["b.bin"]


def test_a_listing_shows_what_another_process_published(s3: S3Server, url: str) -> None:
    storage.write_atomic(storage.join(url, "a.bin"), b"a")
    assert storage.list_folder(url) == ["a.bin"]
    s3.client().put_object(Bucket=s3.bucket, Key=f"{url.rpartition('/')[2]}/b.bin", Body=b"b")
    assert storage.list_folder(url) == ["a.bin", "b.bin"] and storage.exists(storage.join(url, "b.bin"))


@pytest.mark.parametrize(
    "fault", [Fault("silence"), Fault("error", status=500, code="InternalError"), Fault("reset", 0)]
)
def test_a_write_that_fails_once_is_tried_again(url: str, faulty: FaultProxy, fault: Fault) -> None:
    faulty.plan = lambda request: fault if request.method == "PUT" and request.number == 0 else None
    storage.write_atomic(storage.join(url, "a.bin"), b"0123456789")
    assert faulty.injected.total() == 1
    assert storage.read_bytes(storage.join(url, "a.bin")) == b"0123456789"


def test_ranges_are_exact_or_an_error(url: str) -> None:
    where = storage.join(url, "a.bin")
    storage.write_atomic(where, b"0123456789")
    assert storage.read_range(where, 3, 4) == b"3456"
    assert storage.read_range(where, 9, 1) == b"9"
    assert storage.read_range(where, 10, 0) == b""
    for offset, length in ((8, 3), (10, 1), (99, 1)):
        with pytest.raises(OSError, match=rf"{length} bytes wanted at offset {offset}, but the file has 10 bytes"):
            storage.read_range(where, offset, length)


def test_ranges_by_obstore_are_the_same_or_the_same_error(url: str) -> None:
    where = storage.join(url, "a.bin")
    storage.write_atomic(where, b"0123456789")
    assert bytes(storage.read_range(where, 3, 4, client="obstore")) == b"3456"
    for offset, length in ((8, 3), (10, 1), (99, 1)):
        with pytest.raises(OSError, match=rf"{length} bytes wanted at offset {offset}, but the file has 10 bytes"):
            storage.read_range(where, offset, length, client="obstore")
    with pytest.raises(FileNotFoundError, match=r"b\.bin"):
        storage.read_range(storage.join(url, "b.bin"), 0, 1, client="obstore")


def _read_by_obstore(where: str, queue: multiprocessing.Queue[str]) -> None:
    try:
        queue.put(str(bytes(storage.read_range(where, 3, 4, client="obstore"))))
    except NotImplementedError as error:
        queue.put(str(error))


def test_a_process_forked_after_obstore_was_used_is_refused_and_does_not_hang(url: str) -> None:
    where = storage.join(url, "a.bin")
    storage.write_atomic(where, b"0123456789")
    storage.read_range(where, 3, 4, client="obstore")
    context = multiprocessing.get_context("fork")
    queue: multiprocessing.Queue[str] = context.Queue()
    child = context.Process(target=_read_by_obstore, args=(where, queue), daemon=True)
    child.start()
    assert "read by s3fs" in queue.get(timeout=30)
    child.join(30)


def test_what_obstore_cannot_read_is_refused_with_the_mend(monkeypatch: pytest.MonkeyPatch) -> None:
    storage.check_client("obstore", "s3://bucket/set")
    storage.check_client("obstore", "/local/set")
    storage.check_client("s3fs", "gs://bucket/set")
    with pytest.raises(ValueError, match=r"not for gs://bucket/set"):
        storage.check_client("obstore", "gs://bucket/set")
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(ValueError, match=r"not installed: pip install .*s3-fast"):
        storage.check_client("obstore", "s3://bucket/set")


def test_a_packed_set_is_the_same_as_on_disk_and_reads_back(url: str, tmp_path: Path) -> None:
    manifest = write(url, SAMPLES, 8)
    assert manifest == write(tmp_path, SAMPLES, 8)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert storage.list_folder(url) == names and len(names) == 7
    for name in names:
        assert storage.read_bytes(storage.join(url, name)) == (tmp_path / name).read_bytes()
    assert list(iterate(url)) == SAMPLES
    for chunk_bytes in (CHUNK, 1000, None):
        reader = reader_of(url, manifest, chunk_bytes)
        assert read_all(reader) == SAMPLES
        tally = reader.chunks.take_tally()
        assert (tally.retries, tally.cache_hits) == (0, 0)
        assert reader.read(2, "k-023") == SAMPLES[23][1]


def test_a_shard_cut_at_an_entry_boundary_is_noticed(url: str) -> None:
    manifest = write(url, SAMPLES, 8)
    shard = storage.join(url, "000000.tar")
    offset, _ = load_index(url, manifest.shards[0]).span(4, 5)
    storage.write_atomic(shard, storage.read_bytes(shard)[: offset - 512])
    reader = reader_of(url, manifest, None)
    with pytest.raises(ValueError, match=r"000000\.tar, key k-004, offset \d+: cannot be read: .*but the file has"):
        read_all(reader)


@pytest.mark.slow
def test_a_server_that_goes_down_and_comes_back_costs_no_sample(s3: S3Server, packed: tuple[str, Manifest]) -> None:
    url, manifest = packed
    reader = reader_of(url, manifest, None, STEADY)
    delivered = [next(reader.samples(0))]
    s3.kill()
    rest: list[Sample] = []
    reading = threading.Thread(target=lambda: rest.extend(read_all(reader)), daemon=True)
    reading.start()
    try:
        time.sleep(0.5)
    finally:
        s3.restart()
    reading.join(60)
    assert delivered == SAMPLES[:1] and rest == SAMPLES
    assert reader.chunks.take_tally().retries > 0


# ---- credentials


@pytest.mark.parametrize("wrong", ["no credentials", "another secret", "an unknown key"])
def test_refused_access_is_an_error_and_never_an_empty_folder(
    packed: tuple[str, Manifest], monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    url, manifest = packed
    monkeypatch.setattr(storage_faults, "_SETTLED_TRIES", 2)  # each try opens a session
    monkeypatch.setattr(storage_faults, "_START_S", 0.1)
    storage._filesystems.clear()
    storage._served.clear()
    if wrong == "no credentials":
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    else:
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY" if wrong == "another secret" else "AWS_ACCESS_KEY_ID", "wrong")
    bucket = url.rpartition("/")[0]
    try:
        for action in (
            lambda: storage.exists(bucket),
            lambda: storage.list_folder(url),
            lambda: storage.write_atomic(storage.join(url, "x"), b""),
            lambda: load_manifest(url),
        ):
            told = "set AWS_ACCESS_KEY_ID" if wrong == "no credentials" else "s3://"
            with pytest.raises(PermissionError, match=told):
                action()
        with pytest.raises(PermissionError, match=r"shard s3://.*000000\.tar.*(PermissionError|MissingCredentials)"):
            reader_of(url, manifest, patience=STEADY).read(0, "k-000")
    finally:
        storage._filesystems.clear()


@pytest.fixture(params=["environment", "file"])
def key_place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[KeyPlace]:
    place = KeyPlace(tmp_path / "credentials" if request.param == "file" else None, monkeypatch)
    storage._filesystems.clear()
    yield place
    storage._filesystems.clear()


class KeyPlace:
    """Where this process finds its credentials."""

    def __init__(self, file: Path | None, patch: pytest.MonkeyPatch) -> None:
        self.file, self.patch = file, patch

    def put(self, credentials: dict[str, str]) -> None:
        if self.file is None:
            for name, value in credentials.items():
                self.patch.setenv(name, value)
            return
        self.patch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(self.file))
        for name in credentials:
            self.patch.delenv(name, raising=False)
        self.file.write_text(
            "[default]\n" + "".join(f"{name.lower()} = {value}\n" for name, value in credentials.items())
        )


@pytest.mark.parametrize("client", ["s3fs", "obstore"])
def test_a_revoked_key_that_was_renewed_goes_on(
    s3: S3Server, packed: tuple[str, Manifest], key_place: KeyPlace, client: str
) -> None:
    url, manifest = packed
    first, second = s3.new_credentials(), s3.new_credentials()
    key_place.put(first)
    reader = reader_of(url, manifest, None, replace(QUICK, budget_s=1.5), client=client)
    assert reader.read(0, "k-000") == SAMPLES[0][1]
    s3.revoke(first)
    with pytest.raises(PermissionError, match=r"000000\.tar, key k-001, offset \d+.*PermissionError"):
        reader.read(0, "k-001")
    key_place.put(second)
    assert read_all(reader) == SAMPLES
    s3.revoke(second)


@pytest.mark.parametrize("known", [True, False])
def test_a_forked_reader_waits_for_a_metadata_service_if_the_store_served_its_parent(
    packed: tuple[str, Manifest], monkeypatch: pytest.MonkeyPatch, known: bool
) -> None:
    """The loader processes of a machine all ask it at once, and it refuses some of them for seconds."""
    url, manifest = packed
    monkeypatch.setattr(storage_faults, "_START_S", 0.2)
    reader = reader_of(url, manifest, None, STEADY)
    if known:
        reader.keys(0)
    else:
        storage._served.clear()

    def found() -> tuple[str, float]:
        storage._filesystems.clear()
        os.environ.pop("AWS_ACCESS_KEY_ID")
        renewal = threading.Timer(1.5, os.environ.__setitem__, ("AWS_ACCESS_KEY_ID", s3_key))
        renewal.start()
        began = time.monotonic()
        try:
            result = "read" if reader.read(0, "k-000") == SAMPLES[0][1] else "wrong"
        except PermissionError as error:
            result = str(error)
        spent = time.monotonic() - began
        renewal.cancel()
        return result, spent

    s3_key = os.environ["AWS_ACCESS_KEY_ID"]
    context = multiprocessing.get_context("fork")
    queue: multiprocessing.Queue[tuple[str, float]] = context.Queue()
    child = context.Process(target=lambda: queue.put(found()), daemon=True)
    child.start()
    result, seconds = queue.get(timeout=60)
    child.join(30)
    if known:
        assert result == "read" and seconds > 1
    else:
        assert "set AWS_ACCESS_KEY_ID" in result and seconds < 1.4


@pytest.mark.parametrize(("status", "client"), [(400, "s3fs"), (403, "s3fs"), (400, "obstore")])
def test_an_expired_token_that_is_renewed_late_goes_on(
    s3: S3Server, packed: tuple[str, Manifest], faulty: FaultProxy, key_place: KeyPlace, status: int, client: str
) -> None:
    url, manifest = packed
    old, new = s3.new_credentials(), s3.new_credentials()
    key_place.put(old)
    reader = reader_of(url, manifest, None, STEADY, connections=1, client=client)
    delivered = list(reader.samples(0))
    refused = 0

    def expired(request: Request) -> Fault | None:
        nonlocal refused
        if request.access_key != old["AWS_ACCESS_KEY_ID"]:
            return None
        refused += 1
        if refused == 6:  # more often than other refusals are borne
            key_place.put(new)
        return Fault("error", status=status, code="ExpiredToken")

    faulty.plan = expired
    delivered += [*reader.samples(1), *reader.samples(2)]
    assert delivered == SAMPLES and refused >= 6
    for key in (old, new):
        s3.revoke(key)


# ---- faults


class Case(NamedTuple):
    """A fault of one object of a set, on the first answer that can show it or (lasting) on all of them."""

    name: str
    object: str
    lasting: bool
    chunk_bytes: int | None = 16 * 1024
    client: storage.Client = "s3fs"

    def __str__(self) -> str:
        how = "stays" if self.lasting else "once"
        by = "" if self.client == "s3fs" else f", by {self.client}"
        return f"{self.object}, {self.name}, {how}{'' if self.chunk_bytes else ', single samples'}{by}"


class Outcome(NamedTuple):
    delivered: list[Sample]
    error: str
    seconds: float
    injected: int
    retries: float


SHARD, INDEX, MANIFEST = "000001.tar", "000001.index.json", "manifest.json"
IN_DOCUMENTS = (
    "500", "404", "no answer", "5 bytes a second", "reset in data", "short, length agrees, in a sample",
    "short, no length, in a sample", "flipped bit in data", "zeros from a byte of data on", "error page with 200",
)  # fmt: skip
ONCE = [
    *(Case(name, SHARD, False, chunk_bytes) for name in NAMES for chunk_bytes in (16 * 1024, None)),
    *(Case(name, SHARD, False, client="obstore") for name in NAMES),
    *(Case(name, document, False) for document in (INDEX, MANIFEST) for name in IN_DOCUMENTS),
]
LASTING = [case._replace(lasting=True) for case in ONCE if case.chunk_bytes]
SMALL = make_samples(12, 6000)
TOLD_S = 2 * (QUICK.budget_s + QUICK.stall_s) + 10
"""A prefetch and the read, each with a last try begun within the budget; and a busy machine."""
THREADS = 6  # more would starve each other on a busy machine, and a read that starves looks like one that stalls


@pytest.fixture(scope="module")
def outcomes(s3: S3Server, tmp_path_factory: pytest.TempPathFactory) -> dict[Case, Outcome]:
    """Of all cases, each on a set of its own; many at a time, since most of them wait."""
    cases = [*ONCE, *LASTING]
    urls = {case: f"{s3.url}/{uuid.uuid4().hex}" for case in cases}
    folder = tmp_path_factory.mktemp("small")
    manifest, client = write(folder, SMALL, 6), s3.client()

    def put(url: str) -> None:
        for path in folder.iterdir():
            client.put_object(Bucket=s3.bucket, Key=f"{url.rpartition('/')[2]}/{path.name}", Body=path.read_bytes())

    plans = {}
    in_shard = places(load_index(folder, manifest.shards[1]), 3)
    for case, url in urls.items():
        half = (folder / case.object).stat().st_size // 2
        fault = faults(in_shard if case.object == SHARD else Places(half, half, half))[case.name]
        plans[url.removeprefix("s3:/")] = on_reads(fault, of=case.object, times=None if case.lasting else 1)
    injected: Counter[str] = Counter()

    def plan(request: Request) -> Fault | None:
        folder = request.path.rpartition("/")[0]
        fault = plans[folder](request)
        injected[folder] += fault is not None
        return fault

    def run(case: Case) -> Outcome:
        quick = case.lasting and case.name not in HARMLESS
        chunks = ChunkReader(Reading(patience=QUICK if quick else STEADY, client=case.client))
        delivered: list[Sample] = []
        error, began = "", time.monotonic()
        try:
            manifest = load_manifest(urls[case])
            reader = ShardReader(urls[case], manifest, chunks=chunks, chunk_bytes=case.chunk_bytes)
            for number in range(2):
                delivered.extend(reader.samples(number))
        except (ValueError, OSError) as found:
            error = f"{type(found).__name__}: {found}"
        seconds, retries = time.monotonic() - began, chunks.take_tally().retries
        chunks.close()
        return Outcome(delivered, error, seconds, injected[urls[case].removeprefix("s3:/")], retries)

    found: dict[Case, Outcome] = {}
    with (
        FaultProxy(s3, plan) as proxy,
        client_environment(s3.environment(proxy.endpoint)),
        pytest.MonkeyPatch.context() as patch,
        ThreadPoolExecutor(THREADS) as pool,
    ):
        list(pool.map(put, urls.values()))
        in_manifest = [case for case in LASTING if case.object == MANIFEST]
        others = [case for case in cases if case not in in_manifest]
        for mine, patience in ((others, STEADY), (in_manifest, QUICK)):
            patch.setattr(storage, "PATIENCE", patience)  # of the manifest
            found |= dict(zip(mine, pool.map(run, mine), strict=True))
            for case in [case for case in mine if case.lasting and found[case].seconds > TOLD_S]:
                injected[urls[case].removeprefix("s3:/")] = 0
                found[case] = run(case)  # alone: a machine that stood still for some seconds starves all that are under way
    return found


@pytest.mark.slow
@pytest.mark.parametrize("case", ONCE, ids=str)
def test_a_fault_that_comes_once_costs_nothing(outcomes: dict[Case, Outcome], case: Case) -> None:
    outcome = outcomes[case]
    assert outcome.error == ""
    assert outcome.delivered == SMALL
    assert outcome.injected == 1
    if case.name not in HARMLESS and case.object != MANIFEST:
        assert outcome.retries > 0


@pytest.mark.slow
@pytest.mark.parametrize("case", LASTING, ids=str)
def test_a_fault_that_stays_is_told_in_time(outcomes: dict[Case, Outcome], case: Case) -> None:
    outcome = outcomes[case]
    assert outcome.delivered == SMALL[: len(outcome.delivered)]  # nothing wrong, nothing left out
    assert outcome.injected > 0
    if case.name in HARMLESS:
        assert outcome.error == "" and len(outcome.delivered) == len(SMALL)
        return
    fault = faults(Places(0, 0, 0))[case.name]
    kind, _, told = outcome.error.partition(": ")
    # On a busy machine the last try may have stalled for a second whatever the fault was, and the last is what is told.
    stalled = kind == "OSError" and re.search("no byte for|no answer within", told) is not None
    assert stalled or kind == lasting_error(fault, in_shard=case.object == SHARD).__name__
    if case.object == SHARD:
        assert re.match(r"shard s3://\S+/000001\.tar, key k-\d+, offset \d+: ", told)
        causes = CAUSES if case.client == "s3fs" else CAUSES | CAUSES_OF_OBSTORE
        assert stalled or re.search(causes.get(fault.kind, fault.code), told)
    else:
        assert case.object in told and len(told) > len(case.object)
    assert len(outcome.delivered) < len(SMALL)
    assert outcome.seconds < TOLD_S


def test_once_a_lasting_fault_is_over_the_same_reader_goes_on(packed: tuple[str, Manifest], faulty: FaultProxy) -> None:
    """What was fetched ahead in vain is fetched again."""
    url, manifest = packed
    patience = Patience(budget_s=1.0, stall_s=1.0, first_wait_s=0.05, longest_wait_s=0.2)
    reader = reader_of(url, manifest, patience=patience)
    reader.keys(1)
    faulty.plan = on_reads(Fault("error", status=503, code="SlowDown"), of="000001.tar", times=None)
    with pytest.raises(OSError, match=r"000001\.tar, key k-008, offset \d+: .*SlowDown"):
        read_all(reader)
    faulty.plan = None
    time.sleep(2 * patience.longest_wait_s)  # for what is still being tried
    assert read_all(reader) == SAMPLES


@pytest.mark.parametrize("client", ["s3fs", "obstore"])
@pytest.mark.parametrize("late", ["once", "always", "always, awaited"])
def test_a_store_that_answers_late_is_asked_again_or_the_limit_to_raise_is_told(
    packed: tuple[str, Manifest], faulty: FaultProxy, late: str, client: str
) -> None:
    """Three times as late as a try may take, as if a store took 30 s where 10 are allowed."""
    url, manifest = packed
    stall_s = 4.0 if late == "always, awaited" else 0.4
    patience = Patience(budget_s=2.0, stall_s=stall_s, first_wait_s=0.02, longest_wait_s=0.2)
    reader = reader_of(url, manifest, patience=patience, client=client)
    for number in range(3):
        reader.keys(number)
    faulty.plan = on_reads(Fault("late", wait_s=1.2), of="000001.tar", times=1 if late == "once" else None)
    if late != "always":
        assert read_all(reader) == SAMPLES
        assert (reader.chunks.take_tally().retries > 0) == (late == "once")
        return
    mend = r"takes longer than 0\.4 s \(stall_s; in training data\.reading\.stall_s\) to answer, raise that limit$"
    with pytest.raises(OSError, match=rf"000001\.tar, key k-008, offset \d+: cannot be read: .*tried \d+ times in 2 s: .*{mend}"):
        read_all(reader)


@pytest.mark.slow
@pytest.mark.parametrize("chunk_bytes", [6000, None])
def test_an_epoch_with_hundreds_of_faults_delivers_every_sample_once(
    url: str, faulty: FaultProxy, chunk_bytes: int | None
) -> None:
    samples = make_samples(280, 3000, seed=2)
    manifest = write(url, samples, 70)
    spans = [load_index(url, shard).span for shard in manifest.shards]
    starts = {
        f"/{url.removeprefix('s3://')}/{shard.path}": set(range(0, shard.bytes, chunk_bytes))
        if chunk_bytes
        else {span(row, row + 1)[0] for row in range(shard.samples)}
        for shard, span in zip(manifest.shards, spans, strict=True)
    }
    injected = set()

    def plan(request: Request) -> Fault | None:
        """A fault for the first request of most chunks, drawn by what is asked for, not by when."""
        if request.start not in starts.get(request.path, ()):
            return None
        starts[request.path].remove(request.start)
        draw = random.Random(f"3 {request.path[-10:]} {request.start}")
        if draw.random() > 0.85:
            return None
        at = draw.randrange(request.start, int(request.stop))
        name = draw.choice(NAMES)
        injected.add(name)
        return faults(Places(at, at, at))[name]

    faulty.plan = plan
    reader = reader_of(url, manifest, chunk_bytes, STEADY, connections=16)
    assert read_all(reader) == samples
    assert faulty.injected.total() >= 200
    assert injected == set(NAMES)


# ---- processes


class Dataset(torch.utils.data.Dataset[Sample]):
    def __init__(self, reader: ShardReader) -> None:
        self.reader = reader

    def __len__(self) -> int:
        return len(SAMPLES)

    def __getitem__(self, row: int) -> Sample:
        key = SAMPLES[row][0]
        return key, self.reader.read(row // 8, key)


def test_a_worker_forked_after_use_reads_on_its_own(packed: tuple[str, Manifest]) -> None:
    """A session inherited across fork raises or hangs (s3fs 369, 889, 914)."""
    url, manifest = packed
    reader = reader_of(url, manifest, patience=STEADY)
    assert read_all(reader) == SAMPLES
    loader = torch.utils.data.DataLoader(
        Dataset(reader), batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=60, collate_fn=tuple
    )
    assert list(loader) == SAMPLES
    assert reader.read(1, "k-009") == SAMPLES[9][1]


def test_a_forked_process_counts_only_its_own_reads(packed: tuple[str, Manifest]) -> None:
    url, manifest = packed
    reader = reader_of(url, manifest)
    read_all(reader)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=lambda: queue.put(reader.chunks.take_tally().requests))
    child.start()
    assert queue.get(timeout=30) == 0
    child.join(30)
    assert reader.chunks.take_tally().requests > 0


# ---- the folder of chunks


def chunk_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.chunk"))


def kept_bytes(folder: Path) -> int:
    """Under the folder's lock: other processes may be writing."""
    with (folder / ".total").open() as total:
        fcntl.flock(total, fcntl.LOCK_EX)
        return sum(path.stat().st_size for path in chunk_files(folder))


def cached(url: str, manifest: Manifest, folder: Path, limit: int = 1 << 30) -> ShardReader:
    return reader_of(url, manifest, patience=STEADY, folder=str(folder), folder_bytes=limit)


def test_sets_with_the_same_file_names_share_no_chunk(url: str, tmp_path: Path) -> None:
    """Names made of basenames serve the samples of one set for those of another."""
    sets = {f"{url}/{name}": make_samples(16, 20_000, seed) for seed, name in enumerate(("a", "b"))}
    for where, samples in sets.items():
        write(where, samples, 8)
    for hits in (False, True):
        for where, samples in sets.items():
            reader = cached(where, load_manifest(where), tmp_path)
            assert read_all(reader) == samples
            tally = reader.chunks.take_tally()
            assert (tally.cache_hits > 0, tally.fetched > 0) == (hits, not hits)
    first = next(iter(sets))
    for name in storage.list_folder(first):
        storage.remove(storage.join(first, name))
    new = make_samples(16, 20_000, seed=9)
    write(first, new, 8)
    assert read_all(cached(first, load_manifest(first), tmp_path)) == new  # the same URL, another build


def _read_in_process(url: str, folder: str, limit: int, queue: multiprocessing.Queue[object]) -> None:
    reader = cached(url, load_manifest(url), Path(folder), limit)
    queue.put((read_all(reader) == SAMPLES, kept_bytes(Path(folder))))


def test_processes_share_a_folder_within_its_limit(packed: tuple[str, Manifest], tmp_path: Path) -> None:
    url, _ = packed
    limit = 4 * CHUNK
    context = multiprocessing.get_context("fork")
    queue: multiprocessing.Queue[tuple[bool, int]] = context.Queue()
    children = [
        context.Process(target=_read_in_process, args=(url, str(tmp_path), limit, queue), daemon=True) for _ in range(4)
    ]
    for child in children:
        child.start()
    for right, kept in [queue.get(timeout=60) for _ in children]:
        assert right and kept <= limit
    for child in children:
        child.join(30)
    assert 0 < kept_bytes(tmp_path) <= limit
    assert int((tmp_path / ".total").read_text()) == kept_bytes(tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} == {".chunk", ""}


def test_the_limit_holds_at_every_sample(packed: tuple[str, Manifest], tmp_path: Path) -> None:
    url, manifest = packed
    limit = 3 * CHUNK
    (tmp_path / ".left-by-a-killed-writer.chunk.1.tmp").write_bytes(bytes(CHUNK))
    reader = cached(url, manifest, tmp_path, limit)
    most = 0
    for number in range(3):
        for key, files in reader.samples(number):
            assert files == dict(SAMPLES)[key]
            most = max(most, kept_bytes(tmp_path))
    assert CHUNK < most <= limit
    assert not list(tmp_path.glob(".*.tmp"))


@pytest.mark.parametrize("damage", ["flipped", "cut"])
def test_a_damaged_cached_chunk_is_fetched_again(packed: tuple[str, Manifest], tmp_path: Path, damage: str) -> None:
    url, manifest = packed
    assert read_all(cached(url, manifest, tmp_path)) == SAMPLES
    whole = {path: path.read_bytes() for path in chunk_files(tmp_path)}
    for path, data in whole.items():
        path.write_bytes(bytes(len(data)) if damage == "flipped" else data[:-1])
    reader = cached(url, manifest, tmp_path)
    assert read_all(reader) == SAMPLES
    reader.chunks.close()
    assert {path: path.read_bytes() for path in chunk_files(tmp_path)} == whole


def test_a_full_disk_costs_the_cache_and_nothing_else(
    packed: tuple[str, Manifest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, manifest = packed
    reader = cached(url, manifest, tmp_path)

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "ftruncate", full)
    monkeypatch.setattr(Path, "write_bytes", full)
    assert read_all(reader) == SAMPLES
    assert chunk_files(tmp_path) == []


def test_a_folder_that_cannot_be_used_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / ".total").mkdir()
    with pytest.raises(OSError):
        ChunkReader(Reading(folder=str(tmp_path), folder_bytes=CHUNK))
