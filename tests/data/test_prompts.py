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


def write(folder: Path, text: str) -> str:
    path = folder / "p.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_a_file_of_the_user_is_read_as_utf8_with_its_names(tmp_path: Path) -> None:
    text = "present: ['présence de {disease}', 'il y a {disease}']\nabsent: ['{disease} absent', 'ni {disease}, ni {disease}']\n"
    prompts = load_prompts(["Mass", "B_C"], write(tmp_path, text + "names: {Mass: opacité}"))
    assert prompts.texts == (
        ("Présence de opacité", "Présence de b c", "Opacité absent", "B c absent"),
        ("Il y a opacité", "Il y a b c", "Ni opacité, ni opacité", "Ni b c, ni b c"),
    )


@pytest.mark.parametrize(
    ("template", "fault"),
    [
        ("There is {finding}.", r"holds \{finding\}"),
        ("There is {disease} or {finding}.", r"holds \{finding\}"),
        ("There is {disease:>10}.", r"holds \{disease:>10\}"),
        ("There is {}.", r"holds \{\}"),
        ("There is {disease.", "holds a single brace"),
        ("There is {disease}}.", "holds a single brace"),
        ("There is something.", r"lacks \{disease\}"),
    ],
)
def test_a_template_that_cannot_be_filled_is_named(tmp_path: Path, template: str, fault: str) -> None:
    for text in (f"present: ['{template}']\nabsent: ['No {{disease}}.']", f"present: ['{{disease}}']\nabsent: ['{template}']"):
        path = write(tmp_path, text)
        with pytest.raises(ValueError, match=fault) as caught:
            load_prompts(["A"], path)
        assert path in str(caught.value) and f"{template!r}" in str(caught.value)
        assert "the only field is {disease}" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("present: ['{disease}']\nabsent: []", "`present` has 1 templates and `absent` 0"),
        ("present: []\nabsent: []", "`present` has 0 templates"),
        ("present: ['{disease}']", "`absent` must be a list"),
        ("present: '{disease}'\nabsent: '{disease}'", "`present` must be a list"),
        ("present: [{disease}]\nabsent: ['{disease}']", "put it in quotes"),
        ("present: ['{disease}']\nabsent: ['{disease}']\nnames: [A]", "`names` must map"),
        ("present: ['{disease}']\nabsent: ['{disease}']\nnames: {A: }", "`names` must map"),
        ("[]", "must hold `present` and `absent`"),
        ("present: [", "is not valid YAML"),
    ],
)
def test_malformed_files_are_named(tmp_path: Path, text: str, fault: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ValueError, match=fault) as caught:
        load_prompts(["A"], path)
    assert f"prompts.file={path}" in str(caught.value) and "\n" not in str(caught.value)


def test_missing_and_spoiled_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"prompts\.file=.*p\.yaml: no such file"):
        load_prompts(["A"], str(tmp_path / "p.yaml"))
    (tmp_path / "p.yaml").write_bytes(b"present: ['\xff {disease}']")
    with pytest.raises(ValueError, match=r"p\.yaml is not UTF-8 text \(byte 11\): save it as UTF-8"):
        load_prompts(["A"], str(tmp_path / "p.yaml"))
