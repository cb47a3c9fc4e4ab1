"""Sizes and spans of time as people write them: read from options, printed in tables. Pure.

    "10GiB" -> 10737418240      "500MB" -> 500000000      "4096" -> 4096
    "7d"    -> 604800.0         "90m"   -> 5400.0         "30"   -> 30.0

Sizes print in powers of 1024 (``1.5 GiB``), since quotas and block sizes are; both kinds are read.
"""

import re

from prefixstore.errors import InvalidError

__all__ = ["format_age", "format_size", "parse_age", "parse_size"]

_SIZE_UNITS = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "pb": 10**15,
    "k": 2**10,
    "m": 2**20,
    "g": 2**30,
    "t": 2**40,
    "p": 2**50,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
    "pib": 2**50,
}
_AGE_UNITS = {"": 1, "s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
_QUANTITY = re.compile(r"\s*(\d{1,18}(?:\.\d{1,9})?)\s*([a-z]{0,3})\s*", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Read a size in bytes.

    >>> parse_size("10GiB"), parse_size("1.5 MB")
    (10737418240, 1500000)

    Raises:
        InvalidError: The text is no number with a known unit.
    """
    match = _QUANTITY.fullmatch(text)
    unit = _SIZE_UNITS.get(match[2].lower()) if match else None
    if match is None or unit is None:
        raise InvalidError(f"{text!r} is not a size; write it like 10GiB, 500MB or 4096 (bytes)")
    return int(float(match[1]) * unit) if "." in match[1] else int(match[1]) * unit


def parse_age(text: str) -> float:
    """Read a span of time in seconds.

    >>> parse_age("7d"), parse_age("1.5h")
    (604800.0, 5400.0)

    Raises:
        InvalidError: The text is no number with a known unit.
    """
    match = _QUANTITY.fullmatch(text)
    unit = _AGE_UNITS.get(match[2].lower()) if match else None
    if match is None or unit is None:
        raise InvalidError(f"{text!r} is not a span of time; write it like 7d, 12h, 30m or 90s")
    return float(match[1]) * unit


def format_size(size_bytes: int) -> str:
    """Print a size in the largest unit that leaves a number of at least one.

    >>> format_size(4096), format_size(1610612736)
    ('4.0 KiB', '1.5 GiB')
    """
    size = float(size_bytes)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        # 1023.95 would round up to a four-digit number of the smaller unit.
        if abs(size) < 1023.95:  # noqa: PLR2004
            return f"{size_bytes} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} PiB"


def format_age(age_s: float) -> str:
    """Print a span of time in its two largest units.

    >>> format_age(5400), format_age(0.2)
    ('1h 30m', '0s')
    """
    left = max(0, int(age_s))
    parts: list[str] = []
    for unit, unit_s in (("d", 86400), ("h", 3600), ("m", 60), ("s", 1)):
        amount, left = divmod(left, unit_s)
        if amount:
            parts.append(f"{amount}{unit}")
    return " ".join(parts[:2]) or "0s"
