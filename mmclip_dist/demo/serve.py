"""Load a model, listen on an address, serve the demo until it is stopped."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import uvicorn
from mmclip_shards.manifest import find_split

from mmclip_dist.checkpoint.folder import read_meta, weights_hash
from mmclip_dist.checkpoint.mirror import local_checkpoint
from mmclip_dist.demo.answer import MAX_FINDINGS, Reports, parse_findings
from mmclip_dist.demo.app import build_app
from mmclip_dist.inference import MMCLIPModel

_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_SOME = ("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Pleural Effusion", "Pneumothorax")


def serve(
    checkpoint: str, *, data: str | None, findings: str | None, average: bool, host: str, port: int,
    progress: Callable[[str, str], AbstractContextManager[Callable[[int, int], None]]],
) -> None:  # fmt: skip
    """findings: in the form at first, by default those that the model was trained on. progress: of reading the set's reports.

    ValueError if there is no checkpoint or set, or if the address cannot be used.
    """
    names = parse_findings(findings) if findings is not None else None
    try:  # before anything that takes time
        listening = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise ValueError(f"--host {host} --port {port} cannot be used: {error.strerror}; choose another port") from error
    with listening:
        with local_checkpoint(checkpoint) as folder:
            model, meta = MMCLIPModel.from_pretrained(folder, average=average), read_meta(folder)
            title = f"step {meta.step:,}, weights {weights_hash(folder)[:12]}"
        reports = None
        if data is not None:
            with progress("reports", "samples") as report:
                reports = Reports(model, find_split(data, "train"), report)
        if host not in _LOOPBACK:
            print(f"warning: everyone who reaches {host} can use this page; it has no password", flush=True)
        app = build_app(
            model, title=title, findings=names or _at_first(meta.diseases), reports=reports,
            hosts=_LOOPBACK if host in _LOOPBACK else ("*",),
        )  # fmt: skip
        print(f"open http://{f'[{host}]' if ':' in host else host}:{port} in a browser; Ctrl-C ends it", flush=True)
        uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False)).run(sockets=[listening])


def _at_first(diseases: Sequence[str]) -> Sequence[str]:
    return diseases[:MAX_FINDINGS] or _SOME
