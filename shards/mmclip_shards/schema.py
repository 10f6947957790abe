"""What is inside a shard: keys, names of members, encodings; and the raw record that packing turns into one sample."""

from __future__ import annotations

import hashlib
import io
import json
import math
import re
import tokenize
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path, PurePosixPath
from types import NoneType
from typing import Any

import numpy as np

from mmclip_shards.rawpath import RemotePath

SCHEMA_VERSION = 1

KEY_PATTERN = re.compile(r"[A-Za-z0-9_-]+")
"""WebDataset splits a member's name at its *first* dot, so a key with a dot would silently merge two samples into one."""

MAX_KEY_LENGTH = 80
"""A ustar name holds 100 bytes; this leaves 20 for the longest suffix."""

ALLOWED_SUFFIXES = ("jpg", "png", "webp", "json", "txt", "npy")
"""Allowed last extensions of a member. Nothing else is ever decoded: shards are untrusted, and a pickle runs code."""

ENTITIES_SUFFIX = "entities.json"
ATTENTION_SUFFIX = "attention.npy"
IMAGE_SUFFIXES = ("jpg", "png", "webp")

OLDEST = 90
"""Ages above 89 are stored as this: a higher one can name a patient (HIPAA, Safe Harbor)."""

LABEL_VALUES = (1, 0, -1, None)
"""present, absent, uncertain, not mentioned."""

_NPY_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
# NumPy parses a header as Python source and does not catch the parser's errors.
_NPY_HEADER_ERRORS = (
    ValueError, TypeError, KeyError, SyntaxError, EOFError, tokenize.TokenError, RecursionError, MemoryError,
)  # fmt: skip
_SUFFIX_PATTERN = re.compile(r"(?:[a-z0-9_]{1,12}\.)?[a-z]{3,4}")


@dataclass(frozen=True)
class Box:
    """Where a finding is, in pixels of its image. The origin is the top left corner, after EXIF orientation is applied."""

    label: str
    x: float
    y: float
    width: float
    height: float


RawImage = Path | RemotePath | bytes | np.ndarray | Callable[[], tuple[np.ndarray, tuple[Box, ...]]]
"""What `Record.image` may be."""


@dataclass(frozen=True)
class Record:
    """One study image of a raw data set, before packing.

    image: a file (of this machine, or behind a URL: `rawpath`), encoded bytes, 8/16-bit single-channel pixels [height, width], or
    a function that draws pixels and boxes: `pack` calls it in a worker. It must be picklable and draw the same each time; `boxes`
    is empty then.
    report: full text, or "" for an unpaired image; findings and impression: its sections, if known. sections: of a report by
    name, if a recipe knows them (`datasets.sections`); they replace report, findings and impression, and are not stored.
    labels: disease -> 1 present, 0 absent, -1 uncertain, None not mentioned.
    patient: the raw patient id; only its keyed hash is ever written.
    source: the image's path relative to the raw data set (or any stable name).
    split: the split that the data set itself gives this image, if any. age: of the patient at the study, in whole years.
    """

    key: str
    image: RawImage
    patient: str
    source: str
    report: str = ""
    findings: str | None = None
    impression: str | None = None
    labels: Mapping[str, int | None] = field(default_factory=dict)
    view: str | None = None
    boxes: tuple[Box, ...] = ()
    split: str | None = None
    sections: dict[str, str] = field(default_factory=dict)
    age: int | None = None


def check_key(key: str) -> None:
    """ValueError unless `key` may name a sample."""
    if not key:
        raise ValueError("sample key is empty: every image needs a file name or an id")
    if not KEY_PATTERN.fullmatch(key):
        raise ValueError(f"sample key {key!r} may hold only A-Z a-z 0-9 _ and -; map it with schema.make_key")
    if len(key) > MAX_KEY_LENGTH:
        raise ValueError(f"sample key {key!r} is longer than {MAX_KEY_LENGTH} characters; map it with schema.make_key")


def make_key(text: str) -> str:
    """Map any text (a DICOM UID, a dotted file name) to a legal key. Different texts get different keys.

    Illegal characters become `-`, and long texts are cut. If that changes the text, 8 hex digits of its BLAKE2b hash are
    appended. ValueError for an empty text.
    """
    if not text:
        raise ValueError("a sample key cannot be made from an empty text")
    clean = re.sub(r"[^A-Za-z0-9_-]", "-", text)
    if clean == text and len(text) <= MAX_KEY_LENGTH:
        return text
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=4).hexdigest()
    return f"{clean[: MAX_KEY_LENGTH - 9]}-{digest}"


def check_suffix(suffix: str) -> None:
    """ValueError unless a member may have this suffix: the part after the key's dot, such as `jpg` or `entities.json`."""
    if not _SUFFIX_PATTERN.fullmatch(suffix) or suffix.rpartition(".")[2] not in ALLOWED_SUFFIXES:
        raise ValueError(f"member suffix {suffix!r} is refused: it must end in one of {', '.join(ALLOWED_SUFFIXES)}")


def member_name(key: str, suffix: str) -> str:
    """The name of a member inside a shard. ValueError for a key or suffix that is refused."""
    check_key(key)
    check_suffix(suffix)
    return f"{key}.{suffix}"


def split_member(name: str) -> tuple[str, str]:
    """(key, suffix) of a member's name. ValueError for a name that may not be in a shard."""
    key, _, suffix = name.partition(".")
    check_key(key)
    check_suffix(suffix)
    return key, suffix


def image_of(members: Mapping[str, bytes]) -> bytes | None:
    """The encoded image of a sample, from its members: suffix -> bytes. None if it has none."""
    return next((members[suffix] for suffix in IMAGE_SUFFIXES if suffix in members), None)


def canonical_json(value: object) -> bytes:
    """The JSON encoding of everything that is written: the same content gives the same bytes."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8") + b"\n"


def encode_npy(array: np.ndarray) -> bytes:
    """An array as .npy bytes. ValueError for object arrays, which would need pickle."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def decode_npy(data: bytes) -> np.ndarray:
    """The array in .npy bytes. ValueError for anything else, pickled objects included."""
    # Cut the header out by its length field and cache it: all arrays of a shard share one, and NumPy parses it slowly.
    length = (
        10 + int.from_bytes(data[8:10], "little") if data[6:7] == b"\x01" else 12 + int.from_bytes(data[8:12], "little")
    )
    shape, fortran_order, dtype = _npy_header(data[:length])
    body = memoryview(data)[length:]
    # Check before anything is allocated: the header is untrusted and may claim terabytes.
    if math.prod(shape) * dtype.itemsize != len(body) or any(length < 0 for length in shape):
        raise ValueError(f".npy data of shape {shape} and type {dtype} does not fit its {len(body)} bytes")
    flat = np.frombuffer(body, dtype=dtype) if len(body) else np.empty(0, dtype)
    return flat.reshape(shape, order="F" if fortran_order else "C").copy()


@lru_cache(maxsize=64)
def _npy_header(header: bytes) -> tuple[tuple[int, ...], bool, np.dtype]:
    """(shape, Fortran order, type) of an array, from its header. ValueError unless this is a header."""
    buffer = io.BytesIO(header)
    try:
        shape, fortran_order, dtype = _NPY_HEADERS[np.lib.format.read_magic(buffer)](buffer)
    except _NPY_HEADER_ERRORS as error:
        raise ValueError(f"not .npy data: {error}") from error
    if dtype.hasobject:
        raise ValueError("a .npy of Python objects is refused: unpickling it would run code")
    return shape, fortran_order, dtype


def check_source(source: str) -> None:
    """ValueError unless `source` is a name or a path below a tree. The message does not hold it: it may name a patient."""
    if not source:
        raise ValueError("the image's path is empty: give every image its own")
    if source.startswith("/") or (".." in source and ".." in PurePosixPath(source).parts):
        raise ValueError("the image's path leads out of the data set's folder: use paths below it")


def check_box(box: Box) -> None:
    """ValueError unless a box can be stored."""
    sides = (box.x, box.y, box.width, box.height)
    if not box.label.strip() or not all(map(math.isfinite, sides)) or min(box.width, box.height) <= 0:
        raise ValueError(f"box {box} needs a label, finite numbers, and a width and height above 0")


def check_record(record: Record) -> None:
    """ValueError unless key, source, age, labels and boxes of a record can be stored."""
    check_key(record.key)
    check_source(record.source)
    if record.age is not None and not (type(record.age) is int and record.age >= 0):
        raise ValueError(f"the age is {record.age!r}; it must be whole years, or None")
    if not all(map(str.strip, record.labels)):
        raise ValueError("a label has an empty name")
    # Without a loop where all is well: a table may have 190 labels for each of 160,000 images.
    if not (set(map(type, record.labels.values())) <= {int, NoneType} and set(record.labels.values()) <= set(LABEL_VALUES)):
        for name, value in record.labels.items():
            if isinstance(value, bool) or value not in LABEL_VALUES:
                raise ValueError(f"label {name!r} is {value!r}; use 1 present, 0 absent, -1 uncertain, None not mentioned")
    for box in record.boxes:
        check_box(box)


def sample_document(
    record: Record,
    *,
    label_names: tuple[str, ...],
    patient_hash: str,
    dataset: str,
    width: int,
    height: int,
    boxes: tuple[Box, ...],
) -> dict[str, Any]:
    """The content of `KEY.json`. width, height, boxes: of the stored image, in pixels. Each of `label_names` gets a value."""
    document: dict[str, Any] = {
        "report": _report(record),
        "labels": {name: record.labels.get(name) for name in label_names},
        "patient": patient_hash,
        "view": record.view,
        "dataset": dataset,
        "source": record.source,
        "width": width,
        "height": height,
    }
    if record.age is not None:
        document["age"] = min(record.age, OLDEST)
    if boxes:
        document["boxes"] = [
            {"label": box.label, "x": box.x, "y": box.y, "width": box.width, "height": box.height} for box in boxes
        ]
    return document


def _report(record: Record) -> dict[str, str] | None:
    if not record.report.strip():
        return None
    sections = {"findings": record.findings, "impression": record.impression}
    return {"text": record.report, **{name: text for name, text in sections.items() if text}}
