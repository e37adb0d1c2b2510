"""Times of all kinds are read to the last digit and in the right unit."""

from __future__ import annotations

import random
import warnings
from datetime import UTC, date, datetime
from decimal import Decimal
from fractions import Fraction

import pytest

from examples.recsys.data import Interactions
from examples.recsys.data.protocol import TEST, TRAIN, VALIDATION
from examples.recsys.data.times import NAMES, UNITS, Clock

DAY = 1_717_113_600
"""2024-05-31 in Unix seconds."""

FRACTIONS = {
    # How an instant that lies so many nanoseconds after DAY is written, the unit, and what a step of it is.
    "s as integers": ("s", 10**9, lambda ns: f"{DAY + ns // 10**9}"),
    "s as decimals": ("s", 1, lambda ns: f"{DAY + ns // 10**9}.{ns % 10**9:09d}"),
    "s with an exponent": ("s", 1, lambda ns: f"{Decimal(DAY) + Decimal(ns).scaleb(-9):e}"),
    "s beyond float64": ("s", 1, lambda ns: f"{DAY + ns // 10**9}.{ns % 10**9:09d}000000000001"),
    "ms": ("ms", 10**6, lambda ns: f"{DAY * 1000 + ns // 10**6}"),
    "ms as decimals": ("ms", 1, lambda ns: f"{DAY * 1000 + ns // 10**6}.{ns % 10**6:06d}"),
    "us": ("us", 10**3, lambda ns: f"{DAY * 10**6 + ns // 10**3}"),
    "ns": ("ns", 1, lambda ns: f"{DAY * 10**9 + ns}"),
    "ISO with microseconds": ("s", 10**3, lambda ns: f"{_iso(ns)}.{ns % 10**9 // 1000:06d}"),
    "ISO with nanoseconds": ("s", 1, lambda ns: f"{_iso(ns)}.{ns % 10**9:09d}Z"),
    "ISO with a comma": ("s", 1, lambda ns: f'"{_iso(ns)},{ns % 10**9:09d}"'),
    "ISO in a zone": ("s", 1, lambda ns: f"{_iso(ns + 7200 * 10**9)}.{ns % 10**9:09d}+02:00"),
    "ISO in UTC, spelled out": ("s", 1, lambda ns: f"{_iso(ns).replace('T', ' ')}.{ns % 10**9:09d} UTC"),
    "digits of a date": ("date", 1, lambda ns: f"{_iso(ns, '%Y%m%d%H%M%S')}.{ns % 10**9:09d}"),
}


def _iso(ns: int, form: str = "%Y-%m-%dT%H:%M:%S") -> str:
    return datetime.fromtimestamp(DAY + ns // 10**9, UTC).strftime(form)


def log(tmp_path, rows, **kwargs) -> Interactions:
    path = tmp_path / "log.csv"
    path.write_text("user,item,timestamp\n" + "".join(f"{','.join(map(str, row))}\n" for row in rows))
    return Interactions(str(path), **kwargs)


def names(data: Interactions) -> list[list[object]]:
    sequences = data.load_sequences()
    return [[data.item_ids[item - 1] for item in sequences[user].tolist()] for user in range(len(sequences))]


@pytest.mark.filterwarnings("ignore:What was decided")
@pytest.mark.parametrize("kind", FRACTIONS)
class TestOrder:
    def test_it_is_that_of_the_last_digit(self, tmp_path, kind):
        unit, step, write = FRACTIONS[kind]
        places = list(range(40))
        random.Random(0).shuffle(places)
        rows = [("u", f"i{place}", write(place * step)) for place in places]
        data = log(tmp_path, rows, time_unit=unit)
        assert names(data) == [[f"i{place}" for place in range(40)]]
        assert data.load_sequences().times.tolist() == [DAY + place * step // 10**9 for place in range(40)]
        assert not any("same time" in remark for remark in data.report())

    def test_exact_ties_keep_the_order_of_the_file_and_are_counted(self, tmp_path, kind):
        unit, step, write = FRACTIONS[kind]
        rows = [("u", item, write(step)) for item in "cab"] + [("v", item, write(0)) for item in "ba"]
        rows += [("u", "first", write(0)), ("v", "last", write(step))]
        rows += [("w", item, write(n * step)) for n, item in enumerate("abc")]
        data = log(tmp_path, rows, time_unit=unit)
        assert names(data) == [["first", "c", "a", "b"], ["b", "a", "last"], ["a", "b", "c"]]
        (remark,) = [remark for remark in data.report() if "same time" in remark]
        assert remark.startswith(
            "2 of 3 users have rows at exactly the same time (5 rows): these keep the order of the file"
        )

    def test_a_split_by_time_cuts_within_a_second(self, tmp_path, kind):
        """The order of the users in the file is opposite to that of their targets."""
        unit, step, write = FRACTIONS[kind]
        rows = [(f"u{user}", f"i{n}", write((n * 10 + 9 - user) * step)) for user in range(10) for n in range(2)]
        data = log(tmp_path, rows, time_unit=unit, split="time")
        data.setup("fit")
        labels = data.protocol.labels[1::2].tolist()
        assert labels == [TEST, VALIDATION, *[TRAIN] * 8]


class TestUnit:
    SCALES = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}  # noqa: RUF012

    @pytest.mark.parametrize("given", UNITS)
    @pytest.mark.parametrize("meant", UNITS)
    @pytest.mark.parametrize("write", [int, float])
    def test_a_wrong_one_is_named_with_the_right_one(self, tmp_path, given, meant, write):
        days = range(DAY, DAY + 5 * 86_400, 86_400)
        numbers = (
            [f"{datetime.fromtimestamp(day, UTC):%Y%m%d}" for day in days]
            if meant == "date"
            else [day * self.SCALES[meant] for day in days]
        )
        data = log(tmp_path, [("u", n, write(int(number))) for n, number in enumerate(numbers)], time_unit=given)
        if given == meant:
            assert data.load_sequences().times.tolist() == list(days)
            assert data.report() == []
        else:
            with pytest.raises(ValueError, match=rf"log.csv.* looks like {NAMES[meant]}: set time_unit='{meant}'"):
                data.load_sequences()

    @pytest.mark.parametrize("number", ["20240531", "202405311230", "20240531123000", "20240531.0"])
    def test_digits_of_a_date_are_one(self, number):
        assert Clock("date").read(number, "line 2") in (DAY, DAY + 12.5 * 3600)
        clock = Clock("s")
        clock.read(number, "line 2")
        assert "set time_unit='date'" in clock.fault()

    @pytest.mark.parametrize("unit", ["s", "ms"])
    def test_two_units_in_a_file_are_refused(self, tmp_path, unit):
        rows = [("u", "a", DAY), ("u", "b", DAY * 1000), ("u", "c", DAY + 1)]
        with pytest.raises(ValueError, match=r"\(line 2\) looks like seconds, but .* \(line 3\) like milliseconds"):
            log(tmp_path, rows, time_unit=unit).load_sequences()

    @pytest.mark.parametrize("number", [-(10**11), 10**30, "1e39"])
    def test_numbers_in_no_unit_are_refused(self, tmp_path, number):
        with pytest.raises(ValueError, match=r"column timestamp: .* \(line 3\) is in the year .*, far from our time"):
            log(tmp_path, [("u", "a", DAY), ("u", "b", number)]).load_sequences()

    @pytest.mark.parametrize("first", [0, 1, -5])
    def test_an_order_is_taken_without_a_word(self, tmp_path, first):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert names(log(tmp_path, [("u", n, first + n) for n in range(5)])) == [list("01234")]

    @pytest.mark.parametrize(
        ("times", "unit", "remark"),
        [
            (
                [0, DAY * 1000, DAY * 1000 + 1],
                "ms",
                "1 time is before 1971, the earliest on 1970-01-01",
            ),
            (["0001-01-01", "2024-05-31", "2024-06-01"], "s", None),
            (
                [19_000, 19_001, 19_002],
                "s",
                "The times are from 1970-01-01 to 1970-01-01 in seconds: if these are times and",
            ),
            (["2024-05-31", "2024-05-31T12:00:00+02:00", "2024-06-01"], "s", "2 dates have no time zone, others do"),
            ([DAY, DAY + 1, 4_000_000_000], "s", "The latest time is 2096-10-02, which is in the future."),
        ],
    )
    def test_what_is_odd_is_said(self, tmp_path, times, unit, remark):
        data = log(tmp_path, [("u", n, time) for n, time in enumerate(times)], time_unit=unit)
        if remark is None:
            with pytest.raises(ValueError, match="line 2: timestamp '0001-01-01' is far from our time: drop such rows"):
                data.report()
        else:
            with pytest.warns(UserWarning, match="What was decided in reading .*log.csv"):
                (said,) = data.report()
            assert said.startswith(remark)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "snan", "1e999999", "31/05/2024", "noon", "1.2.3"])
def test_what_is_no_time_gets_a_sentence(tmp_path, value):
    with pytest.raises(ValueError, match=r"line 2: timestamp must be a number or an ISO date, .*got '"):
        log(tmp_path, [("u", "a", value)]).load_sequences()


@pytest.mark.parametrize("value", [date(2024, 5, 31), datetime(2024, 5, 31), DAY, float(DAY), Decimal(DAY), f" {DAY} "])
def test_values_of_any_type_are_read(value):
    assert Clock("s").read(value, "row 1") == DAY


def test_agrees_with_exact_fractions():
    draw = random.Random(1)
    for unit, scale in TestUnit.SCALES.items():
        for _ in range(200):
            text = f"{draw.randrange(10**9, 2 * 10**9) * scale}.{draw.randrange(10 ** draw.randrange(1, 30))}"
            assert Fraction(Clock(unit).read(text, "line 2")) == Fraction(text) / scale
