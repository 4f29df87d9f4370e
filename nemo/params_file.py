"""params.yaml as YAML, in which no key may be named twice (ours).

PyYAML lets the last one win, so that a value that stands there would decide nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from nemo.fields import ParamsError

MERGE = "tag:yaml.org,2002:merge"  # of `<<`, which may stand there for several mappings


def read_params(path: str | Path) -> dict[str, Any]:
    """The keys of a params file, not yet checked.

    Raises:
        ParamsError: the file is missing, is no YAML mapping, or names keys twice; a line for each.
    """
    try:
        raw = _unique(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ParamsError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ParamsError(f"{path}: not UTF-8 text") from None
    except yaml.YAMLError as error:
        raise ParamsError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    except ParamsError as error:
        raise ParamsError("\n".join(f"{path}: {e}" for e in str(error).splitlines())) from None
    if not isinstance(raw, dict):
        raise ParamsError(f"{path}: expected a mapping of keys, got {type(raw).__name__}")
    return raw


def _unique(text: str) -> Any:
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        if lines := list(_twice(node, (), set())):
            raise ParamsError("\n".join(lines))
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _twice(node: yaml.Node, path: tuple[str, ...], done: set[yaml.Node]) -> Iterator[str]:
    """A line for each key below `node` that stands twice in its mapping; an alias is the node of
    its anchor, `done` once."""
    if node in done:
        return
    done.add(node)
    if isinstance(node, yaml.SequenceNode):
        for position, item in enumerate(node.value):
            yield from _twice(item, (*path, str(position)), done)
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            below, kind = (*path, str(key.value)), f"{key.tag} {key.value}"
            if kind in seen:
                yield f"{'.'.join(below)}: named twice, again in line {key.start_mark.line + 1}"
            if key.tag != MERGE:
                seen.add(kind)
            yield from _twice(value, below, done)
