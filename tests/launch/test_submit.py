"""What `mmclip launch` would run, what it refuses, and that the code is frozen when it is submitted."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import yaml
from mmclip_launch import doctor, frozen, submit
from mmclip_launch.findings import Finding
from mmclip_launch.frozen import archive, freeze, frozen_at, variables
from mmclip_launch.hosts import LOCAL, Host
from mmclip_launch.submit import (
    Job,
    deepspeed_command,
    job_of,
    slurm_command,
    start_deepspeed,
    submit_kubernetes,
    submit_slurm,
)
from mmclip_launch.unpack import unpack

from mmclip_dist.errors import Mendable
from mmclip_dist.run import folder
from mmclip_dist.run.folder import locked

HOSTS = (Host("node-1", 8), Host("node-2", 8))
SETS = ("loss.entity=0", "model.text.tokenizer=tokenizer", "data.sources=[{url: s3://bucket/set/train}]")
SECRETS = {"AWS_SECRET_ACCESS_KEY": "planted-1", "RAY_AUTH_TOKEN": "planted-2", "WANDB_API_KEY": "planted-3"}


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    """In an empty folder, with secrets in the environment."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("PDSH_SSH_ARGS_APPEND", raising=False)
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    return job_of("quickstart", [f"run_dir={tmp_path / 'run'}", *SETS])


def without_docs_and_secrets(text: str) -> str:
    assert not any(secret in text for secret in SECRETS.values())
    return text


def test_deepspeed_over_ssh_imports_the_frozen_code_and_gives_silent_hosts_up(job: Job, tmp_path: Path) -> None:
    (tmp_path / ".deepspeed_env").write_text("AWS_PROFILE=training\n")
    command = deepspeed_command(job, HOSTS, Path("/code"))
    run = tmp_path / "run"
    assert command.words == [
        "deepspeed", "--hostfile", f"{run}/launch/hostfile", "--master_port", "29500", "--force_multi", "--module",
        "mmclip_dist.train", "quickstart",
        f"run_dir={run}", *SETS,
    ]  # fmt: skip
    assert command.files[run / "launch" / "hostfile"] == "node-1 slots=8\nnode-2 slots=8\n"
    passed = command.files[run / "launch" / "deepspeed_env"]
    assert passed == "AWS_PROFILE=training\nPYTHONPATH=/code\nPYTHONSAFEPATH=1\n"
    assert command.variables["DS_ENV_FILE"] == str(run / "launch" / "deepspeed_env")
    assert "ServerAliveInterval=5" in command.variables["PDSH_SSH_ARGS_APPEND"]
    without_docs_and_secrets(str(command))


@pytest.mark.parametrize("dry", [True, False])
def test_a_key_in_the_file_that_deepspeed_prints_is_neither_shown_nor_sent(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], dry: bool
) -> None:
    (tmp_path / ".deepspeed_env").write_text("AWS_SECRET_ACCESS_KEY=planted-1\n")
    monkeypatch.setattr(submit, "look", lambda *_, **__: ([], {}))
    monkeypatch.setattr(os, "execvpe", lambda *_: pytest.fail("started"))
    with pytest.raises(Mendable, match=r"AWS_SECRET_ACCESS_KEY stands in .*\.deepspeed_env: DeepSpeed prints it"):
        start_deepspeed(job, HOSTS, dry=dry)
    without_docs_and_secrets("".join(capsys.readouterr()))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("cards", "more"), [(None, {"DS_ACCELERATOR": "cpu"}), ([{"name": "H100"}], {})])
def test_deepspeed_on_this_machine_needs_no_ssh(
    job: Job, monkeypatch: pytest.MonkeyPatch, cards: list | None, more: dict[str, str]
) -> None:
    monkeypatch.setattr(submit, "gpus", lambda: cards)
    command = deepspeed_command(job, (Host(LOCAL, 2),), Path("/code"))
    assert "--no_ssh_check" in command.words and "--force_multi" not in command.words
    assert command.variables == {"PYTHONPATH": "/code", "PYTHONSAFEPATH": "1"} | more


def test_a_dry_run_prints_all_and_writes_nothing(job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start_deepspeed(job, HOSTS, dry=True)
    printed = without_docs_and_secrets(capsys.readouterr().out)
    assert printed.endswith(f"{shlex.join(deepspeed_command(job, HOSTS, Path()).words)}\n")
    assert "node-2 slots=8" in printed and f"PYTHONPATH={frozen_at(tmp_path / 'run')}" in printed
    assert not (tmp_path / "run").exists()


def test_nothing_is_started_on_hosts_with_faults(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fault = Finding("error", "disk", "node-2", "run_dir: 0.0 GiB free", "free some")
    monkeypatch.setattr(submit, "look", lambda *_, **__: ([fault, Finding("ok", "host", "", "fine")], {}))
    monkeypatch.setattr(os, "execvpe", lambda *_: pytest.fail("started"))
    with pytest.raises(Mendable, match="nothing was started: 1 fault"):
        start_deepspeed(job, HOSTS, dry=False)
    assert capsys.readouterr().err == "error: disk: node-2: run_dir: 0.0 GiB free: free some\n"
    assert not (tmp_path / "run").exists()


def test_a_port_that_another_run_holds_is_named_before_anything_starts(
    job: Job, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its ranks on other hosts would join the other run's meeting, and wait there."""
    monkeypatch.setattr(os, "execvpe", lambda *_: pytest.fail("started"))
    text = doctor.program("probe")
    monkeypatch.setattr(doctor, "program", lambda name: text.replace("_PORT_S = 5.0", "_PORT_S = 0.0"))
    with socket.create_server(("", 0)) as other:
        port = other.getsockname()[1]
        monkeypatch.setenv("MASTER_PORT", str(port))
        monkeypatch.setattr(doctor, "reading", lambda *_, **__: nullcontext(dict))
        with pytest.raises(Mendable, match="nothing was started"):
            start_deepspeed(job, (Host(LOCAL, 2),), dry=False)
    assert f"error: port: localhost: port {port}, where the ranks would meet, is in use" in capsys.readouterr().err
    assert ["--master_port", str(port)] == deepspeed_command(job, HOSTS, Path("/code")).words[3:5]
    monkeypatch.setenv("MASTER_PORT", "many")
    with pytest.raises(ValueError, match="MASTER_PORT=many is no port"):
        start_deepspeed(job, HOSTS, dry=True)


def test_a_folder_where_another_run_works_is_named_before_anything_starts(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder, "locked", partial(locked, wait_s=0.3))
    monkeypatch.setattr(submit, "look", lambda *_, **__: pytest.fail("looked"))
    with locked(tmp_path / "run"), pytest.raises(ValueError, match=f"another run is working in {tmp_path / 'run'}"):
        start_deepspeed(job, HOSTS, dry=False)


def test_what_is_started_is_recorded(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submit, "look", lambda *_, **__: ([], {}))
    started: list = []
    monkeypatch.setattr(os, "execvpe", lambda *words: started.append(words))
    start_deepspeed(job, HOSTS, dry=False)
    run = tmp_path / "run"
    told = json.loads(without_docs_and_secrets((run / "submitted.json").read_text()))
    code = frozen_at(run)
    assert told["target"] == "deepspeed" and told["code"] == code.name and told["command"] == started[0][1]
    assert (code / "mmclip_dist" / "recipes" / "quickstart.yaml").is_file() and (
        code / "mmclip_launch" / "node.py"
    ).is_file()
    assert f"PYTHONPATH={code}" in (run / "launch" / "deepspeed_env").read_text()


def test_ranks_that_do_not_fit_are_refused_before_anything_is_asked(job: Job) -> None:
    with pytest.raises(ValueError, match="cannot be spread over 4096 ranks"):
        start_deepspeed(job, (Host("node-1", 4096),), dry=True)


def test_a_copy_of_the_code_arrives_whole_on_another_disk(tmp_path: Path) -> None:
    code = freeze(tmp_path / "run")
    there = tmp_path / "elsewhere" / code.name
    for _ in range(2):
        unpack(there, archive(code))
    files = [{str(path.relative_to(at)): path.read_bytes() for path in at.rglob("*.py")} for at in (code, there)]
    assert files[0] == files[1] and list(there.parent.iterdir()) == [there]


def test_slurm_refuses_run_folders_of_the_hosts_own(tmp_path: Path) -> None:
    own = ("checkpoint.host_local=true", "checkpoint.url=s3://bucket/run")
    with pytest.raises(ValueError, match="Slurm's nodes take the code from run_dir"):
        submit.submit_slurm(job_of("quickstart", [f"run_dir={tmp_path}", *SETS, *own]), nodes=2, gpus=8, dry=True)


def test_slurm_is_asked_for_nothing_where_its_job_could_not_write_its_output(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a checkout that is mounted read-only, jobs failed without a word."""
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK or Path(path) != Path())
    started: list[list[str]] = []
    monkeypatch.setattr(subprocess, "run", lambda words, **_: started.append(words) or subprocess.CompletedProcess(words, 0))
    with pytest.raises(ValueError, match=r"cannot be written to, .*--option=--output=FOLDER/slurm-%j\.out"):
        submit_slurm(job, nodes=1, gpus=8, dry=False)
    assert not started and not (tmp_path / "run").exists()
    assert submit_slurm(job, nodes=1, gpus=8, options=("--output=/logs/%j.out",), dry=False) == 0 and len(started) == 1


def test_what_is_edited_later_does_not_reach_a_submitted_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if the job starts in a folder with other code, as a repository is."""
    source = tmp_path / "repository"
    (source / "ours").mkdir(parents=True)
    (source / "ours" / "__init__.py").write_text("print('as submitted')\n")
    monkeypatch.syspath_prepend(source)
    monkeypatch.setattr(frozen, "OURS", ("ours",))
    code = freeze(tmp_path / "run")
    assert freeze(tmp_path / "run") == code
    (source / "ours" / "__init__.py").write_text("print('edited')\n")
    environment = {"PATH": os.environ["PATH"], **variables(code)}
    ran = subprocess.run(
        [sys.executable, "-c", "import ours"], cwd=source, env=environment, capture_output=True, text=True
    )
    assert ran.stdout == "as submitted\n"
    assert freeze(tmp_path / "run") != code and len(list((tmp_path / "run" / "code").iterdir())) == 2


def test_a_copy_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(folder: Path) -> None:
        (folder / "mmclip_dist").mkdir(parents=True)
        raise OSError("No space left on device")

    monkeypatch.setattr(frozen, "copy_packages", full)
    with pytest.raises(OSError, match="No space left"):
        freeze(tmp_path / "run")
    assert not list((tmp_path / "run" / "code").iterdir())


def test_slurm_gets_the_template_the_run_folder_and_the_code(job: Job, tmp_path: Path) -> None:
    command = slurm_command(job, Path("/code"), nodes=2, gpus=8, options=["--partition=gpu"], sweep=None)
    assert command.words[:4] == ["sbatch", "--nodes=2", "--gpus-per-node=8", "--partition=gpu"]
    assert Path(command.words[4]).name == "train.sbatch" and command.words[5:] == ["quickstart", *SETS]
    assert command.variables == {"RUN_DIR": str(tmp_path / "run"), "PYTHONPATH": "/code", "PYTHONSAFEPATH": "1"}


def test_each_line_of_a_sweep_is_checked_and_kept(job: Job, tmp_path: Path) -> None:
    lines = "optim.lr=1e-4\noptim.lr=2e-4 'data.sources=[{url: s3://other}]'\n"
    (tmp_path / "sweep").write_text(lines)
    command = slurm_command(job, Path("/code"), nodes=1, gpus=8, options=(), sweep=tmp_path / "sweep")
    assert "--array=1-2" in command.words and command.files == {Path(command.variables["SWEEP"]): lines}
    (tmp_path / "sweep").write_text("optim.lr=1e-4\noptim.lrr=2e-4\n")
    with pytest.raises(ValueError, match=r"optim\.lrr"):
        slurm_command(job, Path("/code"), nodes=1, gpus=8, options=(), sweep=tmp_path / "sweep")
    (tmp_path / "sweep").write_text("optim.lr=1e-4\n\n")
    with pytest.raises(ValueError, match="sweep, line 2 is empty"):
        slurm_command(job, Path("/code"), nodes=1, gpus=8, options=(), sweep=tmp_path / "sweep")


@pytest.mark.parametrize(
    ("image", "run_dir", "told"),
    [
        ("mmclip", "/runs/one", "does not say which version"),
        ("host:5000/mmclip", "/runs/one", "does not say which version"),
        ("mmclip:latest", "/runs/one", "does not say which version"),
        ("mmclip:1", "/home/one", "not in /runs"),
        ("mmclip:1", "/runs/One_2", "names the Job"),
    ],
)
def test_kubernetes_refuses_what_is_not_frozen_or_has_no_place(image: str, run_dir: str, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        submit_kubernetes(job_of("quickstart", [f"run_dir={run_dir}", *SETS]), image, nodes=2, gpus=8, dry=True)


def test_kubernetes_gets_the_template_filled_in(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    run = job_of("quickstart", ["run_dir=/runs/my-run", *SETS])
    assert submit_kubernetes(run, "host:5000/mmclip:0.1.0", nodes=3, gpus=4, dry=True) == 0
    service, made = yaml.safe_load_all(without_docs_and_secrets(capsys.readouterr().out))
    assert (
        service["metadata"]["name"] == made["metadata"]["name"] == service["spec"]["selector"]["job-name"] == "my-run"
    )
    assert made["spec"]["completions"] == made["spec"]["parallelism"] == 3
    pod = made["spec"]["template"]["spec"]
    container = pod["containers"][0]
    assert pod["subdomain"] == "my-run" and container["image"] == "host:5000/mmclip:0.1.0"
    assert container["args"] == ["quickstart", *SETS] and container["resources"]["limits"] == {"nvidia.com/gpu": 4}
    values = {each["name"]: each.get("value") for each in container["env"]}
    assert values["NODES"] == "3" and values["GPUS"] == "4" and values["FIRST"] == "my-run-0.my-run"
    assert values["RUN_DIR"] == "/runs/my-run"


def test_what_starts_runs_imports_neither_torch_nor_deepspeed_nor_ray() -> None:
    modules = "mmclip_launch.submit, mmclip_launch.ray_submission, mmclip_launch.node, mmclip_launch.doctor, mmclip_launch.cli"
    program = (
        f"import sys, {modules}; print(sorted({{'torch', 'deepspeed', 'ray', 'transformers'}} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout == "[]\n"
