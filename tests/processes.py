"""Whether processes live and end."""

import time
from pathlib import Path


def alive(pid: int) -> bool:
    """Return whether the process exists and is no zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    state, *_ = stat.rpartition(")")[2].split()
    return state != "Z"


def dies(pid: int, within_s: float = 5.0) -> bool:
    """Return whether the process ends within so many seconds."""
    deadline = time.monotonic() + within_s
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    return not alive(pid)
