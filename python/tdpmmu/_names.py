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
PASSES = ("4K", "2M", "1G", "root")


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
            for found in catalogue()["designs"] if part.strip() == "all" else [design(part.strip(), name)]:
                if found not in chosen:
                    chosen.append(found)
    if not chosen:
        raise InvalidArgument(f"{name}: expected at least one design")
    return chosen


def profile(value: object, name: str = "profile") -> str:
    """Return a kernel profile, `NAME[,switch=value...]`. The switches are checked where they are applied."""
    if not isinstance(value, str):
        raise TypeError(f"{name}={value!r}: expected text, not {type(value).__name__}")
    one_of(value.partition(",")[0], catalogue()["profiles"], name)
    return value


def passes(value: str | Iterable[str], name: str = "passes") -> str:
    """Return zap passes as `4K,2M,1G,root`.

    Raises:
        InvalidArgument: an unknown pass, a coarser pass before a finer, no `root` at the end.
    """
    parts = [one_of(p.strip(), PASSES, name) for p in (value.split(",") if isinstance(value, str) else value)]
    order = [PASSES.index(p) for p in parts]
    if not parts or parts[-1] != "root" or order != sorted(set(order)):
        raise InvalidArgument(
            f"{name}={','.join(parts)!r}: expected ascending levels that end in root, such as '1G,root': "
            "a coarse pass first would do the fine passes' work without a chance to yield"
        )
    return ",".join(parts)
