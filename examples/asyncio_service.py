"""The engine inside an asyncio program of yours: many requests, one batch, tokens as they come.

python examples/asyncio_service.py build/tiny-llama-hqq-4bit
"""

import asyncio
import sys

import qcompiler
from qcompiler.runtime.sampling import SamplingParams
from qcompiler.runtime.service import OverloadedError, Request, Service

PROMPTS = ["Once upon a time", "It was a dark and stormy night", "The first rule", "In the beginning"]


async def answer(service: Service, prompt: str) -> str:
    """One request; its tokens arrive between those of the others."""
    tokens = service.model.tokenizer.encode(prompt)
    pieces = []
    # Leaving the block early, also by an exception or a cancelled task, cancels the request.
    async with service.submit(Request(tokens, SamplingParams(max_tokens=24, temperature=0.0))) as stream:
        async for event in stream:
            pieces.append(event.text)  # noqa: PERF401  a server would send it here
    return "".join(pieces)


async def main(artifact: str) -> None:
    """Serve all prompts at once, and one with a deadline."""
    with Service(qcompiler.load(artifact), max_waiting=64) as service:
        answers = await asyncio.gather(*(answer(service, prompt) for prompt in PROMPTS))
        for prompt, text in zip(PROMPTS, answers, strict=True):
            print(f"{prompt}|{text}".replace("\n", " "))
        try:
            await asyncio.wait_for(answer(service, PROMPTS[0]), timeout=10)
        except (TimeoutError, OverloadedError) as error:
            print(f"not answered: {type(error).__name__}")
        stats = service.stats()
        print(f"running {stats.running}, pages in use {stats.pages_held} of {stats.pages_total}")


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
