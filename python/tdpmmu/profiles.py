"""The modelled kernels, and in what they differ: one table of switches, their sources and their values."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["Policies"]

_WIDTH = 108


@dataclass(frozen=True, slots=True)
class Policies:
    """What `tdpmmu.policies()` returned, with the exports of a result. No units: values are spellings."""

    raw: Mapping[str, Any]

    def to_json(self, indent: int | None = None) -> str:
        """Return it as JSON text."""
        return json.dumps(self.raw, indent=indent)

    def to_rows(self) -> list[dict[str, Any]]:
        """Return a flat dict a switch: its name, its text, a column a kernel."""
        return [
            {"switch": switch["switch"], **switch["values"], "text": switch["text"]}
            for switch in self.raw["switches"]
        ]

    def to_arrow(self) -> Any:
        """Return the rows as an Arrow table, text columns.

        Raises:
            Unsupported: pyarrow is not installed (`pip install 'tdpmmu[arrow]'`).
        """
        from tdpmmu.arrow import to_table

        rows: list[Mapping[str, Any]] = [*self.to_rows()]
        return to_table(rows, {"schema": self.raw["schema"]})

    def render(self) -> str:
        """Return a paragraph a switch: what it is and where it is known from, then who has which value."""
        names = ", ".join(self.raw["profiles"])
        lines = [f"Kernel profiles: {names}. NAME,switch=value changes one switch."]
        for switch in self.raw["switches"]:
            lines += ["", switch["switch"]]
            lines += textwrap.wrap(switch["text"], _WIDTH, initial_indent="  ", subsequent_indent="  ")
            lines += [f"    {value}: {', '.join(kernels)}" for value, kernels in self._by_value(switch)]
        return "\n".join(lines) + "\n"

    def markdown(self) -> str:
        """Return the page `docs/profiles.md`: a section a switch."""
        lines = [
            "# Kernel profiles",
            "",
            "In what the modelled kernels differ: each switch of a profile, where it is known from, and who "
            "has which",
            "value. `--profile NAME,switch=value` changes one. Made by `tdpmmu.profiles`; a test holds it "
            "against the code.",
            "",
            "Profiles: " + ", ".join(f"`{name}`" for name in self.raw["profiles"]) + ".",
        ]
        for switch in self.raw["switches"]:
            lines += ["", f"## `{switch['switch']}`", "", switch["text"], ""]
            lines += [f"* `{value}`: {', '.join(kernels)}" for value, kernels in self._by_value(switch)]
        return "\n".join(lines) + "\n"

    def _by_value(self, switch: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
        """Group the kernels, oldest first, by their value."""
        found: dict[str, list[str]] = {}
        for kernel in self.raw["profiles"]:
            found.setdefault(str(switch["values"][kernel]), []).append(kernel)
        return list(found.items())
