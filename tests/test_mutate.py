"""The mutation runner on a small tree, and whether every mutation of this one can still be applied."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests import mutate

SOURCE = """
def double(x):
    return 2 * x

def half(x):
    return x / 2
"""
TESTS = """
from toy import double

def test_double():
    assert double(3) == 6
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A package whose `double` is tested and whose `half` is not."""
    for name, text in {
        "toy/__init__.py": SOURCE,
        "tests/test_toy.py": TESTS,
        ".gitignore": "ignored\n",
        "ignored": "",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    return tmp_path


def write(tree: Path, **changes: object) -> None:
    """A file of one mutation, by default of `double`."""
    entry = {
        "file": "toy/__init__.py",
        "find": "2 * x",
        "replace": "3 * x",
        "tests": ["tests/test_toy.py"],
        "breaks": "all",
    }
    (tree / mutate.MUTATIONS).mkdir(exist_ok=True)
    lines = [f"{key} = {json.dumps(value)}" for key, value in (entry | changes).items()]  # these values are TOML, too
    (tree / mutate.MUTATIONS / "toy.toml").write_text("\n".join(["[[mutation]]", *lines]))


def of(find: str, replace: str) -> mutate.Mutation:
    return mutate.Mutation("toy/__init__.py", find, replace, ("tests/test_toy.py",), f"{find} is {replace}")


@pytest.mark.slow
def test_a_mutation_is_killed_survives_or_is_broken(tree: Path) -> None:
    mutations = [of("2 * x", "3 * x"), of("x / 2", "x / 3"), of("def double", "def triple")]
    seen: list[mutate.Result] = []
    results = mutate.run_all(mutations, tree, jobs=2, timeout=60, report=seen.append)
    assert [result.outcome for result in results] == ["killed", "survived", "broken"] and len(seen) == 3
    assert results[0].by == "tests/test_toy.py::test_double"
    assert "code 2" in results[2].by and "ImportError" in results[2].by
    assert (tree / "toy" / "__init__.py").read_text() == SOURCE
    assert "toy                      3      1        1      1" in mutate.summary(results)
    rows = {mutate.head(result.mutation): mutate.row(result) for result in results}
    table = mutate.document(mutations, rows)
    assert "| `return 2 * x` -> `return 3 * x` |" not in table
    assert "| `2 * x` -> `3 * x` | 2 * x is 3 * x | `tests/test_toy.py::test_double` |" in table
    assert mutate.rows_of(mutations, table) == rows
    assert [mutate.is_killed(rows[mutate.head(each)]) for each in mutations] == [True, False, False]
    assert not mutate.is_killed(None)
    assert mutate.rows_of(mutations[1:], table).keys() == {mutate.head(each) for each in mutations[1:]}


@pytest.mark.slow
def test_red_tests_stop_the_run(tree: Path) -> None:
    (tree / "tests" / "test_toy.py").write_text(TESTS.replace("6", "7"))
    with pytest.raises(ValueError, match="not green without a mutation"):
        mutate.run_all([of("2 * x", "3 * x")], tree, jobs=1, timeout=60, report=print)


def test_tests_that_hang_are_ended(tree: Path) -> None:
    with mutate.copies(tree, 1) as (copy,):
        assert not (copy / "ignored").exists()
        found = mutate.run_one(of("return 2 * x", "import time; time.sleep(600)"), copy, 2)
        assert (copy / "toy" / "__init__.py").read_text() == SOURCE
    assert found.outcome == "broken" and found.by == "no answer within 2 s" and found.seconds < 30


def test_a_package_from_elsewhere_is_refused(tree: Path) -> None:
    """An installed version would be tested, and every mutation would survive."""
    (tree / "json").mkdir()
    (tree / "json" / "__init__.py").write_text("")
    (tree / "sitecustomize.py").write_text("import sys, email as json; sys.modules['json'] = json")
    with pytest.raises(ValueError, match="from outside the copy"), mutate.copies(tree, 1):
        pass


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"find": "x"}, "holds the text to find 4 times, not once: 'x'"),
        ({"find": "y"}, "0 times"),
        ({"file": "toy/gone.py"}, "0 times"),
        ({"replace": "2 *  x"}, "the same"),
        ({"tests": ["tests/test_gone.py::test_it"]}, "no such tests"),
        ({"tests": []}, "none is named"),
        ({"survived": True}, "what closed it"),
        ({"closed_by": "a test"}, "what closed it"),
        ({"note": "hm"}, "unknown keys"),
    ],
)
def test_an_entry_that_cannot_be_used_is_named(tree: Path, changes: dict[str, object], message: str) -> None:
    write(tree)
    assert len(mutate.load(tree)) == 1
    write(tree, **changes)
    with pytest.raises(ValueError, match=f"toy.toml, entry 1: .*{message}"):
        mutate.load(tree)


def test_tests_are_named_once() -> None:
    assert mutate.distinct(["a.py::x", "b.py::y", "a.py", "b.py::y"]) == ["b.py::y", "a.py"]


def test_every_mutation_of_this_tree_applies() -> None:
    assert len(mutate.load(mutate.ROOT)) >= 15
