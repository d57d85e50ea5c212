"""Reading files that somebody else made: names, sizes, digests and JSON, all bounded before use.

An artifact is a flat directory of plain files. Nothing in it is a program, an
archive or a link; whatever else stands there is refused, never skipped.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from pathlib import Path
from typing import Any

from qcompiler.kernels.errors import ArtifactError

# What an artifact may hold. Everything is read as data: no pickles, no archives, no code.
EXTENSIONS = frozenset({".json", ".safetensors", ".md", ".txt", ".jinja"})
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
MAX_FILES = 4096
MAX_JSON_BYTES = 256 << 20  # the largest tokenizer.json in use is about 35 MB
MAX_JSON_DEPTH = 64
_CHUNK = 4 << 20


def check_name(name: object, where: str) -> str:
    """A file name as an artifact may use it: one plain component with a known extension.

    Raises:
        ArtifactError: for `..`, absolute paths, folders, hidden files and unknown extensions.
    """
    if not isinstance(name, str) or not NAME.fullmatch(name) or ".." in name:
        raise ArtifactError(
            f"{where}: file name {str(name)[:80]!r} is refused",
            hint="An artifact is a flat folder; names are letters, digits, '.', '_' and '-'.",
        )
    if Path(name).suffix not in EXTENSIONS:
        raise ArtifactError(
            f"{where}: {name!r} is no kind of file that an artifact may hold",
            hint=f"Allowed: {', '.join(sorted(EXTENSIONS))}. Pickles, archives and code are never read.",
        )
    return name


def list_directory(root: Path) -> dict[str, int]:
    """Names and sizes of the files in `root`; refuses links, folders and whatever is no plain file."""
    if not root.is_dir():
        raise ArtifactError(f"{root} is not a folder", hint="Give the folder that qcompile wrote.")
    sizes: dict[str, int] = {}
    with os.scandir(root) as entries:
        for entry in entries:
            if len(sizes) >= MAX_FILES:
                raise ArtifactError(f"{root} holds more than {MAX_FILES} files")
            info = entry.stat(follow_symlinks=False)
            if stat.S_ISLNK(info.st_mode):
                raise ArtifactError(
                    f"{root}: {entry.name!r} is a symbolic link",
                    hint="Copy the artifact with its contents, e.g. cp -rL.",
                )
            if not stat.S_ISREG(info.st_mode):
                raise ArtifactError(f"{root}: {entry.name!r} is not a plain file")
            if info.st_nlink != 1:
                raise ArtifactError(
                    f"{root}: {entry.name!r} is hard-linked from elsewhere, where it could be changed unseen",
                    hint="Copy the artifact, e.g. cp -r --no-preserve=links.",
                )
            check_name(entry.name, str(root))
            sizes[entry.name] = info.st_size
    return sizes


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as f:
        while piece := f.read(_CHUNK):
            digest.update(piece)
    return digest.hexdigest()


def parse_json(data: bytes, where: str, *, max_depth: int = MAX_JSON_DEPTH) -> Any:
    """JSON without its surprises: UTF-8, no duplicate keys, no NaN, bounded nesting.

    Args:
        data: The whole text.
        where: File name for the error.
        max_depth: Deepest nesting of objects and arrays that is accepted.

    Raises:
        ArtifactError: naming `where` and what was wrong.
    """
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except RecursionError:
        raise ArtifactError(f"{where}: JSON is nested too deeply") from None
    except ValueError as e:  # JSONDecodeError, UnicodeDecodeError, numbers of too many digits
        raise ArtifactError(f"{where}: not valid JSON: {str(e)[:200]}") from None
    layer, depth = [value], 0
    while layer:
        depth += 1
        if depth > max_depth + 1:
            raise ArtifactError(f"{where}: JSON is nested deeper than {max_depth}")
        below: list[Any] = []
        for item in layer:
            if isinstance(item, dict):
                below.extend(item.values())
            elif isinstance(item, list):
                below.extend(item)
        layer = [item for item in below if isinstance(item, (dict, list))]
    return value


def read_json(path: Path, *, max_bytes: int = MAX_JSON_BYTES, max_depth: int = MAX_JSON_DEPTH) -> Any:
    """`parse_json` of a file whose size is checked before it is read."""
    try:
        size = path.stat().st_size
        if size > max_bytes:
            raise ArtifactError(f"{path.name}: {size} bytes of JSON, more than the {max_bytes} accepted")
        data = path.read_bytes()
    except OSError as e:
        raise ArtifactError(f"{path.name}: cannot be read: {e.strerror or e}") from None
    return parse_json(data, path.name, max_depth=max_depth)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"duplicate name {key[:100]!r}")
            seen.add(key)
    return result


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is not a JSON number")
