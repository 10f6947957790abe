"""A Ray cluster's job server: does it answer, whom does it let in, and which Ray is it?"""

from __future__ import annotations

import json
import os
import platform
import urllib.error
import urllib.request
from importlib.metadata import version
from pathlib import Path

from mmclip_launch.findings import Finding

_ANSWER_S = 8.0
_CHECK = "Ray"


def token() -> str | None:
    """The cluster's token, found where Ray looks for it: RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH, ~/.ray/auth_token."""
    if told := os.environ.get("RAY_AUTH_TOKEN"):
        return told.strip()
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH", "~/.ray/auth_token")).expanduser()
    return path.read_text().strip() if path.is_file() else None


def judge_cluster(address: str) -> list[Finding]:
    """address: http://HOST:8265. The token goes only into a request's header."""
    if not address.startswith(("http://", "https://")):
        mend = "name its job server: --address http://HOST:8265"
        return [Finding("error", _CHECK, "", f"{address} is no address of a job server", mend)]
    url, known = f"{address.rstrip('/')}/api/version", token()
    try:
        status, text = _get(url, known)
    except OSError as error:
        mend = "is the head up, does a firewall let this port through, and does it listen on more than 127.0.0.1?"
        return [Finding("error", _CHECK, "", f"{address} does not answer: {getattr(error, 'reason', error)}", mend)]
    if status in (401, 403):
        what = "refuses our token: it is wrong or has expired" if known else "asks for a token, and none is set"
        mend = "put the cluster's token into a file of mode 600 and set RAY_AUTH_TOKEN_PATH to it"
        return [Finding("error", _CHECK, "", f"{address} {what}", mend)]
    try:
        theirs = json.loads(text)["ray_version"]
    except (ValueError, KeyError, TypeError):
        mend = "name Ray's job server: --address http://HOST:8265"
        return [Finding("error", _CHECK, "", f"{address} is no Ray job server (code {status})", mend)]
    found, ours = [], version("ray")
    if theirs != ours:
        mend = f"install ray=={theirs} here, or start the cluster with ray=={ours}"
        found.append(Finding("error", _CHECK, "", f"{address} runs Ray {theirs}, here is {ours}", mend))
    found += _judge_python(address, known)
    if _get(url, None)[0] == 200:
        mend = "whoever reaches it can run programs there: start it with RAY_AUTH_MODE=token"
        found.append(Finding("warning", _CHECK, "", f"{address} lets everybody in", mend))
    return found or [Finding("ok", _CHECK, "", f"Ray {theirs}, which asks for the token")]


def _judge_python(address: str, known: str | None) -> list[Finding]:
    try:
        theirs = json.loads(_get(f"{address.rstrip('/')}/api/v0/cluster_metadata", known)[1])["data"]["pythonVersion"]
    except (OSError, ValueError, KeyError, TypeError):
        mend = "compare `python --version` there and here"
        return [Finding("warning", _CHECK, "", f"{address} does not tell its Python", mend)]
    ours = platform.python_version()
    if theirs.split(".")[:2] == ours.split(".")[:2]:
        return []
    mend = f"use Python {'.'.join(theirs.split('.')[:2])} here, or start the cluster with {'.'.join(ours.split('.')[:2])}"
    return [Finding("error", _CHECK, "", f"{address} runs Python {theirs}, here is {ours}", mend)]


def _get(url: str, known: str | None) -> tuple[int, bytes]:
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {known}"} if known else {})
    try:
        with urllib.request.urlopen(request, timeout=_ANSWER_S) as answer:
            return answer.status, answer.read(65536)
    except urllib.error.HTTPError as error:
        return error.code, b""
