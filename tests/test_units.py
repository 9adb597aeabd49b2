"""Sizes, times and counts: what is accepted, what is refused, and that text and numbers agree."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tdpmmu
from tdpmmu import units
from tdpmmu.errors import InvalidArgument


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4K", 4096),
        ("4k", 4096),
        ("2MiB", 2 << 20),
        ("1GB", 1 << 30),
        ("64T", 64 << 40),
        ("0x1000", 4096),
        ("0X10", 16),
        (" 512 ", 512),
        ("0", 0),
        ("7B", 7),
        (12, 12),
        (np.uint64(1 << 40), 1 << 40),
    ],
)
def test_a_size_is_read(text: str, size: int) -> None:
    assert units.parse_size(text) == size


@pytest.mark.parametrize(
    "value",
    [
        "64X",
        "1.5K",
        "-1",
        -1,
        True,
        np.True_,
        1e12,
        math.nan,
        np.float32(4096),
        "",
        "K",
        "4 K",
        "4Ki",
        "1e3",
        "16E",
        1 << 64,
        "0xg",
    ],
)
def test_what_is_no_size_is_refused_by_name(value: object) -> None:
    with pytest.raises(InvalidArgument, match="memory=") as caught:
        units.parse_size(value, "memory")  # type: ignore[arg-type]
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize("value", [None, [], object, b"4K"])
def test_a_wrong_type_is_a_type_error_that_names_the_parameter(value: object) -> None:
    with pytest.raises(TypeError, match="memory="):
        units.parse_size(value, "memory")  # type: ignore[arg-type]


@given(st.integers(0, (1 << 64) - 1))
def test_bytes_and_hexadecimal_text_are_the_number(number: int) -> None:
    assert (
        units.parse_size(number) == units.parse_size(str(number)) == units.parse_size(hex(number)) == number
    )


@given(st.integers(0, 1 << 20), st.sampled_from("KMGTPE"))
def test_a_suffix_is_a_power_of_1024(number: int, suffix: str) -> None:
    size = number * 1024 ** ("KMGTPE".index(suffix) + 1)
    if size < 1 << 64:
        assert units.parse_size(f"{number}{suffix}") == size
    else:
        with pytest.raises(InvalidArgument):
            units.parse_size(f"{number}{suffix}")


@given(st.text(max_size=12))
def test_any_text_is_a_size_or_refused(text: str) -> None:
    try:
        size = units.parse_size(text)
    except InvalidArgument as error:
        message = str(error)
    else:
        message = repr(text)
        assert 0 <= size < 1 << 64
    assert repr(text) in message


@pytest.mark.parametrize(
    ("text", "ns"), [("4ms", 4_000_000), ("10us", 10_000), ("3", 3), ("2s", 2 * 10**9), (5, 5)]
)
def test_a_time_is_read(text: str, ns: int) -> None:
    assert units.parse_time(text) == ns


@pytest.mark.parametrize("value", ["4 ms", "1.5ms", "ms", -1, True, 0.5, "4x"])
def test_what_is_no_time_is_refused(value: object) -> None:
    with pytest.raises(InvalidArgument, match="tick="):
        units.parse_time(value, "tick")  # type: ignore[arg-type]


def test_a_page_is_one_of_three_sizes() -> None:
    assert [units.parse_page(size) for size in ("4k", 2 << 20, "1024M")] == ["4K", "2M", "1G"]
    with pytest.raises(InvalidArgument, match="4K, 2M, 1G"):
        units.parse_page("8K")


def test_64_tib_of_4k_pages_need_128_gib_of_tables() -> None:
    assert tdpmmu.table_pages("64T") == 33_554_432 + 65_536 + 128 + 1
    assert tdpmmu.table_bytes("64T", "2M") == (65_536 + 128 + 1) * 4096
    assert tdpmmu.table_pages("64T", "4K", 5) == tdpmmu.table_pages("64T") + 1


def test_pages_of_a_size_that_is_no_multiple_are_refused() -> None:
    assert tdpmmu.pages("1G") == 262_144
    with pytest.raises(InvalidArgument, match="multiple of 4 KiB"):
        tdpmmu.pages(4097)


@pytest.mark.parametrize(
    ("ns", "text"),
    [
        (None, "-"),
        (0, "0 ns"),
        (950, "950 ns"),
        (999.7, "1.00 us"),
        (1234, "1.23 us"),
        (45_600_000, "45.6 ms"),
        (999_600, "1.00 ms"),
        (7 * 10**9, "7 s"),
        (900 * 10**9, "900 s"),
    ],
)
def test_times_are_scaled_for_people(ns: float | None, text: str) -> None:
    assert units.format_ns(ns) == text


@given(st.integers(1, 10**14))
def test_a_scaled_time_is_right_to_one_percent(ns: int) -> None:
    number, unit = units.format_ns(ns).split()
    assert float(number) * {"ns": 1, "us": 1e3, "ms": 1e6, "s": 1e9}[unit] == pytest.approx(ns, rel=0.01)


def test_sizes_and_counts_are_scaled_for_people() -> None:
    assert units.format_size(64 << 30) == "64 GiB"
    assert units.format_size(12) == "12 B"
    assert units.format_count(67_108_864) == "67,108,864"
