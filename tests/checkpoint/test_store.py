"""What a run may go on from, and what it refuses, with the reason."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mmclip_dist.checkpoint.conversion import needs_conversion
from mmclip_dist.checkpoint.folder import Meta
from mmclip_dist.checkpoint.model_files import write_model
from mmclip_dist.checkpoint.store import check_data, check_shapes
from mmclip_dist.config import load_config
from mmclip_dist.engine.collective import AgreedError, agreed
from mmclip_dist.model.build import build_model
from mmclip_dist.run.folder import describe, locked

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
