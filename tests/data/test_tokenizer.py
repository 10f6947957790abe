"""The embedded tokenizer: the same from the same reports, whole words where it can, nothing lost where it cannot."""

import json
import os
import re
import subprocess
import sys
from itertools import chain
from pathlib import Path

import pytest
from mmclip_shards.manifest import load_manifest
from transformers import PreTrainedTokenizerFast

from mmclip_dist.data.prompts import load_prompts
from mmclip_dist.data.tokenizer import load_tokenizer, reports_of, save_tokenizer, tokenizer_of_sets, train_tokenizer

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


@pytest.mark.slow
def test_it_is_the_same_in_every_process() -> None:
    """Ties between equally frequent words are not broken at random, nor by the order of a set."""
    script = (
        "import json, sys; from mmclip_dist.data.tokenizer import train_tokenizer;"
        "print(train_tokenizer(json.loads(sys.argv[1])).backend_tokenizer.to_str())"
    )
    found = subprocess.run(
        [sys.executable, "-c", script, json.dumps(REPORTS)], capture_output=True, text=True, check=True,
        env=os.environ | {"PYTHONHASHSEED": "7"},
    )  # fmt: skip
    assert json.loads(found.stdout) == json.loads(train_tokenizer(REPORTS).backend_tokenizer.to_str())


def test_the_limit_keeps_the_most_frequent() -> None:
    whole = train_tokenizer(REPORTS)
    small = train_tokenizer(REPORTS, vocabulary=len(whole) - 3)
    kept, dropped = set(small.get_vocab()), set(whole.get_vocab()) - set(small.get_vocab())
    assert len(small) == len(kept) == len(whole) - 3 and "effusion" in kept
    words = {"small": 4, "left": 2, "pleural": 4, "effusion": 6, "no": 4, "large": 2, "heart": 4}  # of REPORTS
    assert max(words[word] for word in dropped) <= min(words[word] for word in kept & set(words))


def test_no_report_is_an_error() -> None:
    with pytest.raises(ValueError, match="no report"):
        train_tokenizer([])


def test_a_missing_tokenizer_is_named() -> None:
    with pytest.raises(ValueError, match="no tokenizer at"):
        load_tokenizer("/nowhere/at/all")


def test_a_tokenizer_without_mask_token_is_refused(tmp_path: Path) -> None:
    trained = train_tokenizer(REPORTS)
    save_tokenizer(trained, tmp_path / "whole")
    assert load_tokenizer(str(tmp_path / "whole")).get_vocab() == trained.get_vocab()
    bare = PreTrainedTokenizerFast(tokenizer_object=trained.backend_tokenizer, pad_token="[PAD]")
    save_tokenizer(bare, tmp_path / "bare")
    with pytest.raises(ValueError, match="a mask and a padding token"):
        load_tokenizer(str(tmp_path / "bare"))


def test_words_of_reports_and_of_prompts_stay_whole(sets) -> None:
    tokenizer = tokenizer_of_sets([sets.paired, sets.unpaired], 600)
    reports = list(reports_of([sets.paired, sets.unpaired]))
    assert len(reports) > 50  # the paired set's alone
    prompts = " ".join(chain(*load_prompts(load_manifest(sets.paired).labels).texts)).lower()
    words = set(re.findall("[a-z]+", prompts))
    assert words - set(re.findall("[a-z]+", " ".join(reports).lower()))  # some are of the prompts alone
    assert all(tokenizer.tokenize(word) == [word] for word in words)
    assert "[UNK]" not in tokenizer.tokenize(" ".join(reports))
