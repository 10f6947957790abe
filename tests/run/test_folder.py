"""The run folder, the DeepSpeed configuration, the quarantine."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from mmclip_dist.checkpoint.folder import checkpoint_path, newest_checkpoint, resolve_checkpoint
from mmclip_dist.config import Config, Optim, load_config
from mmclip_dist.engine import deepspeed_inside
from mmclip_dist.engine.deepspeed_engine import deepspeed_json
from mmclip_dist.engine.optimizer import layer_scales, parameter_groups
from mmclip_dist.engine.stale_locks import refuse_stale_locks
from mmclip_dist.model.build import build_model
from mmclip_dist.run.folder import describe, locked
from mmclip_dist.run.metrics import MetricsLog, read_metrics
from mmclip_dist.run.quarantine import Quarantine


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
    MetricsLog(tmp_path, 0).write({"step": 30})
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
    for name in ("NCCL_DEBUG", "OMP_NUM_THREADS", "DS_ACCELERATOR", "NCCL_SECRET_KEY", "WANDB_API_KEY", "MMCLIP_PATIENT_KEY"):
        monkeypatch.setenv(name, "seen" if "KEY" not in name else "hidden")
    describe(tmp_path, load_config("quickstart", [f"run_dir={tmp_path}"]), 2, {})
    text = (tmp_path / "environment.json").read_text()
    environment = json.loads(text)
    assert {"NCCL_DEBUG", "OMP_NUM_THREADS", "DS_ACCELERATOR"} <= set(environment["variables"])
    assert "hidden" not in text and socket.gethostname() not in environment["machine"]
    assert environment["devices"]["names"] == [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    assert f"torch=={torch.__version__}\n" in (tmp_path / "packages.txt").read_text()
    readme = (tmp_path / "README.txt").read_text()
    assert all(path.name in readme for path in tmp_path.iterdir() if path.name != "README.txt")


def _hold(folder: Path, ready: multiprocessing.Queue) -> None:
    with locked(folder):
        ready.put(True)
        multiprocessing.Event().wait(60)


def test_two_runs_cannot_share_a_folder_and_a_killed_one_lets_go(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
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


def test_deepspeed_json_is_derived_and_the_passthrough_wins() -> None:
    config = load_config(
        "quickstart", ["zero_stage=2", "deepspeed={zero_optimization: {overlap_comm: true}, prescale_gradients: true}"]
    )
    found = deepspeed_json(config, 2, gpu=False)
    assert found["train_batch_size"] == config.optim.global_batch == 2 * found["train_micro_batch_size_per_gpu"]
    assert found["zero_optimization"] == {"stage": 2, "overlap_comm": True} and found["prescale_gradients"] is True
    assert found["gradient_clipping"] == config.optim.clip and found["bf16"]["enabled"] is False


def test_offload_and_half_precision_reach_deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(
        "quickstart", ["zero_stage=3", "precision=fp16", "offload={optimizer: cpu, parameters: cpu}", "optim.name=lamb"]
    )
    found = deepspeed_json(config, 2, gpu=True)
    assert found["zero_optimization"] == {
        "stage": 3, "offload_optimizer": {"device": "cpu", "pin_memory": True},
        "offload_param": {"device": "cpu", "pin_memory": True},
    }  # fmt: skip
    assert found["fp16"] == {"enabled": True} and found["bf16"] == {"enabled": False}
    assert found["zero_force_ds_cpu_optimizer"] is False and found["zero_allow_untested_optimizer"] is True
    assert "optimizer" not in found  # ours is handed over built
    monkeypatch.setattr(deepspeed_inside, "multiplies_fp16", lambda: False)
    with pytest.raises(ValueError, match="AVX512-FP16"):
        deepspeed_json(config, 2, gpu=False)


def test_layers_further_from_the_loss_learn_more_slowly(sets, tokenizer) -> None:
    shape = "width: 32, depth: 3, heads: 2"
    config = sets.config(f"model.image={{size: 32, patch: 8, {shape}}}", f"model.text={{{shape}, max_tokens: 48}}")
    model = build_model(config, tokenizer, ["Nodule"])
    scales = {name: layer_scales(model, 0.5).get(p, 1.0) for name, p in model.named_parameters()}
    assert scales["image.vit.embeddings.patch_embeddings.projection.weight"] == 0.5**4
    assert scales["text.bert.embeddings.word_embeddings.weight"] == 0.5**4
    for layer in range(3):
        encoders = ("image.vit", "text.bert")
        of_layer = {scale for name, scale in scales.items() if f".{layer}." in name and name.startswith(encoders)}
        assert of_layer == {0.5 ** (3 - layer)}
    full = {name for name, scale in scales.items() if scale == 1.0}
    assert {"image.vit.layernorm.weight", "image_head.weight", "log_scale", "image_decoder.layers.0.self_norm.bias"} <= full
    groups = parameter_groups(model, Optim(steps=1), layer_scales(model, 0.5))
    assert len(groups) == 2 * 5 and sum(len(group["params"]) for group in groups) == len(scales)
    alone = parameter_groups(model, Optim(steps=1, name="lamb"), layer_scales(model, 0.5))
    assert all(len(group["params"]) == 1 for group in alone if group["weight_decay"])


def test_a_lock_of_a_killed_build_is_told(tmp_path: Path) -> None:
    lock = tmp_path / "py311_cpu" / "cpu_adam" / "lock"
    lock.parent.mkdir(parents=True)
    refuse_stale_locks(tmp_path)
    lock.touch()
    refuse_stale_locks(tmp_path)  # a build may well be under way
    os.utime(lock, (0, 0))
    with pytest.raises(ValueError, match=r"killed and left .*cpu_adam/lock"):
        refuse_stale_locks(tmp_path)


def test_norms_biases_tokens_and_the_temperature_do_not_decay() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
    model.token = torch.nn.Parameter(torch.zeros(1, 1, 4))
    model.scale = torch.nn.Parameter(torch.zeros(1))
    groups = parameter_groups(model, Optim(steps=1, weight_decay=0.1), {})
    plain, decayed = sorted(groups, key=lambda group: group["weight_decay"])
    assert [p.shape for p in decayed["params"]] == [(4, 3)] and decayed["weight_decay"] == 0.1
    assert len(plain["params"]) == 5 and plain["weight_decay"] == 0.0


@pytest.fixture
def one_rank(tmp_path: Path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def batch_with(bad: int) -> dict:
    return {"replaced": [(f"k{i}", "cut") for i in range(bad)], "keys": [str(i) for i in range(100)]}


def test_too_many_undecodable_samples_stop_the_run(tmp_path: Path, one_rank: None) -> None:
    quarantine = Quarantine(tmp_path, 0.01)

    def count(bad: int, step: int) -> None:
        quarantine.count(batch_with(bad), step, replaced=bad, seen=100)

    count(2, 1)  # two in the first batch are no measure
    count(0, 2)
    count(0, 3)
    count(2, 4)  # 4 of 400 is the limit
    with pytest.raises(ValueError, match=r"6 of 500 .*/quarantine-"):
        count(2, 5)
    listed = [json.loads(line) for line in (tmp_path / "quarantine-0.jsonl").read_text().splitlines()]
    assert len(listed) == 6 and listed[0] == {"step": 1, "key": "k0", "reason": "cut"}


def test_none_allowed_means_none(tmp_path: Path, one_rank: None) -> None:
    with pytest.raises(ValueError, match="1 of 100"):
        Quarantine(tmp_path, 0.0).count(batch_with(1), 1, replaced=1, seen=100)
