"""Seeds: every random number follows from what it is for, never from when or where it was drawn."""

import hashlib


def derive(*parts: str | int) -> int:
    """A 31-bit seed: the first bytes of sha256 of the parts. Equal parts, equal seed."""
    text = "|".join(map(str, parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little") >> 1
