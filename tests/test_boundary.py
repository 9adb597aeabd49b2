"""Long calls beside Python: signals, timeouts, progress, panics, and the GIL."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

import tdpmmu
from tdpmmu import _native


def test_a_panic_below_is_an_internal_error_with_its_message() -> None:
    with pytest.raises(tdpmmu.InternalError, match="the rule that broke"):
        _native._panic("the rule that broke")
    assert _native._idle(0.0) >= 0, "and the module works on"


def test_a_long_call_leaves_the_gil_to_others() -> None:
    turns = 0

    def count() -> None:
        nonlocal turns
        while not done.is_set():
            turns += 1
            time.sleep(0.001)

    done = threading.Event()
    other = threading.Thread(target=count)
    other.start()
    _native._idle(0.3)
    done.set()
    other.join()
    assert turns > 10


def test_progress_runs_on_the_calling_thread_and_grows() -> None:
    seen: list[tuple[str, float, int]] = []
    _native._idle(0.3, progress=lambda phase, part: seen.append((phase, part, threading.get_ident())))
    assert {phase for phase, _, _ in seen} == {"idle"}
    assert {thread for _, _, thread in seen} == {threading.get_ident()}
    parts = [part for _, part, _ in seen]
    assert parts == sorted(parts)
    assert 0 <= parts[0] < parts[-1] <= 1


def test_a_progress_that_raises_stops_the_work_with_its_own_error() -> None:
    def refuse(phase: str, part: float) -> None:
        raise ZeroDivisionError("enough")

    start = time.monotonic()
    with pytest.raises(ZeroDivisionError, match="enough"):
        _native._idle(60.0, progress=refuse)
    assert time.monotonic() - start < 30


def test_a_timeout_is_a_stall_error_that_names_it() -> None:
    with pytest.raises(tdpmmu.StallError, match=r"timeout=0\.05 s"):
        _native._idle(60.0, timeout=0.05)


def test_timeout_zero_is_a_poll() -> None:
    with pytest.raises(tdpmmu.StallError):
        _native._idle(60.0, timeout=0.0)


@pytest.mark.parametrize("seconds", [float("nan"), -1.0, float("inf")])
def test_a_length_that_is_none_is_refused(seconds: float) -> None:
    with pytest.raises(tdpmmu.InvalidArgument, match="seconds="):
        _native._idle(seconds)


INTERRUPTED = """
import time, threading, os, signal
from tdpmmu import _native
sent = None
def interrupt():
    global sent
    time.sleep(0.3)
    sent = time.monotonic()
    os.kill(os.getpid(), signal.SIGINT)
threading.Thread(target=interrupt).start()
try:
    _native._idle(60.0)
except KeyboardInterrupt:
    print("back after", time.monotonic() - sent)
print("usable", _native._idle(0.0))
"""


def test_ctrl_c_comes_back_as_a_keyboard_interrupt_and_the_module_stays_usable() -> None:
    done = subprocess.run([sys.executable, "-c", INTERRUPTED], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("back after")
    assert "usable" in done.stdout


def test_a_signal_handler_runs_during_a_long_call() -> None:
    ran = []
    old = signal.signal(signal.SIGUSR1, lambda *_: ran.append(time.monotonic()))
    try:
        timer = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGUSR1))
        timer.start()
        _native._idle(0.4)
        end = time.monotonic()
        timer.join()
    finally:
        signal.signal(signal.SIGUSR1, old)
    assert ran
    assert ran[0] < end


def test_many_threads_may_call_at_once() -> None:
    errors: list[BaseException] = []

    def call() -> None:
        try:
            _native._idle(0.05)
            tdpmmu.build_info()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=call) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


def test_a_second_interpreter_gets_an_import_error_and_no_crash() -> None:
    code = """
import sys
try:
    import _xxsubinterpreters as interpreters
except ImportError:
    try:
        import _interpreters as interpreters
    except ImportError:
        sys.exit(77)
import tdpmmu._native
one = interpreters.create()
try:
    interpreters.run_string(one, '''
try:
    import tdpmmu._native
except ImportError as error:
    print("refused:", error)
else:
    print("accepted")
''')
except Exception as error:
    print("refused:", error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    if done.returncode == 77:
        pytest.skip("this Python has no interpreters module")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("refused"), done.stdout
