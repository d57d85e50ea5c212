"""The code blocks of a page, and a place to run them in: commands, Python and a server, in this process.

A comment right before a block says what is to be done with it:

    <!-- not run: REASON -->   nothing
    <!-- file: NAME -->        it is written to a file of that name
    <!-- exits: CODE -->       its commands end with that exit code
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import runpy
import shlex
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SHELL = {"sh", "bash", "shell", "console"}
# A block without a language is a shell's if a line of it begins like this.
_COMMANDS = re.compile(r"^\s*(\$ |qcompile |qrun |pip |make |python3? |curl |git )", re.MULTILINE)
_MARK = re.compile(r"<!-- (not run|file|exits): (.+?) -->")
_FENCE = re.compile(r"^(\s*)```(\w*)\s*$")


@dataclass
class Block:
    """A fenced block."""

    page: Path
    line: int
    language: str
    text: str
    marks: dict[str, str] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """shell, python, yaml or text."""
        if self.language in SHELL or (not self.language and _COMMANDS.search(self.text)):
            return "shell"
        return self.language if self.language in ("python", "yaml") else "text"

    @property
    def commands(self) -> list[str]:
        """The lines of a shell block, continued ones joined, comments gone."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [s for line in lines if (s := line.strip().removeprefix("$ ")) and not s.startswith("#")]


def blocks(page: Path) -> list[Block]:
    """All blocks of a page, in order."""
    found: list[Block] = []
    marks: dict[str, str] = {}
    opened: Block | None = None
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        fence = _FENCE.match(line)
        if opened is not None:
            if fence:
                found.append(opened)
                opened = None
            else:
                opened.text += line + "\n"
        elif fence:
            opened, marks = Block(page, number, fence[2], "", marks), {}
        elif mark := _MARK.match(line.strip()):
            marks[mark[1]] = mark[2]
        elif line.strip():
            marks = {}
    if opened is not None:
        raise ValueError(f"{page.name}:{opened.line}: the block does not end")
    return found


class Place:
    """A folder like the repository's, in which the blocks of a page are run one after another."""

    def __init__(self, folder: Path, root: Path, placeholders: dict[str, str]):
        self.folder = folder
        self._placeholders = placeholders
        self._made: set[tuple[str, ...]] = set()
        self._port = 0
        for name in ("examples", "constraints", "benchmarks"):
            (folder / name).symlink_to(root / name)

    @contextlib.contextmanager
    def page(self) -> Iterator[None]:
        """The time of one page; its server ends with it."""
        before = Path.cwd()
        os.chdir(self.folder)
        with _free_port() as self._port, _servers() as self._servers:
            try:
                yield
            finally:
                os.chdir(before)

    def run(self, block: Block, left_out: tuple[str, ...] = ()) -> None:
        """Run a block, or write its file; raises where something fails."""
        if name := block.marks.get("file"):
            (self.folder / name).write_text(block.text, encoding="utf-8")
        elif "not run" in block.marks or block.kind == "text":
            return
        elif block.kind == "yaml":
            self._check_yaml(block)
        elif block.kind == "python":
            script = self.folder / f"{block.page.stem}_{block.line}.py"
            script.write_text(self._here(block.text), encoding="utf-8")
            runpy.run_path(str(script), run_name="__main__")
        else:
            for command in block.commands:
                if not command.startswith(left_out):
                    self._command(self._here(command), int(block.marks.get("exits", "0")))

    def _here(self, text: str) -> str:
        return re.sub(r"(127\.0\.0\.1:|localhost:|--port )8000\b", rf"\g<1>{self._port}", text)

    def _command(self, command: str, wanted: int) -> None:
        arguments = [self._placeholders.get(a, a) for a in shlex.split(command, comments=True)]
        tool, rest = arguments[0], arguments[1:]
        if tool == "qcompile":
            what = _without_output(rest)
            if what in self._made and wanted == 0:
                return  # the same work for another folder
            # Once with the measurement that is on by default, then without: it would take most of the time.
            code = _qcompile(rest, eval_tokens=0 if self._made else 256)
            self._made.add(what)
            for made in self.folder.glob("*bit"):  # written where no -o says so: another command may be, too
                shutil.rmtree(made)
        elif tool == "qrun" and rest[0] == "serve":
            self._serve(rest)
            return
        elif tool == "qrun":
            code = _qrun(rest)
        elif [tool, *rest[:2]] == ["python", "-m", "benchmarks"]:
            from benchmarks.__main__ import main

            code = main(rest[2:])
        elif tool == "curl":
            if shutil.which("curl") is None:
                return
            code = subprocess.run(["curl", "--fail-with-body", *rest], timeout=60).returncode
        else:
            raise ValueError(
                f"nobody knows how to run {command!r} here: say so with <!-- not run: REASON -->"
            )
        if code != wanted:
            raise AssertionError(f"{command!r} ended with {code}, not {wanted}")

    def _serve(self, arguments: list[str]) -> None:
        if "--port" not in arguments:
            arguments = [*arguments, "--port", str(self._port)]
        code: list[int] = []
        thread = threading.Thread(target=lambda: code.append(_qrun(arguments)), daemon=True)
        thread.start()
        end = time.monotonic() + 60
        while not (self._servers and self._servers[-1].started):
            if not thread.is_alive() or time.monotonic() > end:
                raise AssertionError(f"the server did not start: {arguments}")
            time.sleep(0.01)

    @staticmethod
    def _check_yaml(block: Block) -> None:
        from qcompiler.cli.config_file import read_config
        from qcompiler.cli.main import qcompile

        file = Path(f"{block.page.stem}_{block.line}.yaml")
        file.write_text(block.text, encoding="utf-8")
        read_config(file, {str(p.name) for p in qcompile.params})


def _without_output(arguments: list[str]) -> tuple[str, ...]:
    named = [a for i, a in enumerate(arguments) if "-o" not in (a, arguments[i - 1])]
    return tuple(a for a in named if a != "--overwrite")


def _qcompile(arguments: list[str], **defaults: Any) -> int:
    import click

    from qcompiler.cli.main import qcompile
    from qcompiler.kernels.errors import QCompilerError

    try:
        qcompile.main(args=arguments, prog_name="qcompile", standalone_mode=False, default_map=defaults)
    except QCompilerError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except click.ClickException as error:
        error.show()
        return error.exit_code
    return 0


def _qrun(arguments: list[str]) -> int:
    from qcompiler.runtime.cli.main import run

    before, sys.stdin = sys.stdin, io.StringIO("Hello\n")
    try:
        return run(arguments)
    finally:
        sys.stdin = before


@contextlib.contextmanager
def _servers() -> Iterator[list[Any]]:
    """Servers that `qrun serve` makes meanwhile; they are stopped at the end."""
    from qcompiler.runtime.server import main

    made: list[Any] = []
    make = main.make_server

    def noted(*args: Any, **kwargs: Any) -> Any:
        made.append(make(*args, **kwargs))
        return made[-1]

    main.make_server = noted
    try:
        yield made
    finally:
        main.make_server = make
        for server in made:
            server.should_exit = True


@contextlib.contextmanager
def _free_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as found:
        port = found.getsockname()[1]
    yield port
