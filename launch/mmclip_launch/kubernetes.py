"""A training run as an indexed Kubernetes Job: `templates/job.yaml`, filled in."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import PurePosixPath
from typing import Any

import yaml

from mmclip_launch.frozen import OURS
from mmclip_launch.probe import code_hash
from mmclip_launch.templates import template

RUNS = PurePosixPath("/runs")
_NAME = re.compile(r"[a-z]([-a-z0-9]{0,50}[a-z0-9])?")
_FROZEN = re.compile(r".+(@sha256:[0-9a-f]{64}|:(?!latest$)[\w][\w.-]*)")


def check_image(image: str) -> None:
    """ValueError if the image's name may mean another image tomorrow: it is what freezes the code."""
    if not _FROZEN.fullmatch(image) or "/" in image.rpartition(":")[2]:
        raise ValueError(
            f"--image {image} does not say which version: add a tag that never moves, or a digest (@sha256:...)"
        )


def run_name(run_dir: str) -> str:
    """The name of the run's objects: that of its folder. ValueError unless it lies in the volume of runs and fits DNS."""
    path = PurePosixPath(run_dir)
    if RUNS not in path.parents or ".." in path.parts:
        raise ValueError(
            f"run_dir={run_dir} is not in {RUNS}, where the pods mount the volume of runs: set run_dir={RUNS}/NAME"
        )
    if not _NAME.fullmatch(path.name):
        raise ValueError(
            f"run_dir={run_dir}: {path.name!r} names the Job, so it needs a-z, 0-9 and -, at most 52, a letter first"
        )
    return path.name


def job(image: str, run_dir: str, words: Sequence[str], *, nodes: int, gpus: int) -> list[dict[str, Any]]:
    """The Service and the Job. words: recipe and overrides. gpus: of each node."""
    check_image(image)
    name = run_name(run_dir)
    service, made = yaml.safe_load_all(template("job.yaml").read_text())
    labels = {"app.kubernetes.io/name": "mmclip", "app.kubernetes.io/version": version("mmclip-dist")}
    for document in (service, made):
        document["metadata"] |= {"name": name, "labels": labels}
    service["spec"]["selector"] = {"job-name": name}
    made["metadata"]["annotations"] = {"mmclip/submitted-with-code": str(code_hash(list(OURS)))}
    made["spec"] |= {"completions": nodes, "parallelism": nodes}
    pod = made["spec"]["template"]["spec"]
    pod["subdomain"] = name
    (container,) = pod["containers"]
    container |= {"image": image, "args": list(words)}
    container["resources"]["limits"]["nvidia.com/gpu"] = gpus
    values = {"NODES": str(nodes), "GPUS": str(gpus), "FIRST": f"{name}-0.{name}", "RUN_DIR": run_dir}
    for variable in container["env"]:
        if variable["name"] in values:
            variable["value"] = values[variable["name"]]
    return [service, made]


def rendered(documents: Sequence[dict[str, Any]]) -> str:
    return yaml.safe_dump_all(documents, sort_keys=False)


APPLY = ("kubectl", "apply", "-f", "-")


def apply(text: str) -> int:
    """Hand the objects to the cluster of the present kubectl context -> kubectl's exit code."""
    return subprocess.run(APPLY, input=text, text=True, check=False).returncode
