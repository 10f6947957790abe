"""What the quick start refuses before it writes anything, what it hands to each phase, and how it remembers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from mmclip_launch.quickstart import Job, Progress, check, control_steps, phase_config, phase_overrides, summarise
from mmclip_shards.manifest import load_manifest

from mmclip_dist.run.metrics import MetricsLog
from tests.conftest import TINY


def job(sets, out: Path, **given: tuple[str, ...]) -> Job:
    urls = {"paired": (sets.paired,), "unpaired": (sets.unpaired,), "evaluation": (sets.test,)} | given
    return Job(out, **urls, overrides=TINY)


def test_good_sets_pass(sets, tmp_path: Path) -> None:
    check(job(sets, tmp_path))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"evaluation": ()}, "name at least one --paired and one --eval"),
        ({"paired": ()}, "name at least one --paired and one --eval"),
        ({"evaluation": ("PAIRED",)}, "is trained on, so it cannot be evaluated on"),
        ({"evaluation": ("/nowhere",)}, "/nowhere"),
    ],
)
def test_sets_that_cannot_work_are_refused(sets, tmp_path: Path, given: dict, message: str) -> None:
    given = {name: tuple(url.replace("PAIRED", sets.paired) for url in urls) for name, urls in given.items()}
    with pytest.raises(ValueError, match=message):
        check(job(sets, tmp_path, **given))


def test_streams_that_do_not_divide_the_batch_are_refused(sets, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no multiple of data\.streams=3"):
        check(Job(tmp_path, (sets.paired,), (), (sets.test,), (*TINY, "data.streams=3")))


def test_the_warm_up_is_contrastive_and_training_goes_on_from_it(sets, tmp_path: Path) -> None:
    quick = Job(tmp_path, (sets.paired,), (sets.unpaired,), (sets.test,), (*TINY, "optim.stop_at=6"))
    warmup, train = phase_config(quick, "warmup"), phase_config(quick, "train")
    assert warmup.optim.stop_at == 6 and train.optim.stop_at is None
    assert warmup.loss.image == warmup.loss.entity == 0 and warmup.checkpoint.start_from is None
    assert all(source.entities is source.attention is None for source in warmup.data.sources)
    assert train.loss.image > 0 and train.loss.entity > 0 and train.checkpoint.start_from == str(tmp_path / "warmup")
    assert train.run_dir == str(tmp_path / "train")
    paired, unpaired = train.data.sources
    assert paired.entities == str(tmp_path / "sidecars" / "entities" / "0") and unpaired.entities is None
    assert paired.attention == str(tmp_path / "sidecars" / "attention" / "0")
    assert unpaired.attention == str(tmp_path / "sidecars" / "attention" / "1")
    assert [s.weight for s in train.data.sources] == [load_manifest(url).samples for url in (sets.paired, sets.unpaired)]
    assert phase_overrides(quick, "train")[: len(TINY)] == list(TINY)  # the user's come first, ours are what they type


def test_stages_are_remembered_and_another_job_is_refused(sets, tmp_path: Path) -> None:
    progress = Progress(job(sets, tmp_path))
    assert not progress.done("pack")
    progress.record("pack", 1.26)
    again = Progress(job(sets, tmp_path))
    assert again.done("pack") and not again.done("train") and again.stages == [("pack", 1.3)]
    with pytest.raises(ValueError, match=r"another configuration \(differs in unpaired\)"):
        Progress(job(sets, tmp_path, unpaired=()))
    (tmp_path / "quickstart.json").write_text('{"settings": {')
    with pytest.raises(ValueError, match=r"quickstart.json is cut or is not JSON .*: delete the folder to start anew"):
        Progress(job(sets, tmp_path))


def test_the_summary_joins_both_phases(sets, tmp_path: Path) -> None:
    for phase, steps in (("warmup", (1, 5, 9)), ("train", (6, 9)), ("control", (6, 11))):
        (tmp_path / phase).mkdir()
        log = MetricsLog(tmp_path / phase, 0)
        for step in steps:
            losses = {"contrastive": 10.0 - step} | ({"image": 1 / step} if phase == "train" else {})
            seconds = {"warmup": 9.0 if step == 1 else 4.0, "train": 3.0, "control": 3.1}[phase]
            log.write({"step": step, "samples": 8 * step, "loss": losses, "processor_s": seconds})
    result = {"auc_macro": 0.7, "per_class": {"Nodule": 0.7}, "auc_macro_ci95": [0.6, 0.8], "samples": 3}
    (tmp_path / "zeroshot.json").write_text(json.dumps(result))
    (tmp_path / "control.json").write_text(json.dumps(result | {"auc_macro": 0.65}))
    found = summarise(job(sets, tmp_path), [("pack", 1.0)])
    assert found["samples"] == 72 and found["world_size"] == 2 and found["stages"] == [{"name": "pack", "seconds": 1.0}]
    assert found["loss"] == {"contrastive": {"first": 9.0, "last": 1.0}, "image": {"first": 1 / 6, "last": 1 / 9}}
    shot = {key: result[key] for key in ("auc_macro", "per_class", "auc_macro_ci95")}
    assert found["zero_shot"] == shot and found["processor_s"] == 6.0
    assert found["control"] == {"zero_shot": shot | {"auc_macro": 0.65}, "processor_s": 6.2, "steps": 11}
    assert control_steps(job(sets, tmp_path)) == 15  # a step of the warm-up took a second, but for the first: six of them after 9
