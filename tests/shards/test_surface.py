"""What `import mmclip_shards` gives a user, and what it does not load."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import mmclip_shards
import numpy as np
import pytest

HEAVY = ("torch", "webdataset", "ray", "s3fs", "botocore", "aiohttp")


@pytest.mark.parametrize("name", mmclip_shards.__all__)
def test_every_public_name_exists_and_is_documented(name: str) -> None:
    value = getattr(mmclip_shards, name)
    own = value.__doc__ or ""
    assert own.strip() and not own.startswith(f"{name}("), "a dataclass makes up a docstring"
    assert value.__module__.startswith("mmclip_shards.")


def test_the_surface_is_sorted_typed_and_has_the_projects_version() -> None:
    assert sorted(mmclip_shards.__all__) == mmclip_shards.__all__
    assert mmclip_shards.__version__ == version("mmclip-dist")
    assert (Path(mmclip_shards.__file__).parent / "py.typed").is_file()


def test_importing_it_loads_nothing_heavy() -> None:
    command = f"import sys, mmclip_shards; print([name for name in {HEAVY!r} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_a_set_is_packed_read_and_checked_through_the_surface(tmp_path: Path) -> None:
    records = [
        mmclip_shards.Record(f"k{number}", np.full((8, 8), number, np.uint8), f"patient {number}", f"{number}.png")
        for number in range(4)
    ]
    made = mmclip_shards.pack(records, tmp_path / "set", dataset="toy", splits={"train": 1.0}, config_hash="c")
    url = str(tmp_path / "set" / "train")
    assert mmclip_shards.load_manifest(url) == made["train"]
    members = dict(mmclip_shards.iterate(url))
    assert np.asarray(mmclip_shards.decode_image(members["k3"]["png"])).max() == 3
    assert mmclip_shards.ShardReader(url, made["train"]).read(0, "k3") == members["k3"]
    assert not mmclip_shards.verify(url).findings
    assert mmclip_shards.collect_stats(url).splits[0].samples == 4
