"""The names by which a run and those that start it speak of a stop. It imports nothing: starting a run needs no torch."""

EXIT_CODE = 75
"""Exit code of a run that was asked to stop and has saved. It goes on when it is started again (EX_TEMPFAIL)."""
STOP_FILE, STOPPED = "stop", "stopped.json"
"""In the run folder: the first asks for a stop, the second tells that one has been made."""
