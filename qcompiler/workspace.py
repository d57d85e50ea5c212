"""The folder of an unfinished compilation: finished layers, a journal, and a lock.

It stands beside the output as `<output>.resume`. A layer's tensors are written
to a temporary name and renamed, and only then named in the journal with their
digest, so that a kill at any moment leaves a prefix of the work. The disk is not
waited for: what a power cut keeps from it fails its digest and is done again.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import torch
from safetensors import SafetensorError, safe_open

from qcompiler.emit.shards import write_safetensors
from qcompiler.kernels.errors import InvalidInputError

_STATE = "state.json"
_JOURNAL = "journal.jsonl"


class Workspace:
    """Finished layers of one compilation, locked against a second writer.

    Args:
        output: Folder of the artifact to be.
        fingerprint: JSON-able configuration; resuming demands an equal one.
        resume: Continue what stands there.
        overwrite: Throw away what stands there.

    Raises:
        InvalidInputError: An unfinished compilation stands there and neither flag was given, it is
            of another configuration, another process holds it, or the folder cannot be written.
    """

    def __init__(self, output: Path, fingerprint: dict[str, Any], *, resume: bool, overwrite: bool):
        self.output = output
        self.path = output.parent / f"{output.name}.resume"
        self._lock_path = output.parent / f"{output.name}.lock"
        self._fingerprint = json.loads(json.dumps(fingerprint, sort_keys=True))
        self._resume = resume
        self._overwrite = overwrite
        self._lock: TextIO | None = None
        self._finished: dict[str, dict[str, Any]] = {}

    def __enter__(self) -> Workspace:
        with writing(self.path):
            self.output.parent.mkdir(parents=True, exist_ok=True)
            self._acquire_lock()
            try:
                self._open()
            except BaseException:
                self._release_lock()
                raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and not self._finished:
            self.discard()  # refused before anything was done: nothing to resume
        self._release_lock()

    @property
    def count(self) -> int:
        """Layers that are done."""
        return len(self._finished)

    def finished(self, layer: str) -> dict[str, Any] | None:
        """What the journal says of a layer that is done, or None."""
        entry = self._finished.get(layer)
        return None if entry is None else entry["info"]

    def store(self, layer: str, tensors: dict[str, torch.Tensor], info: dict[str, Any]) -> None:
        """Keep a layer's tensors; `info` must be JSON-able."""
        name = f"{len(self._finished):05d}.safetensors"
        target, temporary = self.path / name, self.path / f"{name}.tmp"
        with writing(self.path):
            temporary.unlink(missing_ok=True)  # of a run that was killed
            held = {k: v.cpu().contiguous() for k, v in tensors.items()}
            written = write_safetensors(temporary, held, sync=False)
            entry = {"layer": layer, "file": name, "sha256": written.sha256, "info": info}
            temporary.replace(target)
            with (self.path / _JOURNAL).open("a", encoding="utf-8") as journal:
                journal.write(json.dumps(entry) + "\n")
        self._finished[layer] = entry

    def load(self, layer: str) -> dict[str, torch.Tensor]:
        """The tensors of a finished layer."""
        with safe_open(self.path / self._finished[layer]["file"], framework="pt") as part:
            return {name: part.get_tensor(name) for name in part.keys()}  # noqa: SIM118 (not a dict)

    def discard(self) -> None:
        """Remove the folder: the artifact stands, or was refused."""
        shutil.rmtree(self.path, ignore_errors=True)

    def _acquire_lock(self) -> None:
        # The lock file lies beside the folder, so that removing the folder cannot unlock it.
        while self._lock is None:
            file = self._lock_path.open("w", encoding="utf-8")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.close()
                raise InvalidInputError(
                    f"another process is compiling into {self.output}",
                    hint="Wait for it, or choose another folder with -o.",
                ) from None
            # The previous holder may have unlinked the file between our open and our lock.
            if self._lock_path.exists() and os.path.samestat(self._lock_path.stat(), os.fstat(file.fileno())):
                self._lock = file
            else:
                file.close()

    def _release_lock(self) -> None:
        if self._lock is not None:
            self._lock_path.unlink(missing_ok=True)
            self._lock.close()
            self._lock = None

    def _open(self) -> None:
        state = self.path / _STATE
        if self._overwrite and self.path.exists():
            shutil.rmtree(self.path)
        if not state.is_file():
            if self.path.exists() and any(
                p.suffix not in {".tmp", ".safetensors"} for p in self.path.iterdir()
            ):
                raise InvalidInputError(
                    f"{self.path} exists and is not an unfinished compilation", hint="Move it away."
                )
            self.path.mkdir(parents=True, exist_ok=True)
            state.write_text(json.dumps(self._fingerprint, indent=1, sort_keys=True), encoding="utf-8")
            return
        if not self._resume:
            raise InvalidInputError(
                f"an unfinished compilation stands in {self.path}",
                hint="Continue it with --resume, or start anew with --overwrite.",
            )
        self._check_fingerprint(state)
        self._read_journal()

    def _check_fingerprint(self, state: Path) -> None:
        try:
            found = json.loads(state.read_text(encoding="utf-8"))
        except ValueError:
            found = {}
        if found == self._fingerprint:
            return
        differing = sorted(
            k for k in {*found, *self._fingerprint} if found.get(k) != self._fingerprint.get(k)
        )
        told = ", ".join(
            f"{k}: {found.get(k)!r} there, {self._fingerprint.get(k)!r} now" for k in differing[:4]
        )
        raise InvalidInputError(
            f"the unfinished compilation in {self.path} is of another configuration ({told})",
            hint="Use the options it was started with, or start anew with --overwrite.",
        )

    def _read_journal(self) -> None:
        journal = self.path / _JOURNAL
        if not journal.is_file():
            return
        kept: list[str] = []
        for line in journal.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
                part = self.path / entry["file"]
                intact = part.is_file() and _digest(part) == entry["sha256"]
            except (ValueError, KeyError, TypeError, SafetensorError):
                intact = False  # a torn last line: the layer is done again
            if not intact:
                break
            self._finished[entry["layer"]] = entry
            kept.append(line + "\n")
        journal.write_text("".join(kept), encoding="utf-8")


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Tell a full or read-only disk in the user's terms.

    Raises:
        InvalidInputError: The disk is full, or the folder may not be written.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise InvalidInputError(
                f"the disk is full: writing {path} failed",
                hint="Free some space and rerun with --resume; the layers done so far are kept.",
            ) from error
        if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise InvalidInputError(
                f"{path} cannot be written ({error.strerror})", hint="Choose another folder with -o."
            ) from error
        raise


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
