"""Names that configurations accept: designs, profiles, passes. Unknown ones are answered with the closest."""

from __future__ import annotations

import difflib
import functools
import json
from collections.abc import Iterable, Sequence
from typing import Any

from tdpmmu import _native
from tdpmmu.errors import InvalidArgument

PREEMPT = ("none", "voluntary", "full")
OWNERSHIP = ("vcpu", "mmu")
POPULATE = ("bulk", "fault")
WRITEBACK = ("none", "bitmap")
SHARING = ("local", "pipeline", "global")
QUEUES = ("per-vm", "system")
#: The scene that ends a process with work pending: a child process, so it is played from Python.
PROCESS_EXIT = "process-exit"


@functools.cache
def catalogue() -> dict[str, tuple[Any, ...]]:
    """Return the native side's names by kind (`designs`, `profiles`, `experiments`), in the order shown.

    `design_info` and `scene_info` have an object each: the name, a one-line summary, what it is by default.
    """
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


def design_of(profile_text: str) -> str:
    """Return the zap design of a kernel profile, `NAME[,switch=value]`.

    Raises:
        InvalidArgument: an unknown profile or switch.
    """
    name, *switches = profile(profile_text).split(",")
    for switch in switches:
        if switch.startswith("design="):
            return switch.removeprefix("design=")
    return str(catalogue()["profile_designs"][catalogue()["profiles"].index(name)])


def designs(values: str | Iterable[str], name: str = "design") -> list[str]:
    """Return zap designs from names and comma lists, without repeats.

    `all` is every sound one of the TDP MMU, `shadow` every one of the shadow MMU.
    """
    groups = {"all": catalogue()["sound_designs"], "shadow": shadow_designs()}
    chosen: list[str] = []
    for text in [values] if isinstance(values, str) else values:
        if not isinstance(text, str):
            raise TypeError(f"{name}={text!r}: expected text, not {type(text).__name__}")
        for part in text.split(","):
            for found in groups.get(part.strip()) or [design(part.strip(), name)]:
                if found not in chosen:
                    chosen.append(found)
    if not chosen:
        raise InvalidArgument(f"{name}: expected at least one design")
    return chosen


def flawed() -> tuple[str, ...]:
    """Return the designs that are wrong on purpose: `all` leaves them out, and whoever shows one says so."""
    return tuple(str(info["name"]) for info in catalogue()["design_info"] if info["flawed"])


def shadow_designs() -> tuple[str, ...]:
    """Return the designs of the shadow MMU, oldest first: `shadow` stands for them, `all` leaves them out."""
    return tuple(str(name) for name in catalogue()["shadow_designs"])


def design_groups() -> list[tuple[str, list[Any]]]:
    """Return the designs of each MMU under a heading, oldest first."""
    infos = catalogue()["design_info"]
    heads = {
        "tdp": "Designs of the TDP MMU (flawed ones are wrong on purpose, and never in all):",
        "shadow": "Designs of the shadow MMU (shadow is all of them):",
    }
    return [(said, [info for info in infos if info["mmu"] == mmu]) for mmu, said in heads.items()]


def reclaims() -> tuple[str, ...]:
    """Return the ways to keep zapped shadow pages from lockless walkers."""
    return tuple(str(info["name"]) for info in catalogue()["reclaim_info"])


def marked(name: str) -> str:
    """Return a design's name as it is shown: `system-workqueue (flawed)`."""
    return f"{name} (flawed)" if name in flawed() else name


def scenes_of(experiment: str) -> tuple[str, ...]:
    """Return the scenes of `zap` or `drop`, the default one first."""
    names = tuple(str(s["name"]) for s in catalogue()["scene_info"] if s["experiment"] == experiment)
    return (*names, PROCESS_EXIT) if experiment == "drop" else names


def scene_summaries(experiment: str) -> list[tuple[str, str]]:
    """Return the scenes of an experiment, each with a line that says what happens."""
    known = {(s["experiment"], s["name"]): str(s["summary"]) for s in catalogue()["scene_info"]}
    known["drop", PROCESS_EXIT] = "a process ends with the teardown of a dropped root still under way"
    return [(name, known[experiment, name]) for name in scenes_of(experiment)]


def scenes(values: str | Iterable[str], experiment: str, name: str = "scene") -> list[str]:
    """Return scenes of an experiment from names and comma lists, without repeats; `all` takes in the others.

    Raises:
        InvalidArgument: an unknown one, or one of the other experiment.
        TypeError: not text.
    """
    known = scenes_of(experiment)
    chosen: list[str] = []
    for text in [values] if isinstance(values, str) else values:
        if not isinstance(text, str):
            raise TypeError(f"{name}={text!r}: expected text, not {type(text).__name__}")
        for part in map(str.strip, text.split(",")):
            other = "zap" if experiment == "drop" else "drop"
            if part not in known and part in scenes_of(other):
                raise InvalidArgument(f"{name}={part!r}: a scene of bench {other}, not of bench {experiment}")
            # `all` stays: which scenes make sense with the other settings is decided below.
            found = part if part == "all" else one_of(part, known, name)
            if found not in chosen:
                chosen.append(found)
    if not chosen:
        raise InvalidArgument(f"{name}: expected at least one scene")
    return ["all"] if "all" in chosen else chosen


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


def passes_list(value: str | Iterable[str], name: str = "passes") -> list[str]:
    """Return zap passes, one entry a run: from one text, several, or the parts of one.

    `"1G,root"`, `["1G,root", "4K,2M,1G,root"]` and `["4K", "2M", "1G", "root"]` are one, two and one.

    Raises:
        InvalidArgument: see `passes`; or none at all.
    """
    parts = [value] if isinstance(value, str) else list(value)
    if not parts:
        raise InvalidArgument(f"{name}: expected at least one")
    whole = all(isinstance(part, str) and part.split(",")[-1].strip() == "root" for part in parts)
    return list(dict.fromkeys(passes(part, name) for part in parts)) if whole else [passes(parts, name)]


def each_of(values: str | Iterable[str], known: Sequence[str], name: str) -> list[str]:
    """Return names out of `known` from names and comma lists, without repeats.

    Raises:
        InvalidArgument: an unknown one, or none at all.
        TypeError: not text.
    """
    texts = [values] if isinstance(values, str) else list(values)
    found: list[str] = []
    for text in texts:
        for part in text.split(",") if isinstance(text, str) else [text]:
            found.append(one_of(part.strip() if isinstance(part, str) else part, known, name))
    if not found:
        raise InvalidArgument(f"{name}: expected at least one")
    return list(dict.fromkeys(found))
