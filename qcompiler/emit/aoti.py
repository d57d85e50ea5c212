"""An AOTInductor package of an artifact's program, built and tried out in processes of their own.

torch compiles the program ahead of time (C++ on a CPU, which needs a compiler
there) and calls our ops through the dispatcher. Loading such a package has been
seen to crash torch itself; so a package is kept only after another process has
loaded it, run a step and got what the program gives.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from qcompiler.emit.pt2 import example_inputs, export_artifact, graph_module
from qcompiler.kernels.errors import InvalidInputError, QCompilerError
from qcompiler.runtime.artifact import Artifact, open_artifact

# Inductor orders sums in its own way; a wrong program is further off than this.
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}


def emit_aoti(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    device: str = "cpu",
    timeout: float = 1800.0,
) -> Path:
    """Build an AOTInductor package, load it elsewhere and compare a step; this process loads nothing.

    Args:
        source: The artifact.
        out: The file to write; its name ends in `.pt2`. An existing file is replaced.
        device: Where the package runs: "cpu" or "cuda".
        timeout: Seconds that building, and then trying it, may each take.

    Returns:
        The file. `torch._inductor.aoti_load_package` loads it after `import qcompiler.kernels.ops`; its
        inputs are those of `graph.json`, with `max_query_len` as a uint8 tensor of that many elements.

    Raises:
        InvalidInputError: Another file name; or no package can be built, loaded or trusted here, with the
            reason. Nothing is left at `out` then.
    """
    path = Path(out)
    if path.suffix != ".pt2":
        raise InvalidInputError(f"{path}: torch wants a file name that ends in .pt2")
    if not path.parent.is_dir():
        raise InvalidInputError(f"{path.parent} is not a folder", hint="Create it first.")
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.stem}-") as folder:
        package = Path(folder) / "package.pt2"
        for stage in ("build", "probe"):
            run_stage(stage, Path(source), package, device, timeout)
        package.replace(path)
    return path


def run_stage(stage: str, source: Path, package: Path, device: str, timeout: float) -> None:
    """Run one stage of this module in a process of its own.

    Raises:
        InvalidInputError: It fails, crashes or takes too long.
    """
    argv = [sys.executable, "-m", "qcompiler.emit.aoti", stage, str(source), str(package), device]
    try:
        done = subprocess.run(
            argv, capture_output=True, text=True, timeout=timeout, stdin=subprocess.DEVNULL, check=False
        )
    except subprocess.TimeoutExpired:
        raise InvalidInputError(f"AOTInductor: the {stage} took longer than {timeout:.0f} s") from None
    if done.returncode == 0:
        return
    lines = done.stderr.strip().splitlines() or ["no message"]
    reason = lines[-1]
    if done.returncode < 0:
        reason = f"torch crashed ({signal.Signals(-done.returncode).name})"
    raise InvalidInputError(
        f"AOTInductor: the {stage} of a package for {device} failed: {reason}",
        hint="The .pt2 program and the artifact run without it.",
    )


def build(source: Path, package: Path, device: str) -> None:
    """Compile the program into a package."""
    from torch._inductor import aoti_compile_and_package

    program = export_artifact(source, device=device, numbers_as_sizes=True)
    with torch.no_grad():
        aoti_compile_and_package(program, package_path=str(package))


def probe(source: Path, package: Path, device: str) -> None:
    """Load the package, run a step, and hold it against the program as it is.

    Raises:
        QCompilerError: They differ.
    """
    from torch._inductor import aoti_load_package

    artifact: Artifact = open_artifact(source)
    where = torch.device(device)
    module = graph_module(artifact.graph, artifact.read, where, numbers_as_sizes=True)
    run = aoti_load_package(str(package))
    given = [example_inputs(artifact.graph.inputs, where, numbers_as_sizes=True) for _ in range(2)]
    with torch.no_grad():
        wanted, got = module(*given[0].values()), run(*given[1].values())
    error = float((got - wanted).abs().max() / wanted.abs().max().clamp_min(1e-6))
    if not error <= _TOLERANCE.get(wanted.dtype, 1e-1):
        raise QCompilerError(f"the package differs from the program by {error:.2e} of the largest value")


if __name__ == "__main__":
    stage_, source_, package_, device_ = sys.argv[1:]
    {"build": build, "probe": probe}[stage_](Path(source_), Path(package_), device_)
