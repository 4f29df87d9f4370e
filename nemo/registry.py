"""What params.yaml can name, and files of the user's own can add to (ours)."""

from __future__ import annotations

from typing import TypeVar

T = TypeVar("T")


class Registry(dict[str, T]):
    """Entries by the name that params.yaml uses for them, in the order they were added."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def add(self, name: str, entry: T) -> None:
        """
        Raises:
            ValueError: another entry has that name.
        """
        if name in self:
            raise ValueError(f"{self.kind} {name!r} exists already: choose another name")
        self[name] = entry

    def named(self, name: str) -> T:
        """
        Raises:
            ValueError: there is no such entry; the message lists those that there are.
        """
        if name not in self:
            raise ValueError(f"unknown {self.kind} {name!r}; accepted: {', '.join(self)}")
        return self[name]
