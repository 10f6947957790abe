"""Keys, member names, .npy members and the JSON of a sample."""

from __future__ import annotations

import io
import json
import pickle
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mmclip_shards.schema import (
    MAX_KEY_LENGTH,
    Box,
    Record,
    canonical_json,
    check_key,
    check_record,
    check_suffix,
    decode_npy,
    encode_npy,
    make_key,
    sample_document,
    split_member,
)


@pytest.mark.parametrize("key", ["", "a.b", "a/b", "a b", "é", "a\n", "x" * (MAX_KEY_LENGTH + 1), "..", "pipe:x"])
def test_illegal_keys_are_refused(key: str) -> None:
    with pytest.raises(ValueError, match="sample key"):
        check_key(key)


@pytest.mark.parametrize("key", ["0", "a-B_9", "x" * MAX_KEY_LENGTH])
def test_legal_keys_pass_and_stay_as_they_are(key: str) -> None:
    check_key(key)
    assert make_key(key) == key


def test_dotted_names_stay_apart() -> None:
    """The trap: a WebDataset name splits at its first dot, so both of these studies would be sample `1`."""
    keys = [make_key(text) for text in ("1.2.840", "1.2-840", "1-2.840", "1-2-840", "1.3.12")]
    assert len(set(keys)) == 5
    assert re.fullmatch(r"1-2-840-[0-9a-f]{8}", keys[0])
    assert keys[3] == "1-2-840"


@settings(max_examples=50, deadline=None)
@given(st.sets(st.text(min_size=1, max_size=120), min_size=2, max_size=8))
def test_every_text_gets_a_legal_key_of_its_own(texts: set[str]) -> None:
    keys = {make_key(text) for text in texts}
    for key in keys:
        check_key(key)
    assert len(keys) == len(texts)


def test_long_texts_that_differ_at_the_end_stay_apart() -> None:
    assert make_key("x" * 100 + "a") != make_key("x" * 100 + "b")


@pytest.mark.parametrize(
    "suffix", ["pkl", "pyd", "pickle", "pth", "jpg.pkl", "npy.gz", "json.", "", ".jpg", "JPG", "a/b.jpg", "a.b.jpg"]
)
def test_other_suffixes_are_refused(suffix: str) -> None:
    with pytest.raises(ValueError, match="suffix"):
        check_suffix(suffix)


def test_member_names_split_at_the_first_dot() -> None:
    assert split_member("a-1.entities.json") == ("a-1", "entities.json")
    with pytest.raises(ValueError, match="key"):
        split_member("../a.json")


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6, dtype=np.float16).reshape(2, 3),
        np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        np.zeros((0, 4), np.uint8),
        np.float32(3).reshape(()),
    ],
)
def test_npy_round_trip(array: np.ndarray) -> None:
    back = decode_npy(encode_npy(array))
    assert back.dtype == array.dtype and back.shape == array.shape
    np.testing.assert_array_equal(back, array)


def test_npy_of_objects_is_refused_both_ways() -> None:
    objects = np.array([{"a": 1}], dtype=object)
    with pytest.raises(ValueError):
        encode_npy(objects)
    buffer = io.BytesIO()
    np.save(buffer, objects, allow_pickle=True)
    with pytest.raises(ValueError, match="unpickling"):
        decode_npy(buffer.getvalue())


@pytest.mark.parametrize("cut", [0, 5, 40, -1])
def test_npy_that_is_cut_is_refused(cut: int) -> None:
    with pytest.raises(ValueError):
        decode_npy(encode_npy(np.arange(9))[:cut])


def test_npy_that_claims_terabytes_is_refused_without_allocating() -> None:
    header = b"{'descr': '|u1', 'fortran_order': False, 'shape': (1099511627776,), }".ljust(117) + b"\n"
    with pytest.raises(ValueError, match="does not fit"):
        decode_npy(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + b"x")


@pytest.mark.parametrize("literal", [b"(1, 8", b"(" * 6, b"------", b"(-1,8)", b"(1,'')", b"1     "])
def test_npy_with_a_broken_header_is_refused(literal: bytes) -> None:
    data = encode_npy(np.zeros((1, 8), np.uint8))
    assert b"(1, 8)" in data
    with pytest.raises(ValueError):
        decode_npy(data.replace(b"(1, 8)", literal.ljust(6)))


def test_npy_with_a_field_of_another_type_is_refused() -> None:
    with pytest.raises(ValueError, match=r"not \.npy data"):
        decode_npy(encode_npy(np.zeros(3)).replace(b"'descr'", b"b'desc'"))


def test_a_pickle_is_not_an_npy() -> None:
    with pytest.raises(ValueError):
        decode_npy(pickle.dumps([1]))


def test_canonical_json_is_independent_of_order_and_refuses_nan() -> None:
    assert canonical_json({"b": 1, "a": "é"}) == canonical_json({"a": "é", "b": 1}) == '{"a":"é","b":1}\n'.encode()
    with pytest.raises(ValueError):
        canonical_json(float("nan"))


def test_document_of_a_paired_and_an_unpaired_record() -> None:
    paired = Record(
        key="a",
        image=b"",
        patient="p",
        source="s/a.png",
        report="Clear.",
        impression="Clear.",
        labels={"Edema": 1},
        view="PA",
    )
    common = {"label_names": ("Edema", "Mass"), "patient_hash": "h", "dataset": "d", "width": 4, "height": 5}
    document = json.loads(canonical_json(sample_document(paired, boxes=(Box("Edema", 1, 2, 3, 4),), **common)))
    assert document == {
        "report": {"text": "Clear.", "impression": "Clear."},
        "labels": {"Edema": 1, "Mass": None},
        "patient": "h",
        "view": "PA",
        "dataset": "d",
        "source": "s/a.png",
        "width": 4,
        "height": 5,
        "boxes": [{"label": "Edema", "x": 1, "y": 2, "width": 3, "height": 4}],
    }
    unpaired = sample_document(Record(key="a", image=b"", patient="p", source="s", report=" \n"), boxes=(), **common)
    assert unpaired["report"] is None
    assert "boxes" not in unpaired and "age" not in unpaired


@pytest.mark.parametrize("value", [2, True, -2, "1", 0.5])
def test_other_label_values_are_refused(value: object) -> None:
    with pytest.raises(ValueError, match="label 'Edema'"):
        check_record(Record(key="a", image=b"", patient="p", source="s", labels={"Edema": value}))  # type: ignore[dict-item]


@pytest.mark.parametrize(("age", "stored"), [(0, 0), (89, 89), (90, 90), (104, 90)])
def test_ages_above_89_are_stored_as_90(age: int, stored: int) -> None:
    record = Record(key="a", image=b"", patient="p", source="s", age=age)
    check_record(record)
    document = sample_document(record, label_names=(), patient_hash="h", dataset="d", width=4, height=5, boxes=())
    assert document["age"] == stored


@pytest.mark.parametrize("age", [-1, 41.0, "41", True])
def test_an_age_that_is_no_whole_number_of_years_is_refused(age: object) -> None:
    with pytest.raises(ValueError, match="it must be whole years, or None"):
        check_record(Record(key="a", image=b"", patient="p", source="s", age=age))  # type: ignore[arg-type]


def test_boxes_need_finite_positive_sides() -> None:
    for box in (Box("a", 0, 0, 0, 1), Box("a", float("nan"), 0, 1, 1), Box("", 0, 0, 1, 1)):
        with pytest.raises(ValueError, match="box"):
            check_record(Record(key="a", image=b"", patient="p", source="s", boxes=(box,)))
