"""Text files that a person, a full disk or a killed process may have spoiled: read whole, or refused in one line that names
the file and says what to do."""

from __future__ import annotations

import json
from typing import Any

from mmclip_shards import storage
from mmclip_shards.storage import Url


def read_text(url: Url, mend: str) -> str:
    """A UTF-8 file. ValueError, with the file's name and `mend`, when it is not UTF-8; FileNotFoundError when missing."""
    try:
        return storage.read_bytes(url).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{url} is not UTF-8 text (byte {error.start}): {mend}") from error


def read_json(url: Url, mend: str) -> Any:
    """A JSON file. ValueError, with the file's name and `mend`, when it is cut or no JSON; FileNotFoundError when missing."""
    text = read_text(url, mend)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{url} is cut or is not JSON ({_place(error)}): {mend}") from error


def read_rows(url: Url, mend: str) -> list[dict[str, Any]]:
    """The objects of a file with one JSON object a line. A last line without its end, which a killed process left, is ignored.

    ValueError, with the file's name, the line and `mend`, for any other line that is no object; FileNotFoundError when missing.
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
    return f"line {error.lineno}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else type(error).__name__
