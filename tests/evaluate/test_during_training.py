"""Zero-shot scores of a run under way, on one rank: when they are due, what they are, and that a stop ends them.

tests/test_training.py has two ranks of ZeRO-3 and averaged weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist
from mmclip_shards.manifest import load_manifest

from mmclip_dist.checkpoint.folder import Meta
from mmclip_dist.checkpoint.model_files import write_model
from mmclip_dist.evaluate import during_training, reading
from mmclip_dist.evaluate.during_training import EvaluationDuringTraining
from mmclip_dist.evaluate.zeroshot import zero_shot
from mmclip_dist.model.build import build_model


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def stop_after(rounds: int) -> Any:
    """A stop request that comes in after so many questions."""
    asked = iter([False] * rounds)
    return SimpleNamespace(requested=lambda device: next(asked, True))


def evaluation_of(sets: Any, tokenizer: Any, *overrides: str) -> EvaluationDuringTraining:
    config = sets.config(f"evaluation={{sets: [{sets.test}], every: 3}}", "optim.steps=10", *overrides)
    return EvaluationDuringTraining(config, tokenizer, ())


def test_it_is_due_every_so_many_steps_and_after_the_last(sets, tokenizer) -> None:
    whole, stopped = evaluation_of(sets, tokenizer), evaluation_of(sets, tokenizer, "optim.stop_at=7")
    assert [step for step in range(1, 11) if whole.due(step)] == [3, 6, 9, 10]
    assert [step for step in range(1, 8) if stopped.due(step)] == [3, 6, 7]


def test_scores_are_those_of_the_command_and_a_stop_ends_them(
    sets, tokenizer, one_rank: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, diseases = sets.config(), load_manifest(sets.test).labels
    model = build_model(config, tokenizer, diseases)
    folder = tmp_path / "step"
    folder.mkdir()
    write_model(folder, model, tokenizer, config, Meta(1, 1, 1, diseases, ()))
    command = zero_shot(str(folder), [sets.test])
    monkeypatch.setattr(reading, "BATCH", 5)  # several rounds
    evaluation, engine = evaluation_of(sets, tokenizer), SimpleNamespace(module=model, device="cpu")
    found = evaluation.scores(engine, stop_after(100))
    assert found == pytest.approx({"macro": command.auc_macro, **command.per_class}, abs=1e-9)
    assert evaluation.scores(engine, stop_after(2)) is None
    assert model.training  # as before, also after the stop


def test_a_class_that_cannot_be_scored_is_left_out_of_the_mean(
    sets, tokenizer, one_rank: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, diseases = sets.config(), load_manifest(sets.test).labels
    aucs = np.array([np.nan, *np.linspace(0.5, 0.9, len(diseases) - 1)])
    monkeypatch.setattr(during_training, "per_class_auc", lambda scores, labels: aucs)
    engine = SimpleNamespace(module=build_model(config, tokenizer, diseases), device="cpu")
    found = evaluation_of(sets, tokenizer).scores(engine, stop_after(100))
    assert found == pytest.approx({"macro": 0.7} | dict(zip(diseases[1:], aucs[1:], strict=True)))


def test_a_set_that_is_trained_on_is_refused(sets, tokenizer) -> None:
    trained_on = tuple(shard.sha256 for shard in load_manifest(sets.test).shards[-1:])
    config = sets.config(f"evaluation.sets=[{sets.test}]")
    with pytest.raises(ValueError, match="was trained on"):
        EvaluationDuringTraining(config, tokenizer, trained_on)
