"""Read text files that a person, a full disk or a killed process may have damaged. Errors are one line that names the file and
says what to do: `mend` is that advice."""

from __future__ import annotations

import json
from typing import Any

from mmclip_shards import storage
from mmclip_shards.storage import Url


def read_text(url: Url, mend: str) -> str:
    """The text of a UTF-8 file, without the mark that Windows' editors put first.

    ValueError when it is not UTF-8, FileNotFoundError when it is missing.
    """
    try:
        return storage.read_bytes(url).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{url} is not UTF-8 text (byte {error.start}): {mend}") from error


def read_json(url: Url, mend: str) -> Any:
    """The value of a JSON file. ValueError when it is cut or is not JSON, FileNotFoundError when it is missing."""
    text = read_text(url, mend)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{url} is cut or is not JSON ({_place(error)}): {mend}") from error


def read_rows(url: Url, mend: str) -> list[dict[str, Any]]:
    """The objects of a file with one JSON object per line. Ignores a last line without a line end: a killed process left it.

    ValueError that names the line for any other line that is not an object; FileNotFoundError when the file is missing.
    """
    rows = []
    for number, line in enumerate(read_text(url, mend).split("\n")[:-1], 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            raise ValueError(f"{url}, line {number}, is cut or is not a JSON object: {mend}")
        rows.append(row)
    return rows


def _place(error: Exception) -> str:
    return (
        f"line {error.lineno}, column {error.colno}"
        if isinstance(error, json.JSONDecodeError)
        else type(error).__name__
    )
