"""What a save leaves, what a run may go on from, and what it refuses, with the reason."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from deepspeed.runtime.zero.config import ZeroStageEnum

from mmclip_dist.checkpoint import mirror as mirror_module
from mmclip_dist.checkpoint import store, writer
from mmclip_dist.checkpoint.conversion import needs_conversion
from mmclip_dist.checkpoint.folder import (
    MANIFEST,
    Meta,
    checkpoint_path,
    checkpoints_of,
    entry_of,
    fault,
    parse_manifest,
    write_manifest,
)  # fmt: skip
from mmclip_dist.checkpoint.model_files import load_model, write_model
from mmclip_dist.checkpoint.safe import load_state
from mmclip_dist.checkpoint.store import Checkpoints, check_data, check_shapes
from mmclip_dist.config import load_config
from mmclip_dist.data.seen import SEEN, Seen, load_seen
from mmclip_dist.engine.collective import AgreedError, agreed
from mmclip_dist.engine.optimizer import build_optimizer
from mmclip_dist.engine.random_state import random_state
from mmclip_dist.model.build import build_model
from mmclip_dist.run.folder import describe, locked
from tests import faulty_train
from tests.conftest import TRAIN, wait_for
from tests.ranks import run_ranks

META = Meta(8, 2, 1, (), ("a", "b"))


@pytest.mark.parametrize(
    ("written", "here", "convert"),
    [
        ((2, 1), (2, 1), False), ((2, 1), (4, 1), True), ((2, 1), (2, 2), True), ((2, 2), (1, 1), True), ((2, 3), (2, 3), False),
        ((2, 3), (1, 3), True), ((2, 0), (4, 0), False),
    ],
)  # fmt: skip
def test_another_number_of_ranks_is_converted(written: tuple[int, int], here: tuple[int, int], convert: bool) -> None:
    meta = replace(META, world_size=written[0], zero_stage=written[1])
    assert needs_conversion(meta, *here) == convert


@pytest.mark.parametrize(("written", "here"), [(1, 3), (2, 3), (3, 1), (3, 2), (0, 1), (2, 0), (0, 3)])
def test_a_stage_that_cuts_otherwise_is_refused_with_the_reason(written: int, here: int) -> None:
    with pytest.raises(ValueError, match=rf"zero_stage={written} \(.*zero_stage={here} \(.*Go on with zero_stage={written}"):
        needs_conversion(replace(META, zero_stage=written), 2, here)


def test_changed_data_is_refused_in_the_same_run() -> None:
    path = Path("run/checkpoints/step-00000008")
    check_data(path, META, ("a", "b"))
    with pytest.raises(ValueError, match=r"1 of its 2 shards are gone, 2 are new.*checkpoint.start_from=run/checkpoints/step-"):
        check_data(path, META, ("b", "c", "d"))
    with pytest.raises(ValueError, match="its shards come in another order"):
        check_data(path, META, ("b", "a"))


def test_a_checkpoint_of_another_model_is_refused(sets, tokenizer, tmp_path: Path) -> None:
    config = sets.config()
    write_model(tmp_path, build_model(config, tokenizer, ()), tokenizer, config, META)
    check_shapes(tmp_path, build_model(config, tokenizer, ()))
    other = build_model(sets.config("model.embed=8"), tokenizer, ())
    with pytest.raises(ValueError, match=r"of another model: \d+ of \d+ tensors differ.*\(16, 32\) there and \(8, 32\) here"):
        check_shapes(tmp_path, other)
    deeper = build_model(sets.config("attmim.decoder.depth=2"), tokenizer, ())
    with pytest.raises(ValueError, match="none there"):
        check_shapes(tmp_path, deeper)


@pytest.fixture
def one_rank(tmp_path: Path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_a_run_folder_that_cannot_be_written_is_named(tmp_path: Path, one_rank: None) -> None:
    (tmp_path / "file").touch()
    refusal = r"run_dir=.*/file/run cannot be written to: Not a directory"
    with pytest.raises(ValueError, match=refusal), agreed(), locked(tmp_path / "file" / "run"):
        pass
    config = load_config("quickstart", [f"run_dir={tmp_path / 'run'}"])
    (tmp_path / "run" / "deepspeed.json").mkdir(parents=True)
    with pytest.raises(AgreedError, match="Is a directory"), agreed():  # an OSError of one rank is a refusal, too
        describe(tmp_path / "run", config, 1, {})


class Engine:
    """As much of a stage-0 engine as checkpoints ask for: it saves and loads the weights as one file."""

    def __init__(self, model: Any, config: Any) -> None:
        self.module, self.device = model, "cpu"
        self.checkpoint_engine: Any = None
        groups = [{"params": list(model.parameters()), "weight_decay": 0.0}]
        self.optimizer = self.basic_optimizer = build_optimizer(groups, config.optim, sharded=False)

    def zero_optimization_stage(self) -> int:
        return 0

    def save_checkpoint(self, folder: str, *, tag: str, client_state: dict, save_latest: bool) -> None:
        assert not save_latest  # it would name the folder that is renamed
        self.checkpoint_engine.save(self.module.state_dict(), f"{folder}/{tag}/state.pt")

    def load_checkpoint(self, folder: str, *, tag: str) -> tuple[str, dict]:
        self.module.load_state_dict(self.checkpoint_engine.load(f"{folder}/{tag}/state.pt"))
        return f"{folder}/{tag}", {}

    def step(self) -> None:
        """A step of the optimizer on a gradient that is 1 everywhere."""
        for group in self.optimizer.param_groups:
            group["lr"] = 0.1
        for weight in self.module.parameters():
            weight.grad = torch.ones_like(weight)
        self.optimizer.step()

    @property
    def weight(self) -> torch.Tensor:
        return self.module.image_head.weight.detach().clone()


@pytest.fixture
def opened(sets, tokenizer, one_rank: None, tmp_path: Path) -> Callable[..., tuple[Engine, Checkpoints]]:
    """A run's engine and its checkpoints, at zero_stage=0 in RUN (by default the same for all calls)."""

    def build(*overrides: str, run: str = "run", seen: Seen | None = None) -> tuple[Engine, Checkpoints]:
        config = sets.config("zero_stage=0", "optim.steps=100", f"run_dir={tmp_path / run}", *overrides)
        engine = Engine(build_model(config, tokenizer, ()), config)
        return engine, Checkpoints(tmp_path / run, engine, tokenizer, config, seen)

    return build


def meta(step: int, score: float | None = None, world: int = 1) -> Meta:
    return Meta(step, world, 0, (), ("a", "b"), score)


def test_a_save_is_whole_and_a_run_goes_on_from_it(opened: Callable, tmp_path: Path) -> None:
    engine, checkpoints = opened("optim.ema=0.5")
    first = engine.weight
    engine.step()
    torch.manual_seed(11)
    checkpoints.save(meta(3))
    saved, drawn = engine.weight, torch.rand(3)
    path = checkpoint_path(tmp_path / "run", 3)
    assert fault(path) is None and [found.name for found in path.parent.iterdir()] == [path.name]
    listed = parse_manifest((path / MANIFEST).read_bytes())
    there = {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()}
    assert set(listed) == there - {MANIFEST} and {"state.pt", "random-00000.pt", "model.safetensors"} <= there
    assert torch.equal(load_model(path)[0].image_head.weight, saved)
    torch.testing.assert_close(load_model(path, average=True)[0].image_head.weight, (first + saved) / 2)

    engine.step()
    again, checkpoints = opened("optim.ema=0.5")
    torch.manual_seed(12)
    assert checkpoints.resume(("a", "b")) == 3
    assert torch.equal(again.weight, saved) and not torch.equal(again.weight, engine.weight)
    assert torch.equal(torch.rand(3), drawn)  # the generators, too, go on


def test_an_empty_run_begins_at_step_0(opened: Callable) -> None:
    _, checkpoints = opened()
    assert checkpoints.resume(("a", "b")) == 0


def test_other_data_is_refused_in_the_same_run_and_taken_in_a_new_one(opened: Callable, tmp_path: Path) -> None:
    engine, checkpoints = opened()
    engine.step()
    checkpoints.save(meta(3))
    with pytest.raises(AgreedError, match=r"2 of its 2 shards are gone, 1 are new"):
        opened()[1].resume(("c",))
    start = f"checkpoint.start_from={tmp_path / 'run'}"
    other, checkpoints = opened(start, run="other")
    assert checkpoints.resume(("c",)) == 3 and torch.equal(other.weight, engine.weight)
    with pytest.raises(AgreedError, match=r"is of step 3, and this run ends at step 3: nothing would be trained"):
        opened(start, "optim.stop_at=3", run="third")[1].resume(("c",))


def test_a_checkpoint_tells_the_patients_of_its_run_and_of_the_run_it_started_from(opened: Callable, tmp_path: Path) -> None:
    first, second = (Seen(np.array([n], np.uint64), np.array([n + 10], np.uint64), (f"set {n}",)) for n in (1, 2))
    opened(seen=first)[1].save(meta(3))
    _, checkpoints = opened(f"checkpoint.start_from={tmp_path / 'run'}", run="other", seen=second)
    assert checkpoints.resume(("c",)) == 3
    checkpoints.save(meta(4))
    found = load_seen(checkpoint_path(tmp_path / "other", 4) / SEEN)
    assert found.patients.tolist() == [1, 2] and found.images.tolist() == [11, 12] and found.datasets == ("set 1", "set 2")
    assert load_seen(checkpoint_path(tmp_path / "run", 3) / SEEN).patients.tolist() == [1] and found.unknown == ()
    (checkpoint_path(tmp_path / "run", 3) / SEEN).unlink()
    assert second.after(checkpoint_path(tmp_path / "run", 3) / SEEN).unknown == ("the run that it started from",)


def test_random_states_of_another_number_of_ranks_are_not_taken(opened: Callable) -> None:
    """Some ranks would find one and others none."""
    torch.manual_seed(11)
    opened()[1].save(meta(3, world=2))
    _, checkpoints = opened()
    torch.manual_seed(12)
    state = torch.get_rng_state()
    assert checkpoints.resume(("a", "b")) == 3
    assert torch.equal(torch.get_rng_state(), state)


def test_old_checkpoints_go_and_the_best_one_stays(opened: Callable, tmp_path: Path) -> None:
    _, checkpoints = opened("checkpoint.keep=1", "checkpoint.keep_best=1")
    for step, score in ((3, 0.5), (6, 0.9), (9, 0.7), (12, None)):
        checkpoints.save(meta(step, score))
    assert checkpoints_of(tmp_path / "run") == [checkpoint_path(tmp_path / "run", step) for step in (6, 12)]


def test_a_step_that_is_saved_again_replaces_the_first(opened: Callable, tmp_path: Path) -> None:
    engine, checkpoints = opened()
    checkpoints.save(meta(3))
    engine.step()
    checkpoints.save(meta(3))
    path = checkpoint_path(tmp_path / "run", 3)
    assert torch.equal(load_model(path)[0].image_head.weight, engine.weight) and fault(path) is None
    assert [found.name for found in path.parent.iterdir()] == [path.name]


def test_training_goes_on_while_a_checkpoint_is_written(
    opened: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has no name before it is whole, and holds the weights of the step at which it was begun."""
    written, save = threading.Event(), writer.save_verified

    def slow(state: Any, path: Path) -> Any:
        assert written.wait(60)
        return save(state, path)

    monkeypatch.setattr(writer, "save_verified", slow)
    engine, checkpoints = opened("checkpoint.asynchronous=true")
    begun, path = engine.weight, checkpoint_path(tmp_path / "run", 3)
    checkpoints.save(meta(3))
    assert checkpoints.writing and not path.exists()
    engine.step()
    written.set()
    checkpoints.finish()
    assert not checkpoints.writing and fault(path) is None
    again, checkpoints = opened()
    checkpoints.resume(("a", "b"))
    assert torch.equal(again.weight, begun) and torch.equal(load_model(path)[0].image_head.weight, begun)


def test_a_save_that_fails_is_told_and_leaves_the_older_one(
    opened: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, checkpoints = opened()
    checkpoints.save(meta(3))

    def full(state: Any, path: Path) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer, "save_verified", full)
    older = checkpoint_path(tmp_path / "run", 3)
    with pytest.raises(AgreedError, match=rf"step 6 could not be written: .*No space left.*; {older} and those before it are"):
        checkpoints.save(meta(6))
    assert list(older.parent.iterdir()) == [older] and fault(older) is None


def test_a_folder_that_the_machines_do_not_share_is_told(opened: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 does not find what another rank wrote."""
    _, checkpoints = opened()
    save = writer.save_verified

    def elsewhere(state: Any, path: Path) -> Any:
        entry = save(state, path)
        path.unlink()
        return entry

    monkeypatch.setattr(writer, "save_verified", elsewhere)
    with pytest.raises(AgreedError, match=r"state.pt was written on another machine; set run_dir to a folder that all"):
        checkpoints.save(meta(3))


def test_every_byte_is_on_the_disk_before_a_checkpoint_gets_its_name(
    opened: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine that loses its power keeps a whole checkpoint or none: files and folders are flushed, then renamed."""
    done: list[tuple[str, Path]] = []
    flush, rename = os.fsync, Path.rename

    def flushed(descriptor: int) -> None:
        done.append(("flush", Path(f"/proc/self/fd/{descriptor}").readlink()))
        flush(descriptor)

    def renamed(path: Path, target: Path) -> Path:
        done.append(("rename", target))
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(Path, "rename", renamed)
    _, checkpoints = opened()
    checkpoints.save(meta(3))
    path = checkpoint_path(tmp_path / "run", 3)
    at = done.index(("rename", path))
    before = {flushed for kind, flushed in done[:at] if kind == "flush"}
    temporary = path.with_name(f".{path.name}.writing")
    wanted = {temporary / file.relative_to(path) for file in path.rglob("*") if file.name != MANIFEST} | {temporary}
    assert wanted <= before, wanted - before
    assert any(flushed.name.startswith(f".{MANIFEST}.") for flushed in before)
    assert ("flush", path.parent) in done[at:]  # and the name itself


@pytest.mark.parametrize("failing", ["upload_files", "mirror"])
def test_a_store_that_is_away_costs_a_warning_and_the_next_save_catches_up(
    opened: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], failing: str
) -> None:
    there = tmp_path / "mirror"

    def away(*arguments: Any) -> None:
        raise OSError("no answer from the store")

    _, checkpoints = opened(f"checkpoint.url={there}")
    with monkeypatch.context() as patched:
        patched.setattr(store, failing, away)
        checkpoints.save(meta(3))
        checkpoints.finish()
    assert f"warning: {there} lacks the newest checkpoint: no answer from the store" in capsys.readouterr().err
    checkpoints.save(meta(6))
    checkpoints.finish()
    assert sorted(path.name for path in there.iterdir()) == ["step-00000003", "step-00000006"]
    assert all((path / MANIFEST).exists() for path in there.iterdir())


def test_training_goes_on_while_a_checkpoint_is_uploaded_and_it_is_whole_at_the_end(
    opened: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there, may_go_on, upload = tmp_path / "mirror", threading.Event(), mirror_module.upload
    monkeypatch.setattr(mirror_module, "upload", lambda *arguments: may_go_on.wait(30) and upload(*arguments))
    _, checkpoints = opened(f"checkpoint.url={there}")
    checkpoints.save(meta(3))
    assert checkpoints.writing and checkpoint_path(tmp_path / "run", 3).is_dir() and not there.exists()
    may_go_on.set()
    wait_for(lambda: not checkpoints.writing)
    files = {path.name for path in (there / "step-00000003").iterdir()}
    assert "model.safetensors" in files and MANIFEST not in files  # other ranks may still upload theirs
    checkpoints.publish()
    checkpoints.finish()
    assert fault(there / "step-00000003") is None and not checkpoints.writing


def test_a_step_that_is_saved_again_replaces_its_copy(opened: Callable, tmp_path: Path) -> None:
    there = tmp_path / "mirror"
    engine, checkpoints = opened(f"checkpoint.url={there}")
    checkpoints.save(meta(3))
    checkpoints.finish()
    with torch.no_grad():
        engine.module.log_scale.add_(1.0)
    checkpoints.save(meta(3))
    checkpoints.finish()
    copy, own = there / "step-00000003", checkpoint_path(tmp_path / "run", 3)
    assert fault(copy) is None and (copy / MANIFEST).read_bytes() == (own / MANIFEST).read_bytes()


@pytest.mark.slow
def test_every_rank_uploads_its_own_files(sets, tmp_path: Path) -> None:
    there = tmp_path / "mirror"
    overrides = [*sets.overrides(tmp_path / "run"), *TRAIN, f"checkpoint.url={there}", "checkpoint.keep=2"]
    code, outputs = run_ranks(faulty_train.main, ["told uploads", "quickstart", *overrides], ranks=2, folder=tmp_path)
    assert code == 0, outputs
    uploaded = [{line.split()[1] for line in output.splitlines() if line.startswith("uploaded ")} for output in outputs]
    assert not uploaded[0] & uploaded[1] and any("random-00001" in name for name in uploaded[1])
    newest = sorted(there.iterdir())[-1]
    assert len(list(there.iterdir())) == 2 and fault(newest) is None


class Evil:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["state.pt", "random-00000.pt", "part/optimizer.pt"])
def test_a_state_file_that_would_run_code_is_refused_before_deepspeed_gets_it(
    opened: Callable, tmp_path: Path, name: str
) -> None:
    _, checkpoints = opened()
    checkpoints.save(meta(3))
    path = checkpoint_path(tmp_path / "run", 3)
    (path / "part").mkdir()
    torch.save({"module": Evil(tmp_path / "ran")}, path / name)
    files = {str(file.relative_to(path)): entry_of(file) for file in path.rglob("*") if file.is_file() and file.name != MANIFEST}
    write_manifest(path, files)
    _, checkpoints = opened(f"checkpoint.start_from={path}", run="another")
    with pytest.raises(AgreedError, match=rf"{name} asks to run posix\.mkdir, so it was not loaded: .*checkpoint\.trusted=true"):
        checkpoints.resume(("a", "b"))
    assert not (tmp_path / "ran").exists()
    if name == "part/optimizer.pt":  # the stand-in's own files are as they were
        assert opened(f"checkpoint.start_from={path}", "checkpoint.trusted=true", run="another")[1].resume(("a", "b")) == 3


class Asked:
    """A pickle that asks for an attribute, as some versions of Python pickle the members of an enumeration."""

    def __init__(self, *of: Any) -> None:
        self.of = of

    def __reduce__(self) -> Any:
        return getattr, self.of


def test_members_of_enumerations_are_loaded_as_any_python_pickles_them_and_no_other_attribute(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    torch.save({"stage": Asked(ZeroStageEnum, "weights")}, path)
    assert load_state(path) == {"stage": ZeroStageEnum.weights}
    for of in ((ZeroStageEnum, "__class__"), (torch.Tensor, "backward")):
        torch.save({"stage": Asked(*of)}, path)
        with pytest.raises(ValueError, match="so it was not loaded"):
            load_state(path)


def test_the_random_states_and_every_class_of_deepspeed_are_loaded(tmp_path: Path) -> None:
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    scaler = DynamicLossScaler(4, 1000, 1, 1, False)
    state = {"a": ZeroStageEnum.weights, "b": fragment_address(numel=3, start=1), "c": LossScaler(2.0), "d": scaler,
             "random": random_state(), "shape": torch.Size([2])}  # fmt: skip
    torch.save(state, tmp_path / "state.pt")
    found = load_state(tmp_path / "state.pt")
    assert found["a"] == ZeroStageEnum.weights and found["b"] == state["b"] and found["c"].cur_scale == 2.0
    assert vars(found["d"]) == vars(scaler)
    assert (found["random"]["numpy"][1] == state["random"]["numpy"][1]).all()
    assert found["random"]["python"] == state["random"]["python"]
