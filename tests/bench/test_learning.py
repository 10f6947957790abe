"""The learning bench: its statistics against scikit-learn and cases done by hand, its plans, and one plan run to a table."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from mmclip_shards.manifest import load_manifest
from sklearn.metrics import roc_auc_score

from mmclip_dist.bench.learning import __main__ as command
from mmclip_dist.bench.learning.compare import METRICS, compare, macro_auc, resamples
from mmclip_dist.bench.learning.plan import Packed, load_plan
from mmclip_dist.bench.learning.runs import Outcome, Run, Runs
from mmclip_dist.bench.learning.sets import Sets
from mmclip_dist.config import load_config
from mmclip_dist.evaluate.probe import SHARES

PLAN = """
data: {pairs: 48, unpaired: 24, probe: 100, validation: 40, test: 60, draw: 0, size: 40}
steps: 4
evaluations: 2
seeds: [0]
compare: [steps]
control: contrastive
overrides:
- "model.image={size: 32, patch: 8, width: 32, depth: 1, heads: 2}"
- "model.text={width: 32, depth: 1, heads: 2, max_tokens: 48}"
- "attmim.decoder={depth: 1, width: 32, heads: 2}"
- "entmlm.decoder={depth: 1, width: 32, heads: 2}"
- "data.streams=4"
- "data.shuffle_block=8"
- "optim.global_batch=8"
arms:
  contrastive: {overrides: [loss.image=0, loss.entity=0]}
  full: {unpaired: 0.5}
  diverges: {overrides: [health.max_bad_steps=1, optim.clip=1e-30, optim.lr=1e30, model.temperature=1e-6]}
"""


def write_plan(folder: Path, text: str = PLAN) -> Path:
    path = folder / "tiny.yaml"
    path.write_text(text)
    return path


# -- Statistics -------------------------------------------------------------------------------------------------------


def test_the_weighted_auc_is_that_of_scikit_learn_over_repeated_samples() -> None:
    random = np.random.default_rng(0)
    scores, labels = random.normal(size=(80, 3)), random.integers(-1, 2, size=(80, 3))
    weights = random.integers(0, 4, size=(5, 80))
    ours = macro_auc(scores, labels, weights)
    for row, found in zip(weights, ours, strict=True):
        repeated = np.repeat(np.arange(80), row)
        expected = []
        for column in range(3):
            known = repeated[labels[repeated, column] >= 0]
            expected.append(roc_auc_score(labels[known, column], scores[known, column]))
        assert found == pytest.approx(np.mean(expected), abs=1e-12)


def test_patients_are_drawn_whole_and_the_first_row_is_the_data_itself() -> None:
    patients = np.array(["b", "a", "b", "c", "a", "b"])
    weights, seeds = resamples(patients, 3)
    assert (weights[0] == 1).all()
    for name in "abc":
        columns = weights[:, patients == name]
        assert (columns == columns[:, :1]).all()
    per_patient = weights[1:, [1, 0, 3]]
    assert (per_patient.sum(1) == 3).all() and per_patient.std(0).min() > 0.5
    assert set(np.unique(seeds)) == {0, 1, 2}


def arrays_of(scores: np.ndarray, labels: np.ndarray, patients: np.ndarray) -> dict[str, np.ndarray]:
    count = len(labels)
    return {
        "patients": patients, "labels": labels, "zeroshot": scores,
        **{f"probe_{share:g}": scores[None] for share in SHARES},
        **{name: np.ones((count, 3), bool) for name in ("image_to_text", "text_to_image")},
        "pointed_sample": np.arange(count), "pointed_disease": np.arange(count) % 2,
        "pointed": np.arange(count) % 2, "attention_inside": np.full(count, 0.25),
    }  # fmt: skip


def test_a_better_arm_is_outside_the_interval_and_an_equal_one_is_not() -> None:
    random = np.random.default_rng(1)
    labels, patients = random.integers(0, 2, size=(400, 2)), np.arange(400) // 2
    noise = [random.normal(size=(400, 2)) for _ in range(3)]
    control = [arrays_of(labels * 0.5 + own, labels, patients) for own in noise]
    better = [arrays_of(labels * 1.5 + own, labels, patients) for own in noise]
    equal = [arrays_of(labels * 0.5 + random.normal(size=(400, 2)), labels, patients) for _ in range(3)]
    found = compare(better, control)["zero-shot AUC"]
    assert found.interval[0] > 0.1 and found.interval[0] < found.difference < found.interval[1]
    assert found.mean == pytest.approx(np.mean([roc_auc_score(one["labels"], one["zeroshot"]) for one in better]))
    low, high = compare(equal, control)["zero-shot AUC"].interval
    assert low < 0 < high
    assert compare(control, control)["pointing game"].mean == 0.5  # the mean over diseases: one always hit, one never
    assert "error in boxes" not in compare(control, control)  # not measured in these arms


def test_runs_on_other_patients_are_not_compared() -> None:
    labels = np.tile([[0], [1]], (4, 1))
    one = arrays_of(labels + 0.0, labels, np.arange(8))
    with pytest.raises(ValueError, match="measured on different patients"):
        compare([one], [one | {"patients": np.arange(8) + 1}])


def test_a_set_without_boxes_and_reports_has_the_other_metrics() -> None:
    generator = np.random.default_rng(0)
    labels, patients = generator.integers(0, 2, (60, 2)), np.arange(60).astype(str)
    own = arrays_of(generator.normal(size=(60, 2)), labels, patients)
    own |= {name: own[name][:0] for name in own if name.startswith(("pointed", "attention_inside", "box_share"))}
    own = {name: value for name, value in own.items() if name not in ("image_to_text", "text_to_image")}
    found = compare([own, own], [own, own])
    assert {"zero-shot AUC", "probe 1%"} <= set(found)
    assert not {"pointing game", "attention in boxes", "image to text R@1", "text to image R@10"} & set(found)


# -- Plans ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (("steps: 4", "stepps: 4"), "unknown config key 'stepps'"),
        (("seeds: [0]", "seeds: []"), "seeds: Tuple should have at least 1 item"),
        (("seeds: [0]", "seeds: [1, 1]"), "names one twice"),
        (("control: contrastive", "control: clip"), "control=clip is no arm; the arms are contrastive, full, diverges"),
        (("full: {unpaired: 0.5}", "full: {attention: gone}"), "arms.full.attention=gone is no arm"),
        (("unpaired: 24,", ""), "arms.full.unpaired=0.5, but the data has no unpaired images"),
        (("arms:", "arms: ["), "is not valid YAML"),
        (("  full:", "  all three:"), "String should match pattern"),
    ],
)
def test_a_plan_that_cannot_be_run_is_one_line_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: tuple[str, str], told: str
) -> None:
    path = write_plan(tmp_path, PLAN.replace(*change))
    assert command.main([str(path), "--work", str(tmp_path / "work")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and told in error and error.count("\n") == 1
    assert not (tmp_path / "work").exists()


def test_the_committed_plans_can_be_run() -> None:
    for path in sorted(command.RESULTS.glob("*.yaml")):
        plan = load_plan(path)
        for arm in plan.arms.values():
            load_config(plan.recipe, [*plan.overrides, *arm.overrides, "run_dir=unused"])


def test_sets_of_ones_own_are_taken_as_they_lie(sets, tmp_path: Path) -> None:
    data = Packed(pairs=sets.paired, unpaired=sets.unpaired, probe=sets.paired, validation=sets.test, test=sets.test)
    own = Sets(data, tmp_path)
    training = own.training(1)
    assert (training.pairs, training.unpaired, own.held_out("test")) == (sets.paired, sets.unpaired, sets.test)
    assert load_manifest(training.entities).kind == "entities" and Path(training.tokenizer).is_dir()
    assert own.training(2) == training  # the seeds differ in weights and order alone


def test_arms_that_score_patches_run_before_those_that_need_them(tmp_path: Path) -> None:
    plan = load_plan(write_plan(tmp_path, PLAN.replace("full: {unpaired: 0.5}", "split: {attention: contrastive}")))
    first, others = command.rounds(plan)
    assert {run.arm for run in first} == {"contrastive"} and {run.arm for run in others} == {"split", "diverges"}


def test_equal_time_gives_an_arm_as_many_steps_as_the_control_has_time_for(tmp_path: Path) -> None:
    plan = load_plan(write_plan(tmp_path))
    runs = Runs(plan, Sets(plan.data, tmp_path), tmp_path)
    for arm, seconds in (("contrastive", 10.0), ("full", 20.0)):
        folder = runs.folder_of(Run(arm, 0, "steps"))
        folder.mkdir(parents=True)
        (folder / "result.json").write_text(json.dumps(vars(Outcome(4, 4, 0.5, seconds))))
    assert runs.steps(Run("full", 0, "time")) == 2 and runs.steps(Run("full", 0, "steps")) == 4
    with pytest.raises(ValueError, match="no run of the arm diverges came to its end"):
        runs.steps(Run("diverges", 0, "time"))


@pytest.mark.slow
def test_a_plan_becomes_a_table_and_goes_on_where_it_stopped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(write_plan(tmp_path)), "--work", str(tmp_path / "work"), "--out", str(tmp_path / "out"), "--jobs", "2"]
    assert command.main(words) == 0, capsys.readouterr().err
    document = json.loads((tmp_path / "out" / "tiny.json").read_text())["equal steps"]
    assert set(document) == {"contrastive", "full"}
    full = document["full"]
    assert {*METRICS} == {*full["metrics"]}
    assert all(0 <= full["metrics"][name]["mean"] <= 1 for name in ("probe 1%", "pointing game"))
    assert "error in boxes" not in document["contrastive"]["metrics"]
    assert full["runs"][0]["steps"] == 4 and full["runs"][0]["processor_s"] > 0
    table = (tmp_path / "out" / "tiny.md").read_text()
    assert "- `diverges`, seed 0: ended at step" in table and "| zero-shot AUC |" in table
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "work").rglob("measures.npz")}
    assert len(made) == 2
    assert command.main(words) == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "work").rglob("measures.npz")} == made
    other = write_plan(tmp_path, PLAN.replace("loss.entity=0", "loss.entity=0.5"))
    assert command.main([str(other), *words[1:]]) == 2
    assert "holds the runs of another plan (contrastive)" in capsys.readouterr().err
