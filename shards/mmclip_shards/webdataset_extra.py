"""The `webdataset` package: an extra, imported only where it is used, because it imports torch."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType


def webdataset_module(name: str) -> ModuleType:
    """The module `name` of webdataset. ValueError with the command that helps if the package is not installed."""
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name != "webdataset":
            raise  # one of webdataset's own requirements is missing: the error names it
        raise ValueError(
            "this needs the webdataset package, which is not installed here: run pip install 'mmclip-shards[webdataset]'"
        ) from None
