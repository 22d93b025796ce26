"""Read files that come from others: regular ones, of a sensible size, parsed without surprises."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Hashable
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from retrofit.runtime.errors import InputError

if TYPE_CHECKING:
    import yaml

JSON_BYTES = 32_000_000  # indices of the largest models have about 10 MB
TEXT_BYTES = 16_000_000
PICTURE_BYTES = 1_000_000_000
YAML_BYTES = 100_000
YAML_DEPTH = 20
YAML_NODES = 10_000
YAML_NUMBER = 2**64  # Python can't even print very large ones
LINE = 300  # characters of a parser's message
NOT_BLOCKING = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
KINDS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}


def open_regular(path: str | Path, most_bytes: int | None = None) -> BinaryIO:
    """Open a file for reading; what would block, never end or fill the memory is refused.

    Args:
        path: The file, or a link to it.
        most_bytes: Bytes that it may have; None is any number.

    Raises:
        InputError: If it is a pipe, a device, a socket or a folder, or has more bytes.
        OSError: If it is missing or can't be read.
    """
    require_regular(path, os.stat(path))  # opening a device may do something
    descriptor = os.open(path, os.O_RDONLY | NOT_BLOCKING)
    try:
        found = os.fstat(descriptor)
        require_regular(path, found)  # what was opened, not what was there before
        if most_bytes is not None and found.st_size > most_bytes:
            raise InputError(
                f"{path}: expected at most {most_bytes / 1e6:g} MB, got "
                f"{found.st_size / 1e6:.1f} MB. Check that it is the file that was meant."
            )
    except BaseException:
        os.close(descriptor)
        raise
    return os.fdopen(descriptor, "rb")


def require_regular(path: str | Path, found: os.stat_result) -> None:
    """Refuse what is not a regular file.

    Raises:
        InputError: With what it is.
    """
    if not stat.S_ISREG(found.st_mode):
        kind = KINDS.get(stat.S_IFMT(found.st_mode), "something else")
        raise InputError(f"{path}: expected a file, got {kind}. Put a regular file in its place.")


def read_bytes(path: str | Path, most_bytes: int) -> bytes:
    """All of a file; errors as for `open_regular`."""
    with open_regular(path, most_bytes) as stream:
        data = stream.read(most_bytes + 1)
    if len(data) > most_bytes:  # it grew meanwhile
        raise InputError(f"{path}: expected at most {most_bytes / 1e6:g} MB, got more.")
    return data


def read_text(path: str | Path, most_bytes: int = TEXT_BYTES) -> str:
    """A file as UTF-8 text; errors as for `open_regular`, and `UnicodeDecodeError`."""
    return read_bytes(path, most_bytes).decode("utf-8")


def parse_json(text: str | bytes) -> Any:
    """Parse JSON.

    Raises:
        ValueError: If it is none, or nested deeper than Python can read.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deep") from error


def parse_yaml(text: str) -> Any:
    """Parse YAML as data of about the size of its text: no aliases, merges or tags.

    Raises:
        ValueError: If it is none, too large or too deep, uses one of these, or has a key twice.
    """
    import yaml

    if len(text) > YAML_BYTES:
        raise ValueError(f"at most {YAML_BYTES // 1000} kB, got {len(text) / 1000:.0f} kB")
    try:
        _check_events(text)
        return _strict_loader()(text).get_single_data()
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())[:LINE]) from error


def _check_events(text: str) -> None:
    """Look at what is written, before anything is made of it."""
    import yaml

    depth = nodes = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            raise ValueError(f"no aliases, got *{event.anchor}{_line(event)}. Write it out")
        if (tag := getattr(event, "tag", None)) is not None:
            raise ValueError(f"no tags, got {tag}{_line(event)}. Leave it out")
        if isinstance(event, yaml.ScalarEvent) and event.implicit[0] and event.value == "<<":
            raise ValueError(f"no merges, got <<{_line(event)}. Write it out")
        nodes += isinstance(event, yaml.NodeEvent)
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > YAML_DEPTH or nodes > YAML_NODES:
            raise ValueError(f"at most {YAML_DEPTH} levels and {YAML_NODES} values, got more")


def _line(found: Any) -> str:
    return f" in line {found.start_mark.line + 1}"


def _strict_loader() -> type[yaml.SafeLoader]:
    """PyYAML takes the last of two equal keys without a word, and whole numbers of any length."""
    import yaml

    class StrictLoader(yaml.SafeLoader):
        def construct_yaml_int(self, node: Any) -> int:
            number: int = super().construct_yaml_int(node)
            if abs(number) > YAML_NUMBER:
                raise ValueError(f"no whole number above 64 bits, got one{_line(node)}")
            return number

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
            seen = set()
            for key_node, _ in node.value:
                key = self.construct_object(key_node, deep=True)
                if isinstance(key, Hashable) and key in seen:
                    raise ValueError(f"every key once, got {key!r} again{_line(key_node)}")
                seen.add(key if isinstance(key, Hashable) else id(key))
            return super().construct_mapping(node, deep=deep)

    StrictLoader.add_constructor("tag:yaml.org,2002:int", StrictLoader.construct_yaml_int)
    return StrictLoader
