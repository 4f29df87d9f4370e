from __future__ import annotations

from pathlib import Path
from unicodedata import normalize

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo.data import DataError, parse_subset

DIGITS = [str(digit) for digit in range(10)]
ODD = ["C++", "golden retriever", "C", "tabby cat", "Койка"]
PETS = ["bird", "cat", "dog", "t-shirt", "0-1"]


@pytest.mark.parametrize(
    ("text", "classes", "expected"),
    [
        ("all", PETS, [0, 1, 2, 3, 4]),
        ("all", ["all", "none"], [0, 1]),
        ("0-4", DIGITS, [0, 1, 2, 3, 4]),
        ("3+5", DIGITS, [3, 5]),
        ("5+3", DIGITS, [5, 3]),
        ("0-2+7", DIGITS, [0, 1, 2, 7]),
        ("7+0-2", DIGITS, [7, 0, 1, 2]),
        ("cat+dog", PETS, [1, 2]),
        ("cat+0", PETS, [1, 0]),
        ("2-2", PETS, [2]),
        ("t-shirt+cat", PETS, [3, 1]),
        ("0-1", PETS, [4]),
        ("1", ["2", "1", "0"], [1]),
        ("2", ["2", "1", "0"], [0]),
        ("golden retriever+tabby cat", ODD, [1, 3]),
        ("C++", ODD, [0]),
        (normalize("NFD", "C+++Койка+C"), ODD, [0, 4, 2]),  # as macOS writes it
        ("tabby cat+C+++C", ODD, [3, 0, 2]),
        ("C+1+C++", ODD, [2, 1, 0]),
        ("a+b", ["a", "a+b", "b"], [1]),
        ("b+a", ["a", "a+b", "b"], [2, 0]),
    ],
)
def test_it_reads(text: str, classes: list[str], expected: list[int]) -> None:
    assert parse_subset(text, classes) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "cow",
            "subset 'cow': 'cow' is no class; accepted: all, .* joined by .*: ranges such as 0-4, "
            "and 0 bird",
        ),
        ("cat+cow", r"subset 'cat\+cow': 'cow' is no class; .* 2 dog"),
        ("", "'' is no class"),
        ("cat+", "'' is no class"),
        ("all+cat", "'all' is no class"),
        ("5", "'5' is no class"),
        ("-1", "'-1' is no class"),
        ("0-1-2", "'0-1-2' is no class"),
        ("cat-dog", "'cat-dog' is no class"),
        ("\u0663", "is no class"),  # a digit to str.isdigit, but not to people who read params
        ("3-1", "'3-1' is no range of classes, which go up from 0 to 4"),
        ("2-5", "'2-5' is no range of classes"),
        ("cat+1", r"class 1 \(cat\) is named twice"),
        ("0-2+2", r"class 2 \(dog\) is named twice"),
    ],
)
def test_it_refuses(text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        parse_subset(text, [*PETS[:4], "shoe"])


def test_classes_that_are_called_by_their_positions_are_listed_as_a_range() -> None:
    with pytest.raises(DataError, match=r"ranges such as 0-9, and 0 to 9$"):
        parse_subset("cow", [str(digit) for digit in range(10)])


def test_a_range_is_refused_where_names_are_other_numbers() -> None:
    with pytest.raises(DataError, match="'0-2' could mean the class called 2 or the one at"):
        parse_subset("0-2", ["0", "1", "10", "2"])


def test_ten_drawn_classes_are_those_of_the_seed_and_among_fifty_drawn() -> None:
    classes = [f"class-{number}" for number in range(200)]
    ten, fifty = (parse_subset(f"random:{count}@3", classes) for count in (10, 50))
    assert ten == [6, 81, 84, 99, 117, 119, 128, 135, 142, 190]  # numpy's own stream, written down
    assert set(ten) < set(fifty)
    assert len(set(fifty)) == 50
    assert parse_subset("random:10@4", classes) != ten
    assert parse_subset("random:200@3", classes) == parse_subset("all", classes)
    assert parse_subset("random:3@1", ["a", "random:3@1"]) == [1]
    assert parse_subset("100-199", classes) == list(range(100, 200))


@pytest.mark.parametrize("text", ["random:0@3", "random:201@3"])
def test_more_classes_than_there_are_cannot_be_drawn(text: str) -> None:
    with pytest.raises(DataError, match=f"{text}': accepted: random:1@3 to random:200@3"):
        parse_subset(text, [str(number) for number in range(200)])


def test_a_file_names_a_class_on_each_line(tmp_path: Path) -> None:
    file = tmp_path / "odd.txt"
    names = "\ufeffC++\r\n\r\n  golden retriever \r\n" + normalize("NFD", "Койка")
    file.write_bytes(names.encode())
    assert parse_subset(f"file:{file}", ODD) == [0, 1, 4]
    for content, message in (
        (b"C\nC+++C\n", "'C.{3}C' is no class"),  # a line is one name
        (b"C\n2\n", r"class 2 \(C\) is named twice"),
        (b"\n \n", "holds no names; accepted: classes, one a line"),
        (b"\xff", "not UTF-8 text"),
    ):
        file.write_bytes(content)
        with pytest.raises(DataError, match=message):
            parse_subset(f"file:{file}", ODD)


@settings(deadline=None)  # a busy machine is no failure
@given(st.permutations(range(12)), st.integers(1, 12), st.data())
def test_names_and_positions_agree(order: list[int], count: int, data: st.DataObject) -> None:
    classes = [f"class-{letter}" for letter in "abcdefghijkl"]
    chosen = order[:count]
    parts = [classes[c] if data.draw(st.booleans()) else str(c) for c in chosen]
    assert parse_subset("+".join(parts), classes) == chosen


@settings(deadline=None)
@given(st.text(alphabet="0123456789-+ab", max_size=8))
def test_any_text_gives_distinct_classes_or_a_data_error(text: str) -> None:
    classes = ["a", "b", "a-b", "c", "d"]
    try:
        chosen = parse_subset(text, classes)
    except DataError as error:
        assert repr(text) in str(error)  # noqa: PT017
        assert "\n" not in str(error)  # noqa: PT017
    else:
        assert chosen
        assert len(set(chosen)) == len(chosen)
        assert set(chosen) <= set(range(5))
