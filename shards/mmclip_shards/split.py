"""Assign patients to splits, and turn patient ids into keyed hashes. No other module does either."""

from __future__ import annotations

import hashlib
import logging
import math
import os
import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path

from mmclip_shards.home import home
from mmclip_shards.schema import KEY_PATTERN

logger = logging.getLogger(__name__)

KEY_VARIABLE = "MMCLIP_PATIENT_KEY"
MIN_KEY_LENGTH = 16


def split_of(patient: str, splits: Mapping[str, float], seed: int = 0) -> str:
    """The split of a patient: a pure function of the raw id, the fractions (in any order) and the seed.

    ValueError for fractions that do not sum to 1, or an empty id (many patients would count as one).
    """
    check_splits(splits)
    check_patient(patient)
    digest = hashlib.blake2b(f"{seed}\0{patient}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
    position = int.from_bytes(digest) / 2**64
    chosen, upper = "", 0.0
    for name in sorted(splits):
        if splits[name] > 0:
            chosen, upper = name, upper + splits[name]
            if position < upper:
                break
    return chosen  # rounding can leave a rest below 1: the last split takes it


def parse_splits(text: str) -> dict[str, float]:
    """Parse `"train=.8,val=.1,test=.1"` -> fractions by name. ValueError that shows the form."""
    splits: dict[str, float] = {}
    for part in text.split(","):
        name, equals, fraction = (piece.strip() for piece in part.partition("="))
        try:
            value = float(fraction)
        except ValueError:
            value = math.nan
        if not equals or math.isnan(value):
            raise ValueError(
                f"splits {text!r}: {part!r} is not NAME=FRACTION; write for example train=.8,val=.1,test=.1"
            )
        if name in splits:
            raise ValueError(f"splits {text!r}: {name!r} comes twice")
        splits[name] = value
    check_splits(splits)
    return splits


def check_splits(splits: Mapping[str, float]) -> None:
    """ValueError unless the names can be folders and the fractions are at least 0 and sum to 1."""
    for name, fraction in splits.items():
        check_split_name(name)
        if not (math.isfinite(fraction) and fraction >= 0):
            raise ValueError(f"split {name!r} has fraction {fraction}; it must be between 0 and 1")
    total = math.fsum(splits.values())
    if abs(total - 1) > 1e-6:
        raise ValueError(
            f"the split fractions sum to {total:g}; they must sum to 1, for example train=.8,val=.1,test=.1"
        )


def check_split_name(name: str) -> None:
    """ValueError unless `name` can be a folder of a set."""
    if not KEY_PATTERN.fullmatch(name):
        raise ValueError(f"split name {name!r} may hold only A-Z a-z 0-9 _ and -")


def check_patient(patient: str) -> None:
    """ValueError for an empty patient id."""
    if not patient.strip():
        raise ValueError("a patient id is empty: without it a patient could cross splits; give every image one")


def crossing_patients(rows: Iterable[tuple[str, str, str]]) -> dict[str, str]:
    """The patients who are in two splits, and where. rows: (place, patient, split). The texts name places, never the id."""
    first: dict[str, tuple[str, str]] = {}
    crossing: dict[str, str] = {}
    for place, patient, split in rows:
        first_place, first_split = first.setdefault(patient, (place, split))
        if split != first_split:
            crossing.setdefault(patient, f"{first_place} ({first_split}) and {place} ({split}) belong to the same patient")
    return crossing


def hash_patient(patient: str, key: bytes, numbering: str | None = None) -> str:
    """The stored form of a patient id: keyed BLAKE2b, 32 hex digits. Without the key nobody can test which id it is.

    numbering: the collection that gave the id. Many count from 1: patient 1 of one is not patient 1 of another.
    """
    check_patient(patient)
    patient = patient if numbering is None else f"{numbering}/{patient}"
    if not 0 < len(key) <= hashlib.blake2b.MAX_KEY_SIZE:
        raise ValueError(f"the patient key has {len(key)} bytes; it must have 1 to {hashlib.blake2b.MAX_KEY_SIZE}")
    return hashlib.blake2b(patient.encode("utf-8", "surrogatepass"), key=key, digest_size=16).hexdigest()


def key_id(key: bytes) -> str:
    """A mark of a key, which tells nothing of it: sets whose patients were hashed with one key have the same."""
    return hash_patient("fingerprint of the key", key)


def patient_key() -> bytes:
    """The key for `hash_patient`: $MMCLIP_PATIENT_KEY, or else a private file, made with random content if it is missing.

    The file is `mmclip/patient.key` in $XDG_CONFIG_HOME or ~/.config. To use its key on another machine, put its content
    into the variable. ValueError when the key is too short or other users may read the file.
    """
    text = os.environ.get(KEY_VARIABLE)
    if text is not None:
        return _key_from_text(text, f"${KEY_VARIABLE}")
    path = Path(os.environ.get("XDG_CONFIG_HOME") or home() / ".config") / "mmclip" / "patient.key"
    if not path.exists():
        _make_key_file(path)
    if path.stat().st_mode & 0o077:
        raise ValueError(f"{path} can be read by other users: run `chmod 600 {path}`")
    return _key_from_text(path.read_text(encoding="utf-8"), str(path))


def _key_from_text(text: str, where: str) -> bytes:
    if len(text.strip()) < MIN_KEY_LENGTH:
        raise ValueError(
            f"{where} is shorter than {MIN_KEY_LENGTH} characters, too short to keep patient ids secret: "
            "set it to the output of `openssl rand -hex 32`"
        )
    return hashlib.blake2b(text.strip().encode("utf-8"), digest_size=32).digest()


def _make_key_file(path: Path) -> None:
    """Publish a fresh key at `path`. If two processes do so at the same time, one key wins and both use it."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(secrets.token_hex(32) + "\n")
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(temporary, path)  # unlike a rename, a link never replaces a key that is already in use
        except FileExistsError:
            return
        logger.warning(
            "%s was made, the key that hashes patient ids: keep it, and keep it secret (with another key nobody can tell "
            "that two sets share patients)", path,
        )  # fmt: skip
    finally:
        temporary.unlink()
