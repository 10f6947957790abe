"""Does an arm learn more than the control? Arms x seeds through the ordinary training, measured on held-out patients.

    python -m mmclip_dist.bench.learning PLAN.yaml --work FOLDER [--jobs 2] [--out FOLDER]

Everything is kept in --work, run by run: the same command goes on where it was stopped. PLAN.md and PLAN.json appear in --out.
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from mmclip_dist.bench.learning.compare import METRICS, Compared, compare
from mmclip_dist.bench.learning.measures import measure_to
from mmclip_dist.bench.learning.plan import Plan, load_plan
from mmclip_dist.bench.learning.runs import Outcome, Run, Runs
from mmclip_dist.bench.learning.sets import Sets

RESULTS = Path(__file__).parents[1] / "results" / "learning"
MEASURES = "measures.npz"


def main(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m mmclip_dist.bench.learning", description=str(__doc__).splitlines()[0])
    parser.add_argument("plan", type=Path)
    parser.add_argument("--work", type=Path, required=True, help="folder of sets and runs")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at once")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the tables")
    options = parser.parse_args(words)
    try:
        plan = load_plan(options.plan)
        check_folder(plan, options.work)
        runs = Runs(plan, Sets(plan.data, options.work / "sets"), options.work / "runs")
        for wanted in rounds(plan):
            runs.complete(wanted, options.jobs)
            measure_all(runs, wanted, options.jobs)
        publish(plan, runs, options.plan.stem, options.out, words)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def check_folder(plan: Plan, work: Path) -> None:
    """ValueError if the folder holds the runs of another plan: they would be mixed. More seeds or arms may come."""
    path = work / "plan.json"
    settings = plan.model_dump(mode="json", exclude={"seeds", "arms", "compare"})
    found = json.loads(path.read_text()) if path.exists() else {"settings": settings, "arms": {}}
    arms = {name: arm.model_dump(mode="json") for name, arm in plan.arms.items()}
    changed = [name for name, arm in arms.items() if found["arms"].get(name, arm) != arm]
    if found["settings"] != settings or changed:
        raise ValueError(f"{work} holds the runs of another plan ({', '.join(changed) or 'other settings'}): name another --work")
    work.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"settings": settings, "arms": found["arms"] | arms}))


def rounds(plan: Plan) -> list[list[Run]]:
    """What can run at the same time: arms that score patches for others first, equal steps before equal time."""
    scorers = {arm.attention for arm in plan.arms.values() if arm.attention}
    first = [Run(name, seed, "steps") for seed in plan.seeds for name in plan.arms if name in scorers]
    others = [Run(name, seed, "steps") for seed in plan.seeds for name in plan.arms if name not in scorers]
    timed = [Run(name, seed, "time") for seed in plan.seeds for name in plan.arms if name != plan.control]
    return [first, others] + ([timed] if "time" in plan.compare else [])


def measure_all(runs: Runs, wanted: Sequence[Run], jobs: int) -> None:
    """Measure the finished runs that are not measured yet."""
    missing = [run for run in wanted if _whole(runs, run) and not (runs.folder_of(run) / MEASURES).exists()]
    if not missing:
        return
    sets = {name: runs.sets.held_out(name) for name in ("test", "validation", "probe")}
    entities = runs.sets.entities(sets["test"], runs.sets.folder / "test-entities")
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(measure_to, [(runs.checkpoint(run), sets, entities, runs.folder_of(run) / MEASURES) for run in missing]))


def _whole(runs: Runs, run: Run) -> bool:
    outcome = runs.outcome(run)
    return outcome is not None and outcome.failed is None


def publish(plan: Plan, runs: Runs, name: str, out: Path, words: Sequence[str]) -> None:
    """Write NAME.md and NAME.json."""
    document: dict[str, object] = {"plan": plan.model_dump(mode="json"), "cpus": os.cpu_count(), "torch": torch.__version__}
    lines = [
        f"# {name}", "",
        f"{datetime.date.today()}, {os.cpu_count()} CPU cores, torch {torch.__version__}, one rank and one thread a run.",
        f"Command: `python -m mmclip_dist.bench.learning {' '.join(words)}`", "",
        f"Seeds {', '.join(map(str, plan.seeds))}; each has training data and weights of its own. Values are means over the",
        "seeds on the same test patients, each run at its best checkpoint by validation. In brackets the difference to",
        f"`{plan.control}` with its 95% bootstrap interval over patients and seeds; bold: 0 lies outside.",
    ]  # fmt: skip
    for comparison in plan.compare:
        found = {arm: compared for arm in plan.arms if (compared := _compared(plan, runs, arm, comparison))}
        document[f"equal {comparison}"] = {
            arm: {"metrics": {metric: asdict(value) for metric, value in compared.items()},
                  "runs": [asdict(o) for o in _outcomes(plan, runs, arm, comparison)]}
            for arm, compared in found.items()
        }  # fmt: skip
        lines += ["", f"## Equal {comparison}", "", *_table(plan, runs, found, comparison)]
        lines += _failures(plan, runs, comparison)
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.md").write_text("\n".join(lines) + "\n")
    (out / f"{name}.json").write_text(json.dumps(document, indent=1) + "\n")
    print("\n".join(lines))


def _run(plan: Plan, arm: str, seed: int, comparison: str) -> Run:
    return Run(arm, seed, "steps" if arm == plan.control else comparison)


def _outcomes(plan: Plan, runs: Runs, arm: str, comparison: str) -> list[Outcome]:
    found = [runs.outcome(_run(plan, arm, seed, comparison)) for seed in plan.seeds]
    return [outcome for outcome in found if outcome is not None]


def _compared(plan: Plan, runs: Runs, arm: str, comparison: str) -> dict[str, Compared]:
    """Over the seeds for which both the arm and the control came to their end."""
    pairs = [(_run(plan, arm, seed, comparison), _run(plan, plan.control, seed, comparison)) for seed in plan.seeds]
    whole = [(one, other) for one, other in pairs if _whole(runs, one) and _whole(runs, other)]
    if not whole:
        return {}
    ours, theirs = ([dict(np.load(runs.folder_of(pair[place]) / MEASURES)) for pair in whole] for place in (0, 1))
    return compare(ours, theirs)


def _table(plan: Plan, runs: Runs, found: dict[str, dict[str, Compared]], comparison: str) -> list[str]:
    """One column an arm, one row a metric."""
    whole = {arm: [o for o in _outcomes(plan, runs, arm, comparison) if o.failed is None] for arm in found}
    rows = {
        "seeds": {arm: str(len(outcomes)) for arm, outcomes in whole.items()},
        "steps": {arm: str(outcomes[0].steps) for arm, outcomes in whole.items()},
        "best at step": {arm: ", ".join(str(outcome.best) for outcome in outcomes) for arm, outcomes in whole.items()},
        "processor time of a step": {arm: f"{runs.cost(arm):.2f}" for arm in found},
    }
    for name in METRICS:
        if cells := {arm: _cell(compared[name], arm == plan.control) for arm, compared in found.items() if name in compared}:
            rows[name] = cells
    lines = [f"| | {' | '.join(found)} |", "|---" * (len(found) + 1) + "|"]
    return lines + [f"| {name} | {' | '.join(cells.get(arm, '') for arm in found)} |" for name, cells in rows.items()]


def _cell(value: Compared, is_control: bool) -> str:
    low, high = value.interval
    if is_control or np.isnan(low):
        return f"{value.mean:.3f}"
    text = f"{value.mean:.3f} ({value.difference:+.3f}; {low:+.3f} to {high:+.3f})"
    return f"**{text}**" if low > 0 or high < 0 else text


def _failures(plan: Plan, runs: Runs, comparison: str) -> list[str]:
    lines = []
    for arm in plan.arms:
        for seed in plan.seeds:
            outcome = runs.outcome(_run(plan, arm, seed, comparison))
            if outcome is not None and outcome.failed is not None:
                lines.append(f"- `{arm}`, seed {seed}: ended at step {outcome.steps}: {outcome.failed}")
    return ["", "Runs that did not come to their end:", "", *lines] if lines else []


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
