"""Many streaming clients in one process of its own, so that they take nothing from the server they measure.

Reads one JSON job from stdin and writes one JSON object to stdout; needs only the standard library. `at` and
all times are those of the system's monotonic clock, which processes share.

    {"port": 8000, "at": 12.5, "streams": 64, "prompt_tokens": 128, "tokens": 256, "vocab": 32000, "seed": 0,
     "kind": "streams"}                               when each event of each stream came
    {..., "kind": "prompts", "seconds": 8, "rate": 2}  long prompts at a rate: how long each one took

`cpus` names the cores to run on. Of both kinds comes `busy`: the part of the time in which the process
computed, 1 where it could not have taken more.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import sys
import time
from typing import Any


def completion(tokens: list[int], count: int) -> dict[str, Any]:
    """A request for `count` tokens, each an event."""
    return {"prompt": tokens, "max_tokens": count, "temperature": 0, "ignore_eos": True, "stream": True}


async def request(port: int, body: dict[str, Any]) -> list[float]:
    """Times of the events of one streamed completion; raises unless it is whole."""
    content = json.dumps(body).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
    head = f"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(content)}\r\n"
    writer.write(f"{head}content-type: application/json\r\nconnection: close\r\n\r\n".encode() + content)
    times: list[float] = []
    tail = b""
    whole = False
    while piece := await reader.read(1 << 16):
        now = time.monotonic()
        # A mark that is split between two reads is found in the second.
        data = tail + piece
        times += [now] * data.count(b'data: {"id"')
        whole = whole or b"data: [DONE]" in data
        tail = data[-10:]
    writer.close()
    if not whole:
        raise RuntimeError(f"the stream broke off: {data[:500]!r}")
    return times


def prompt(chance: random.Random, job: dict[str, Any]) -> list[int]:
    """Random tokens, so that no prompt begins like another."""
    return [chance.randrange(3, job["vocab"]) for _ in range(job["prompt_tokens"])]


async def run_streams(job: dict[str, Any]) -> dict[str, Any]:
    """All streams at once, from the moment `at`."""
    chance = random.Random(job["seed"])
    bodies = [completion(prompt(chance, job), job["tokens"]) for _ in range(job["streams"])]
    await asyncio.sleep(max(0.0, job["at"] - time.monotonic()))
    return {"times": await asyncio.gather(*(request(job["port"], body) for body in bodies))}


async def run_prompts(job: dict[str, Any]) -> dict[str, Any]:
    """Long prompts at a rate, for a time; seconds until each one's only token."""
    chance = random.Random(job["seed"])
    taken: list[float] = []

    async def one() -> None:
        body = completion(prompt(chance, job), 1)
        start = time.monotonic()
        await request(job["port"], body)
        taken.append(time.monotonic() - start)

    await asyncio.sleep(max(0.0, job["at"] - time.monotonic()))
    begin = time.monotonic()
    end = begin + job["seconds"]
    pending = []
    while time.monotonic() < end:
        pending.append(asyncio.ensure_future(one()))
        await asyncio.sleep(1 / job["rate"])
    await asyncio.gather(*pending)
    return {"seconds": taken, "begin": begin, "end": time.monotonic()}


def main() -> None:
    """Run the job."""
    job = json.load(sys.stdin)
    if job.get("cpus"):
        os.sched_setaffinity(0, job["cpus"])
    run = run_streams if job["kind"] == "streams" else run_prompts
    used = time.process_time()
    result = asyncio.run(run(job))
    busy = (time.process_time() - used) / max(1e-9, time.monotonic() - job["at"])
    json.dump({**result, "busy": busy}, sys.stdout)


if __name__ == "__main__":
    main()
