"""`mmclip launch ray-job`: what travels, what is refused, and a whole stage on a Ray head with another environment and folder."""

from __future__ import annotations

import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import sysconfig
import uuid
import venv
from collections.abc import Iterator
from contextlib import ExitStack
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest
from mmclip_launch import ray_package
from mmclip_launch.findings import Finding
from mmclip_launch.frozen import OURS
from mmclip_launch.processes import environment
from mmclip_launch.ray_cluster import judge_cluster
from mmclip_launch.ray_jobs import Cluster, local_cluster
from mmclip_launch.ray_package import Files, fill, pinned
from mmclip_launch.ray_submission import _client, entrypoint, follow, submit_ray
from mmclip_shards import storage
from mmclip_shards.manifest import load_manifest
from mmclip_shards.reader import iterate
from mmclip_shards.testing.s3_server import S3Server

from mmclip_dist.errors import Mendable
from tests import toy_model
from tests.object_store import client_environment

SECRET = "planted-key-of-this-laptop"


@pytest.fixture
def laptop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with files of a user."""
    names = ("recipes/a.yaml", "recipes/deep/b.yaml", "recipes/scan.png", "recipes/.git/config", "recipes/.env", "lexicon.yaml")
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_files_that_are_named_travel_and_hidden_or_excluded_ones_do_not(
    laptop: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    elsewhere = str(laptop / "recipes/scan.png")  # a full path means what the cluster has there
    words = ["s3://bucket/set/train", "--model=lexicon.yaml", "recipes/a.yaml", "--workers", "64", elsewhere]
    files = Files.of(words, [laptop / "recipes"], ["*.png"])
    assert [str(path) for path in files.paths] == ["lexicon.yaml", "recipes/a.yaml", "recipes/deep/b.yaml"]
    assert [str(path) for path in Files.of([], [Path("recipes")], ["recipes/d*", "scan.*"]).paths] == ["recipes/a.yaml"]
    made = tmp_path_factory.mktemp("package")
    fill(made, files)
    assert {path.name for path in made.iterdir()} == {*OURS, "lexicon.yaml", "recipes"}
    assert (made / "recipes" / "deep" / "b.yaml").read_text() == "recipes/deep/b.yaml"
    assert (made / "mmclip_dist" / "recipes" / "quickstart.yaml").is_file()
    assert not [path for path in made.rglob("*") if path.name in ("__pycache__", "tests", ".git", "results")]


def test_what_cannot_travel_is_refused_in_one_line(laptop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (laptop / "mmclip_dist").mkdir()
    (laptop / "mmclip_dist" / "x.py").touch()
    wrong = {"no.yaml": "is not here", str(laptop.parent): "does not lie below", "mmclip_dist": "take the place"}
    for more, told in wrong.items():
        with pytest.raises(ValueError, match=told):
            Files.of([], [Path(more)], [])
    monkeypatch.setattr(ray_package, "LARGEST_MIB", 1)
    (laptop / "recipes" / "scan.png").write_bytes(bytes(3 << 20))
    with pytest.raises(ValueError, match=r"MiB would travel.*at most 1 may; largest: recipes/scan.png \(3\.0 MiB\).*--exclude"):
        fill(laptop / "made", Files.of([], [Path("recipes")], []))


def test_a_command_that_the_cluster_would_not_understand_is_refused(laptop: Path) -> None:
    words = ["entities", "s3://bucket/set/train", "--workers", "64"]
    assert entrypoint(words) == ["python", "-m", "mmclip_launch.cli", *words]
    for wrong, told in (
        (["train"], "name a stage, entities or attention"),
        (["entities", "sets/train"], "sets/train is relative"),
        (["attention", "s3://bucket/set/train", "--checkpoint", "recipes"], "recipes is relative"),
        (["attention", "s3://bucket/set/train", "--checkpoint=recipes"], "recipes is relative"),
        (["entities", "s3://key:secret@host/set/train"], "password"),
        (["entities", "https://host/set/train?X-Amz-Signature=secret"], "signature"),
    ):
        with pytest.raises(ValueError, match=told) as caught:
            entrypoint(wrong)
        assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["entities", "s3://bucket/set/train", "--worker", "2"], "No such option: --worker"),
        (["entities", "s3://bucket/set/train", "--workers", "0"], "--workers"),
        (["entities"], "Missing argument"),
        (["attention", "s3://bucket/set/train"], "Missing option '--checkpoint'"),
        (["attention", "s3://bucket/set/train", "--checkpoint", "/runs/a", "--gpus", "many"], "--gpus"),
    ],
)
def test_what_the_stage_would_refuse_is_refused_before_anything_travels(words: list[str], told: str) -> None:
    command = [sys.executable, "-m", "mmclip_launch.cli", "launch", "ray-job", "--address", "http://127.0.0.1:1", "--dry-run"]
    ran = subprocess.run([*command, "--", *words], capture_output=True, text=True)
    assert ran.returncode == 2 and told in ran.stderr and not ran.stdout, ran.stderr


def test_requirements_are_pinned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "requirements.txt"
    path.write_text("# ours\nspacy==3.8.18 # why\n\nray[default]==2.60.0\n")
    assert pinned(path) == ["spacy==3.8.18", "ray[default]==2.60.0"]
    assert submit_ray("http://127.0.0.1:1", ["entities", "/set/train"], pip=path, dry=True) == 0
    assert capsys.readouterr().out.splitlines()[-2:] == ["pip: spacy==3.8.18", "pip: ray[default]==2.60.0"]
    for line in ("torch>=2", "torch", "-r other.txt", "git+https://host/x", "torch==2.*"):
        path.write_text(f"spacy==3.8.18\n{line}\n")
        with pytest.raises(ValueError, match=r"requirements.txt, line 2: .* is not pinned"):
            pinned(path)


def test_nothing_is_sent_to_a_cluster_that_is_not_fit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fault = Finding("error", "Ray", "", "http://head:8265 runs Python 3.9.1, here is another", "use Python 3.9 here")
    monkeypatch.setattr("mmclip_launch.ray_submission.judge_cluster", lambda _: [fault])
    monkeypatch.setattr("mmclip_launch.ray_submission._client", lambda _: pytest.fail("asked"))
    with pytest.raises(Mendable, match="nothing was submitted"):
        submit_ray("http://head:8265", ["entities", "/set/train"])
    assert capsys.readouterr().err == f"{fault}\n"


# -- A real head --------------------------------------------------------------------------------------------------------


def environment_of_a_node(folder: Path) -> Path:
    """A virtual environment that sees the packages of ours -> its Python. Ray makes a copy of a node's environment for a job that
    brings packages: of this one that costs a second, of ours minutes."""
    venv.create(folder, symlinks=True)
    own = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    (own / "ours.pth").write_text(sysconfig.get_path("purelib"))
    python = folder / "bin" / "python"
    (folder / "bin" / "ray").write_text(f"#!{python}\nfrom ray.scripts.scripts import main\nmain()\n")
    (folder / "bin" / "ray").chmod(0o755)
    return python


@pytest.fixture(scope="module")
def head(s3: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Its nodes have the keys of the store and another working folder than whoever submits, and do not find our code. Their pip
    installs from a folder that only they know."""
    with ExitStack() as stack:
        with pytest.MonkeyPatch.context() as patch, client_environment(s3.environment()):
            patch.chdir(tmp_path_factory.mktemp("head"))
            patch.delenv("PYTHONPATH", raising=False)
            patch.setenv("ONLY_ON_THE_CLUSTER", "yes")
            wheels = tmp_path_factory.mktemp("wheels")
            toy_model.write_wheel(wheels, ("lung", "heart"))
            patch.setenv("PIP_NO_INDEX", "1")
            patch.setenv("PIP_FIND_LINKS", str(wheels))
            patch.setattr(sys, "executable", str(environment_of_a_node(tmp_path_factory.mktemp("node") / "venv")))
            cluster = stack.enter_context(local_cluster(tmp_path_factory.mktemp("log") / "ray.log", cpus=1))
        yield cluster


@pytest.fixture
def reached(head: Cluster, s3: S3Server, laptop: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """The head, from a laptop that has its token and other keys, which must stay there."""
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
        monkeypatch.setenv(name, head.env[name])
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:1")  # of another cluster
    with client_environment({"AWS_SECRET_ACCESS_KEY": SECRET, "AWS_ACCESS_KEY_ID": SECRET}):
        yield head


AS_SUBMITTED = """
import atexit, os, pathlib
atexit.register(lambda: print(
    "on the cluster:", os.environ["ONLY_ON_THE_CLUSTER"], sorted(str(p) for p in pathlib.Path("recipes").rglob("*.*")), flush=True
))
"""
SUBMIT = """
import sys
from pathlib import Path
from mmclip_launch import ray_package
from mmclip_launch.cli import main
copy = ray_package.copy_packages
def marked(folder):
    copy(folder)
    cli = folder / "mmclip_launch" / "cli.py"
    cli.write_text(cli.read_text().replace("import sys\\n", "import sys\\n" + Path("marks").read_text(), 1))
ray_package.copy_packages = marked
sys.exit(main())
"""


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_stage_from_a_laptop_to_a_cluster_and_ctrl_c_leaves_it_running(
    sets, reached: Cluster, s3: S3Server, laptop: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("scispacy", reason="needs the extra nlp")
    base = f"{s3.url}/{uuid.uuid4().hex}/train"
    with client_environment(s3.environment()):
        for path in Path(sets.paired).iterdir():
            storage.write_atomic(f"{base}/{path.name}", path.read_bytes())
    (laptop / "marks").write_text(AS_SUBMITTED)
    (laptop / "submit.py").write_text(SUBMIT)
    (laptop / "requirements.txt").write_text(f"{toy_model.NAME}=={toy_model.VERSION}\n")
    files = ["--with", "recipes", "--exclude", "*.png", "--pip", "requirements.txt"]
    stage = ["entities", base, "--model", toy_model.NAME, "--workers", "1"]
    command = [sys.executable, "submit.py", "launch", "ray-job", "--address", reached.address, *files, "--", *stage]
    running = subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert running.stderr is not None
    shown = ""
    for line in running.stderr:
        shown += line
        if line.startswith("submitted as "):
            running.send_signal(signal.SIGINT)
    assert running.wait(30) == 130 and "detached; the job goes on. follow it: ray job logs" in shown, shown
    name = next(line.split()[-1] for line in shown.splitlines() if line.startswith("submitted as "))
    assert f"stop it: ray job stop {name} --address {reached.address}" in shown
    client = _client(reached.address)
    assert client.get_job_info(name).status in ("PENDING", "RUNNING")
    assert follow(client, reached.address, name) == 0
    out = capsys.readouterr().out
    assert "on the cluster: yes ['recipes/a.yaml', 'recipes/deep/b.yaml']" in out, out  # code and files as submitted
    with client_environment(s3.environment()):
        rows = [json.loads(members["entities.json"]) for _, members in iterate(f"{base}/entities")]
    assert len(rows) == load_manifest(sets.paired).samples
    # The model that the workers used is in the package that only pip has brought.
    assert not find_spec(toy_model.NAME) and {each["label"] for row in rows for each in row} == {"ENTITY"}

    told = client.get_job_info(name)
    assert told.entrypoint == shlex.join(["python", "-m", "mmclip_launch.cli", *stage])
    assert told.metadata["mmclip-dist"] == version("mmclip-dist") and len(told.metadata["code"]) > 8
    everything = json.dumps([told.model_dump(mode="json") if hasattr(told, "model_dump") else told.dict()], default=str)
    for secret in (SECRET, s3.environment()["AWS_SECRET_ACCESS_KEY"], reached.env["RAY_AUTH_TOKEN"]):
        assert secret not in everything + out + shown + client.get_job_logs(name)


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_the_exit_code_is_the_jobs_and_the_cluster_is_judged(
    reached: Cluster, s3: S3Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert submit_ray(reached.address, ["entities", f"{s3.url}/{uuid.uuid4().hex}/train"]) == 2
    assert "error: " in capsys.readouterr().out
    Path("requirements.txt").write_text(f"{toy_model.NAME}==9.9\n")
    assert submit_ray(reached.address, ["entities", "/set/train"], pip=Path("requirements.txt")) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("failed: ")]
    assert f"No matching distribution found for {toy_model.NAME}==9.9" in line, line
    monkeypatch.setattr(platform, "python_version", lambda: "3.10.2")
    here = platform.python_version()
    (finding,) = judge_cluster(reached.address)
    assert finding.level == "error" and f"here is {here}" in finding.text and "runs Python 3." in finding.text
    monkeypatch.setenv("RAY_AUTH_TOKEN", "wrong")
    with pytest.raises(Mendable, match="nothing was submitted"):
        submit_ray(reached.address, ["entities", "/set/train"])
    assert os.environ["RAY_AUTH_TOKEN"] not in capsys.readouterr().out
