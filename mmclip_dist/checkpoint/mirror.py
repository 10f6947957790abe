"""A copy of a run's checkpoints on object storage or another disk. Uploads write the manifest last; a run whose folder has no
checkpoint fetches the newest one, and so does whoever is given its URL."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from mmclip_shards.storage import (
    download,
    exists,
    join,
    list_folder,
    local_path,
    read_bytes,
    remove,
    remove_empty_folder,
    upload,
)

from mmclip_dist.checkpoint.folder import (
    MANIFEST,
    META,
    checkpoint_name,
    checkpoint_path,
    checkpoints_of,
    entry_of,
    fault,
    parse_manifest,
    parse_meta,
    resolve_checkpoint,
    step_of,
)  # fmt: skip

_AT_ONCE = 8  # files copied at once


def upload_files(checkpoint: Path, url: str, files: Sequence[str]) -> None:
    """Upload some files of a checkpoint to the mirror `url`, where it is not whole before `mirror` adds its manifest."""
    _together(upload, [(checkpoint / file, join(join(url, checkpoint.name), file)) for file in files])


def retract(url: str, step: int) -> None:
    """Let the copy of a step, if there is one, count as torn: the step was saved again, and its files will be replaced."""
    manifest = join(url, checkpoint_name(step), MANIFEST)
    if exists(manifest):
        remove(manifest)


def mirror(
    run_dir: Path, url: str, keep: Callable[[dict[int, float | None]], set[int]], uploaded: int | None = None
) -> None:
    """Upload the checkpoints that `url` lacks, but no torn ones and no parts of one, and delete those there that
    `keep({step: score})` does not name. OSError if the store fails; the next call goes on.

    uploaded: the step whose files are there already, so that only its manifest is missing.
    """
    there = _whole_steps(url)
    for checkpoint in checkpoints_of(run_dir):
        step = step_of(checkpoint.name)
        if step is not None and step not in there and (step == uploaded or fault(checkpoint) is None):
            if step != uploaded:
                upload_files(checkpoint, url, list(parse_manifest((checkpoint / MANIFEST).read_bytes())))
            upload(checkpoint / MANIFEST, join(join(url, checkpoint.name), MANIFEST))
            there.append(step)
    scores = {step: _score(join(url, checkpoint_name(step), META)) for step in there}
    for step in set(scores) - keep(scores):
        _delete(join(url, checkpoint_name(step)))


def fetch_newest(url: str, run_dir: Path, say: Callable[[str], None]) -> Path | None:
    """Bring the newest whole checkpoint of `url` into the run folder; None if there is none. Torn ones are passed over."""
    for name in sorted((name for name in list_folder(url) if step_of(name) is not None), reverse=True):
        found = _fetch(join(url, name), run_dir, say)
        if found is not None:
            return found
    return None


def fetch_checkpoint(url: str, run_dir: Path, say: Callable[[str], None]) -> Path:
    """Bring the checkpoint of a step-* folder, or the newest whole one of a mirror, into a run folder. ValueError without one."""
    single = step_of(url.rstrip("/").rpartition("/")[2]) is not None
    found = _fetch(url.rstrip("/"), run_dir, say) if single else fetch_newest(url, run_dir, say)
    if found is None:
        raise ValueError(f"no whole checkpoint at {url}: name the checkpoint.url of a run, or one of the step-* folders there")
    return found


@contextmanager
def local_checkpoint(checkpoint: str) -> Iterator[Path]:
    """A checkpoint's folder on this machine. checkpoint: such a folder or a run's, as in `resolve_checkpoint`, or a URL as in
    `fetch_checkpoint`: its copy is verified, lies in TMPDIR and is deleted after the block."""
    path = local_path(checkpoint)
    if path is not None:
        yield resolve_checkpoint(str(path))
        return
    with TemporaryDirectory(prefix="mmclip-checkpoint-") as folder:
        yield fetch_checkpoint(checkpoint, Path(folder), lambda text: print(text, file=sys.stderr, flush=True))


def _fetch(source: str, run_dir: Path, say: Callable[[str], None]) -> Path | None:
    """Copy one checkpoint and verify it; None if it is torn. Files of it that are here already are not copied again."""
    step = step_of(source.rpartition("/")[2])
    assert step is not None, source
    final = checkpoint_path(run_dir, step)
    temporary = final.with_name(f".{final.name}.fetching")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        data = read_bytes(join(source, MANIFEST))
        if fault(final) is None and (final / MANIFEST).read_bytes() == data:
            return final
        files = parse_manifest(data)
        here = {file for file, entry in files.items() if (final / file).is_file() and entry_of(final / file) == entry}
        _together(_take_over, [(final / file, temporary / file) for file in here])
        _together(download, [(join(source, file), temporary / file) for file in files.keys() - here])
    except (FileNotFoundError, ValueError) as error:
        say(f"passing over {source}, which is torn: {error}")
        return None
    (temporary / MANIFEST).write_bytes(data)
    torn = fault(temporary)
    if torn is not None:
        say(f"passing over {source}, which is torn: {torn}")
        shutil.rmtree(temporary)
        return None
    shutil.rmtree(final, ignore_errors=True)
    temporary.rename(final)
    return final


def _take_over(own: Path, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.hardlink_to(own)


def _whole_steps(url: str) -> list[int]:
    steps = [step for name in list_folder(url) if (step := step_of(name)) is not None]
    return [step for step in steps if exists(join(url, checkpoint_name(step), MANIFEST))]


def _score(meta: str) -> float | None:
    """None also for a checkpoint of another version, or without this file."""
    try:
        return parse_meta(read_bytes(meta)).score
    except (FileNotFoundError, ValueError):
        return None


def _delete(url: str) -> None:
    files = list(parse_manifest(read_bytes(join(url, MANIFEST))))
    remove(join(url, MANIFEST))  # first, so that a half-deleted checkpoint counts as torn
    _together(remove, [(join(url, file),) for file in files])
    folders = {parent for file in files for parent in Path(file).parents}
    for folder in sorted(folders, reverse=True):  # the inner ones first
        remove_empty_folder(join(url, str(folder)) if folder.name else url)


def _together(action: Callable[..., None], calls: list[tuple[object, ...]]) -> None:
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for done in [pool.submit(action, *call) for call in calls]:
            done.result()
