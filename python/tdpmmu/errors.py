"""What can go wrong, by kind. Every error of tdpmmu is a `TdpMmuError` and also the built-in it resembles.

The message names the value and the rule it broke. The native module raises these same classes.
"""

from __future__ import annotations

__all__ = [
    "Busy",
    "Closed",
    "DirtyRingFull",
    "ForkedError",
    "InternalError",
    "InvalidArgument",
    "OracleViolation",
    "OutOfTableMemory",
    "StallError",
    "TdpMmuError",
    "TraceError",
    "Unsupported",
]


class TdpMmuError(Exception):
    """The base of every error that tdpmmu defines."""


class InvalidArgument(TdpMmuError, ValueError):
    """A value breaks a rule. The message names the parameter, the value and what is accepted."""


class OutOfTableMemory(TdpMmuError, MemoryError):
    """More page-table memory is needed than there is, or than a cap allows.

    Attributes:
        needed_bytes: what the request needs, in bytes; 0 where it is not known.
        available_bytes: what there was, in bytes; 0 where it is not known.
    """

    def __init__(self, message: str, *, needed_bytes: int = 0, available_bytes: int = 0) -> None:
        super().__init__(message)
        self.needed_bytes = needed_bytes
        self.available_bytes = available_bytes


class Closed(TdpMmuError, RuntimeError):
    """The object was closed, and a closed object does nothing more."""


class Busy(TdpMmuError, RuntimeError):
    """Somebody else uses it right now: a vCPU, for one, is one thread at a time."""


class DirtyRingFull(TdpMmuError, RuntimeError):
    """A vCPU's dirty ring has no room (KVM_EXIT_DIRTY_RING_FULL): harvest it, reset the rings, go on."""


class ForkedError(TdpMmuError, RuntimeError):
    """The object was made before a fork and is used in the child, where its threads do not exist."""


class TraceError(TdpMmuError, ValueError):
    """A recording cannot be read.

    Attributes:
        path: the file, `-` for standard input.
        line: line number from 1; 0 where the fault is not in a line.
        offset: byte offset in the (decompressed) input.
        column: byte column from 1 in the line, or None.
        text: the offending text, shortened.
    """

    def __init__(
        self,
        message: str,
        *,
        path: str = "",
        line: int = 0,
        offset: int = 0,
        column: int | None = None,
        text: str = "",
    ) -> None:
        super().__init__(message)
        self.path = path
        self.line = line
        self.offset = offset
        self.column = column
        self.text = text


class StallError(TdpMmuError, TimeoutError):
    """Not finished within the time given. What was running has been stopped."""


class OracleViolation(TdpMmuError, AssertionError):
    """A check failed: the engine, or a recording, broke an invariant.

    Attributes:
        partial: what was measured until then, as JSON text, or None.
    """

    def __init__(self, message: str, *, partial: str | None = None) -> None:
        super().__init__(message)
        self.partial = partial


class Unsupported(TdpMmuError, NotImplementedError):
    """This host or this build cannot do it. The message says what is missing."""


class InternalError(TdpMmuError, RuntimeError):
    """A defect of tdpmmu itself, such as a panic in the native part. Worth a report."""
