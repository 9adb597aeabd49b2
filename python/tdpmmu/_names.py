"""Names that configurations accept: designs, profiles, passes. Unknown ones are answered with the closest."""

from __future__ import annotations

import difflib
import functools
import json
from collections.abc import Iterable, Sequence

from tdpmmu import _native
from tdpmmu.errors import InvalidArgument

PREEMPT = ("none", "voluntary", "full")
OWNERSHIP = ("vcpu", "mmu")
POPULATE = ("bulk", "fault")
WRITEBACK = ("none", "bitmap")


@functools.cache
def catalogue() -> dict[str, tuple[str, ...]]:
    """Return the native side's names by kind (`designs`, `profiles`, `experiments`), in the order shown."""
    return {kind: tuple(names) for kind, names in json.loads(_native.catalogue()).items()}


def one_of(value: object, known: Sequence[str], name: str) -> str:
    """Return `value` if it is one of `known`.

    Raises:
        InvalidArgument: unknown; the message has the closest name and all of them.
        TypeError: not text.
    """
    if not isinstance(value, str):
        raise TypeError(f"{name}={value!r}: expected text, not {type(value).__name__}")
    if value in known:
        return value
    near = difflib.get_close_matches(value, known, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise InvalidArgument(f"{name}={value!r}: unknown{hint} (known: {', '.join(known)})")


def design(value: object, name: str = "design") -> str:
    """Return the name of a zap design."""
    return one_of(value, catalogue()["designs"], name)


def designs(values: str | Iterable[str], name: str = "design") -> list[str]:
    """Return zap designs from names, comma lists and `all` (every sound design), without repeats."""
    chosen: list[str] = []
    for text in [values] if isinstance(values, str) else values:
        if not isinstance(text, str):
            raise TypeError(f"{name}={text!r}: expected text, not {type(text).__name__}")
        for part in text.split(","):
            sound = catalogue()["sound_designs"]
            for found in sound if part.strip() == "all" else [design(part.strip(), name)]:
                if found not in chosen:
                    chosen.append(found)
    if not chosen:
        raise InvalidArgument(f"{name}: expected at least one design")
    return chosen


def profile(value: object, name: str = "profile") -> str:
    """Return a kernel profile, `NAME[,switch=value...]`, in its usual spelling.

    Raises:
        InvalidArgument: an unknown name or switch, or a value that the switch does not take.
    """
    if not isinstance(value, str):
        raise TypeError(f"{name}={value!r}: expected text, not {type(value).__name__}")
    one_of(value.partition(",")[0].strip(), catalogue()["profiles"], name)
    return _native.profile(value)


def passes(value: str | Iterable[str], name: str = "passes") -> str:
    """Return zap passes as `4K,2M,1G,root`.

    Raises:
        InvalidArgument: an unknown pass, one twice, a coarser one before a finer, no `root` at the end.
    """
    if isinstance(value, str):
        return _native.passes(value)
    parts = list(value)
    for part in parts:
        if not isinstance(part, str):
            raise TypeError(f"{name}={value!r}: expected names, not {type(part).__name__}")
    return _native.passes(",".join(parts))
