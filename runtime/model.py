"""`load` an artifact and generate from it.

model = load("tiny-llama-hqq-4bit")
model.generate("Once upon a time", max_tokens=50)
for piece in model.generate("Once upon a time", stream=True):
    print(piece, end="")
"""

from __future__ import annotations

import logging
import operator
from collections import deque
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, overload

import torch

from qcompiler.kernels.errors import ArtifactError, InvalidInputError
from qcompiler.runtime.artifact import Artifact, Verify, open_artifact
from qcompiler.runtime.chat import MAX_SECONDS, ChatTemplate, find_template
from qcompiler.runtime.cold_start import ColdStart
from qcompiler.runtime.engine import Engine, FinishReason, Sequence
from qcompiler.runtime.loader import choose_device, load_program
from qcompiler.runtime.memory import make_executor
from qcompiler.runtime.program import Program
from qcompiler.runtime.prompts import chat_tokens
from qcompiler.runtime.sampling import SamplingParams
from qcompiler.runtime.tokenizer import TextStream, Tokenizer

log = logging.getLogger(__name__)

Pooling = Literal["none", "mean", "first"]


@dataclass(frozen=True)
class Generation:
    """What came of one prompt.

    Attributes:
        text: Generated text, without special tokens and without what stopped it.
        token_ids: Generated tokens, a final end-of-text token included.
        finish_reason: "stop" (end-of-text token, stop token or stop string), "length", or "aborted".
        prompt_tokens: Number of prompt tokens.
    """

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    prompt_tokens: int


def load(
    path: str | Path,
    device: str | torch.device | None = None,
    *,
    verify: Verify = "full",
    max_sequences: int | None = None,
    max_step_tokens: int | None = None,
    max_cache_tokens: int | None = None,
    cuda_graphs: bool = True,
    lean: bool = False,
    kv_bits: str | int | None = None,
    warm_up: Seq[int] | bool = False,
    ahead: bool | None = None,
) -> Model:
    """Open an artifact, verify it, and put it on a device.

    Args:
        path: The folder that qcompile wrote.
        device: "cpu", "cuda" or "cuda:N"; a suitable GPU if there is one, else the CPU, when None.
        verify: "full" compares the SHA-256 of every file, "sizes" only their sizes.
        max_sequences: Most sequences that run at once.
        max_step_tokens: Most tokens computed in one step; longer prompts are taken in pieces.
        max_cache_tokens: Tokens that the KV cache holds; as many as memory allows, within reason, when None.
        cuda_graphs: Capture decode steps as CUDA graphs.
        lean: On a CPU, keep only packed weights: less memory, slower long prompts.
        kv_bits: Of the KV cache: 16, 8, 4 or "fp8"; as the artifact was compiled when None.
        warm_up: Capture decode steps before the first request: for these numbers of sequences, or for all
            up to `max_sequences` if True. Otherwise each is captured when it is first needed.
        ahead: Launch a step before the tokens of the one before are read; on a GPU when None.

    Returns:
        The model, ready to generate.

    Raises:
        ArtifactError: the artifact is damaged or hostile, or this machine cannot run it.
        InvalidInputError: an option or device makes no sense.
    """
    clock = ColdStart()
    with clock.phase("verify"):
        artifact = open_artifact(path, verify=verify)
    return load_opened(
        artifact,
        device,
        max_sequences=max_sequences,
        max_step_tokens=max_step_tokens,
        max_cache_tokens=max_cache_tokens,
        cuda_graphs=cuda_graphs,
        lean=lean,
        kv_bits=kv_bits,
        warm_up=warm_up,
        ahead=ahead,
        cold_start=clock,
    )


def load_opened(
    artifact: Artifact,
    device: str | torch.device | None = None,
    *,
    max_sequences: int | None = None,
    max_step_tokens: int | None = None,
    max_cache_tokens: int | None = None,
    cuda_graphs: bool = True,
    lean: bool = False,
    kv_bits: str | int | None = None,
    warm_up: Seq[int] | bool = False,
    ahead: bool | None = None,
    cold_start: ColdStart | None = None,
) -> Model:
    """`load` of an artifact that was opened and verified before; `cold_start` has timed what came before."""
    clock = cold_start or ColdStart()
    chosen = choose_device(artifact, device)
    with clock.phase("weights"):
        program = load_program(artifact, chosen, lean=lean, kv_bits=kv_bits)
        _settle(chosen)
    if artifact.manifest.kind == "encoder":
        return Model(artifact, program, None, cold_start=clock)
    model = artifact.manifest.model
    with clock.phase("cache"):
        executor, limits = make_executor(
            program,
            max_context=model.max_context,
            position_offset=model.position_offset,
            max_sequences=max_sequences,
            max_step_tokens=max_step_tokens,
            max_cache_tokens=max_cache_tokens,
            cuda_graphs=cuda_graphs,
        )
    engine = Engine(
        executor,
        vocab_size=model.vocab_size,
        max_context=model.max_context,
        eos_token_ids=_eos_token_ids(artifact),
        max_sequences=limits.max_sequences,
        max_step_tokens=limits.max_step_tokens,
        ahead=ahead,
    )
    if warm_up is not False and chosen.type == "cuda":
        with clock.phase("graphs"):
            executor.warm_up(limits.max_sequences if warm_up is True else warm_up)
            _settle(chosen)
    log.info("ready after %s", clock)
    return Model(artifact, program, engine, cold_start=clock)


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Model:
    """A loaded artifact; see `load`."""

    def __init__(
        self,
        artifact: Artifact,
        program: Program,
        engine: Engine | None,
        *,
        cold_start: ColdStart | None = None,
    ):
        self.artifact = artifact
        self.cold_start = cold_start or ColdStart()
        self.program = program
        self._engine = engine
        self._tokenizer: Tokenizer | None = None
        self._template: ChatTemplate | None = None
        self._template_seconds = MAX_SECONDS

    @property
    def kind(self) -> str:
        """Either "decoder" or "encoder"."""
        return self.artifact.manifest.kind

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.program.device

    @property
    def max_context(self) -> int:
        """Most tokens of one sequence."""
        return self.artifact.manifest.model.max_context

    @property
    def engine(self) -> Engine:
        """The decoder's engine.

        Raises:
            InvalidInputError: the model is an encoder.
        """
        if self._engine is None:
            raise InvalidInputError("this model is an encoder and does not generate", hint="Use encode().")
        return self._engine

    @property
    def tokenizer(self) -> Tokenizer:
        """The artifact's tokenizer.

        Raises:
            ArtifactError: it has none; use token ids.
        """
        if self._tokenizer is None:
            path = self.artifact.path("tokenizer.json")
            if path is None:
                raise ArtifactError(
                    "the artifact has no tokenizer.json",
                    hint="Use generate_tokens() and logits() with token ids.",
                )
            self._tokenizer = Tokenizer(path, self._tokenizer_config())
        return self._tokenizer

    @property
    def chat_template(self) -> ChatTemplate:
        """The artifact's chat template.

        Raises:
            InvalidInputError: it has none.
        """
        if self._template is None:
            path = self.artifact.path("chat_template.jinja")
            source = find_template(
                self._tokenizer_config(),
                path.read_text(encoding="utf-8") if path else None,
            )
            if source is None:
                raise InvalidInputError(
                    "the artifact has no chat template", hint="Use generate() with plain text."
                )
            seconds = self._template_seconds
            self._template = ChatTemplate(source, self.tokenizer.special_tokens, max_seconds=seconds)
        return self._template

    @overload
    def generate(self, prompt: str, *, stream: Literal[False] = False, **sampling: Any) -> str: ...
    @overload
    def generate(self, prompt: str, *, stream: Literal[True], **sampling: Any) -> Iterator[str]: ...
    @overload
    def generate(self, prompt: Seq[str], *, stream: Literal[False] = False, **sampling: Any) -> list[str]: ...
    @overload
    def generate(
        self, prompt: Seq[str], *, stream: Literal[True], **sampling: Any
    ) -> Iterator[tuple[int, str]]: ...

    def generate(self, prompt: str | Seq[str], *, stream: bool = False, **sampling: Any) -> Any:
        """Continue one text or several.

        Args:
            prompt: A text, or a list of texts that are generated together.
            stream: Give pieces of text as they come; for a list, pairs (index of the prompt, piece).
            sampling: See `SamplingParams`: temperature, top_k, top_p, max_tokens, stop ...

        Returns:
            The text, the list of texts, or an iterator of pieces.

        Raises:
            InvalidInputError: an option out of range, or a prompt that is empty or too long.
        """
        single = isinstance(prompt, str)
        if not isinstance(prompt, (str, list, tuple)):
            raise InvalidInputError(f"a prompt must be text or a list of texts, not {type(prompt).__name__}")
        texts = [prompt] if isinstance(prompt, str) else list(prompt)
        params = SamplingParams.make(**sampling)
        prompts = [self.tokenizer.encode(text) for text in texts]
        if stream:
            pieces = self._stream(self._start(prompts, params))
            return (piece for _, piece in pieces) if single else pieces
        results = [g.text for g in self._complete(prompts, params)]
        return results[0] if single else results

    def complete(self, prompts: Seq[str], **sampling: Any) -> list[Generation]:
        """Continue several texts together; like `generate`, with token ids and finish reasons."""
        if isinstance(prompts, str):
            raise InvalidInputError("complete() takes a list of prompts")
        return self._complete([self.tokenizer.encode(p) for p in prompts], SamplingParams.make(**sampling))

    @overload
    def generate_tokens(self, prompt: Seq[int], **sampling: Any) -> Generation: ...
    @overload
    def generate_tokens(self, prompt: Seq[Seq[int]], **sampling: Any) -> list[Generation]: ...

    def generate_tokens(self, prompt: Any, **sampling: Any) -> Any:
        """Continue token ids, one list or a list of lists; only stop strings need a tokenizer."""
        params = SamplingParams.make(**sampling)
        prompts = list(prompt)
        if prompts and all(isinstance(p, (list, tuple)) for p in prompts):
            return self._complete([_token_list(p) for p in prompts], params)
        return self._complete([_token_list(prompts)], params)[0]

    @overload
    def chat(
        self, messages: Seq[Mapping[str, Any]], *, stream: Literal[False] = False, **sampling: Any
    ) -> str: ...
    @overload
    def chat(
        self, messages: Seq[Mapping[str, Any]], *, stream: Literal[True], **sampling: Any
    ) -> Iterator[str]: ...

    def chat(self, messages: Seq[Mapping[str, Any]], *, stream: bool = False, **sampling: Any) -> Any:
        """The assistant's next message in a conversation, by the model's own chat template.

        Args:
            messages: Objects with role and content.
            stream: Give pieces of text as they come.
            sampling: See `SamplingParams`.
        """
        params = SamplingParams.make(**sampling)
        prompts = [self.chat_tokens(messages)]
        if stream:
            return (piece for _, piece in self._stream(self._start(prompts, params)))
        return self._complete(prompts, params)[0].text

    def chat_tokens(self, messages: Seq[Mapping[str, Any]]) -> list[int]:
        """The prompt of a conversation; the template writes the special tokens, messages never do."""
        return chat_tokens(self.tokenizer, self.chat_template, messages)

    def limit_template(self, seconds: float) -> None:
        """Give the chat template at most this time for one conversation."""
        self._template_seconds = seconds
        self._template = None

    def logits(self, token_ids: Seq[int]) -> torch.Tensor:
        """Logits float32 [tokens, vocabulary] of a sequence on the CPU; an encoder's output [tokens, …]."""
        tokens = _token_list(token_ids)
        if self._engine is None:
            return self._encode([tokens])[0].float().cpu()
        parts = [part.float().cpu() for _, _, part in self._engine.score([tokens])]
        return torch.cat(parts)

    def encode(self, text: str | Seq[str], *, pooling: Pooling = "none") -> torch.Tensor | list[torch.Tensor]:
        """Output of an encoder for one text or several, computed as one ragged batch.

        Args:
            text: A text, or a list of texts.
            pooling: "none" gives [tokens, …] per text; "mean" and "first" (leading token) one row.

        Returns:
            float32 on the CPU: a tensor, or a list of tensors.
        """
        if pooling not in ("none", "mean", "first"):
            raise InvalidInputError(f"pooling must be none, mean or first, not {pooling!r}")
        if self._engine is not None:
            raise InvalidInputError("this model is a decoder", hint="Use logits() or generate().")
        texts = [text] if isinstance(text, str) else list(text)
        outputs = [o.float().cpu() for o in self._encode([self.tokenizer.encode(t) for t in texts])]
        if pooling == "mean":
            outputs = [o.mean(0) for o in outputs]
        elif pooling == "first":
            outputs = [o[0] for o in outputs]
        return outputs[0] if isinstance(text, str) else outputs

    def _tokenizer_config(self) -> dict[str, Any]:
        config = self.artifact.json("tokenizer_config.json")
        if config is not None and not isinstance(config, dict):
            raise ArtifactError("tokenizer_config.json: not an object")
        return config or {}

    def _encode(self, prompts: Seq[list[int]]) -> list[torch.Tensor]:
        info = self.artifact.manifest.model
        for tokens in prompts:
            if not tokens or len(tokens) > info.max_context:
                raise InvalidInputError(
                    f"a text of {len(tokens)} tokens: 1 to {info.max_context} are possible"
                )
            if min(tokens) < 0 or max(tokens) >= info.vocab_size:
                raise InvalidInputError(f"a token id is not in the vocabulary of {info.vocab_size}")
        flat = torch.tensor([[t for p in prompts for t in p]], device=self.device)
        positions = [i + info.position_offset for p in prompts for i in range(len(p))]
        starts = torch.tensor([0, *(len(p) for p in prompts)]).cumsum(0).to(torch.int32)
        inputs: dict[str, Any] = {
            "input_ids": flat,
            "position_ids": torch.tensor([positions], device=self.device),
            "token_type_ids": torch.zeros_like(flat),
            "query_start": starts.to(self.device),
            "max_query_len": max(map(len, prompts)),
        }
        missing = [i.name for i in self.program.graph.inputs if i.name not in inputs]
        if missing:
            raise ArtifactError(f"graph.json: input {missing[0]!r} is not one that an encoder is given")
        (output, *_) = self.program(inputs)
        return list(output[0].split([len(p) for p in prompts]))

    def _start(self, prompts: Seq[list[int]], params: SamplingParams) -> list[_Request]:
        if not prompts:
            raise InvalidInputError("no prompts were given")
        engine = self.engine
        for tokens in prompts:
            engine.check_tokens(tokens, room=1)
        tokenizer = self.tokenizer if self.artifact.path("tokenizer.json") else None
        if tokenizer is None and params.stop:
            raise InvalidInputError("stop strings need a tokenizer, which the artifact does not have")
        requests: list[_Request] = []
        try:
            for tokens in prompts:
                requests.append(_Request(engine, tokens, params, tokenizer))  # noqa: PERF401  (kept on error)
        except BaseException:
            self._abort(requests)
            raise
        return requests

    def _complete(self, prompts: Seq[list[int]], params: SamplingParams) -> list[Generation]:
        requests = self._start(prompts, params)
        try:
            self.engine.run([r.sequence for r in requests])
        finally:
            self._abort(requests)
        return [r.result() for r in requests]

    def _stream(self, requests: list[_Request]) -> Iterator[tuple[int, str]]:
        try:
            live = dict(enumerate(requests))
            while live:
                self.engine.advance()
                for index, request in list(live.items()):
                    if request.sequence.error is not None:
                        raise request.sequence.error
                    for piece in request.take():
                        yield index, piece
                    if request.sequence.finish_reason is not None:
                        del live[index]
        finally:
            self._abort(requests)

    def _abort(self, requests: Seq[_Request]) -> None:
        for request in requests:
            self.engine.abort(request.sequence)


class _Request:
    """A sequence of the engine together with the text that comes of it."""

    def __init__(
        self, engine: Engine, tokens: list[int], params: SamplingParams, tokenizer: Tokenizer | None
    ):
        self._text = TextStream(tokenizer, params.stop) if tokenizer is not None else None
        self._pieces: deque[str] = deque()
        self._ended = False
        self.sequence: Sequence = engine.add(
            tokens, params, watch=self._watch if self._text is not None else None
        )

    def _watch(self, token: int) -> bool:
        if self._text is None:
            return False
        if piece := self._text.add([token]):
            self._pieces.append(piece)
        return self._text.stopped

    def take(self) -> Iterator[str]:
        """Pieces that came since the last call; the last ones once the sequence has ended."""
        if self.sequence.finish_reason is not None and not self._ended:
            self._ended = True
            if self._text is not None and (rest := self._text.finish()):
                self._pieces.append(rest)
        while self._pieces:
            yield self._pieces.popleft()

    def result(self) -> Generation:
        for _ in self.take():
            pass
        sequence = self.sequence
        reason = "aborted" if sequence.finish_reason is None else sequence.finish_reason
        return Generation(
            text=self._text.text if self._text is not None else "",
            token_ids=sequence.generated,
            finish_reason=reason,
            prompt_tokens=sequence.prompt_length,
        )


def _eos_token_ids(artifact: Artifact) -> tuple[int, ...]:
    """The manifest's, and those of generation_config.json, which may name more."""
    found = set(artifact.manifest.model.eos_token_ids)
    config = artifact.json("generation_config.json")
    extra = config.get("eos_token_id") if isinstance(config, dict) else None
    found.update(t for t in (extra if isinstance(extra, list) else [extra]) if type(t) is int and t >= 0)
    return tuple(sorted(found))


def _token_list(tokens: Any) -> list[int]:
    try:
        return [operator.index(t) for t in (tokens.tolist() if isinstance(tokens, torch.Tensor) else tokens)]
    except TypeError:
        raise InvalidInputError("token ids must be a list of whole numbers") from None
