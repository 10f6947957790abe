"""Odd words reach the ranks as they were typed, whatever shells, launchers and parsers lie between."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from mmclip_launch import kubernetes
from mmclip_launch.hosts import LOCAL, Host
from mmclip_launch.processes import environment
from mmclip_launch.submit import Job, deepspeed_command, job_of, slurm_command, start_deepspeed, submit_kubernetes
from mmclip_launch.templates import template

SETS = ("loss.entity=0", "model.text.tokenizer=tokenizer", "data.sources=[{url: s3://bucket/set/train}]")
ODD = (
    "a=[{url:s3://bucket/x;y}]",
    "a=$(touch injected)",
    "a=`touch injected`",
    'a="twice" and $HOME \\$HOME \\\\',
    "a='once'",
    "a=it's 100%n %h %%u",
    "a=b=c&d|e>f<g*?#~{1,2}!",
    "a=é ü 漢",
    "a=two\nlines of it",
    "a=\\",
    "a=",
)
SBATCH = str(template("train.sbatch"))
FOLDER = "a 'run' of $(touch injected) \"é\"%n"


def tool(folder: Path, name: str, text: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
    (folder / name).chmod(0o755)


def stand_in(folder: Path, told: Path) -> Path:
    """Code that lies where the frozen one would: its `mmclip_dist.train` writes down the words that it gets."""
    package = folder / "mmclip_dist"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "train.py").write_text(
        "import json, os, sys\n"
        f"open({str(told)!r}, 'w').write(json.dumps([sys.argv[2:], os.environ['PYTHONPATH'].split(os.pathsep)[-1]]))\n"
    )
    return folder


# As ssh does: the words go to a shell of the host, as one line.
SSH = """while [[ $1 == -* ]]; do [[ $1 != -o ]] || shift; shift; done
shift
[[ $* == *"hostname -I" ]] && exec echo 127.0.0.1
exec env -i PATH="$PATH" HOME="$HOME" DS_ACCELERATOR=cpu sh -c "$*" """


@pytest.mark.slow
@pytest.mark.parametrize("by_ssh", [True, False])
def test_deepspeeds_launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by_ssh: bool) -> None:
    if by_ssh and not shutil.which("pdsh"):
        pytest.skip("words through pdsh are NOT tested: install Debian's package pdsh")
    tool(tmp_path / "bin", "ssh", SSH)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    run = tmp_path / FOLDER
    config = job_of("quickstart", [f"run_dir={run.name}", *SETS]).config.model_copy(update={"run_dir": str(run)})
    job = Job("a recipe.yaml", (f"run_dir={run}", *ODD), config)
    code = stand_in(run / "code", tmp_path / "told")
    command = deepspeed_command(job, (Host("node-1" if by_ssh else LOCAL, 1),), code)
    command.write(run, "deepspeed")
    environ = environment(command.variables) | {"DS_ACCELERATOR": "cpu"}
    ran = subprocess.run(
        command.words, env=environ | {"PATH": f"{tmp_path / 'bin'}:{environ['PATH']}"}, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert json.loads((tmp_path / "told").read_text()) == [["a recipe.yaml", f"run_dir={run}", *ODD], str(code)]
    assert not (tmp_path / "work" / "injected").exists()


@pytest.mark.parametrize("folder", ["a b", "a$(touch injected)", "a%n", "a;b"])
def test_a_working_folder_that_deepspeed_would_not_reach_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str
) -> None:
    """Its launcher sends `cd FOLDER` to the hosts, without quotes."""
    (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path / folder)
    job = job_of("quickstart", ["run_dir=/run", *SETS])
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path / folder}: its name goes unquoted")):
        start_deepspeed(job, (Host("node-1", 2),), dry=True)
    start_deepspeed(job, (Host(LOCAL, 2),), dry=True)  # no shell lies between


def test_what_a_dry_run_prints_is_a_script_that_does_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = tmp_path / FOLDER
    config = job_of("quickstart", ["run_dir=/run", *SETS]).config.model_copy(update={"run_dir": str(run)})
    tool(tmp_path / "bin", "record", f'printf "%s\\0" "$RUN_DIR" "$SWEEP" "$@" >"{tmp_path}/told"')
    for name in ("sbatch", "deepspeed"):
        (tmp_path / "bin" / name).symlink_to("record")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin" / "python"))  # its folder comes first on PATH
    sweep = tmp_path / "sweep"
    sweep.write_text("optim.lr=1e-4\n'data.sources=[{url: \"s3://$(touch injected)/é\"}]'\n")
    job = Job("quickstart", (*SETS, *ODD), config)
    monkeypatch.setattr("mmclip_launch.submit.load_config", lambda *_: config)
    for command in (
        slurm_command(job, Path("/code"), nodes=2, gpus=8, options=["--comment=a b"], sweep=sweep),
        deepspeed_command(job, (Host("node-1", 2),), Path("/code")),
    ):
        subprocess.run(["sh", "-c", str(command)], check=True, env=os.environ | {"RUN_DIR": "", "SWEEP": ""})
        told = (tmp_path / "told").read_text().split("\0")[:-1]
        assert told == [command.variables.get("RUN_DIR", ""), command.variables.get("SWEEP", ""), *command.words[1:]]
        for path, text in command.files.items():
            assert path.read_text() == text
            path.unlink()
    assert not (tmp_path / "injected").exists()


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand-ins for the commands of Slurm; the file in which `deepspeed` notes its words."""
    tool(tmp_path / "bin", "srun", 'while [[ $1 == --* ]]; do shift; done; exec "$@"')
    tool(tmp_path / "bin", "scontrol", "echo node1")
    tool(tmp_path / "bin", "deepspeed", f'printf "%s\\0" "$@" >"{tmp_path}/told"')
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    for name, value in {
        "JOB_ID": "7",
        "JOB_NODELIST": "node1",
        "GPUS_ON_NODE": "8",
        "PROCID": "1",
        "CPUS_ON_NODE": "9",
    }.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "told"


def test_slurms_template(tmp_path: Path, slurm: Path) -> None:
    run = tmp_path / FOLDER
    environ = os.environ | {"RUN_DIR": str(run)}
    ran = subprocess.run(["bash", SBATCH, "a recipe.yaml", *ODD], env=environ, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    told = slurm.read_text().split("\0")[:-1]
    assert (
        told[:3] == ["--hostfile", f"{run}/hostfile-7", "--no_ssh"]
        and (run / "hostfile-7").read_text() == "node1 slots=8\n"
    )
    assert told[-2 - len(ODD) :] == ["a recipe.yaml", f"run_dir={run}", *ODD]
    assert not list((tmp_path / "work").iterdir())


def test_a_sweep_means_to_slurms_job_what_it_meant_when_it_was_checked(
    tmp_path: Path, slurm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = job_of("quickstart", [f"run_dir={tmp_path / 'run'}", *SETS])
    checked: list[list[str]] = []
    monkeypatch.setattr("mmclip_launch.submit.load_config", lambda _, words: checked.append(words) or job.config)
    lines = ["a=1 'b=$(touch injected)' c=\"d \\\" e\" f=\\'g", "a='it'\"'\"'s' b=\u2028", "a=\\\\ b=é # c=2"]
    (tmp_path / "sweep").write_text("\n".join(lines))
    command = slurm_command(job, Path("/code"), nodes=1, gpus=8, options=(), sweep=tmp_path / "sweep")
    command.write(tmp_path / "run", "slurm")
    assert f"--array=1-{len(checked)}" in command.words
    for task, words in enumerate(checked, 1):
        environ = os.environ | command.variables | {"SLURM_ARRAY_TASK_ID": str(task)}
        subprocess.run(["bash", SBATCH, "recipe", *job.without_run_dir], env=environ, check=True)
        told = slurm.read_text().split("\0")[:-1]
        assert told[told.index("recipe") :] == ["recipe", f"run_dir={tmp_path}/run/{task}", *words[1:]]
    assert not list((tmp_path / "work").iterdir())


def test_a_line_of_a_sweep_that_is_cut_off_starts_nothing(tmp_path: Path, slurm: Path) -> None:
    (tmp_path / "sweep").write_text("optim.lr=1 'data.sources=[\n")
    environ = os.environ | {
        "RUN_DIR": str(tmp_path / "run"),
        "SWEEP": str(tmp_path / "sweep"),
        "SLURM_ARRAY_TASK_ID": "1",
    }
    ran = subprocess.run(["bash", SBATCH, "recipe"], env=environ, capture_output=True, text=True)
    assert ran.returncode == 2 and "line 1: quotes do not match" in ran.stderr and not slurm.exists()


def test_runs_of_a_sweep_have_a_folder_each(tmp_path: Path) -> None:
    job = job_of("quickstart", [f"run_dir={tmp_path}", *SETS])
    (tmp_path / "sweep").write_text(f"optim.lr=1e-4\noptim.lr=2e-4 run_dir={tmp_path}/two\n")
    with pytest.raises(ValueError, match=r"line 2: run_dir= .*run_dir/1, run_dir/2"):
        slurm_command(job, Path("/code"), nodes=1, gpus=8, options=(), sweep=tmp_path / "sweep")
    (tmp_path / "sweep").write_text("optim.lr=1e-4\n'optim.lr=2e-4\n")
    with pytest.raises(ValueError, match="sweep, line 2: quotes do not match"):
        slurm_command(job, Path("/code"), nodes=1, gpus=8, options=(), sweep=tmp_path / "sweep")


# kubectl reads YAML 1.1 with numbers of YAML 1.2, and more words as truth values than PyYAML does (go-yaml, resolve.go).
OF_KUBECTL = re.compile(
    r"[-+]?(\.\d+|\d+(\.\d*)?)([eE][-+]?\d+)?|0[obx][0-9a-fA-F]+|[yYnN]|[Yy]es|[Nn]o|[Oo]n|[Oo]ff|~|null"
)


def expanded(text: str, variables: dict[str, str]) -> str:
    """What the kubelet makes of an argument or a variable's value."""
    return re.sub(
        r"\$(\$|\((.*?)\))?", lambda found: "$" if found[1] == "$" else variables.get(found[2], found[0]), text
    )


@pytest.mark.parametrize("name", ["y", "on", "e1", "a-b"])
def test_kubernetes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """What kubectl is handed is what a dry run prints, and a container gets the words as they were typed."""
    monkeypatch.setattr(kubernetes, "code_hash", lambda _: "1234567e8901")
    tool(tmp_path / "bin", "kubectl", f'echo "$@" >"{tmp_path}/words"; cat >"{tmp_path}/told"')
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    run_dir = f"/runs/$(NODE) of $$/{name}"
    words = (*ODD, "a=$(RUN_DIR) $$(NODE) $$$", "1e3", "0o17")
    job = Job("quickstart", (f"run_dir={run_dir}", *words), job_of("quickstart", [f"run_dir={run_dir}", *SETS]).config)
    for dry in (True, False):
        assert submit_kubernetes(job, "host:5000/mmclip:0.1.0", nodes=2, gpus=8, dry=dry) == 0
    text = (tmp_path / "told").read_text()
    assert (
        capsys.readouterr().out == f"# kubectl apply -f -\n{text}"
        and (tmp_path / "words").read_text() == "apply -f -\n"
    )
    for document in yaml.compose_all(text):
        for node in scalars(document):
            plain = node.style is None and node.tag.endswith(":str")
            assert not (plain and OF_KUBECTL.fullmatch(node.value)), node.value
    container = list(yaml.safe_load_all(text))[1]["spec"]["template"]["spec"]["containers"][0]
    variables = {"NODE": "0"}
    for variable in container["env"]:
        if "value" in variable:
            variables[variable["name"]] = expanded(variable["value"], variables)
    assert variables["RUN_DIR"] == run_dir
    assert [expanded(word, variables) for word in container["args"]] == ["quickstart", *words]


def scalars(node: yaml.Node) -> list[yaml.ScalarNode]:
    if isinstance(node, yaml.ScalarNode):
        return [node]
    below = node.value if isinstance(node, yaml.SequenceNode) else [each for pair in node.value for each in pair]
    return [scalar for each in below for scalar in scalars(each)]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["data.sources=[{url: sets/train}]"], "data.sources: sets/train"),
        (["data.sources=[{url: s3://b/train, attention: grids}]"], "data.sources: grids"),
        (["evaluation.sets=[sets/test]"], "evaluation.sets: sets/test"),
        (["checkpoint.start_from=old"], "checkpoint.start_from: old"),
        (["model.text.tokenizer=vocabulary"], "model.text.tokenizer: vocabulary"),
    ],
)
def test_a_pod_does_not_see_the_folder_that_a_run_is_submitted_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], told: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "vocabulary").mkdir()
    run = job_of("quickstart", ["run_dir=/runs/one", *SETS, *words])
    with pytest.raises(ValueError, match=f"{told} is relative"):
        submit_kubernetes(run, "mmclip:1", nodes=2, gpus=8, dry=True)
    hub = job_of("quickstart", ["run_dir=/runs/one", *SETS, "model.text.tokenizer=bert-base-uncased"])
    assert submit_kubernetes(hub, "mmclip:1", nodes=2, gpus=8, dry=True) == 0
