"""A small spaCy model, as pip installs it: the test of a model and that of packages for a cluster share it."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Sequence
from pathlib import Path

NAME, VERSION = "toy_radiology_model", "1.0"
_METADATA = f"Metadata-Version: 2.1\nName: {NAME}\nVersion: {VERSION}\n"
_WHEEL = "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n"


def write_package(folder: Path, phrases: Sequence[str]) -> None:
    """The package and its metadata, as in site-packages. phrases: each is an ENTITY."""
    import spacy

    nlp = spacy.blank("en", meta={"name": "radiology_model", "version": VERSION})
    patterns = [{"label": "ENTITY", "pattern": text} for text in phrases]
    nlp.add_pipe("entity_ruler", config={"phrase_matcher_attr": "LOWER"}).add_patterns(patterns)  # type: ignore[attr-defined]
    package = folder / NAME
    package.mkdir()
    nlp.to_disk(package / f"{NAME}-{VERSION}")
    (package / "meta.json").write_text(json.dumps({**nlp.meta, "lang": "toy", "name": "radiology_model"}))
    loader = "from spacy.util import load_model_from_init_py\ndef load(**overrides):\n"
    (package / "__init__.py").write_text(f"{loader}    return load_model_from_init_py(__file__, **overrides)\n")
    install = folder / f"{NAME}-{VERSION}.dist-info"
    install.mkdir()
    (install / "METADATA").write_text(_METADATA)


def write_wheel(folder: Path, phrases: Sequence[str]) -> None:
    """The same as a wheel in a folder for pip's --find-links."""
    unpacked = folder / "unpacked"
    unpacked.mkdir(parents=True)
    write_package(unpacked, phrases)
    install = unpacked / f"{NAME}-{VERSION}.dist-info"
    (install / "WHEEL").write_text(_WHEEL)
    files = [path.relative_to(unpacked).as_posix() for path in sorted(unpacked.rglob("*")) if path.is_file()]
    record = f"{install.name}/RECORD"
    (unpacked / record).write_text("".join(f"{name},,\n" for name in (*files, record)))
    with zipfile.ZipFile(folder / f"{NAME}-{VERSION}-py3-none-any.whl", "w") as wheel:
        for name in (*files, record):
            wheel.write(unpacked / name, name)
