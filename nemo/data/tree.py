"""The files of a folder or of a .tar, listed alike (ours).

A file is named by the parts of its path below the root, such as ("train", "cat", "0001.jpg").
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from nemo.data.errors import DataError
from nemo.data.images import ImageFile

Parts = tuple[str, ...]


@dataclass(frozen=True)
class Tree:
    """Files by their parts, and the parts of every folder, empty ones included."""

    files: dict[Parts, ImageFile]
    folders: frozenset[Parts]

    @property
    def tops(self) -> set[str]:
        """Names of the folders at the root."""
        return {parts[0] for parts in self.folders}

    @property
    def depth(self) -> int:
        """How many parts the deepest file has."""
        return max(map(len, self.files), default=0)

    def below(self, top: str) -> Tree:
        """The tree whose root is the folder `top`; an empty one if there is no such folder."""
        files = {parts[1:]: file for parts, file in self.files.items() if _within(parts, top)}
        folders = frozenset(parts[1:] for parts in self.folders if _within(parts, top))
        return Tree(files, folders)

    def __or__(self, other: Tree) -> Tree:
        return Tree(self.files | other.files, self.folders | other.folders)


def scan_folder(root: Path) -> Tree:
    """List a folder, following links to folders; OSError where one cannot be listed."""
    files: dict[Parts, ImageFile] = {}
    folders: set[Parts] = set()
    for folder, names, inside in os.walk(root, onerror=_reraise, followlinks=True):
        names[:] = [name for name in names if not _ignored(name)]
        here = Path(folder).relative_to(root).parts
        if len(here) > 32:
            raise DataError(f"{folder}: nested too deep; does a link lead back to {root}?")
        folders.update((*here, name) for name in names)
        files.update(
            ((*here, name), ImageFile(Path(folder, name))) for name in inside if not _ignored(name)
        )
    return Tree(files, frozenset(folders))


def scan_tar(path: Path, within: str | None = None) -> Tree:
    """List a .tar as if its members were below the folder `within`; nothing is unpacked.

    Raises:
        DataError: not a .tar, compressed, or cut short.
    """
    top = () if within is None else (within,)
    files: dict[Parts, ImageFile] = {}
    folders: set[Parts] = {top} if top else set()
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                parts = PurePosixPath(member.name).parts
                if not parts or any(map(_ignored, parts)):
                    continue
                if member.isdir():
                    folders.update(_prefixes((*top, *parts)))
                else:
                    folders.update(_prefixes((*top, *parts[:-1])))
                    files[*top, *parts] = _image_file(path, member)
            end = tar.offset
    except tarfile.TarError as error:
        raise DataError(f"{path}: not a whole, uncompressed .tar ({error})") from None
    with path.open("rb") as file:
        file.seek(end)
        # tarfile takes a missing or damaged header for the end; the real end is a block of zeros
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise DataError(f"{path}: cut short or damaged after {len(files)} files")
    return Tree(files, frozenset(folders))


def _image_file(path: Path, member: tarfile.TarInfo) -> ImageFile:
    if not member.isreg() or member.issparse():
        raise DataError(f"{path}: {member.name}: a link or special file; accepted: plain files")
    return ImageFile(path, member.name, member.offset_data, member.size)


def _prefixes(parts: Parts) -> Iterable[Parts]:
    return (parts[:count] for count in range(1, len(parts) + 1))


def _within(parts: Parts, top: str) -> bool:
    return len(parts) > 1 and parts[0] == top


def _ignored(name: str) -> bool:
    """Hidden files, `..`, and what macOS adds to archives."""
    return name.startswith(".") or name in ("__MACOSX", "Thumbs.db")


def _reraise(error: OSError) -> None:
    raise error
