"""Where the templates lie: beside this package in the repository, inside it in a wheel."""

from __future__ import annotations

from pathlib import Path

_HERE = Path(__file__).parent


def template(name: str) -> Path:
    return next(path for folder in (_HERE.parent, _HERE) if (path := folder / "templates" / name).is_file())
