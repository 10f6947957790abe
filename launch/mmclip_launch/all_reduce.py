"""How fast the ranks add up their gradients. Sent to every host as text; they meet by what training meets by, mmclip_dist.

`request` is set by the sender: backend (nccl or gloo), first (number of this host's first rank), ranks (here), world, hosts (how
many), address and port of the first host. The first rank answers with bandwidth and latency, a host that fails with the reason.
"""

from __future__ import annotations

import datetime
import json
import multiprocessing
import os
import socket
import statistics
import time
from contextlib import ExitStack
from typing import Any

REACH_S = 15.0
JOIN_S = 30.0  # importing torch from a busy shared disk takes its time
_GO = b"go"
_SMALL = 1024  # floats: their time is latency
_LARGE = {"nccl": 64 * 2**20, "gloo": 4 * 2**20}  # floats: 256 MiB and 16 MiB


def meet(request: dict[str, Any]) -> str:
    """An empty text once all hosts have reached the first one, or the fault after `REACH_S`: before torch is imported, and before
    ranks wait for some that never come."""
    address, port, others = request["address"], request["port"], request["hosts"] - 1
    deadline = time.monotonic() + REACH_S
    if request["first"] == 0:
        return gather(address, port, others, deadline) if others else ""
    while True:
        try:
            with socket.create_connection((address, port), timeout=3) as caller:
                caller.settimeout(2 * REACH_S)
                return "" if caller.recv(len(_GO)) == _GO else "not all hosts reached the first one"
        except OSError as error:
            if time.monotonic() > deadline:
                return f"cannot reach {address} port {port}, where the first rank waits: {error.strerror or error}"
            time.sleep(0.2)


def gather(address: str, port: int, others: int, deadline: float) -> str:
    """The first host's part of `meet`."""
    with ExitStack() as held:
        callers: list[socket.socket] = []
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        server = held.enter_context(socket.create_server((address, port), family=family))
        try:
            while len(callers) < others:
                server.settimeout(max(0.01, deadline - time.monotonic()))
                callers.append(held.enter_context(server.accept()[0]))
        except TimeoutError:
            return f"{len(callers)} of {others} other hosts reached port {port} here within {REACH_S:g} s"
        for caller in callers:
            caller.sendall(_GO)
        for caller in callers:
            caller.recv(1)  # it hangs up first: else the port would be held for a minute
    return ""


def rank(request: dict[str, Any], local: int, out: Any) -> None:
    """Join, add, and tell: a dict with `fault`, or with what the first rank has measured."""
    import torch
    import torch.distributed as dist

    from mmclip_dist.engine.rendezvous import meet as meet_ranks

    number, backend, timeout = request["first"] + local, request["backend"], datetime.timedelta(seconds=JOIN_S)
    os.environ |= {
        "RANK": str(number), "WORLD_SIZE": str(request["world"]), "LOCAL_WORLD_SIZE": str(request["ranks"]),
        "MASTER_ADDR": request["address"], "MASTER_PORT": str(request["port"]),
    }  # fmt: skip
    try:
        device = torch.device("cuda", local) if backend == "nccl" else torch.device("cpu")
        if backend == "nccl":
            torch.cuda.set_device(device)
        store, number, world = meet_ranks(timeout)
        dist.init_process_group(backend, store=store, rank=number, world_size=world, timeout=timeout)

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
    if fault := meet(request):
        return {"fault": fault}
    try:
        import mmclip_dist.engine.rendezvous  # noqa: F401 (once, with torch, instead of in each rank)
    except ImportError as error:
        return {"fault": str(error)}
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
    os._exit(0)  # an interpreter with torch takes its time to end
