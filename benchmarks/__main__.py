"""Lists the benchmarks of speed, or runs some of them with their usual arguments.

    python -m benchmarks                       what there is
    python -m benchmarks linear attention      these, in this order
    python -m benchmarks --all                 everything
    python -m benchmarks linear --show         the commands only

Each runs in a process of its own. Results go to `--results`, from where `python -m benchmarks.tables` makes
the tables and plots of the documentation. One that fails leaves the others.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
import time

from benchmarks.registry import BENCHMARKS


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = {benchmark.name: benchmark for benchmark in BENCHMARKS}
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--results", default="benchmarks/results", metavar="DIR")
    parser.add_argument("--work", default="build/bench", metavar="DIR", help="for checkpoints")
    parser.add_argument("--show", action="store_true", help="print the commands and run nothing")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.names if name not in known]
    if unknown:
        parser.error(f"no benchmark {unknown[0]!r}; there are {', '.join(known)}")
    names = list(known) if options.all else options.names
    if not names:
        for benchmark in BENCHMARKS:
            print(f"{benchmark.name:14} {benchmark.summary}")
        return 0
    failed = []
    for name in names:
        for command in known[name].commands(options.results, options.work):
            print(f"$ python {shlex.join(command)}", flush=True)
            if options.show:
                continue
            begin = time.perf_counter()
            code = subprocess.run([sys.executable, *command], check=False).returncode
            told = "" if code == 0 else f", failed ({code})"
            print(f"# {name}: {time.perf_counter() - begin:.0f} s{told}", flush=True)
            failed += [name] if code else []
    if failed:
        print(f"failed: {', '.join(dict.fromkeys(failed))}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
