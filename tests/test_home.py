"""A user without a home folder, as in a container that runs as a number without a name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from mmclip_launch.hosts import deepspeed_env
from mmclip_launch.ray_cluster import token
from mmclip_shards.split import patient_key

from mmclip_dist.evaluate.probe import cache_folder


@pytest.mark.parametrize("reading", [patient_key, token, deepspeed_env, cache_folder])
def test_a_user_without_a_home_is_told_to_set_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, reading: Callable[[], object]
) -> None:
    for name in ("HOME", "MMCLIP_PATIENT_KEY", "XDG_CONFIG_HOME", "XDG_CACHE_HOME", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda number: {}[number])  # KeyError, as for a number that /etc/passwd lacks
    with pytest.raises(ValueError, match="has no home folder: set HOME"):
        reading()
    monkeypatch.setenv("HOME", str(tmp_path))
    reading()
