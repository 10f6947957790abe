"""How fast the ranks add up their gradients. Sent to every host as text: Python and torch, nothing of ours.

`request` is set by the sender: backend (nccl or gloo), first (number of this host's first rank), ranks (here), world, address and
port of the first host. The first rank answers with bandwidth and latency, a host that fails with the reason.
"""

from __future__ import annotations

import datetime
import json
import multiprocessing
import os
import socket
import statistics
import time
from typing import Any

JOIN_S = 30.0  # importing torch from a busy shared disk takes its time
_SMALL = 1024  # floats: their time is latency
_LARGE = {"nccl": 64 * 2**20, "gloo": 4 * 2**20}  # floats: 256 MiB and 16 MiB


def reach(address: str, port: int) -> str:
    """An empty text once the first host listens, or the fault after `JOIN_S`."""
    deadline = time.monotonic() + JOIN_S
    while True:
        try:
            socket.create_connection((address, port), timeout=3).close()
            return ""
        except OSError as error:
            if time.monotonic() > deadline:
                return f"cannot reach {address} port {port}, where the first rank waits: {error.strerror or error}"
            time.sleep(0.2)


def rank(request: dict[str, Any], local: int, out: Any) -> None:
    """Join, add, and tell: a dict with `fault`, or with what the first rank has measured."""
    import torch
    import torch.distributed as dist

    number, backend = request["first"] + local, request["backend"]
    try:
        device = torch.device("cuda", local) if backend == "nccl" else torch.device("cpu")
        if backend == "nccl":
            torch.cuda.set_device(device)
        dist.init_process_group(
            backend, init_method=f"tcp://{request['address']}:{request['port']}", rank=number, world_size=request["world"],
            timeout=datetime.timedelta(seconds=JOIN_S),
        )  # fmt: skip

        def seconds(floats: int, times: int) -> list[float]:
            values, found = torch.ones(floats, device=device), []
            for _ in range(times):
                dist.barrier()
                began = time.perf_counter()
                dist.all_reduce(values)
                values[0].item()  # the device has done it
                found.append(time.perf_counter() - began)
                values.fill_(1)
            return found

        seconds(_SMALL, 3)
        latency = statistics.median(seconds(_SMALL, 20))
        large = _LARGE[backend]
        took = statistics.median(seconds(large, 5))
        told = {"latency_s": latency, "bytes_s": 2 * (request["world"] - 1) / request["world"] * 4 * large / took}
        out.send(told if number == 0 else {})
    except Exception as error:  # whatever it is, the sender shall read it
        out.send({"fault": f"rank {number}: {str(error).splitlines()[0]}"})
    os._exit(0)  # a group whose peer is gone would wait for it


def main(request: dict[str, Any]) -> dict[str, Any]:
    """Start the ranks of this host -> the first fault, or what they have measured."""
    if request["first"] and (fault := reach(request["address"], request["port"])):
        return {"fault": fault}
    context, pipes = multiprocessing.get_context("fork"), []
    for local in range(request["ranks"]):
        receive, send = context.Pipe(duplex=False)
        context.Process(target=rank, args=(request, local, send), daemon=True).start()
        send.close()
        pipes.append(receive)
    told = []
    for pipe in pipes:
        try:
            told.append(pipe.recv())
        except EOFError:
            told.append({"fault": "a rank died without a word"})
    return next((each for each in told if "fault" in each), told[0])


if __name__ == "__main__":
    print("MMCLIP-ANSWER " + json.dumps(main(request)), flush=True)  # type: ignore[name-defined]  # noqa: F821 (the sender's)
