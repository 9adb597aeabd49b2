"""Which runs of a result a chart is about, and what to call them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tdpmmu import _names
from tdpmmu.errors import InvalidArgument
from tdpmmu.results import BenchResult, BenchRun
from tdpmmu.units import format_count, format_size

__all__ = ["Selection", "measured", "name_of"]


def name_of(run: BenchRun) -> str:
    """Return the design of a run as it is shown, flawed ones marked."""
    return f"{run.design} (flawed)" if run.flawed else run.design


def measured(run: BenchRun) -> str:
    """Return what was measured: scene, size, pages, vCPUs."""
    return (
        f"{run.scene}: {format_size(run.memory_bytes)} of {run.page} pages "
        f"({format_count(run.sptes)} SPTEs), {run.vcpus} vCPUs"
    )


@dataclass(frozen=True, slots=True)
class Selection:
    """The runs of a result that were asked for, never none."""

    result: BenchResult
    runs: tuple[BenchRun, ...]
    field: str | None

    @classmethod
    def of(
        cls, result: BenchResult, *, scene: str | None, designs: Sequence[str] | None, field: str | None
    ) -> Selection:
        """Choose by scene and design.

        Raises:
            InvalidArgument: the result has no such scene or design; the message has those it has.
        """
        runs = result.runs
        if scene is not None:
            _names.one_of(scene, list(dict.fromkeys(run.scene for run in runs)), "scene")
            runs = tuple(run for run in runs if run.scene == scene)
        if designs is not None:
            for design in designs:
                _names.one_of(design, list(dict.fromkeys(run.design for run in runs)), "design")
            runs = tuple(run for run in runs if run.design in designs)
        return cls(result, runs, field)

    def first_scene(self, has: Callable[[BenchRun], object], why: str) -> tuple[BenchRun, ...]:
        """Return the runs with what a chart needs, of the first scene and guest that have it.

        Raises:
            InvalidArgument: none has it; `why` says how to get it.
        """
        good = [run for run in self.runs if has(run)]
        if not good:
            raise InvalidArgument(f"result: {why}")
        first = good[0]
        return tuple(
            run
            for run in good
            if (run.scene, run.memory_bytes, run.page) == (first.scene, first.memory_bytes, first.page)
        )

    def lines(self, runs: Sequence[BenchRun]) -> dict[str, list[BenchRun]]:
        """Group repetitions: one entry a design, told apart by passes and preemption where those vary."""
        out: dict[str, list[BenchRun]] = {}
        passes = {
            design: {r.passes for r in runs if r.design == design} for design in {r.design for r in runs}
        }
        preempt = len({run.preempt for run in runs}) > 1
        reclaim = len({run.shadow.reclaim for run in runs if run.shadow}) > 1
        paging = len({run.shadow.paging for run in runs if run.shadow}) > 1
        for run in runs:
            name = name_of(run)
            if len(passes[run.design]) > 1:
                name += f", {run.passes}"
            if preempt:
                name += f", {run.preempt}"
            if run.shadow and paging:
                name += f", {run.shadow.paging}"
            if run.shadow and reclaim:
                name += f", {run.shadow.reclaim}"
            out.setdefault(name, []).append(run)
        return out
