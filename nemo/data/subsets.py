"""Subsets of classes as text: `0-4`, `cat+dog`, `0-2+7`, `file:subsets/birds.txt`, `random:10@3`.

Needs no torch: report stages and the command line resolve subsets too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from unicodedata import normalize

import numpy as np

from nemo.data.errors import DataError

FILE = "file:"


def parse_subset(text: str, classes: Sequence[str]) -> list[int]:
    """The positions in `classes` that `text` names, in the order it names them.

    `all` is every class. Otherwise the parts between `+` are class names, positions from 0, or
    ranges of positions with both ends included. A class's name is tried first, so that `t-shirt`
    is a class and not a range, and `3` is the class called 3 wherever it stands. Of names that
    hold a `+` the longest is tried first: `C+++cat` is the classes `C++` and `cat`.

    `file:PATH` has such parts in a file of UTF-8 text, one a line. `random:10@3` is ten classes
    drawn with seed 3, in their own order: the first of a permutation by numpy's generator, so that
    `random:50@3` holds them too.

    Raises:
        DataError: a part names no class, a range runs backwards or past the last class, a class is
            named twice, a range's end is also the name of a class that stands elsewhere, there is
            no such file, or more classes shall be drawn than there are.
    """
    if text == "all":
        return list(range(len(classes)))
    text, *classes = (normalize("NFC", name) for name in (text, *classes))  # macOS has another form
    drawn = re.fullmatch(r"random:([0-9]+)@([0-9]+)", text)
    if drawn is not None and text not in classes:
        return _drawn(text, int(drawn[1]), int(drawn[2]), len(classes))
    parts = names_in_file(text) if text.startswith(FILE) else _parts(text.split("+"), classes)
    chosen: list[int] = []
    for part in parts:
        for position in _positions(text, part, classes):
            if position in chosen:
                name = classes[position]
                raise DataError(f"subset {text!r}: class {position} ({name}) is named twice")
            chosen.append(position)
    return chosen


def draw_subset(random: np.random.Generator, classes: int, sizes: Sequence[int]) -> list[int]:
    """Positions in ascending order: as many as one of `sizes`, or all; each is as likely."""
    sizes = [*(size for size in sizes if size < classes), classes]
    size = sizes[random.integers(len(sizes))]
    return np.sort(random.permutation(classes)[:size]).tolist()  # type: ignore[no-any-return]


def names_in_file(text: str) -> list[str]:
    """The lines of the file that `file:PATH` names, empty ones left out; normalized as classes are.

    A PATH that is not absolute begins at the current folder, which has params.yaml.

    Raises:
        DataError: no such file, one that is not UTF-8 text, or one without names.
    """
    try:
        lines = Path(text.removeprefix(FILE)).read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise DataError(f"{text!r}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise DataError(f"{text!r}: not UTF-8 text") from None
    names = [normalize("NFC", line.strip()) for line in lines if line.strip()]
    if not names:
        raise DataError(f"{text!r}: holds no names; accepted: classes, one a line")
    return names


def defined(subsets: Mapping[str, str]) -> list[str] | dict[str, str | list[str]]:
    """What decides the classes of subsets {name: text}: their texts, and the names that files hold.

    A list of texts where they are all their own names.
    """
    found = {n: names_in_file(t) if t.startswith(FILE) else t for n, t in subsets.items()}
    return list(subsets) if all(name == value for name, value in found.items()) else found


def _drawn(text: str, count: int, seed: int, classes: int) -> list[int]:
    if not 1 <= count <= classes:
        raise DataError(f"subset {text!r}: accepted: random:1@{seed} to random:{classes}@{seed}")
    order = np.random.default_rng(seed).permutation(classes)
    return sorted(order[:count].tolist())


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
    last = len(classes) - 1
    if all(name == str(position) for position, name in enumerate(classes)):
        names = f"0 to {last}"
    else:
        names = ", ".join(f"{position} {name}" for position, name in enumerate(classes[:100]))
        names += f", ... {last} {classes[-1]}" if len(classes) > 100 else ""
    joined = f"ranges such as 0-{last}, and {names}"
    return f"all, file:PATH, random:2@0, or joined by +: {joined}"


def check_subsets(subsets: Mapping[str, str], classes: Sequence[str]) -> None:
    """Raise DataError unless every subset {name: text} is two or more of the classes, and no two
    are equal."""
    seen: dict[frozenset[int], str] = {}
    for subset, text in subsets.items():
        chosen = parse_subset(text, classes)
        if len(chosen) < 2:
            raise DataError(f"subsets: {subset!r} is one class; accepted: two or more")
        first = seen.setdefault(frozenset(chosen), subset)
        if first != subset:
            raise DataError(f"subsets: {first!r} and {subset!r} are the same classes")
