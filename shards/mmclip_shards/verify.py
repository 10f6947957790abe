"""Check a packed set byte for byte. Each shard is read once, from first byte to last, in bounded memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import NamedTuple, get_args

from mmclip_shards import storage
from mmclip_shards.manifest import MANIFEST_NAME, Kind, Manifest, find_sets, find_split, load_manifest
from mmclip_shards.phi import KINDS
from mmclip_shards.shardcheck import Finding, ShardPlace, check_shard
from mmclip_shards.storage import Url


@dataclass
class Verdict:
    """What `verify` found. sets, shards, samples, bytes: how much it read; unjoined: sidecars that it checked without a base."""

    findings: list[Finding] = field(default_factory=list)
    sets: int = 0
    shards: int = 0
    samples: int = 0
    bytes: int = 0
    unjoined: list[str] = field(default_factory=list)


class _Set(NamedTuple):
    folder: str
    manifest: Manifest
    base: str | None
    base_manifest: Manifest | None


def verify(
    url: Url,
    *,
    base: Url | None = None,
    workers: int = 1,
    allow_phi_like: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Verdict:
    """Check the set at `url`, or every split below it, and the sidecars `entities` and `attention` in their folders.

    base: the set (or folder of splits) that the sidecars at `url` belong to; not needed for sidecars inside their base set.
    workers: threads that check shards. allow_phi_like: reports that seem to identify people are no finding, though the set was
    not packed so. progress(done, total): in shards. The check goes on after a fault; findings come in
    the order of the shards. ValueError when there is no set at `url` or `base`.
    """
    verdict = Verdict()
    sets = list(_sets(url, base, verdict))
    if base is not None and all(each.base is None for each in sets) and not verdict.findings:
        raise ValueError(f"{url} holds no sidecars: leave out the base {base}")
    places = [
        ShardPlace(each.folder, each.manifest, number, each.base, each.base_manifest)
        for each in sets
        for number in range(len(each.manifest.shards))
    ]
    phi: dict[str, Counter[str]] = {}
    pool = ThreadPoolExecutor(
        workers, "mmclip-verify"
    )  # threads suffice: decoding and hashing release the interpreter's lock
    try:
        last_key = ""
        for done, (place, found) in enumerate(zip(places, pool.map(check_shard, places), strict=True), 1):
            verdict.findings += found.findings
            last = last_key if place.number else ""
            if place.sorted and last >= found.first_key > "":
                problem = f"it does not come after {last!r}, the last key of the shards before: keys must be sorted"
                verdict.findings.append(Finding(place.url, found.first_key, problem))
            last_key = max(last, found.last_key)
            verdict.shards += 1
            verdict.samples += found.samples
            verdict.bytes += found.bytes
            phi.setdefault(place.folder, Counter()).update(found.phi)
            if progress is not None:
                progress(done, len(places))
    finally:
        pool.shutdown(cancel_futures=True)
    if not allow_phi_like:
        verdict.findings += [problem for each in sets for problem in _identifying(each, phi[each.folder])]
    return verdict


def _identifying(each: _Set, counts: Counter[str]) -> Iterator[Finding]:
    """A finding if the reports of a set hold more that identifies people than its manifest says. It tells no content."""
    allowed = each.manifest.phi_scan or {}
    if more := [f"{counts[kind]:,} x {kind}" for kind in KINDS if counts[kind] > allowed.get(kind, 0)]:
        problem = f"reports seem to identify people: {', '.join(more)}: pack from cleaned reports, or give --allow-phi-like"
        yield Finding(storage.join(each.folder, MANIFEST_NAME), "", problem)


def _sets(url: Url, base: Url | None, verdict: Verdict) -> Iterator[_Set]:
    """The sets to check. Faults of their manifests are added to the findings."""
    for folder in find_sets(url):
        manifest = _manifest(folder, verdict)
        if manifest is None:
            continue
        if manifest.kind != "base":
            yield from _joined(folder, manifest, None if base is None else find_split(base, manifest.split), verdict)
            continue
        verdict.sets += 1
        yield _Set(folder, manifest, None, None)
        for kind in get_args(Kind):
            sidecar = storage.join(folder, kind)
            if kind != "base" and storage.exists(storage.join(sidecar, MANIFEST_NAME)):
                beside = _manifest(sidecar, verdict)
                if beside is not None:
                    yield from _joined(sidecar, beside, folder, verdict)


def _manifest(folder: str, verdict: Verdict) -> Manifest | None:
    try:
        return load_manifest(folder)
    except (ValueError, OSError) as error:
        verdict.findings.append(Finding(storage.join(folder, MANIFEST_NAME), "", str(error)))
        return None


def _joined(folder: str, manifest: Manifest, base: str | None, verdict: Verdict) -> Iterator[_Set]:
    """A sidecar set. Differences between its manifest and that of the set in folder `base` are added to the findings."""
    verdict.sets += 1
    if base is None:
        verdict.unjoined.append(folder)
        yield _Set(folder, manifest, None, None)
        return
    base_manifest = load_manifest(base)
    if base_manifest.kind != "base":
        raise ValueError(f"{base} holds {base_manifest.kind} sidecars: name the packed set itself as base")
    where = storage.join(folder, MANIFEST_NAME)
    wanted = {shard.path: shard.sha256 for shard in base_manifest.shards}
    if manifest.base != wanted:
        made = manifest.base or {}
        differing = sum(made.get(path) != sha256 for path, sha256 in wanted.items()) + len(made.keys() - wanted.keys())
        problem = f"made from other shards than those of {base} ({differing} differ): make the sidecars again"
        verdict.findings.append(Finding(where, "", problem))
    for number, (ours, theirs) in enumerate(zip_longest(manifest.shards, base_manifest.shards)):
        if ours is None or theirs is None or ours.samples != theirs.samples:
            problem = (
                f"shard {number} has {ours.samples if ours else 'no'} samples, that of {base} has "
                f"{theirs.samples if theirs else 'none'}: make the sidecars again"
            )
            verdict.findings.append(Finding(where, "", problem))
    yield _Set(folder, manifest, base, base_manifest)
