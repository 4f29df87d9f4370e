"""Subsets of classes as text: `all`, `0-4`, `3+5`, `cat+dog`, `0-2+7` (ours).

Needs no torch: report stages and the command line resolve subsets too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from unicodedata import normalize

from nemo.data.errors import DataError


def parse_subset(text: str, classes: Sequence[str]) -> list[int]:
    """The positions in `classes` that `text` names, in the order it names them.

    `all` is every class. Otherwise the parts between `+` are class names, positions from 0, or
    ranges of positions with both ends included. A class's name is tried first, so that `t-shirt`
    is a class and not a range, and `3` is the class called 3 wherever it stands. Of names that
    hold a `+` the longest is tried first: `C+++cat` is the classes `C++` and `cat`.

    Raises:
        DataError: a part names no class, a range runs backwards or past the last class, a class is
            named twice, or a range's end is also the name of a class that stands elsewhere.
    """
    if text == "all":
        return list(range(len(classes)))
    text, *classes = (normalize("NFC", name) for name in (text, *classes))  # macOS has another form
    chosen: list[int] = []
    for part in _parts(text.split("+"), classes):
        for position in _positions(text, part, classes):
            if position in chosen:
                name = classes[position]
                raise DataError(f"subset {text!r}: class {position} ({name}) is named twice")
            chosen.append(position)
    return chosen


def _parts(pieces: list[str], classes: Sequence[str]) -> Iterator[str]:
    """The pieces, joined again where a class has a `+` in its name."""
    while pieces:
        ends = (end for end in range(len(pieces), 1, -1) if "+".join(pieces[:end]) in classes)
        end = next(ends, 1)
        yield "+".join(pieces[:end])
        pieces = pieces[end:]


def _positions(text: str, part: str, classes: Sequence[str]) -> list[int]:
    if part in classes:
        return [classes.index(part)]
    if re.fullmatch(r"[0-9]+", part) and int(part) < len(classes):
        return [int(part)]
    ends = re.fullmatch(r"([0-9]+)-([0-9]+)", part)
    if ends is None:
        raise DataError(f"subset {text!r}: {part!r} is no class; accepted: {_accepted(classes)}")
    first, last = int(ends[1]), int(ends[2])
    if first > last or last >= len(classes):
        raise DataError(
            f"subset {text!r}: {part!r} is no range of classes, which go up from 0 to "
            f"{len(classes) - 1}; accepted: {_accepted(classes)}"
        )
    for end in (first, last):
        if str(end) in classes and classes.index(str(end)) != end:
            raise DataError(
                f"subset {text!r}: {part!r} could mean the class called {end} or the one at "
                f"position {end}; name the classes one by one, as in {classes[first]}+..."
            )
    return list(range(first, last + 1))


def _accepted(classes: Sequence[str]) -> str:
    names = ", ".join(f"{position} {name}" for position, name in enumerate(classes[:100]))
    return f"all, ranges such as 0-{len(classes) - 1}, and {names}"


def check_subsets(subsets: Sequence[str], classes: Sequence[str]) -> None:
    """Raise DataError unless every subset is two or more of the classes, and no two are equal."""
    seen: dict[frozenset[int], str] = {}
    for subset in subsets:
        chosen = parse_subset(subset, classes)
        if len(chosen) < 2:
            raise DataError(f"subsets: {subset!r} is one class; accepted: two or more")
        first = seen.setdefault(frozenset(chosen), subset)
        if first != subset:
            raise DataError(f"subsets: {first!r} and {subset!r} are the same classes")
