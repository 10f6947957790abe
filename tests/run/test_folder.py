"""The run folder, the DeepSpeed configuration, the quarantine."""

from __future__ import annotations

import json
import multiprocessing
import socket
from pathlib import Path

import pytest
import torch

from mmclip_dist.checkpoint.folder import checkpoint_path, newest_checkpoint, resolve_checkpoint
from mmclip_dist.config import Config, load_config
from mmclip_dist.run.folder import describe, locked, telling_variables
from mmclip_dist.run.metrics import MetricsLog, read_metrics


def test_a_folder_of_another_configuration_is_refused(tmp_path: Path) -> None:
    config = load_config("quickstart", [f"run_dir={tmp_path}"])
    describe(tmp_path, config, 2, {})
    describe(tmp_path, config, 2, {})
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=r"another configuration \(differs in data.augment.flip, optim.lr, which would change"):
        describe(tmp_path, load_config("quickstart", [f"run_dir={tmp_path}", "optim.lr=1", "data.augment.flip=0.5"]), 2, {})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    environment = json.loads((tmp_path / "environment.json").read_text())
    assert environment["world_size"] == 2 and environment["versions"]["torch"] == torch.__version__


def test_operational_keys_may_change_and_are_noted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every remedy of the README for a lack of memory, and what has to do with speed, files and watching."""
    here = f"run_dir={tmp_path}"
    describe(tmp_path, load_config("quickstart", [here]), 2, {})
    log = MetricsLog(tmp_path, 0)
    for step in (20, 30):
        log.write({"step": step})
    changes = [
        "optim.micro_batch=8", "model.checkpoint_activations=true", "zero_stage=3", "offload={optimizer: cpu, parameters: cpu}",
        "log_every=3", "data.workers=1", "data.prefetch=2", "data.reading.memory_mib=9", "data.max_bad_fraction=0.5",
        "checkpoint.every=7", "checkpoint.url=/mirror", "health.timeout_s=9", "track.tensorboard=true", "threads=1",
        "optim.stop_at=500", "loss.impl=triton", "evaluation={every: 3}", "model.compile=false",
    ]  # fmt: skip
    changed = load_config("quickstart", [here, *changes])
    describe(tmp_path, changed, 2, {})
    (row,) = read_metrics(tmp_path, "changes.jsonl")
    assert row["after_step"] == 30 and row["changed"]["optim.micro_batch"] == [None, 8]
    assert row["changed"]["offload.optimizer"] == ["none", "cpu"] and len(row["changed"]) >= 17
    assert "optim.micro_batch=8 (was null)" in capsys.readouterr().out
    assert load_config(str(tmp_path / "config.yaml")) == changed
    describe(tmp_path, changed, 2, {})
    assert len(read_metrics(tmp_path, "changes.jsonl")) == 1


def test_sets_may_move_but_not_change(tmp_path: Path) -> None:
    def config(*sources: str) -> Config:
        return load_config("quickstart", [f"run_dir={tmp_path}", f"data.sources=[{', '.join(sources)}]"])

    describe(tmp_path, config("{url: /disk/a, weight: 2}", "{url: /disk/b}"), 2, {}, [["a0"], ["b0"]])
    describe(tmp_path, config("{url: 's3://x/a', weight: 2}", "{url: /disk/b}"), 2, {}, [["a0"], ["b0"]])
    assert read_metrics(tmp_path, "changes.jsonl")[0]["changed"]["data.sources"][1][0]["url"] == "s3://x/a"
    refused = r"another configuration \(differs in data.sources, which"
    with pytest.raises(ValueError, match=refused):
        describe(tmp_path, config("{url: /disk/a, weight: 2}", "{url: /disk/b}"), 2, {}, [["a1"], ["b0"]])
    with pytest.raises(ValueError, match=refused):
        describe(tmp_path, config("{url: /disk/a, weight: 3}", "{url: /disk/b}"), 2, {}, [["a0"], ["b0"]])


@pytest.mark.parametrize("content", [b"optim: {steps: 5", b"run_dir: \xcc\n", b"nonsense: 1\n", b"- a list\n"])
def test_a_spoiled_configuration_of_a_run_is_named_with_its_mend(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.yaml").write_bytes(content)
    with pytest.raises(ValueError, match=rf"configuration of the run in {tmp_path}: set run_dir to another folder, or delete"):
        describe(tmp_path, load_config("quickstart", [f"run_dir={tmp_path}"]), 2, {})


@pytest.mark.parametrize("content", [b'{"step": 1}\n{"st\n{"step": 3}\n', b'{"step": 1}\n[]\n', b'{"step": 1}\n\xcc\xff\n'])
def test_spoiled_metrics_are_named_with_their_mend(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=rf"{tmp_path}/metrics.jsonl.*: delete that line; the run loses the record of it"):
        read_metrics(tmp_path)


def test_the_folder_says_what_made_it_and_tells_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = ("NCCL_DEBUG", "OMP_NUM_THREADS", "DS_ACCELERATOR")
    for name in (*shown, "NCCL_SECRET_KEY", "WANDB_API_KEY", "MMCLIP_PATIENT_KEY", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "seen" if "KEY" not in name else "hidden")
    describe(tmp_path, load_config("quickstart", [f"run_dir={tmp_path}"]), 2, {})
    environment = json.loads((tmp_path / "environment.json").read_text())
    assert set(shown) <= set(environment["variables"])
    assert "hidden" not in "".join(path.read_text() for path in tmp_path.iterdir())
    assert socket.gethostname() not in environment["machine"]
    assert environment["devices"]["names"] == [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    assert f"torch=={torch.__version__}\n" in (tmp_path / "packages.txt").read_text()
    readme = (tmp_path / "README.txt").read_text()
    assert all(path.name in readme for path in tmp_path.iterdir() if path.name != "README.txt")


@pytest.mark.parametrize(
    ("name", "value"),
    [("DS_WEBHOOK", "x"), ("NCCL_PASSPHRASE", "x"), ("TORCH_AUTH", "x"), ("DS_REPORT", "https://me:x@there"),
     ("NCCL_PLUGIN", "token=x"), ("TORCH_HUB", "ghp_a1b2c3d4e5f6a7b8c9d0e1f2"), ("DS_ID", "d41d8cd98f00b204e9800998ecf8427e")],
)  # fmt: skip
def test_a_variable_that_looks_like_a_secret_is_not_shown(name: str, value: str) -> None:
    assert value not in telling_variables({name: value}).values()


def test_settings_are_shown_as_they_are() -> None:
    plain = {
        "NCCL_DEBUG": "INFO", "NCCL_IB_HCA": "=mlx5_0:1,mlx5_1:1", "NCCL_SOCKET_IFNAME": "^lo,docker0", "DS_ACCELERATOR": "cpu",
        "TORCH_CUDA_ARCH_LIST": "8.0;9.0+PTX", "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True,max_split_size_mb:512",
        "TORCH_HOME": "/data/user1/cache/torch2", "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
    }  # fmt: skip
    assert telling_variables(plain) == plain


def test_the_command_is_told_without_a_password(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["train", "track.mlflow=http://me:hunter2@there"])
    describe(tmp_path, load_config("quickstart", [f"run_dir={tmp_path}"]), 2, {})
    assert json.loads((tmp_path / "environment.json").read_text())["command"][1] == "track.mlflow=http://...@there"


def _hold(folder: Path, ready: multiprocessing.Queue) -> None:
    with locked(folder):
        ready.put(True)
        multiprocessing.Event().wait(60)


def test_two_runs_cannot_share_a_folder_and_a_killed_one_lets_go(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    ready = context.Queue()
    other = context.Process(target=_hold, args=(tmp_path, ready))
    other.start()
    assert ready.get(timeout=60)
    with pytest.raises(ValueError, match="another run is working"), locked(tmp_path, wait_s=0.5):
        pass
    other.kill()
    with locked(tmp_path, wait_s=10):
        pass
    other.join()


def test_metrics_after_the_resumed_step_are_dropped(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, 0)
    for step in (10, 20, 30):
        log.write({"step": step})
    with (tmp_path / "metrics.jsonl").open("a") as handle:
        handle.write('{"step": 40, "lo')  # killed while it wrote
    assert [row["step"] for row in read_metrics(tmp_path)] == [10, 20, 30]
    MetricsLog(tmp_path, 20).write({"step": 30, "again": True})
    assert read_metrics(tmp_path) == [{"step": 10}, {"step": 20}, {"step": 30, "again": True}]


def test_a_torn_checkpoint_is_never_found(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path) is None
    for step in (5, 20):
        checkpoint_path(tmp_path, step).mkdir(parents=True)
    (tmp_path / "checkpoints" / ".step-00000030.writing").mkdir()
    (tmp_path / "checkpoints" / "step-00000040.bak").mkdir()
    assert newest_checkpoint(tmp_path) == checkpoint_path(tmp_path, 20)
    with pytest.raises(ValueError, match="no checkpoint at"):
        resolve_checkpoint(str(tmp_path / "nowhere"))
