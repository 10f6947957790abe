"""The embedded tokenizer: the same from the same reports, whole words where it can, nothing lost where it cannot."""

import subprocess
import sys

import pytest

from mmclip_dist.data.tokenizer import load_tokenizer, train_tokenizer

REPORTS = ["Small left pleural effusion.", "No pleural effusion.", "Large heart; no effusion.", "Small heart."] * 2


def test_words_stay_whole_and_rare_ones_are_spelled() -> None:
    tokenizer = train_tokenizer(REPORTS)
    assert tokenizer.tokenize("No pleural effusion") == ["no", "pleural", "effusion"]
    assert tokenizer.tokenize("feel") == ["f", "##e", "##e", "##l"]
    assert tokenizer.tokenize("Ω") == ["[UNK]"]
    encoded = tokenizer("Small heart.", return_offsets_mapping=True)
    assert tokenizer.convert_ids_to_tokens(encoded["input_ids"])[0] == "[CLS]" and encoded["offset_mapping"][1] == (
        0,
        5,
    )


def test_it_is_the_same_in_every_process() -> None:
    """The trainers of `tokenizers` are not: they break ties at random."""
    script = (
        "import hashlib; from mmclip_dist.data.tokenizer import train_tokenizer; from tests.data.test_tokenizer import REPORTS;"
        "print(hashlib.sha256(train_tokenizer(REPORTS).backend_tokenizer.to_str().encode()).hexdigest())"
    )
    found = {subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout for _ in range(2)}
    assert len(found) == 1 and len(found.pop().strip()) == 64


def test_the_limit_keeps_the_most_frequent() -> None:
    whole = train_tokenizer(REPORTS)
    small = train_tokenizer(REPORTS, vocabulary=len(whole) - 3)
    assert len(small) == len(whole) - 3 and "effusion" in small.get_vocab()


def test_no_report_is_an_error() -> None:
    with pytest.raises(ValueError, match="no report"):
        train_tokenizer([])


def test_a_missing_tokenizer_says_how_to_make_one() -> None:
    with pytest.raises(ValueError, match="mmclip tokenizer"):
        load_tokenizer(None)
    with pytest.raises(ValueError, match="no tokenizer at"):
        load_tokenizer("/nowhere/at/all")
