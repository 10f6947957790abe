"""Break the code on purpose, one line at a time, and see whether a test turns red: python tests/mutate.py [--new] [--write]

The mutations are in tests/mutations/*.toml. Each is applied to a copy of the tree, in which the tests that it names are run:
killed if one fails, survived if all pass, broken if they could not be run. The table tests/mutations/README.md has a row for
each that was run (--write); --new runs those that have none there, or one that is not killed.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from queue import SimpleQueue
from typing import Literal

ROOT = Path(__file__).resolve().parents[1]
MUTATIONS = Path("tests", "mutations")
PATHS = (".", "kernels", "launch", "shards")
"""Folders of the tree that hold importable packages."""

Outcome = Literal["killed", "survived", "broken"]
_TESTS_FAILED, _ALL_PASSED = 1, 0  # pytest's exit codes
_SHOWN = 70  # characters of a changed line in the table


@dataclass(frozen=True)
class Mutation:
    """One change. find: text that occurs once in `file`. tests: pytest files or node ids. breaks: what would go wrong.

    survived: no test turned red at first. closed_by: the test that was added for it, or what was done instead.
    """

    file: str
    find: str
    replace: str
    tests: tuple[str, ...]
    breaks: str
    survived: bool = False
    closed_by: str = ""

    @property
    def package(self) -> str:
        parts = Path(self.file).parts
        return parts[1] if parts[0] in PATHS else parts[0]

    def change(self) -> str:
        """The first line that differs, before and after."""
        pairs = zip([*self.find.splitlines(), ""], [*self.replace.splitlines(), ""], strict=False)
        old, new = next((old.strip(), new.strip()) for old, new in pairs if old != new)
        return f"`{old[:_SHOWN]}` -> `{new[:_SHOWN] or 'nothing'}`"


@dataclass(frozen=True)
class Result:
    """by: the first test that failed, or why the tests could not be run."""

    mutation: Mutation
    outcome: Outcome
    by: str
    seconds: float


# -- Reading --------------------------------------------------------------------------------------------------------------


def load(root: Path) -> list[Mutation]:
    """All mutations of a tree. ValueError naming the file and number of every entry that cannot be used."""
    found, faults = [], []
    for path in sorted((root / MUTATIONS).glob("*.toml")):
        entries = tomllib.loads(path.read_text()).get("mutation", [])
        for number, entry in enumerate(entries, 1):
            try:
                found.append(_parse(entry, root))
            except (ValueError, TypeError) as error:
                faults.append(f"{MUTATIONS / path.name}, entry {number}: {error}")
    if faults:
        raise ValueError("\n".join(faults))
    if not found:
        raise ValueError(f"there are no mutations in {root / MUTATIONS}")
    return found


def _parse(entry: dict[str, object], root: Path) -> Mutation:
    unknown = entry.keys() - {field.name for field in fields(Mutation)}
    if unknown:
        raise ValueError(f"unknown keys {sorted(unknown)}")
    mutation = Mutation(**entry | {"tests": tuple(entry.get("tests", ()))})
    count = (root / mutation.file).read_text().count(mutation.find) if (root / mutation.file).is_file() else 0
    if count != 1:
        raise ValueError(f"{mutation.file} holds the text to find {count} times, not once: {mutation.find.strip()!r}")
    if mutation.find.split() == mutation.replace.split():
        raise ValueError("find and replace are the same")
    missing = [test for test in mutation.tests if not (root / test.split("::")[0]).exists()]
    if missing or not mutation.tests:
        raise ValueError(f"no such tests: {missing or 'none is named'}")
    if mutation.survived != bool(mutation.closed_by):
        raise ValueError("a mutation that survived says what closed it: set both survived and closed_by, or neither")
    return mutation


def distinct(tests: Iterable[str]) -> list[str]:
    """Each test once; a node id only if its whole file is not named."""
    named = dict.fromkeys(tests)
    return [test for test in named if "::" not in test or test.split("::")[0] not in named]


# -- Running --------------------------------------------------------------------------------------------------------------


def copy_tree(root: Path, target: Path) -> None:
    """The files that git tracks or would track, as they are now."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=root,
        capture_output=True,
        check=True,
    ).stdout.decode()
    for name in listed.split("\0"):
        if name and (root / name).exists():  # a deleted file is still listed
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, target / name, follow_symlinks=False)


def environment(copy: Path) -> dict[str, str]:
    """That of a process which imports from the copy.

    No bytecode is written: Python takes a cached file for current if the source has the same size and second, as one has that
    was changed and restored.
    """
    others = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path and not _inside(path, ROOT)]
    ours = [str(copy / path) for path in PATHS]
    return os.environ | {"PYTHONPATH": os.pathsep.join(ours + others), "PYTHONDONTWRITEBYTECODE": "1"}


def _inside(path: str, folder: Path) -> bool:
    return Path(path).resolve().is_relative_to(folder)


def check_imports(copy: Path) -> None:
    """ValueError unless the tree's packages are imported from the copy: an installed version would never be mutated."""
    packages = sorted(path.parent.name for folder in PATHS for path in (copy / folder).glob("*/__init__.py"))
    code = f"from importlib.util import find_spec\nfor name in {packages}: print(find_spec(name).origin)"
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=copy, env=environment(copy), capture_output=True, text=True, check=True
    ).stdout.split()
    elsewhere = [file for file in found if not _inside(file, copy.resolve())]
    if elsewhere or not found:
        raise ValueError(f"packages are imported from outside the copy: {elsewhere or packages}")


def run_tests(copy: Path, tests: Sequence[str], timeout: float) -> tuple[int | None, str]:
    """-> pytest's exit code (None: out of time) and output."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--tb=short", *tests]
    process = subprocess.Popen(
        command, cwd=copy, env=environment(copy), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        start_new_session=True,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        return None, ""
    finally:
        if process.poll() is None:  # out of time, or interrupted: tests may have started processes of their own
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    return process.returncode, output


def run_one(mutation: Mutation, copy: Path, timeout: float) -> Result:
    """Apply a mutation to a copy, run its tests, restore the copy."""
    path = copy / mutation.file
    original = path.read_text()
    path.write_text(original.replace(mutation.find, mutation.replace))
    start = time.monotonic()
    try:
        code, output = run_tests(copy, mutation.tests, timeout)
    finally:
        path.write_text(original)
    seconds = time.monotonic() - start
    if code == _ALL_PASSED:
        return Result(mutation, "survived", "all tests passed", seconds)
    failed = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", output, re.MULTILINE)
    if code == _TESTS_FAILED and failed:
        return Result(mutation, "killed", failed[1], seconds)
    return Result(mutation, "broken", _reason(code, output, timeout), seconds)


def _reason(code: int | None, output: str, timeout: float) -> str:
    if code is None:
        return f"no answer within {timeout:.0f} s"
    errors = [line for line in output.splitlines() if line.startswith("E ")]
    return f"pytest ended with code {code}" + (f": {errors[-1][1:].strip()}" if errors else "")


@contextmanager
def copies(root: Path, count: int) -> Iterator[list[Path]]:
    """So many copies of the tree, whose packages are what is imported there."""
    with tempfile.TemporaryDirectory(prefix="mutate-") as folder:
        made = [Path(folder, str(number)) for number in range(count)]
        for copy in made:
            copy_tree(root, copy)
            check_imports(copy)
        yield made


def run_all(
    mutations: Sequence[Mutation], root: Path, *, jobs: int, timeout: float, report: Callable[[Result], None]
) -> list[Result]:
    """Run the named tests as they are, then each mutation. ValueError if a test is red before anything is changed."""
    with copies(root, jobs) as made:
        tests = distinct(test for mutation in mutations for test in mutation.tests)
        code, output = run_tests(made[0], tests, timeout * len(tests))
        if code != _ALL_PASSED:
            raise ValueError(f"the tests are not green without a mutation:\n{output[-3000:]}")
        free: SimpleQueue[Path] = SimpleQueue()
        for copy in made:
            free.put(copy)

        def run(mutation: Mutation) -> Result:
            copy = free.get()
            try:
                result = run_one(mutation, copy, timeout)
            finally:
                free.put(copy)
            report(result)
            return result

        with ThreadPoolExecutor(jobs) as pool:
            return list(pool.map(run, mutations))


# -- Showing --------------------------------------------------------------------------------------------------------------


def line(result: Result) -> str:
    return (
        f"{result.outcome:8} {result.seconds:5.1f} s  {result.mutation.file}: {result.mutation.breaks}  [{result.by}]"
    )


def summary(results: Sequence[Result]) -> str:
    """Counts by package, then what is not killed."""
    rows = [f"{'package':16} mutations killed survived broken seconds"]
    for package in sorted({result.mutation.package for result in results}):
        own = [result for result in results if result.mutation.package == package]
        counts = [sum(result.outcome == outcome for result in own) for outcome in ("killed", "survived", "broken")]
        seconds = sum(result.seconds for result in own)
        rows.append(f"{package:16} {len(own):9} {counts[0]:6} {counts[1]:8} {counts[2]:6} {seconds:7.0f}")
    return "\n".join([*rows, *(line(result) for result in results if result.outcome != "killed")])


def head(mutation: Mutation) -> str:
    """The first cells of a mutation's row, which tell it from others."""
    return _cells(mutation.package, Path(mutation.file).name, mutation.change(), mutation.breaks)


def row(result: Result) -> str:
    by = f"`{result.by}`" if result.outcome == "killed" else f"**{result.outcome}** {result.by}"
    return f"{head(result.mutation)}{_cells(by, f'{result.seconds:.0f}', result.mutation.closed_by)} |"


def _cells(*texts: str) -> str:
    return "".join("| " + text.replace("|", "\\|") + " " for text in texts)


def is_killed(row: str | None) -> bool:
    return row is not None and "| **survived** " not in row and "| **broken** " not in row


def rows_of(mutations: Sequence[Mutation], table: str) -> dict[str, str]:
    """Head -> row, of those mutations that the text of tests/mutations/README.md has a row for."""
    lines = table.splitlines()
    heads = (head(mutation) for mutation in mutations)
    return {own: found for own in heads if (found := next((each for each in lines if each.startswith(own)), None))}


def document(mutations: Sequence[Mutation], rows: Mapping[str, str]) -> str:
    """tests/mutations/README.md. rows: of those that were run, by `head`."""
    ordered = sorted(mutations, key=lambda mutation: (mutation.package, mutation.file))
    shown = [rows[head(mutation)] for mutation in ordered if head(mutation) in rows]
    return "\n".join(
        [
            "# Mutations",
            "",
            f"`python tests/mutate.py --new --write` broke the code in {len(shown)} of {len(mutations)} places, one at a time,",
            "and ran the tests named, each on the tree of its day. A mutation is killed if a test fails.",
            "Where one survived at first, the last column names what closed the gap.",
            "",
            "| package | file | change | what would go wrong | killed by | seconds | survived at first, closed by |",
            "|---|---|---|---|---|---|---|",
            *shown,
            "",
        ]
    )


def selected(mutations: Sequence[Mutation], text: str | None) -> list[Mutation]:
    """Those whose file, tests or description hold the text. ValueError if there are none."""
    chosen = [each for each in mutations if text is None or text in " ".join([each.file, each.breaks, *each.tests])]
    if not chosen:
        raise ValueError(f"no mutation names {text!r} in its file, tests or description")
    return chosen


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="TEXT", help="mutations whose file, tests or description hold this text")
    parser.add_argument("--jobs", type=int, default=1, help="mutations under way at once, each in a copy of its own")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds for the tests of one mutation")
    parser.add_argument("--list", action="store_true", help="show the mutations and run nothing")
    parser.add_argument("--new", action="store_true", help="only those that the table does not call killed")
    parser.add_argument("--write", action="store_true", help=f"put each result into {MUTATIONS / 'README.md'} at once")
    options = parser.parse_args()
    table = ROOT / MUTATIONS / "README.md"
    try:
        everything = load(ROOT)
        rows = rows_of(everything, table.read_text())
        mutations = selected(everything, options.only)
        if options.new:
            mutations = [each for each in mutations if not is_killed(rows.get(head(each)))]
        if not mutations:
            print("all are killed")
            return 0
        if options.list:
            for mutation in mutations:
                print(f"{mutation.file}: {mutation.breaks}  {mutation.change()}")
            return 0

        def report(result: Result) -> None:
            print(line(result), flush=True)
            rows[head(result.mutation)] = row(result)
            if options.write:
                table.write_text(document(everything, rows))

        results = run_all(mutations, ROOT, jobs=options.jobs, timeout=options.timeout, report=report)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(summary(results))
    return 0 if all(result.outcome == "killed" for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
