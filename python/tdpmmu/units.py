"""Sizes, times and counts: what people type, and what they read.

Input is strict: a whole number and a binary suffix. Output for people is scaled; JSON and results are
always plain bytes and nanoseconds.
"""

from __future__ import annotations

import numbers
import operator
import re
from typing import SupportsIndex

from tdpmmu.errors import InvalidArgument

__all__ = [
    "format_count",
    "format_ns",
    "format_size",
    "max_gfn",
    "pages",
    "parse_page",
    "parse_size",
    "parse_time",
    "table_bytes",
    "table_pages",
]

PAGE_BYTES = {"4K": 4 << 10, "2M": 2 << 20, "1G": 1 << 30}
LEVELS = {"4K": 1, "2M": 2, "1G": 3}

# Physical addresses end at 52 bits, whatever the tables could say (5 levels: 57).
MAXPHYADDR = 52

_SUFFIX = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40, "P": 50, "E": 60}
_SIZE = re.compile(r"(0[xX][0-9a-fA-F]+|[0-9]+)(?:([KMGTPE])(?:iB|B)?|B)?", re.IGNORECASE)
_TIME = re.compile(r"([0-9]+)(ns|us|ms|s|m|h)?")
_TIME_NS = {"ns": 1, "us": 10**3, "ms": 10**6, "s": 10**9, "m": 60 * 10**9, "h": 3600 * 10**9}
_MAX = 1 << 64


def as_int(value: object, name: str, accepted: str = "a whole number") -> int:
    """Return `value` as an int.

    Raises:
        InvalidArgument: a bool or a float, even one without a fraction: both are slips more often than sizes.
        TypeError: no kind of number.
    """
    boolean = isinstance(value, bool) or type(value).__name__ in ("bool", "bool_")  # the second is numpy's
    if boolean or (isinstance(value, numbers.Real) and not isinstance(value, numbers.Integral)):
        raise InvalidArgument(f"{name}={value!r}: expected {accepted}, not {type(value).__name__}")
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name}={value!r}: expected {accepted}, not {type(value).__name__}") from None


def parse_size(value: str | SupportsIndex, name: str = "size") -> int:
    """Return a size in bytes from `"4K"`, `"2MiB"`, `"0x1000"` or a whole number of bytes.

    Suffixes are binary: K, M, G, T, P, E, each also as KiB and KB.

    Raises:
        InvalidArgument: negative, fractional, not below 2**64, an unknown suffix, a bool or a float.
        TypeError: neither text nor a number.

    >>> parse_size("64G") == 64 << 30
    True
    """
    accepted = "bytes as a whole number, or text such as '4K', '2M', '1G', '64T'"
    if isinstance(value, str):
        match = _SIZE.fullmatch(value.strip())
        if match is None:
            raise InvalidArgument(f"{name}={value!r}: expected {accepted}")
        digits, suffix = match.group(1), (match.group(2) or "").upper()
        number = int(digits, 16 if digits[:2] in ("0x", "0X") else 10) << _SUFFIX[suffix]
    else:
        number = as_int(value, name, accepted)
    if not 0 <= number < _MAX:
        raise InvalidArgument(f"{name}={value!r}: must be at least 0 and below 2^64 bytes")
    return number


def parse_time(value: str | SupportsIndex, name: str = "time") -> int:
    """Return a time in nanoseconds from `"4ms"`, `"10us"`, `"2s"` or a whole number of nanoseconds.

    Raises:
        InvalidArgument: negative, fractional, an unknown unit, a bool or a float.
        TypeError: neither text nor a number.

    >>> parse_time("4ms")
    4000000
    """
    accepted = "nanoseconds as a whole number, or text such as '500ns', '10us', '4ms', '2s'"
    if isinstance(value, str):
        match = _TIME.fullmatch(value.strip())
        if match is None:
            raise InvalidArgument(f"{name}={value!r}: expected {accepted}")
        number = int(match.group(1)) * _TIME_NS[match.group(2) or "ns"]
    else:
        number = as_int(value, name, accepted)
    if not 0 <= number < _MAX:
        raise InvalidArgument(f"{name}={value!r}: must be at least 0 and below 2^64 ns")
    return number


def parse_page(value: str | SupportsIndex, name: str = "page") -> str:
    """Return the page size as `"4K"`, `"2M"` or `"1G"`.

    Raises:
        InvalidArgument: any other size.
        TypeError: neither text nor a number.

    >>> parse_page(2 << 20)
    '2M'
    """
    number = parse_size(value, name)
    for text, size in PAGE_BYTES.items():
        if number == size:
            return text
    raise InvalidArgument(f"{name}={value!r}: expected one of 4K, 2M, 1G")


def pages(size: str | SupportsIndex) -> int:
    """Return how many 4 KiB guest pages `size` bytes are.

    Raises:
        InvalidArgument: not a multiple of 4 KiB, or no size.

    >>> pages("1G")
    262144
    """
    number = parse_size(size)
    if number % PAGE_BYTES["4K"]:
        raise InvalidArgument(f"size={size!r}: must be a multiple of 4 KiB")
    return number // PAGE_BYTES["4K"]


def table_pages(memory: str | SupportsIndex, page: str | SupportsIndex = "4K", levels: int = 4) -> int:
    """Return how many page-table pages map `memory` bytes from gfn 0 with one page size, root included.

    Raises:
        InvalidArgument: no size, not a page size, or `levels` other than 4 and 5.

    >>> table_pages("64T") * 4096 / 2**30  # GiB
    128.25049...
    """
    size, level = parse_size(memory, "memory"), LEVELS[parse_page(page)]
    if levels not in (4, 5):
        raise InvalidArgument(f"levels={levels!r}: expected 4 or 5")
    total = 0
    for at in range(level, levels):
        span = PAGE_BYTES["4K"] << (9 * at)
        total += -(-size // span)
    return total + 1


def table_bytes(memory: str | SupportsIndex, page: str | SupportsIndex = "4K", levels: int = 4) -> int:
    """Return the bytes of page tables that map `memory`; see `table_pages`."""
    return table_pages(memory, page, levels) * PAGE_BYTES["4K"]


def max_gfn(levels: int) -> int:
    """Return the end of the guest-physical space in 4 KiB pages, exclusive: 2^36, or 2^40 with 5 levels."""
    return 1 << min(9 * levels, MAXPHYADDR - 12)


def format_size(number: float) -> str:
    """Return bytes for people, exact where a suffix is: `64 GiB`, `128.3 GiB`, `12 B`."""
    value, unit = float(number), "B"
    for suffix in ("KiB", "MiB", "GiB", "TiB", "PiB", "EiB"):
        if abs(value) < 1024:
            break
        value, unit = value / 1024, suffix
    return f"{value:.0f} {unit}" if value == int(value) else f"{value:.1f} {unit}"


def format_ns(number: float | None) -> str:
    """Return nanoseconds for people, to three digits: `950 ns`, `1.23 ms`, `4.56 s`; `-` for None."""
    if number is None:
        return "-"
    value = float(number)
    for unit, scale in (("ns", 1.0), ("us", 1e3), ("ms", 1e6)):
        # What would round up to 1000 of this unit is 1.00 of the next.
        if abs(value) < 999.5 * scale:
            return f"{_three(value / scale)} {unit}"
    return f"{_three(value / 1e9)} s"


def format_count(number: float | None) -> str:
    """Return a count with separators: `67,108,864`; `-` for None."""
    if number is None:
        return "-"
    return f"{number:,}" if isinstance(number, int) else f"{number:,.2f}"


def _three(value: float) -> str:
    magnitude = abs(value)
    if value == int(value) and magnitude < 1000:
        return f"{value:.0f}"
    if magnitude < 9.995:
        return f"{value:.2f}"
    return f"{value:.1f}" if magnitude < 99.95 else f"{value:.0f}"
