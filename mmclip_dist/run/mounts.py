"""Name a network file system that does not answer, instead of waiting for it: any call on its files may never return."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterable
from contextlib import suppress

from mmclip_shards.storage import local_path

from mmclip_dist.errors import Mendable

ANSWER_S = 15.0
MEND = "its server or its mount is gone: mend it (see `mount` and the system's log), or name another place"
# statvfs asks the server: what `stat` tells may be remembered. A path that is not there yet lies where its parent lies.
_ASK = """
import os, sys
for path in sys.argv[1:]:
    while True:
        try:
            os.statvfs(path)
        except (FileNotFoundError, NotADirectoryError):
            if os.path.dirname(path) != path:
                path = os.path.dirname(path)
                continue
        except OSError:
            pass
        print(flush=True)
        break
"""


def first_silent(places: Iterable[str], seconds: float) -> str | None:
    """The first of these paths whose file system does not answer within so many seconds; None if all do. URLs are passed over.

    A process of its own asks. If it hangs so that it cannot even be killed, it is left behind, and this process can end.
    """
    paths = [str(path.absolute()) for path in map(local_path, dict.fromkeys(places)) if path is not None]
    asking = subprocess.Popen(
        [sys.executable, "-IS", "-c", _ASK, *paths],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    answered: list[bytes] = []
    listening = threading.Thread(target=lambda: answered.extend(asking.stdout or ()), daemon=True)
    listening.start()
    listening.join(seconds)
    late = listening.is_alive()
    asking.kill()
    with suppress(subprocess.TimeoutExpired):
        asking.wait(1)
    return paths[len(answered)] if late else None


def check_answering(places: Iterable[str]) -> None:
    """Mendable that names a path whose file system does not answer."""
    if (path := first_silent(places, ANSWER_S)) is not None:
        raise Mendable(f"{path}: its file system does not answer within {ANSWER_S:g} s: {MEND}")
