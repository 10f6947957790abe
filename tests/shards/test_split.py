"""Patients and splits."""

from __future__ import annotations

import os
import stat
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mmclip_shards.split import crossing_patients, hash_patient, parse_splits, patient_key, split_of

THREE = {"train": 0.8, "val": 0.1, "test": 0.1}


@settings(max_examples=50, deadline=None)
@given(st.text(min_size=1).filter(str.strip), st.integers(0, 9), st.permutations(list(THREE)))
def test_a_patient_has_one_split_whatever_the_order_of_the_names(patient: str, seed: int, names: list[str]) -> None:
    assert split_of(patient, {name: THREE[name] for name in names}, seed) == split_of(patient, THREE, seed)


PINNED = ["train", "test", "train", "val", "train", "train", "train", "test", "train", "test", "test", "train"]


def test_splits_are_the_same_on_every_machine() -> None:
    """Pinned: a change here would move patients of published sets between train and test."""
    assert [split_of(f"p{n}", THREE, 0) for n in range(12)] == PINNED
    assert [split_of(f"p{n}", THREE, 1) for n in range(12)] != PINNED


def test_fractions_are_kept() -> None:
    counts = Counter(split_of(f"patient {n}", THREE) for n in range(20_000))
    assert counts["train"] == pytest.approx(16_000, abs=250)
    assert counts["val"] == pytest.approx(2_000, abs=180)
    assert counts["test"] == pytest.approx(2_000, abs=180)


def test_a_split_of_fraction_zero_gets_nobody() -> None:
    assert {split_of(str(n), {"a": 0.0, "train": 1.0, "z": 0.0}) for n in range(500)} == {"train"}


@pytest.mark.parametrize(
    "splits", [{}, {"a": 0.5}, {"a": 1.5, "b": -0.5}, {"a": float("nan")}, {"../a": 1.0}, {"": 1.0}]
)
def test_fractions_that_are_no_partition_are_refused(splits: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="split"):
        split_of("p", splits)


def test_parse_splits() -> None:
    assert parse_splits("train=.8, val=.1,test=0.1") == THREE
    for text in ("", "train", "train=", "train=x", "train=nan", "train=.5,train=.5", "80,10,10", "train=80,val=20"):
        with pytest.raises(ValueError, match=r"train=\.8,val=\.1,test=\.1|comes twice"):
            parse_splits(text)


def test_a_patient_in_two_splits_is_named_by_rows_only() -> None:
    rows = [("row 2", "SECRET", "train"), ("row 3", "other", "val"), ("row 4", "SECRET", "val")]
    ((patient, told),) = crossing_patients(rows).items()
    assert patient == "SECRET" and told == "row 2 (train) and row 4 (val) belong to the same patient"
    assert not crossing_patients(rows[:2])


@pytest.mark.parametrize("patient", ["", " \t"])
def test_an_empty_patient_id_is_refused(patient: str) -> None:
    with pytest.raises(ValueError, match="patient id is empty"):
        split_of(patient, THREE)
    with pytest.raises(ValueError, match="patient id is empty"):
        hash_patient(patient, b"k")


def test_the_stored_hash_depends_on_patient_and_key() -> None:
    assert hash_patient("1", b"k", "nih") not in (hash_patient("1", b"k"), hash_patient("1", b"k", "openi"))
    hashes = {hash_patient(patient, key) for patient in ("1", "2") for key in (b"a" * 32, b"b" * 32)}
    assert len(hashes) == 4
    assert all(len(text) == 32 for text in hashes)
    for key in (b"", b"x" * 65):  # an empty key would be no key at all
        with pytest.raises(ValueError, match="patient key"):
            hash_patient("1", key)


def test_the_key_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setenv("MMCLIP_PATIENT_KEY", "0123456789abcdef")
    assert patient_key() == patient_key() and len(patient_key()) == 32
    monkeypatch.setenv("MMCLIP_PATIENT_KEY", "short")
    with pytest.raises(ValueError, match="openssl rand"):
        patient_key()
    assert list(tmp_path.iterdir()) == []


def test_the_key_file_is_made_once_and_private(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("MMCLIP_PATIENT_KEY", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "one"))
    first = patient_key()
    assert patient_key() == first
    path = tmp_path / "one" / "mmclip" / "patient.key"
    assert f"{path} was made" in caplog.text and len(caplog.records) == 1 and path.read_text().strip() not in caplog.text
    assert [entry.name for entry in path.parent.iterdir()] == ["patient.key"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    monkeypatch.setenv("MMCLIP_PATIENT_KEY", path.read_text())  # the way to carry it to another machine
    assert patient_key() == first
    monkeypatch.delenv("MMCLIP_PATIENT_KEY")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "two"))
    assert patient_key() != first
    os.chmod(tmp_path / "two" / "mmclip" / "patient.key", 0o640)  # noqa: PTH101
    with pytest.raises(ValueError, match="chmod 600"):
        patient_key()
