"""The first hour with a card, in one command: build, check, time beside every peer, tune the tiles, write the results.

    python kernels/bench/first_hour.py [--budget 60] [--only STAGE ...] [--rehearse]

Writes kernels/bench/results/<card>/first_hour.md and .json after each stage (`stages.py`). A stage that fails is recorded with
its error, and the next one starts; the exit code is then 1. Started again, it runs what has not passed, and all of it where the
card, the versions or the code have changed. --rehearse runs every stage on a CPU, as far as that goes, into runs/first_hour.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tuning
from measuring import RESULTS, file_name, table
from stages import ROOT, Document, Stage, stages

REHEARSED = ROOT / "runs" / "first_hour"
SHOWN = 20  # rows of a stage in first_hour.md; all are in first_hour.json
SCRIPT = Path(__file__).with_name("stages.py")
Record = dict[str, Any]


def code() -> str:
    """A digest of what is measured and of what measures it."""
    digest = hashlib.sha256()
    for folder in ("kernels/mmclip_kernels", "kernels/bench", "tests/kernels"):
        for path in sorted((ROOT / folder).glob("*.py")):
            digest.update(f"{path.name} ".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def run(name: str, minutes: float, rehearse: bool, earlier: Document, log: Path) -> Record:
    """One stage in a process of its own, stopped after `minutes`. -> how it went, and its result if it passed."""
    environment = {**os.environ, "TRITON_INTERPRET": "1" if rehearse else "0"}
    if rehearse:
        environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, log.open("w") as output:
        result, before = Path(folder, "result.json"), Path(folder, "earlier.json")
        before.write_text(json.dumps(earlier))
        command = [sys.executable, str(SCRIPT), name, "--result", str(result), "--earlier", str(before)]
        before_run = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the stage ends with this process
        process = subprocess.Popen(
            [*command, *(["--rehearse"] if rehearse else [])], cwd=ROOT, stdout=output, stderr=subprocess.STDOUT,
            env=environment | {"FIRST_HOUR_SCRATCH": folder}, start_new_session=True,
        )  # fmt: skip
        error = None
        try:
            status = process.wait(60 * minutes)
        except subprocess.TimeoutExpired:
            error = f"stopped after {minutes:g} minutes"
        finally:  # its own processes too, and after an interrupt
            _end(process)
            signal.signal(signal.SIGTERM, before_run)
        if error is None and (status or not result.exists()):
            said = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
            error = f"exit code {status}: {said[-1] if said else 'nothing said'}".replace("|", "/")
        found = {} if error else {"result": json.loads(result.read_text())}
    outcome = "failed" if error else "passed"
    return {"outcome": outcome, "seconds": round(time.monotonic() - started, 1), "error": error, **found}


def _end(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):  # all have ended
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


# -- Results --------------------------------------------------------------------------------------------------------------


def load(path: Path, about: Document) -> dict[str, Record]:
    """Records of an earlier start on the same card, with the same versions and code."""
    if not path.exists():
        return {}
    document = json.loads(path.read_text())
    same = all(document["about"].get(key) == about[key] for key in ("machine", "code"))
    return document["stages"] if same else {}


def save(folder: Path, about: Document, records: dict[str, Record]) -> None:
    """first_hour.json and first_hour.md: each is the old one or the new one, whenever the machine is lost."""
    document = {"about": about, "stages": records, "tiles": pasted(about, records)}
    for name, text in (("first_hour.json", json.dumps(document, indent=1)), ("first_hour.md", "\n".join(report(about, records)))):
        new = folder / f"{name}.new"
        new.write_text(text + "\n")
        new.replace(folder / name)


def pasted(about: Document, records: dict[str, Record]) -> list[str]:
    """What a person pastes into `tiles.BY_ARCHITECTURE`."""
    found = [record["result"] for name, record in records.items() if name.startswith("tune ") and "result" in record]
    major, minor = about["machine"].get("capability", (0, 0))
    return tuning.lines(found, 10 * major + minor)


def report(about: Document, records: dict[str, Record]) -> list[str]:
    found = about["machine"]
    said = ", ".join(f"{package} {version}" for package, version in found["versions"].items())
    details = [f"{key} {found[key]}" for key in ("driver", "cuda") if found.get(key)]
    lines = [
        f"# {about['title']}", "",
        f"`{about['command']}`, {about['date']}, {', '.join([found['device'], *details])}, {found['cores']} CPU cores, "
        f"Python {found['python']}, {said}. Code {about['code']}.", *about["notes"], "",
    ]  # fmt: skip
    outcomes: list[Any] = [
        {"stage": name, "outcome": record["outcome"], "s": record["seconds"], "error": record["error"]}
        for name, record in records.items()
    ]
    lines += [*table(outcomes), ""] if outcomes else ["No stage was started.", ""]
    if tiles := pasted(about, records):
        where = "`BY_ARCHITECTURE` of `kernels/mmclip_kernels/tiles.py`"
        lines += [f"Faster tiles, for {where}:", "", "```python", *tiles, "```", ""]
    for name, record in records.items():
        if "result" in record:
            rows, notes = record["result"]["rows"], record["result"].get("notes", [])
            if len(rows) > SHOWN:
                notes = [*notes, f"The first {SHOWN} of {len(rows)} rows."]
            lines += [f"## {name}", "", *([*notes, ""] if notes else []), *table(rows[:SHOWN]), ""]
    return lines


def summary(about: Document, records: dict[str, Record], names: Sequence[str]) -> str:
    """One line for logs."""
    outcomes = [records[name]["outcome"] if name in records else "not started" for name in names]
    counts = ", ".join(f"{outcomes.count(outcome)} {outcome}" for outcome in ("passed", "failed", "not started"))
    seconds = sum(records[name]["seconds"] for name in names if name in records)
    found = ", ".join(f"{package} {about['machine']['versions'][package]}" for package in ("torch", "triton"))
    return (
        f"{about['title']}, {about['date']}, {about['machine']['device']}, {found}: "
        f"{len(names)} stages, {counts}, {seconds:.0f} s"
    )  # fmt: skip


# -- The hour -------------------------------------------------------------------------------------------------------------


def work(planned: Sequence[Stage], folder: Path, about: Document, budget: float, rehearse: bool) -> dict[str, Record]:
    """Run what has not passed yet, while the budget (minutes) lasts."""
    records = load(folder / "first_hour.json", about)
    save(folder, about, records)
    started = time.monotonic()
    for stage in planned:
        if records.get(stage.name, {}).get("outcome") == "passed":
            print(f"{stage.name}: passed before", flush=True)
            continue
        records.pop(stage.name, None)
        if time.monotonic() - started >= 60 * budget:
            print(f"{stage.name}: not started, {budget:g} minutes are over", flush=True)
            continue
        earlier = {name: record["result"] for name, record in records.items() if "result" in record}
        log = folder / "logs" / f"{file_name(stage.name)}.log"
        records[stage.name] = run(stage.name, stage.minutes, rehearse, earlier, log)
        save(folder, about, records)
        record = records[stage.name]
        print(f"{stage.name}: {record['outcome']}, {record['seconds']} s, {record['error'] or 'no error'}", flush=True)
    return records


def main(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python kernels/bench/first_hour.py", description=str(__doc__).splitlines()[0])
    parser.add_argument("--budget", type=float, default=60.0, metavar="MINUTES", help="after which no stage is started")
    parser.add_argument("--only", nargs="+", metavar="STAGE", help="these stages alone; their names are those of the table")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, at tiny sizes, into runs/first_hour")
    parser.add_argument("--folder", type=Path, help="write there instead")
    options = parser.parse_args(words)
    planned = stages(options.rehearse)
    if unknown := set(options.only or ()) - {stage.name for stage in planned}:
        parser.error(f"no stage is named {sorted(unknown)[0]!r}; there are: {', '.join(stage.name for stage in planned)}")
    planned = [stage for stage in planned if not options.only or stage.name in options.only]
    with tempfile.TemporaryDirectory() as scratch:
        log = Path(scratch, "machine.log")
        found = run("machine", 5, options.rehearse, {}, log)
        if found["error"]:
            print(log.read_text(), file=sys.stderr)
            parser.error(f"the machine could not be read: {found['error']}")
    machine = found["result"]
    if not options.rehearse and "capability" not in machine:
        parser.error("no CUDA device was found: run this where there is one, or pass --rehearse")
    folder = options.folder or (REHEARSED if options.rehearse else RESULTS / file_name(machine["device"]))
    if options.rehearse and folder.resolve().is_relative_to(RESULTS.resolve()):
        parser.error(f"a rehearsal measures nothing: pass a folder outside {RESULTS}")
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    about = {
        "title": "First hour, rehearsed" if options.rehearse else "First hour",
        "command": " ".join(["python kernels/bench/first_hour.py", *words]),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(), "machine": machine, "code": code(),
        "notes": ["Without a card, at tiny sizes, in Triton's interpreter: no time means anything."] if options.rehearse else [],
    }  # fmt: skip
    records = work(planned, folder, about, options.budget, options.rehearse)
    for line in pasted(about, records):
        print(line)
    names = [stage.name for stage in planned]
    print(f"{folder / 'first_hour.md'}\n{summary(about, records, names)}")
    return 0 if all(records.get(name, {}).get("outcome") == "passed" for name in names) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
