from collections.abc import Callable
from os import PathLike

__all__ = [
    "_idle",
    "_panic",
    "bench",
    "build_info",
    "catalogue",
    "info",
    "passes",
    "profile",
    "replay",
]

def build_info() -> str: ...
def info() -> str: ...
def catalogue() -> str: ...
def profile(text: str) -> str: ...
def passes(text: str) -> str: ...
def bench(
    kind: str,
    config: str,
    *,
    progress: Callable[[str, float], object] | None = None,
    timeout: float | None = None,
) -> str: ...
def replay(
    path: str | PathLike[str],
    *,
    profile: str | None = None,
    check: bool = False,
    strict: bool = False,
    vm_of: int | None = None,
    progress: Callable[[str, float], object] | None = None,
    timeout: float | None = None,
) -> str: ...
def _panic(message: str) -> None: ...
def _idle(
    seconds: float,
    *,
    progress: Callable[[str, float], object] | None = None,
    timeout: float | None = None,
) -> int: ...
