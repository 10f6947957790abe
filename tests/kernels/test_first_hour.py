"""The first hour with a card, without one: every stage runs, one that fails loses no other, and nothing is measured twice."""

from __future__ import annotations

import importlib
import json
import site
import subprocess
import sys
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

import pytest
import torch
from mmclip_kernels import tiles

ROOT = Path(__file__).parents[2]
BENCH = ROOT / "kernels" / "bench"
RESULTS = BENCH / "results"
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")
MACHINE = {"device": "a card", "python": "3", "cores": 1, "versions": {"torch": "2", "triton": "3"}, "capability": [9, 0]}


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Gives a module of kernels/bench."""
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module


@pytest.fixture
def hour(bench: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """first_hour.py with three stages that are not run: `outcomes` says how each ends, `started` which have been, `versions` what
    the machine has."""
    module = bench("first_hour")
    module.outcomes, module.started, module.machine = {}, [], dict(MACHINE)

    def run(name: str, minutes: float, rehearse: bool, earlier: Any, log: Path) -> dict[str, Any]:
        if name == "machine":
            return {"outcome": "passed", "seconds": 0.0, "error": None, "result": module.machine}
        module.started.append((name, sorted(earlier)))
        error = module.outcomes.get(name)
        result = {} if error else {"result": {"rows": [{"of": name}]}}
        return {"outcome": "failed" if error else "passed", "seconds": 1.0, "error": error, **result}

    monkeypatch.setattr(module, "run", run)
    monkeypatch.setattr(module, "stages", lambda rehearse: [module.Stage(name, dict, 1) for name in ("one", "two", "three")])
    return module


def test_a_stage_that_fails_is_recorded_and_the_rest_goes_on(hour: Any, tmp_path: Path, capsys: Any) -> None:
    hour.outcomes["two"] = "exit code 1: it broke"
    assert hour.main(["--folder", str(tmp_path)]) == 1
    assert hour.started == [("one", []), ("two", ["one"]), ("three", ["one"])]
    assert "| two | failed | 1.0 | exit code 1: it broke |" in (tmp_path / "first_hour.md").read_text()
    assert capsys.readouterr().out.splitlines()[-1].endswith("3 stages, 2 passed, 1 failed, 0 not started, 3 s")
    hour.outcomes.clear()
    assert hour.main(["--folder", str(tmp_path)]) == 0
    assert hour.started[3:] == [("two", ["one", "three"])]  # what has passed is not run again


@pytest.mark.parametrize("changed", ["versions", "device", "code"])
def test_another_card_or_version_or_code_starts_anew(
    hour: Any, changed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert hour.main(["--folder", str(tmp_path)]) == 0
    if changed == "code":
        monkeypatch.setattr(hour, "code", lambda: "other")
    else:
        hour.machine[changed] = {"torch": "2", "triton": "3.1"} if changed == "versions" else "another card"
    assert hour.main(["--folder", str(tmp_path), "--only", "two"]) == 0
    assert [name for name, _ in hour.started] == ["one", "two", "three", "two"]
    assert list(json.loads((tmp_path / "first_hour.json").read_text())["stages"]) == ["two"]


def test_after_the_budget_no_stage_starts(hour: Any, tmp_path: Path, capsys: Any) -> None:
    assert hour.main(["--folder", str(tmp_path), "--budget", "0"]) == 1
    assert hour.started == [] and "No stage was started." in (tmp_path / "first_hour.md").read_text()
    assert "3 not started" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--only", "four"], "no stage is named 'four'; there are: one, two, three"),
        ([], "no CUDA device was found: run this where there is one, or pass --rehearse"),
        (["--rehearse", "--folder", str(RESULTS / "h200")], "a rehearsal measures nothing: pass a folder outside"),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_line(hour: Any, words: list[str], said: str, capsys: Any) -> None:
    del hour.machine["capability"]
    with pytest.raises(SystemExit) as ended:
        hour.main(words)
    assert ended.value.code == 2 and said in capsys.readouterr().err.splitlines()[-1]
    assert hour.started == []


def test_a_stage_is_stopped_after_its_time(bench: Any, tmp_path: Path) -> None:
    record = bench("first_hour").run("machine", 0.001, True, {}, tmp_path / "log")
    assert (record["outcome"], record["error"]) == ("failed", "stopped after 0.001 minutes")


@pytest.mark.parametrize(
    ("script", "error"),
    [
        ("open(sys.argv[3], 'w').write('{\"rows\": 7}')", None),
        ("print('one'); raise ValueError('a|b')", "exit code 1: ValueError: a/b"),
        ("os.kill(os.getpid(), 11)", "exit code -11: nothing said"),
        ("pass", "exit code 0: nothing said"),  # and no result
        ("open(sys.argv[3], 'w').write('{}'); os._exit(9)", "exit code 9: nothing said"),
    ],
)
def test_how_a_stage_ends(bench: Any, script: str, error: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its last line is the error; it gets the results before it, and the interpreter in a rehearsal."""
    module, path = bench("first_hour"), tmp_path / "stage.py"
    path.write_text(f"""import json, os, sys
assert json.load(open(sys.argv[5])) == {{"one": 1}} and sys.argv[6] == "--rehearse"
assert (os.environ["TRITON_INTERPRET"], os.environ["CUDA_VISIBLE_DEVICES"]) == ("1", "")
{script}
""")
    monkeypatch.setattr(module, "SCRIPT", path)
    record = module.run("two", 1, True, {"one": 1}, tmp_path / "log")
    assert (record["error"], record["outcome"]) == (error, "failed" if error else "passed")
    assert record.get("result") == (None if error else {"rows": 7})


def test_a_stage_ends_with_the_hour(bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGTERM, as of `timeout` and of schedulers: the stage would go on on the card."""
    module, path, alive = bench("first_hour"), tmp_path / "stage.py", tmp_path / "alive"
    path.write_text(f"import os, signal, time\nopen({str(alive)!r}, 'w').write(str(os.getpid()))\n"
                    "os.kill(os.getppid(), signal.SIGTERM)\ntime.sleep(60)\n")  # fmt: skip
    monkeypatch.setattr(module, "SCRIPT", path)
    with pytest.raises(SystemExit, match="143"):
        module.run("two", 1, True, {}, tmp_path / "log")
    assert not Path("/proc", alive.read_text()).exists()


@pytest.mark.slow
def test_a_rehearsal_from_the_shell_touches_no_results(tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in RESULTS.rglob("*")}
    script, words = "kernels/bench/first_hour.py", ["--rehearse", "--folder", str(tmp_path), "--only", "topk_mask 2 x 16"]
    found = subprocess.run([sys.executable, script, *words], cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert found.returncode == 0, found.stderr
    assert "1 stages, 1 passed, 0 failed, 0 not started" in found.stdout.splitlines()[-1]
    stages = json.loads((tmp_path / "first_hour.json").read_text())["stages"]
    assert {row["mode"] for row in stages["topk_mask 2 x 16"]["result"]["rows"]} == {"gather", "replace"}
    assert {path: path.stat().st_mtime_ns for path in RESULTS.rglob("*")} == before


@pytest.mark.slow
def test_every_stage_runs_at_the_smallest_sizes(bench: Any, compiler: Executor) -> None:
    """But the one that runs tests, which would be these. One tile does not compile: it is refused, and no other is."""
    found = [tiles.USUAL["sweep"], tiles.Tile(64, 128, 24, 4, 3), tiles.USUAL["sweep, masked"]]
    compiler.submit(site.addsitedir, str(BENCH)).result()
    rows = bench("tuning").candidates(compiler, 90, ["sweep"], found)
    assert [row["fits"] for row in rows] == [True, False, True] and rows[0]["registers"] > 0 and rows[1]["error"]
    earlier: dict[str, Any] = {"candidates": {"rows": rows}}
    for stage in bench("stages").stages(rehearse=True):
        if stage.name not in ("tests", "candidates"):
            earlier[stage.name] = stage.run(earlier)
    assert {row["equal bit for bit"] for row in earlier["graph"]["rows"]} == {"True"}
    tried = {tuple(row[part] for part in tiles.Tile._fields) for row in earlier["tune sweep"]["rows"]}
    assert tried == {found[0], found[2]} and tuple(earlier["tune sweep"]["used"]) == found[0]
    assert {row["loss"] for row in earlier["accuracy"]["rows"]} == {row["loss"] for row in earlier["contrastive 64 x 32"]["rows"]}
    with pytest.raises(ValueError, match="the stage `candidates` has to pass first"):
        bench("stages").tune(bench("stages").REHEARSAL, "sweep", {})


# -- Tiles ------------------------------------------------------------------------------------------------------------------


def test_tiles_that_are_tried_fit_shared_memory(bench: Any) -> None:
    found = list(bench("tuning").grid(90))
    assert found[: len(set(tiles.USUAL.values()))] == list(dict.fromkeys(tiles.USUAL.values())) and len(found) == len(set(found))
    assert all(2 * tile.stages * tile.depth * (tile.rows + tile.columns) <= 227 * 1024 for tile in found)


SLOW, FAST = tiles.Tile(64, 64, 32, 4, 2), tiles.Tile(64, 64, 32, 8, 2)


@pytest.mark.parametrize(("faster", "best"), [(1.01, "used"), (1.05, "found")])
def test_a_tile_takes_the_place_of_another_if_it_is_faster_by_more_than_noise(
    bench: Any, faster: float, best: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuning = bench("tuning")
    spent = {tiles.USUAL["gradient"]: 10.0, SLOW: 12.0, FAST: 10.0 / faster}

    def rounds(cases: dict[str, Any], count: int, seconds: float) -> dict[str, list[float]]:
        return {name: [spent[tile] for tile in [case(0)] * 3] for name, case in cases.items()}

    monkeypatch.setattr(tuning, "rounds", rounds)
    monkeypatch.setattr(tuning, "architecture", lambda: 90)
    monkeypatch.setattr(tuning, "_pass", lambda *_: lambda: tiles.logits_tile("gradient", torch.bfloat16, False, 90))
    monkeypatch.setattr(tuning, "_check", lambda *_: None)
    rows = [{"kernel": "gradient", **tile._asdict(), "fits": fits} for tile, fits in ((SLOW, True), (FAST, True), (SLOW, False))]
    found = tuning.measure("gradient", rows, [(64, 16)], 3, 1.0)
    assert found["best"] == list(FAST if best == "found" else tiles.USUAL["gradient"])
    assert [row["ms"] for row in found["rows"]] == sorted(row["ms"] for row in found["rows"]) and len(found["rows"]) == 3
    lines = tuning.lines([found], 90)
    if best == "used":
        assert lines == []
    else:
        assert lines == ['    90: {"gradient": Tile(rows=64, columns=64, depth=32, warps=8, stages=2)},']


def test_a_tile_with_wrong_values_is_refused(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tuning = bench("tuning")
    tuning._check("gradient", SLOW, False, 70)
    own = tuning.contrastive_loss

    def wrong(*x: Any, impl: Any, **y: Any) -> Any:
        return own(*x, impl=impl, **y) * (1.1 if impl == "triton" else 1)

    monkeypatch.setattr(tuning, "contrastive_loss", wrong)
    with pytest.raises(ValueError, match=r"gradient with Tile.* is wrong"):
        tuning._check("gradient", SLOW, False, 70)


def test_a_peer_that_fails_is_a_row_and_we_are_an_error(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = bench("contrastive")
    own = losses.losses()

    def broken() -> Any:
        raise ImportError("no such kernel\nfor this card")

    monkeypatch.setattr(losses, "losses", lambda: {**own, "peer": broken})
    rows = {row["loss"]: row for row in losses.compare(16, 8, 3, with_memory=False)}
    assert rows["peer"]["ms"] == "failed: ImportError: for this card" and rows[losses.OURS]["time / ours"] == 1.0
    assert {row["loss"]: row for row in losses.errors(16, 8)}["peer"]["loss error"] == "failed: ImportError: for this card"
    monkeypatch.setattr(losses, "losses", lambda: {losses.OURS: broken})
    with pytest.raises(ImportError):
        losses.compare(16, 8, 3, with_memory=False)
