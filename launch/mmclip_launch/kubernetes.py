"""A training run as an indexed Kubernetes Job: `templates/job.yaml`, filled in."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from mmclip_dist.config import Config
from mmclip_launch.frozen import OURS
from mmclip_launch.probe import code_hash
from mmclip_launch.templates import template

RUNS = PurePosixPath("/runs")
_NAME = re.compile(r"[a-z]([-a-z0-9]{0,50}[a-z0-9])?")
_FROZEN = re.compile(r".+(@sha256:[0-9a-f]{64}|:(?!latest$)[\w][\w.-]*)")


class _Dumper(yaml.SafeDumper):
    """Quotes what kubectl, which reads YAML by other rules, would take for a number or a truth value."""


_Dumper.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\.\d+|\d+(\.\d*)?)([eE][-+]?\d+)?$|0o[0-7]+$"), list("-+.0123456789")
)
_Dumper.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"[yYnN]$"), list("yYnN"))


def literal(text: str) -> str:
    """An argument or a variable's value that the kubelet, which replaces $(NAME) and $$, turns into `text`."""
    return text.replace("$", "$$")


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


def check_reachable(config: Config) -> None:
    """ValueError for a path that means something in this folder alone: pods start in another."""
    model = config.model
    paths = {
        "data.sources": [each for source in config.data.sources for each in (source.url, source.entities, source.attention)],
        "evaluation.sets": config.evaluation.sets, "prompts.file": [config.prompts.file],
        "checkpoint.url": [config.checkpoint.url], "checkpoint.start_from": [config.checkpoint.start_from],
    }  # fmt: skip
    hub = {  # or a name on the Hugging Face hub
        "model.image.pretrained": model.image.pretrained, "model.text.pretrained": model.text.pretrained,
        "model.text.tokenizer": model.text.tokenizer,
    }  # fmt: skip
    wanted = [(key, value) for key, values in paths.items() for value in values]
    wanted += [(key, value) for key, value in hub.items() if value and Path(value).exists()]
    for key, value in wanted:
        if value and "://" not in value and not value.startswith("/"):
            mend = "give a URL, or the full path in a volume of the pods"
            raise ValueError(f"{key}: {value} is relative, and pods start in another folder: {mend}")


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
    container |= {"image": image, "args": [literal(word) for word in words]}
    container["resources"]["limits"]["nvidia.com/gpu"] = gpus
    values = {"NODES": str(nodes), "GPUS": str(gpus), "FIRST": f"{name}-0.{name}", "RUN_DIR": literal(run_dir)}
    for variable in container["env"]:
        if variable["name"] in values:
            variable["value"] = values[variable["name"]]
    return [service, made]


def rendered(documents: Sequence[dict[str, Any]]) -> str:
    return yaml.dump_all(documents, Dumper=_Dumper, sort_keys=False)


APPLY = ("kubectl", "apply", "-f", "-")


def apply(text: str) -> int:
    """Hand the objects to the cluster of the present kubectl context -> kubectl's exit code."""
    return subprocess.run(APPLY, input=text, text=True, check=False).returncode
