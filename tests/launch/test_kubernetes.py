"""The Kubernetes templates against the schemas of Kubernetes, and the first process of a pod."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from mmclip_launch.kubernetes import job, rendered
from mmclip_launch.node import wait_for_name
from mmclip_launch.templates import template

from mmclip_dist.errors import USER
from mmclip_dist.run.marks import EXIT_CODE, STOP_FILE, STOPPED

VERSION = "1.37"


def check(document: dict[str, Any]) -> None:
    """Against the schema of its kind; unknown fields are refused."""
    schemas = pytest.importorskip(
        "kubernetes_validate", reason="templates are NOT checked by schemas: pip install kubernetes-validate"
    )
    schemas.validate(document, VERSION, strict=True)


def pod_template(spec: dict[str, Any]) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "x"}, "template": spec}


def test_the_job_fits_the_schema_as_written_and_as_rendered() -> None:
    documents = [*yaml.safe_load_all(template("job.yaml").read_text())]
    documents += yaml.safe_load_all(rendered(job("mmclip:1", "/runs/one", ["quickstart", "a=b"], nodes=2, gpus=8)))
    assert [document["kind"] for document in documents] == ["Service", "Job"] * 2
    for document in documents:
        check(document)
    documents[1]["spec"]["paralelism"] = 2
    with pytest.raises(Exception, match="paralelism"):
        check(documents[1])


def test_what_a_run_needs_of_a_pod_is_there() -> None:
    spec = [*yaml.safe_load_all(template("job.yaml").read_text())][1]["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
    assert "secret" in volumes[mounts["/etc/mmclip"]] and "persistentVolumeClaim" in volumes[mounts["/runs"]]
    assert f'touch "$RUN_DIR/{STOP_FILE}"' in container["lifecycle"]["preStop"]["exec"]["command"][-1]
    assert pod["terminationGracePeriodSeconds"] >= 120
    dockerfile = template("Dockerfile").read_text()
    assert f"USER {pod['securityContext']['fsGroup']}:" in dockerfile  # else the image's user cannot read the Secret
    rules = {
        tuple(rule.get("onExitCodes", {}).get("values", ())): rule["action"]
        for rule in spec["podFailurePolicy"]["rules"]
    }
    assert rules == {(2,): "FailJob", (EXIT_CODE,): "Ignore", (): "Ignore"}
    assert not any("KEY" in variable["name"] or "TOKEN" in variable["name"] for variable in container["env"])


def pods(document: Any) -> list[dict[str, Any]]:
    """The pods that a document asks for: whatever has containers."""
    if isinstance(document, dict):
        return [document] if "containers" in document else pods(list(document.values()))
    return [pod for each in document for pod in pods(each)] if isinstance(document, list) else []


@pytest.mark.parametrize(
    ("name", "count"), [("job.yaml", 1), ("trainjob.yaml", 1), ("raycluster.yaml", 2), ("rayjob.yaml", 2)]
)
def test_pods_fit_the_standard_restricted(name: str, count: int) -> None:
    """Of the Pod Security Standards, which namespaces enforce."""
    found = [pod for document in yaml.safe_load_all(template(name).read_text()) for pod in pods(document)]
    assert len(found) == count
    for pod in found:
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in pod["containers"]:
            wanted = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
            assert container["securityContext"] == wanted
        assert all({"emptyDir", "persistentVolumeClaim", "secret"} & set(volume) for volume in pod["volumes"])


def test_kubeflow_does_not_start_again_what_a_user_has_to_mend() -> None:
    runtime = next(yaml.safe_load_all(template("trainjob.yaml").read_text()))
    spec = runtime["spec"]["template"]["spec"]
    (rule,) = spec["replicatedJobs"][0]["template"]["spec"]["podFailurePolicy"]["rules"]
    assert rule == {"action": "FailJob", "onExitCodes": {"containerName": "node", "operator": "In", "values": [USER]}}
    (mend,) = spec["failurePolicy"]["rules"]
    assert (mend["action"], mend["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])


def test_the_train_job_fits_the_models_of_kubeflow_and_its_pods_the_schema() -> None:
    models = pytest.importorskip(
        "kubeflow_trainer_api.models", reason="trainjob.yaml is NOT checked: pip install kubeflow-trainer-api"
    )
    runtime, train = yaml.safe_load_all(template("trainjob.yaml").read_text())
    for document, kind in ((runtime, models.TrainerV1alpha1TrainingRuntime), (train, models.TrainerV1alpha1TrainJob)):
        again = kind.from_dict(document).to_dict()
        assert floats(again) == floats(document)  # a field that the model does not know is left out
    (node,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    check({"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, "spec": node["template"]["spec"]})
    assert node["template"]["metadata"]["labels"]["trainer.kubeflow.org/trainjob-ancestor-step"] == "trainer"
    check(pod_template(node["template"]["spec"]["template"]))


def floats(value: Any) -> Any:
    """With all numbers as the models hold them."""
    if isinstance(value, dict):
        return {name: floats(each) for name, each in value.items()}
    if isinstance(value, list):
        return [floats(each) for each in value]
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


CLUSTER_FIELDS = {"rayVersion", "authOptions", "headGroupSpec", "workerGroupSpecs"}
GROUP_FIELDS = {"rayStartParams", "template", "groupName", "replicas", "minReplicas", "maxReplicas"}
JOB_FIELDS = {"entrypoint", "backoffLimit", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished", "rayClusterSpec"}
"""Fields of KubeRay's API, version ray.io/v1, that the templates use."""


@pytest.mark.parametrize("name", ["raycluster.yaml", "rayjob.yaml"])
def test_the_ray_templates_hold_known_fields_and_pods_that_fit_the_schema(name: str) -> None:
    document = yaml.safe_load(template(name).read_text())
    assert document["apiVersion"] == "ray.io/v1"
    cluster = document["spec"]
    if name == "rayjob.yaml":
        assert document["kind"] == "RayJob" and set(cluster) == JOB_FIELDS
        assert cluster["entrypoint"].split()[:2] == ["mmclip", "attention"]
        cluster = cluster["rayClusterSpec"]
    assert set(cluster) == CLUSTER_FIELDS and cluster["authOptions"] == {"mode": "token"}
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        assert set(group) <= GROUP_FIELDS and all(isinstance(value, str) for value in group["rayStartParams"].values())
        check(pod_template(group["template"]))
    limits = cluster["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert limits["nvidia.com/gpu"] == 4


def test_the_ray_templates_name_the_version_that_was_tested() -> None:
    constraints = (Path(__file__).resolve().parents[2] / "constraints.txt").read_text().splitlines()
    for name in ("raycluster.yaml", "rayjob.yaml"):
        spec = yaml.safe_load(template(name).read_text())["spec"]
        assert f"ray=={spec.get('rayClusterSpec', spec)['rayVersion']}" in constraints


# -- The first process of a pod -------------------------------------------------------------------------------------------


@pytest.fixture
def pod(tmp_path: Path) -> dict[str, str]:
    """The variables of a pod in which `deepspeed` is a stand-in that runs $RUN."""
    (tmp_path / "deepspeed").write_text('#!/usr/bin/env bash\necho "$@" >"$RUN_DIR/started"\ncat "$2" >"$RUN_DIR/hosts"\n'
                                        'eval "$RUN"\n')  # fmt: skip
    (tmp_path / "deepspeed").chmod(0o755)
    return {
        **os.environ, "NODES": "2", "NODE": "1", "FIRST": "localhost", "GPUS": "8", "RUN_DIR": str(tmp_path / "run"),
        "PATH": f"{tmp_path}:{os.environ['PATH']}", "RUN": "true",
    }  # fmt: skip


# The interpreter's own folder holds the true `deepspeed`, and comes first on PATH.
NODE = """
import os, sys
from mmclip_launch import node
node.environment = lambda: None
sys.exit(node.main(sys.argv[1:], os.environ))
"""


def start(pod: dict[str, str], *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", NODE, *words], env=pod, stderr=subprocess.PIPE, text=True)


def test_a_pod_starts_the_ranks_of_its_node(pod: dict[str, str]) -> None:
    assert start(pod, "quickstart", "optim.lr=1").wait(60) == 0
    run = Path(pod["RUN_DIR"])
    words = (run / "started").read_text().split()
    assert words[2:] == [
        "--no_ssh", "--node_rank", "1", "--master_addr", "localhost", "--master_port", "29500", "--module", "mmclip_dist.train",
        "quickstart", f"run_dir={run}", "optim.lr=1",
    ]  # fmt: skip
    assert (run / "hosts").read_text() == "node-0 slots=8\nnode-1 slots=8\n"


@pytest.mark.parametrize(
    ("run", "code"), [("exit 2", 2), ("exit 70", 70), (f"exit {EXIT_CODE}", EXIT_CODE), ("kill -9 $$", 137)]
)
def test_a_pod_ends_with_the_code_of_its_run(pod: dict[str, str], run: str, code: int) -> None:
    assert start(pod | {"RUN": run}, "quickstart").wait(60) == code


def test_a_launcher_that_was_ended_after_the_run_had_saved_counts_as_a_stop(pod: dict[str, str]) -> None:
    assert start(pod | {"RUN": f'touch "$RUN_DIR/{STOPPED}"; exit 1'}, "quickstart").wait(60) == EXIT_CODE
    assert start(pod | {"RUN": "exit 1"}, "quickstart").wait(60) == 1  # that mark is of the stop before


def test_sigterm_asks_for_a_stop_and_waits_for_it(pod: dict[str, str]) -> None:
    stop = Path(pod["RUN_DIR"], STOP_FILE)
    waiting = f'touch "$RUN_DIR/begun"; until [[ -e {stop} ]]; do sleep 0.05; done; sleep 0.3; exit {EXIT_CODE}'
    process = start(pod | {"RUN": waiting}, "quickstart")
    while not Path(pod["RUN_DIR"], "begun").exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == EXIT_CODE


def test_a_pod_that_waits_for_the_first_one_ends_at_once(pod: dict[str, str]) -> None:
    """The kernel keeps signals without a handler from the first process of a container."""
    process = start(pod | {"FIRST": "no-such-pod.invalid"}, "quickstart")
    while not Path(pod["RUN_DIR"]).exists():
        time.sleep(0.02)
    time.sleep(1)  # it looks for the name by now
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 128 + signal.SIGTERM and not Path(pod["RUN_DIR"], "started").exists()


def test_a_pod_says_which_variables_it_lacks(pod: dict[str, str]) -> None:
    process = start({name: value for name, value in pod.items() if name not in ("NODE", "GPUS")}, "quickstart")
    assert process.wait(60) == 2 and process.stderr and process.stderr.read() == "error: set NODE, GPUS\n"


def test_a_first_pod_that_never_comes_is_told() -> None:
    with pytest.raises(OSError, match=r"first node no-such-pod\.invalid has no address after 0 s: is its pod pending"):
        wait_for_name("no-such-pod.invalid", timeout_s=0, pause=lambda _: None)
