"""Labels in words: templates and names from a file, refused in one line where they are malformed."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmclip_dist.data.prompts import load_prompts, tokenize_prompts


def test_prompts_put_labels_into_words(tokenizer) -> None:
    prompts = load_prompts(["Pleural_Thickening", "Nodule"])
    assert prompts.texts[0] == (
        "There is pleural thickening.", "There is a pulmonary nodule.",
        "No evidence of pleural thickening.", "No evidence of a pulmonary nodule.",
    )  # fmt: skip
    tokens, mask = tokenize_prompts(prompts, tokenizer, 48)
    assert tokens.shape[:2] == (4, 4) and mask.shape == tokens.shape and mask.any(2).all()


@pytest.mark.parametrize("text", ["present: [a]", "present: ['{disease}']\nabsent: []", "[]", "present: ["])
def test_malformed_prompt_files_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "p.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"prompts\.file"):
        load_prompts(["A"], str(tmp_path / "p.yaml"))
