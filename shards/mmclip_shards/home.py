"""The user's own folder, for keys and caches."""

from __future__ import annotations

from pathlib import Path


def home() -> Path:
    """ValueError without one, as in a container that runs as a number without a name."""
    try:
        return Path.home()
    except RuntimeError:
        raise ValueError("this user has no home folder: set HOME to a folder that is this user's own") from None
