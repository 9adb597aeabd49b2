"""Charts of results, by matplotlib (`pip install 'tdpmmu[plot]'`), to files: no display is needed.

One kind a file. The title says what was found, the line under it what was measured; axes carry units; colours
are told apart by readers who see fewer of them, and never carry a meaning alone.
"""

from __future__ import annotations

import importlib
import io
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from tdpmmu import _names
from tdpmmu.errors import InvalidArgument, Unsupported
from tdpmmu.mmus import Versus
from tdpmmu.plot.select import Selection
from tdpmmu.recorded import Replay
from tdpmmu.results import BenchResult, MicroResult

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["FORMATS", "KINDS", "RECORDED_KINDS", "draw"]

FORMATS = ("svg", "png", "pdf")
#: What can be drawn of a bench result; a file each.
KINDS = ("bars", "percentiles", "timeline", "scaling", "attribution", "backlog", "retained")
#: And of a replayed recording.
RECORDED_KINDS = ("recording", "pages", "causes", "storms")


def draw(
    result: object,
    format: str = "svg",
    *,
    kind: str | None = None,
    field: str | None = None,
    scene: str | None = None,
    designs: Sequence[str] | None = None,
) -> bytes:
    """Return the chart of a result as a file's bytes. Times are in ns in the result, scaled on the axes.

    Args:
        result: a `BenchResult`; a `MicroResult` or a `Versus`, which have one picture each; or a `Replay`.
        format: `svg`, `png` or `pdf`.
        kind: one of `KINDS`: `bars` (what a KVM engineer compares), `percentiles` (whole distributions),
            `timeline` (a track a thread), `scaling` (zap-64t: built, fitted, extrapolated), `attribution`
            (where the time went and who paid), `backlog` (pages that wait for a grace period), `retained`
            (obsolete shadow pages over time). Of a `Replay`
            one of `RECORDED_KINDS`: `pages` (what was mapped when, and the tables), `causes` (who zapped, how
            long), `storms` (each zap at its time), `recording` (the three). None is `bars`, or `recording`.
        field: which distribution `percentiles` draws, such as `access_ns`.
        scene: only the runs of this scene; None takes the first that has what the kind needs (bars: all).
        designs: only the runs of these designs, by name.

    Raises:
        Unsupported: matplotlib is not installed.
        InvalidArgument: an unknown format or kind, or a result without what the kind draws.
    """
    if format not in FORMATS:
        raise InvalidArgument(f"format={format!r}: expected one of {', '.join(FORMATS)}")
    if not isinstance(result, (BenchResult, MicroResult, Versus, Replay)):
        raise InvalidArgument(
            f"result: a {type(result).__name__} has no chart; expected a bench result or a replay"
        )
    if isinstance(result, Versus):
        for name, given in (("kind", kind), ("field", field), ("scene", scene), ("designs", designs)):
            if given is not None:
                raise InvalidArgument(f"{name}={given!r}: the two MMUs have one picture")
        if not result.rows:
            raise InvalidArgument("result: nothing to draw, it has no rows")
        return _drawn(format, lambda figure: _mmus(figure, result))
    kinds = RECORDED_KINDS if isinstance(result, Replay) else KINDS
    kind = kinds[0] if kind is None else _names.one_of(kind, kinds, "kind")
    if isinstance(result, Replay):
        for name, given in (("field", field), ("scene", scene), ("designs", designs)):
            if given is not None:
                raise InvalidArgument(f"{name}={given!r}: a recording has none")
        return _drawn(format, lambda figure: _recording(figure, result, kind))
    if not (result.runs if isinstance(result, BenchResult) else result.rows):
        raise InvalidArgument("result: nothing to draw, it has no runs")
    if isinstance(result, MicroResult) and kind != "bars":
        raise InvalidArgument(f"kind={kind!r}: a MicroResult has bars only")
    if field is not None and kind != "percentiles":
        raise InvalidArgument(f"field={field!r}: only percentiles draw one field, not {kind}")

    def fill(figure: Figure) -> None:
        if isinstance(result, MicroResult):
            from tdpmmu.plot import bars, dirty

            logging = result.rows[0].raw.get("phase") is not None
            (dirty.draw if logging else bars.draw_micro)(figure, result)
        else:
            chosen = Selection.of(result, scene=scene, designs=designs, field=field)
            importlib.import_module(f"tdpmmu.plot.{kind}").draw(figure, chosen)

    return _drawn(format, fill)


def _recording(figure: Figure, result: Replay, kind: str) -> None:
    from tdpmmu.plot import recording

    recording.draw(figure, result, kind)


def _mmus(figure: Figure, result: Versus) -> None:
    from tdpmmu.plot import mmus

    mmus.draw(figure, result)


def _drawn(format: str, fill: Callable[[Figure], None]) -> bytes:
    """Return the picture that `fill` draws, as a file's bytes."""
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError as error:
        raise Unsupported("charts need matplotlib: pip install 'tdpmmu[plot]'") from error
    from tdpmmu.plot import style

    # A figure without pyplot touches no display and no global state.
    with mpl.rc_context(style.RC):
        figure = Figure(layout="constrained")
        fill(figure)
        sink = io.BytesIO()
        figure.savefig(sink, format=format, dpi=160, metadata={"Date": None} if format == "svg" else None)
    return sink.getvalue()
