"""The house: what lies at the top, and which way imports point."""

import ast
import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {
    "mmclip_dist": ROOT / "mmclip_dist",
    "mmclip_kernels": ROOT / "kernels" / "mmclip_kernels",
    "mmclip_shards": ROOT / "shards" / "mmclip_shards",
    "mmclip_launch": ROOT / "launch" / "mmclip_launch",
}
MAY_IMPORT = {
    "mmclip_kernels": set(),
    "mmclip_shards": set(),
    "mmclip_dist": {"mmclip_kernels", "mmclip_shards"},
    "mmclip_launch": {"mmclip_dist", "mmclip_kernels", "mmclip_shards"},
}


def imported(path: Path) -> set[str]:
    """Top-level names that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add((node.module or "").split(".")[0])
    return names


def test_imports_point_one_way() -> None:
    seen = 0
    for package, folder in PACKAGES.items():
        for path in folder.rglob("*.py"):
            seen += 1
            ours = imported(path) & set(PACKAGES) - {package}
            assert ours <= MAY_IMPORT[package], f"{path.relative_to(ROOT)} imports {ours - MAY_IMPORT[package]}"
    assert seen > 30


WALL_CLOCK = {
    "mmclip_dist/engine/stale_locks.py",  # the age of a file that another process left
    "mmclip_dist/run/trackers.py",  # the date of a metric, for MLflow to show
    "launch/mmclip_launch/hosts.py",  # two hosts' clocks are compared, here ...
    "launch/mmclip_launch/probe.py",  # ... and there
}


def test_durations_are_measured_by_a_clock_that_never_jumps() -> None:
    """time.monotonic, not time.time: a clock that is set by an hour must end no run and hold up none."""
    users = {
        str(path.relative_to(ROOT))
        for folder in PACKAGES.values()
        for path in folder.rglob("*.py")
        if re.search(r"\btime\.time(_ns)?\b|from time import .*\btime\b|datetime\.(now|utcnow)\(\) *-", path.read_text())
    }
    assert users == WALL_CLOCK


WINGS = {
    "errors": set(),
    "launcher": set(),
    "config": {"errors"},
    "data": {"errors", "launcher", "config"},
    "model": {"config", "data"},
    "plan": {"config"},
    "engine": {"errors", "launcher", "config", "data", "model"},
    "checkpoint": {"launcher", "config", "data", "model", "engine"},
    "run": {"errors", "launcher", "config", "data", "model", "engine", "plan"},
    "offline": {"config", "data", "model", "checkpoint"},
    "fit": {"launcher", "config", "data", "model", "engine", "checkpoint", "run"},
    "evaluate": {"errors", "config", "data", "model", "engine", "checkpoint", "run", "offline", "fit"},
    "export": {"config", "data", "model", "checkpoint", "evaluate"},
    "inference": {"data", "model", "checkpoint", "export"},
    "demo": {"data", "checkpoint", "evaluate", "inference"},
    "bench": {"config", "data", "model", "engine", "checkpoint", "run", "evaluate", "export", "offline"},
    "commands": {"config", "data", "plan", "evaluate", "export", "offline", "bench", "demo"},
    "train": {"errors", "launcher", "config", "data", "model", "engine", "checkpoint", "run", "fit", "evaluate"},
    "cli": {"errors", "commands"},
}
"""What each wing of mmclip_dist may import of the others: no two import each other, and what reads checkpoints is not read."""


def test_wings_import_one_way() -> None:
    folder, seen = PACKAGES["mmclip_dist"], set()
    for path in folder.rglob("*.py"):
        wing = path.relative_to(folder).parts[0].removesuffix(".py")
        if wing == "__init__":
            continue
        seen.add(wing)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "mmclip_dist":
                parts = (node.module or "").split(".")
                others = {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
                assert others <= WINGS[wing] | {wing}, f"{path.relative_to(ROOT)} imports {others}"
    assert seen == set(WINGS)
    order = list(WINGS)
    assert all(order.index(other) < order.index(wing) for wing, others in WINGS.items() for other in others)


def test_folders_that_only_hold_a_package_are_no_packages() -> None:
    """As importable names they would shadow `kernels`, `launch` and `shards` of the package index."""
    for folder in ("kernels", "launch", "shards"):
        assert not (ROOT / folder / "__init__.py").exists()


def test_top_level_is_the_agreed_one() -> None:
    folders = {path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith(".")}
    assert folders - {"runs", "dist", "build"} <= {"mmclip_dist", "kernels", "launch", "shards", "tests"}
    for name in (
        "pyproject.toml",
        "README.md",
        "CHANGELOG.md",
        "CONTRIBUTING.md",
        "LICENSE",
        "Makefile",
        "constraints.txt",
    ):
        assert (ROOT / name).is_file(), name


def test_no_dependency_pulls_in_torchvision() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = project["dependencies"] + sum((v for k, v in project["optional-dependencies"].items() if k != "bench"), [])
    assert not [name for name in named if name.startswith(("timm", "open_clip", "torchvision"))]


def test_modules_are_named_by_what_they_hold() -> None:
    banned = {"utils", "misc", "helpers", "common", "ray", "deepspeed", "torch", "csv"}
    for folder in PACKAGES.values():
        assert not [path for path in folder.rglob("*.py") if path.stem in banned]
