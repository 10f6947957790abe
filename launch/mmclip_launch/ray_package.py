"""What travels with a Ray job: our packages as they are now, and files of the user. Every node of the job gets a copy of it."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from mmclip_launch.frozen import OURS, copy_packages

LARGEST_MIB = 100
"""Ray keeps packages in the memory of the head."""
_HIDDEN = (".*", "__pycache__")  # .git, and what should not leave this machine, such as .aws and .env
_PINNED = re.compile(r"[A-Za-z0-9][\w.-]*(\[[\w,.-]+\])?==[\w.!+-]+(\s*;.*)?")
_SHOWN = 3


@dataclass(frozen=True)
class Files:
    """Files of the user, by their paths below the working folder of this process; that of the job will be like it."""

    paths: tuple[Path, ...]

    @classmethod
    def of(cls, words: Iterable[str], more: Iterable[Path], excludes: Sequence[str]) -> Files:
        """Files that the words of a command name (`recipe.yaml`, `--model=lexicon.yaml`), and `more`: files, or folders whole but
        for hidden files and what matches `excludes`. ValueError for what lies outside the working folder, or is not there."""
        named = (Path(word.partition("=")[2] if word.startswith("--") else word) for word in words)
        found = [path for path in named if not path.is_absolute() and path.is_file()]
        for path in more:
            if not path.exists():
                raise ValueError(f"{path} is not here: --with takes files and folders that travel with the job")
            found += [path] if path.is_file() else below(path, excludes)
        return cls(tuple(sorted({inside(path) for path in found})))

    @property
    def size(self) -> int:
        return sum(path.stat().st_size for path in self.paths)

    def largest(self) -> str:
        sizes = sorted(((path.stat().st_size, str(path)) for path in self.paths), reverse=True)
        return ", ".join(f"{path} ({size / 2**20:.1f} MiB)" for size, path in sizes[:_SHOWN])


def inside(path: Path) -> Path:
    """The path below the working folder. ValueError if it lies elsewhere, or would hide our code."""
    short = Path(os.path.relpath(path))
    if short.parts[0] == "..":
        raise ValueError(f"{path} does not lie below the working folder, whose files travel: start from a folder above it")
    if short.parts[0] in OURS:
        raise ValueError(f"{path} would take the place of our package {short.parts[0]} on the cluster: rename it")
    return short


def below(folder: Path, excludes: Sequence[str]) -> Iterator[Path]:
    """All files below a folder. A pattern excludes a file or a folder by its name, or by its path from the working folder."""
    for entry in sorted(folder.iterdir()):
        short = os.path.relpath(entry)
        if any(fnmatch(entry.name, pattern) for pattern in (*_HIDDEN, *excludes)) or any(fnmatch(short, p) for p in excludes):
            continue
        if entry.is_dir():
            yield from below(entry, excludes)
        elif entry.is_file():
            yield entry


def fill(folder: Path, files: Files) -> None:
    """Make the package in an empty folder. ValueError if it is larger than `LARGEST_MIB`."""
    copy_packages(folder)
    code = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if (whole := (code + files.size) / 2**20) > LARGEST_MIB:
        raise ValueError(
            f"{whole:.0f} MiB would travel with the job, at most {LARGEST_MIB} may; largest: {files.largest()}. Leave files "
            "out by --exclude, or put them into a store or a folder that the cluster sees"
        )
    for path in files.paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, folder / path)


def pinned(requirements: Path) -> list[str]:
    """The lines of a pip requirements file. ValueError that names a line which does not say exactly what to install."""
    lines = [line.split(" #")[0].strip() for line in requirements.read_text().splitlines()]
    for number, line in enumerate(lines, 1):
        if line and not line.startswith("#") and not _PINNED.fullmatch(line):
            mend = "write NAME==VERSION, so that all nodes get the same"
            raise ValueError(f"{requirements}, line {number}: {line!r} is not pinned; {mend}")
    return [line for line in lines if line and not line.startswith("#")]
