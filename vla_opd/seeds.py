"""Seeds: every random number follows from its purpose, never from when or where it is drawn."""

import hashlib


def derive(*parts: str | int) -> int:
    """Return a 31-bit seed, the first bits of the parts' sha256. Equal parts give equal seeds."""
    text = "|".join(map(str, parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little") >> 1
