"""A Ray cluster's job server: does it answer, whom does it let in, and which Ray is it?"""

from __future__ import annotations

import json
import os
import platform
import re
import ssl
import urllib.error
import urllib.request
from http.client import HTTPException
from importlib.metadata import version
from pathlib import Path
from urllib.parse import urlsplit

from mmclip_shards.home import home
from mmclip_shards.textfiles import read_text

from mmclip_dist.errors import SECRET
from mmclip_launch.findings import Finding, error, ok, warning

_ANSWER_S = 8.0
_CHECK, _VERSION = "Ray", "/api/version"
_NAME_IT = "name Ray's job server: --address http://HOST:8265"
_TOKEN = "put the cluster's token, and nothing else, into a file of mode 600 and set RAY_AUTH_TOKEN_PATH to it"


def token() -> str | None:
    """The cluster's token, found where Ray looks for it: RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH, ~/.ray/auth_token. ValueError or
    OSError if it cannot be read, or is no token."""
    if told := os.environ.get("RAY_AUTH_TOKEN"):
        return told.strip()
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    path = Path(named).expanduser() if named else home() / ".ray" / "auth_token"
    if not path.is_file():
        return None
    found = read_text(path, _TOKEN).strip()
    if not (found.isascii() and found.isprintable()):
        raise ValueError(f"{path} holds more than a token: {_TOKEN}")
    return found


class _Unfit(Exception):
    """Nothing can be submitted. Its arguments: text and mend of the finding."""


def judge_cluster(address: str) -> list[Finding]:
    """address: http://HOST:8265. The token goes only into a request's header."""
    try:
        known, address = _token_for(address), address.rstrip("/")
        theirs = _version(address, known)
    except _Unfit as fault:
        return [error(_CHECK, "", *fault.args)]
    found, ours = [], version("ray")
    if theirs != ours:
        mend = f"install ray=={theirs} here, or start the cluster with ray=={ours}"
        found.append(error(_CHECK, "", f"{address} runs Ray {theirs}, here is {ours}", mend))
    found += _judge_python(address, known)
    if _lets_all_in(address):
        mend = "whoever reaches it can run programs there: start it with RAY_AUTH_MODE=token"
        found.append(warning(_CHECK, "", f"{address} lets everybody in", mend))
    return found or [ok(_CHECK, "", f"Ray {theirs}, which asks for the token")]


def _token_for(address: str) -> str | None:
    """The token, once the address is one. _Unfit if it is not, or if the token cannot be read."""
    if SECRET.search(address):
        mend = f"leave it out; Ray takes a token: {_TOKEN}"
        raise _Unfit(f"{SECRET.sub('...', address)} has a password in it", mend)
    if not _is_address(address):
        raise _Unfit(f"{address} is no address of a job server", "name it: --address http://HOST:8265")
    try:
        return token()
    except (OSError, ValueError) as fault:
        raise _Unfit(f"the cluster's token cannot be read: {fault}", _TOKEN) from None


def _version(address: str, known: str | None) -> str:
    """Ray's version there. _Unfit if nothing answers, it is no job server, or it refuses us."""
    try:
        status, text = _get(address + _VERSION, known)
    except HTTPException:
        raise _Unfit(f"{address} does not speak HTTP", _NAME_IT) from None
    except OSError as fault:
        reason = getattr(fault, "reason", fault)
        mend = "is the head up, does a firewall let this port through, and does it listen on more than 127.0.0.1?"
        if isinstance(reason, ssl.SSLError):
            mend = "write http://, not https://, unless a proxy in front of it has a certificate that this machine trusts"
        raise _Unfit(f"{address} does not answer: {reason}", mend) from None
    if status in (401, 403):
        what = "refuses our token: it is wrong or has expired" if known else "asks for a token, and none is set"
        raise _Unfit(f"{address} {what}", _TOKEN)
    try:
        return str(json.loads(text)["ray_version"])
    except (ValueError, KeyError, TypeError):
        raise _Unfit(f"{address} is no Ray job server (code {status})", _NAME_IT) from None


def _judge_python(address: str, known: str | None) -> list[Finding]:
    try:
        theirs = json.loads(_get(f"{address}/api/v0/cluster_metadata", known)[1])["data"]["pythonVersion"]
    except (OSError, HTTPException, ValueError, KeyError, TypeError):
        mend = "compare `python --version` there and here"
        return [warning(_CHECK, "", f"{address} does not tell its Python", mend)]
    ours = platform.python_version()
    if theirs.split(".")[:2] == ours.split(".")[:2]:
        return []
    mend = f"use Python {'.'.join(theirs.split('.')[:2])} here, or start the cluster with {'.'.join(ours.split('.')[:2])}"
    return [error(_CHECK, "", f"{address} runs Python {theirs}, here is {ours}", mend)]


def _is_address(text: str) -> bool:
    """Whether it is http(s)://HOST[:PORT]."""
    try:
        parts = urlsplit(text)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0 and not re.search(r"\s", text)
    except ValueError:  # a port that is none, half an IPv6 address
        return False


def _lets_all_in(address: str) -> bool:
    try:
        return _get(address + _VERSION, None)[0] == 200
    except (OSError, HTTPException):  # it has just answered, and is busy or on its way down: nothing is known
        return False


def _get(url: str, known: str | None) -> tuple[int, bytes]:
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {known}"} if known else {})
    try:
        with urllib.request.urlopen(request, timeout=_ANSWER_S) as answer:
            return answer.status, answer.read(65536)
    except urllib.error.HTTPError as fault:
        return fault.code, b""
