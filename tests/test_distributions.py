"""What users install: versions agree, every import is declared, and the two small distributions work with nothing else."""

from __future__ import annotations

import ast
import functools
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from hatchling.builders.wheel import WheelBuilder
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {
    "mmclip_dist": ROOT / "mmclip_dist",
    "mmclip_kernels": ROOT / "kernels" / "mmclip_kernels",
    "mmclip_launch": ROOT / "launch" / "mmclip_launch",
    "mmclip_shards": ROOT / "shards" / "mmclip_shards",
}
PROJECTS = {
    "mmclip-dist": (ROOT, set(PACKAGES)),
    "mmclip-kernels": (ROOT / "kernels", {"mmclip_kernels"}),
    "mmclip-shards": (ROOT / "shards", {"mmclip_shards"}),
}
NEEDS_EXTRAS = {"mmclip_shards.testing", "mmclip_dist.demo"}
"""Packages that import an extra at the top: a user installs it for them."""

NOT_INSTALLED = {"mlflow": "mlflow-skinny", "open_clip": "open-clip-torch", "sklearn": "scikit-learn"}
"""Distributions of modules that differ in name, for an environment that lacks them."""


def project_of(folder: Path) -> dict[str, Any]:
    return tomllib.loads((folder / "pyproject.toml").read_text())["project"]


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def names(requirements: Iterable[str]) -> set[str]:
    return {normalised(Requirement(text).name) for text in requirements}


# -- Versions and requirements agree --------------------------------------------------------------------------------------


def test_all_packages_have_one_version() -> None:
    versions = {
        re.findall(r'^__version__ = "(.+)"$', (folder / "__init__.py").read_text(), re.MULTILINE)[0]
        for folder in PACKAGES.values()
    }
    assert len(versions) == 1, versions


def test_small_distributions_require_what_the_whole_requires() -> None:
    """The same range for the same package, and no more than the whole: it bundles them."""
    whole = project_of(ROOT)
    for folder in (ROOT / "kernels", ROOT / "shards"):
        small = project_of(folder)
        assert set(small["dependencies"]) <= set(whole["dependencies"])
        for extra, requirements in small.get("optional-dependencies", {}).items():
            assert set(requirements) <= {*whole["dependencies"], *whole["optional-dependencies"].get(extra, ())}, extra


# -- Imports are declared -------------------------------------------------------------------------------------------------


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """(top-level name, whether it is imported as soon as the file is) for each import of other projects' packages."""
    tree = ast.parse(path.read_text())
    at_once = set(_at_once(tree.body))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found = [node.module or ""]
        else:
            continue
        for name in {name.split(".")[0] for name in found} - sys.stdlib_module_names - PACKAGES.keys() - {"tests"}:
            yield name, node in at_once


def _at_once(statements: Sequence[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements that run when a file is imported, without those of `if TYPE_CHECKING`."""
    for statement in statements:
        yield statement
        if isinstance(statement, ast.If) and ast.unparse(statement.test).endswith("TYPE_CHECKING"):
            yield from _at_once(statement.orelse)
        elif not isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef):
            for part in ("body", "orelse", "finalbody"):
                yield from _at_once(getattr(statement, part, []))
            for handler in getattr(statement, "handlers", []):
                yield from _at_once(handler.body)


installed = functools.cache(metadata.packages_distributions)  # it reads the file list of every installed distribution


def distributions_of(module: str) -> set[str]:
    return {normalised(name) for name in installed().get(module, [NOT_INSTALLED.get(module, module)])}


@pytest.mark.parametrize("name", PROJECTS)
def test_every_import_is_declared(name: str) -> None:
    """What a file imports at its top is a dependency; what a function imports may be an extra."""
    folder, packages = PROJECTS[name]
    project = project_of(folder)
    extras = {k: v for k, v in project.get("optional-dependencies", {}).items() if k != "dev"}
    required = names(project["dependencies"])
    optional = required | names(text for requirements in extras.values() for text in requirements)
    seen = set()
    for package in packages:
        for path in PACKAGES[package].rglob("*.py"):
            parent = ".".join([package, *path.relative_to(PACKAGES[package]).parent.parts])
            for module, at_once in imports(path):
                seen.add(module)
                allowed = required if at_once and parent not in NEEDS_EXTRAS else optional
                assert distributions_of(module) & allowed, (
                    f"{path.relative_to(ROOT)} imports {module}: declare it for {name}"
                )
    assert len(seen) >= 2


def test_every_import_of_a_test_is_declared() -> None:
    project = project_of(ROOT)
    declared = names([*project["dependencies"], *sum(project["optional-dependencies"].values(), [])])
    seen = set()
    for path in (ROOT / "tests").rglob("*.py"):
        for module, _ in imports(path):
            seen.add(module)
            assert distributions_of(module) & declared, f"{path.relative_to(ROOT)} imports {module}: declare it for dev"
    assert {"pytest", "torch", "sklearn", "hatchling"} <= seen


def test_what_tests_need_is_pinned() -> None:
    pinned = names(line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#"))
    project = project_of(ROOT)
    optional = project["optional-dependencies"]
    assert names([*project["dependencies"], *optional["nlp"], *optional["s3"], *optional["dev"]]) <= pinned | {"torch"}


# -- The wheels, in bare environments -------------------------------------------------------------------------------------


def build(name: str, folder: Path) -> Path:
    """The wheel of a distribution, built without network or pip, unpacked below `folder`."""
    wheel = next(WheelBuilder(str(PROJECTS[name][0])).build(directory=str(folder / "wheels"), versions=["standard"]))
    unpacked = folder / name
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(unpacked)
    return unpacked


def link_requirements(bare: Path, requirements: Iterable[str]) -> set[str]:
    """Make exactly these distributions and those that they require importable from `bare`. -> their names."""
    linked: set[str] = set()
    waiting = [Requirement(text) for text in requirements]
    while waiting:
        requirement = waiting.pop()
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        assert not requirement.extras, f"{requirement}: extras are not followed here"
        name = normalised(requirement.name)
        if name not in linked:
            linked.add(name)
            _link(metadata.distribution(name), bare)
            waiting += [Requirement(text) for text in metadata.requires(name) or ()]
    return linked


def _link(distribution: metadata.Distribution, bare: Path) -> None:
    for top in {file.parts[0] for file in distribution.files or () if file.parts[0] not in ("..", "__pycache__")}:
        if not (bare / top).exists():
            (bare / top).symlink_to(Path(str(distribution.locate_file(top))))


def run_bare(bare: Path, script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run Python without its installed packages: it can import the standard library and what is in `bare`."""
    whole = f"import sys; sys.path.append({str(bare)!r})\n{script}"
    command = [sys.executable, "-I", "-S", "-c", whole, *map(str, arguments)]
    users = os.environ | {"TRITON_INTERPRET": "0"}  # the tests' interpreter needs NumPy, Triton itself does not
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=users)


IMPORT_ALL = """
import importlib, importlib.metadata, importlib.util, pkgutil
package = importlib.import_module(sys.argv[1])
version = importlib.metadata.version(sys.argv[1].replace("_", "-"))
assert version == package.__version__, (version, package.__version__)
left_out = tuple(sys.argv[2].split())
for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
    if not module.name.startswith(left_out):
        importlib.import_module(module.name)
for absent in sys.argv[3].split():
    assert importlib.util.find_spec(absent) is None, absent
"""

USE_KERNELS = """
import math, torch
from mmclip_kernels import ClipLoss, SigLipLoss, attention_topk_mask, contrastive_loss
image = torch.eye(3, requires_grad=True)
loss = contrastive_loss(image, torch.eye(3), torch.tensor(2.0), impl="torch")
assert abs(loss.item() - math.log(1 + 2 / math.e**2)) < 1e-6, loss
drop_in = ClipLoss()(image.detach(), torch.eye(3), torch.tensor(2.0), output_dict=True)
assert abs(drop_in["contrastive_loss"].item() - loss.item()) < 1e-6, drop_in
sigmoid = SigLipLoss()(image.detach(), torch.eye(3), torch.tensor(2.0), torch.tensor(0.0))
assert abs(sigmoid.item() - math.log(1 + math.e**-2) - 2 * math.log(2)) < 1e-6, sigmoid
loss.backward()
away = 2 / 3 / (math.e**2 + 2)  # of an image from each other text, at a scale of 2
expected = away * (torch.ones(3, 3) - 3 * torch.eye(3))
torch.testing.assert_close(image.grad, expected)
scores = torch.tensor([[0.1, 0.9, 0.2, 0.8]])
found = attention_topk_mask(torch.arange(8.0).view(1, 4, 2), scores=scores, keep=2, impl="torch")
assert found.ids_keep.tolist() == [[0, 2]] and found.visible.tolist() == [[[0, 1], [4, 5]]]
"""

USE_SHARDS = """
from pathlib import Path
import numpy as np
from PIL import Image
from mmclip_shards import ShardReader, as_webdataset, decode_image, index_set, load_manifest, pack, verify
from mmclip_shards.datasets.table import read_table, table_hash

folder = Path(sys.argv[4])
pictures = {f"i{n}": np.full((8, 8), 20 * n, np.uint8) + np.arange(8, dtype=np.uint8) for n in range(6)}
rows = ["image,patient,report"]
for name, picture in pictures.items():
    Image.fromarray(picture).save(folder / f"{name}.png")
    rows.append(f"{name}.png,p{name},Report {name}.")
table = folder / "table.csv"
table.write_text("\\n".join(rows))
columns = dict(image_column="image", patient_column="patient", text_column="report")
records = read_table(table, folder, **columns)
pack(records, folder / "set", dataset="bare", splits={"train": 1.0}, samples_per_shard=4, patient_key=b"k" * 32,
     config_hash=table_hash(table, **columns))
train = folder / "set" / "train"
assert not verify(train).findings

def read() -> dict[str, dict[str, bytes]]:
    reader = ShardReader(train, load_manifest(train))
    return {key: reader.read(n, key) for n in range(len(reader.manifest.shards)) for key in reader.keys(n)}

samples = read()
assert set(samples) == set(pictures)
for key, members in samples.items():
    assert (np.asarray(decode_image(members["png"])) == pictures[key]).all()
    assert f"Report {key}." in members["json"].decode()

shard = next(train.glob("*.tar"))
data = bytearray(shard.read_bytes())
data[data.index(b"Report")] ^= 1
shard.write_bytes(data)
try:
    read()
except ValueError as error:
    assert "damaged" in str(error)
else:
    raise AssertionError("a damaged byte was not seen")

foreign = folder / "foreign"
foreign.mkdir()
shard.rename(foreign / "a.tar")
for use in (lambda: as_webdataset(train), lambda: index_set(foreign)):
    try:
        use()
    except ValueError as error:
        assert "pip install 'mmclip-shards[webdataset]'" in str(error), error
    else:
        raise AssertionError("webdataset was not missed")
"""

USES = {
    "mmclip-kernels": (USE_KERNELS, "", "ray deepspeed transformers numpy PIL mmclip_dist mmclip_shards"),
    "mmclip-shards": (
        USE_SHARDS,
        " ".join(NEEDS_EXTRAS),
        "ray deepspeed torch s3fs webdataset mmclip_dist mmclip_kernels",
    ),
}
"""What is done with each alone, the modules left out because they need an extra, and what must not be importable."""


@pytest.mark.slow
@pytest.mark.parametrize("name", USES)
def test_useful_alone(name: str, tmp_path: Path) -> None:
    """The wheel holds the package alone, and its declared dependencies are all that it needs."""
    bare = build(name, tmp_path)
    package = name.replace("-", "_")
    assert {path.name for path in bare.iterdir() if not path.name.endswith(".dist-info")} == {package}
    assert (bare / package / "py.typed").is_file() and list(bare.glob("*.dist-info/licenses/LICENSE"))
    requirements = project_of(PROJECTS[name][0])["dependencies"]
    link_requirements(bare, requirements)
    work = tmp_path / "work"
    work.mkdir()
    use, without, absent = USES[name]
    found = run_bare(bare, IMPORT_ALL + use, package, without, absent, work)
    assert found.returncode == 0, found.stderr


def test_a_missing_requirement_would_show(tmp_path: Path) -> None:
    bare = build("mmclip-shards", tmp_path)
    requirements = [text for text in project_of(ROOT / "shards")["dependencies"] if "xxhash" not in text]
    assert "xxhash" not in link_requirements(bare, requirements)
    found = run_bare(bare, IMPORT_ALL, "mmclip_shards", " ".join(NEEDS_EXTRAS), "xxhash")
    assert found.returncode == 1 and "No module named 'xxhash'" in found.stderr


def test_the_whole_distribution_bundles_all_packages(tmp_path: Path) -> None:
    unpacked = build("mmclip-dist", tmp_path)
    assert {path.name for path in unpacked.iterdir() if not path.name.endswith(".dist-info")} == set(PACKAGES)
    assert (unpacked / "mmclip_dist" / "recipes" / "quickstart.yaml").is_file()
    assert all((unpacked / package / "py.typed").is_file() for package in PACKAGES)
    (about,) = unpacked.glob("*.dist-info/METADATA")
    assert "\nVersion: 0.1.0\n" in about.read_text()
