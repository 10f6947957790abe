"""What a checkpoint holds beside DeepSpeed's state: enough to use it anywhere."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch

from mmclip_dist.checkpoint.folder import Meta, weights_hash
from mmclip_dist.checkpoint.model_files import load_model, write_model
from mmclip_dist.data.prompts import prompts_text
from mmclip_dist.model.build import build_model

META = Meta(3, 1, 1, ("Nodule",), ("a",))


def test_a_checkpoint_is_complete_without_the_files_of_its_run(sets, tokenizer, tmp_path: Path) -> None:
    """Its prompts are those of training, though the file that the run named is gone; average and weights are two models."""
    wording = prompts_text(None).replace("There is", "One sees")
    (tmp_path / "mine.yaml").write_text(wording)
    config = sets.config(f"prompts.file={tmp_path / 'mine.yaml'}")
    folder = tmp_path / "step"
    folder.mkdir()
    model = build_model(config, tokenizer, META.diseases)
    averages = {name: value.detach() + 1 for name, value in model.state_dict().items()}
    write_model(folder, model, tokenizer, config, META, averages=averages)
    (tmp_path / "mine.yaml").unlink()
    moved = folder.rename(tmp_path / "moved")

    found, words, _, meta = load_model(moved)
    assert meta == META and not found.training and len(words) == len(tokenizer)
    assert (moved / "prompts.yaml").read_text() == wording and wording.count("One sees") > 0
    assert torch.equal(found.prompt_tokens, model.prompt_tokens)
    assert torch.equal(found.image_head.weight, model.image_head.weight)
    assert torch.equal(load_model(moved, average=True)[0].image_head.weight, model.image_head.weight + 1)
    hashes = {weights_hash(moved), weights_hash(moved, average=True)}
    files = [moved / name for name in ("model.safetensors", "ema.safetensors")]
    assert hashes == {hashlib.sha256(file.read_bytes()).hexdigest() for file in files} and len(hashes) == 2


def test_a_run_without_an_average_says_how_to_keep_one(sets, tokenizer, tmp_path: Path) -> None:
    write_model(tmp_path, build_model(sets.config(), tokenizer, META.diseases), tokenizer, sets.config(), META)
    with pytest.raises(ValueError, match=r"ema.safetensors is missing: .*train with optim\.ema"):
        load_model(tmp_path, average=True)
