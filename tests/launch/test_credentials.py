"""Credentials of a store on the hosts of a hostfile, as launch/README.md tells: DeepSpeed's launcher, a stand-in for pdsh, and
an S3 server that checks signatures."""

from __future__ import annotations

import subprocess
import uuid
from pathlib import Path

import pytest
from mmclip_launch.processes import environment
from mmclip_shards import storage
from mmclip_shards.testing.s3_server import S3Server

# It runs what pdsh would send to a host, up to the exported variables, where nothing else of this environment is known.
PDSH = """#!/usr/bin/env bash
shift 5 # -S -f COUNT -w HOSTS
exec env -i PATH="$PATH" HOME="$OTHER_HOME" bash -c "$1 python -c '$ON_HOST'"
"""
ON_HOST = """
import os
from mmclip_shards.storage import read_bytes
print("variables:", *sorted(name for name in os.environ if name.startswith("AWS_")))
print("read:", read_bytes("{url}").decode())
"""


@pytest.mark.slow
def test_hosts_read_their_credentials_file_and_no_secret_is_sent_or_shown(s3: S3Server, tmp_path: Path) -> None:
    url = f"{s3.url}/{uuid.uuid4().hex}/a.txt"
    storage.write_atomic(url, b"what lies in the store")
    keys = s3.environment()
    wanted = "".join(f"{name.lower()} = {keys[name]}\n" for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"))
    (tmp_path / "credentials").write_text(f"[default]\n{wanted.replace(keys['AWS_SECRET_ACCESS_KEY'], 'x')}[training]\n{wanted}")
    passed = {
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "credentials"), "AWS_PROFILE": "training",
        "AWS_ENDPOINT_URL": keys["AWS_ENDPOINT_URL"], "AWS_EC2_METADATA_DISABLED": "true",
    }  # fmt: skip
    (tmp_path / ".deepspeed_env").write_text("".join(f"{name}={value}\n" for name, value in passed.items()))
    (tmp_path / "hostfile").write_text("node1 slots=1\nnode2 slots=1\n")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "pdsh").write_text(PDSH)
    (tmp_path / "bin" / "pdsh").chmod(0o755)
    here = environment({
        "AWS_SECRET_ACCESS_KEY": "the key of this shell", "MLFLOW_TRACKING_PASSWORD": "password-of-this-shell",
        "HOME": str(tmp_path), "OTHER_HOME": str(tmp_path / "elsewhere"), "ON_HOST": ON_HOST.format(url=url),
        "DS_ACCELERATOR": "cpu",
    })  # fmt: skip
    run = subprocess.run(
        ["deepspeed", "--hostfile", str(tmp_path / "hostfile"), "--no_ssh_check", "--master_addr", "127.0.0.1", "--module", "x"],
        env=here | {"PATH": f"{tmp_path / 'bin'}:{here['PATH']}"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert run.returncode == 0 and "read: what lies in the store" in run.stdout, run.stdout
    assert f"variables: {' '.join(sorted(passed))}" in run.stdout
    assert keys["AWS_SECRET_ACCESS_KEY"] not in run.stdout and "the key of this shell" not in run.stdout
    # Why the README keeps secrets out of that file, and a password of MLflow's out of the environment.
    assert "export AWS_PROFILE=training;" in run.stdout and "password-of-this-shell" in run.stdout
