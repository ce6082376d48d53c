import math

import pytest

from velora_torch.report.quantities import (
    format_bytes,
    format_count,
    format_loss,
    format_percent,
    format_ratio,
    format_seconds,
    ratio_of,
)


@pytest.mark.parametrize(
    ("function", "value", "text"),
    [
        (format_bytes, 0, "0 B"),
        (format_bytes, 1023, "1023 B"),
        (format_bytes, 1536, "1.50 KiB"),
        (format_bytes, 612 * 2**20, "612 MiB"),
        (format_bytes, 1023 * 2**20, "1.00 GiB"),
        (format_bytes, 17.25 * 2**30, "17.2 GiB"),
        (format_bytes, 5000 * 2**40, "5000 TiB"),
        (format_seconds, 0.00123, "1.23 ms"),
        (format_seconds, 0.9999, "1.00 s"),
        (format_seconds, 12.34, "12.3 s"),
        (format_seconds, 119.6, "2 min 0 s"),
        (format_seconds, 3599.7, "1 h 0 min"),
        (format_seconds, 7261, "2 h 1 min"),
        (format_ratio, 0.774, "0.77×"),
        (format_ratio, 0.03125, "0.031×"),
        (format_ratio, 0.0, "0.00×"),
        (format_ratio, 1.0, "1.00×"),
        (format_ratio, 12.34, "12.3×"),
        (format_percent, 0.8765, "87.6%"),
        (format_loss, 1.23456, "1.235"),
        (format_count, 9999, "9,999"),
        (format_count, 134_515_008, "134.5 M"),
        (format_count, 999_999, "1.0 M"),
        (format_count, 7e9, "7.0 G"),
    ],
)
def test_numbers_read_well(function, value, text):
    assert function(value) == text


@pytest.mark.parametrize(
    "function",
    [format_bytes, format_seconds, format_ratio, format_percent, format_loss, format_count],
)
@pytest.mark.parametrize("value", [None, math.nan, math.inf])
def test_missing_numbers_are_a_dash(function, value):
    assert function(value) == "–"


@pytest.mark.parametrize(("value", "baseline"), [(None, 1), (1, None), (1, 0), (math.nan, 1)])
def test_a_ratio_that_says_nothing_is_none(value, baseline):
    assert ratio_of(value, baseline) is None
