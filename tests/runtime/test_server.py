"""The server as the openai client sees it, against what the engine says by itself."""

from __future__ import annotations

import asyncio
import json
import random

import httpx
import pytest
from server_case import NAME, serving

pytest.importorskip("openai")

PROMPT = "Once upon a time"
CHAT = [{"role": "user", "content": "Tell me about the sea."}]


@pytest.fixture(scope="module")
def server(tiny_float):
    options = {"max_sequences": 16, "max_step_tokens": 256, "max_cache_tokens": 4096}
    with serving(tiny_float, load_options=options) as running:
        yield running
        running.rest()


@pytest.fixture(scope="module")
def client(server):
    with server.openai() as client:
        yield client


# Completions


def test_a_completion_equals_the_engine(client, float_model):
    (expected,) = float_model.complete([PROMPT], max_tokens=16)
    got = client.completions.create(model=NAME, prompt=PROMPT, max_tokens=16, temperature=0)
    assert got.choices[0].text == expected.text
    assert got.choices[0].finish_reason == "length"
    assert (got.usage.prompt_tokens, got.usage.completion_tokens) == (expected.prompt_tokens, 16)
    assert got.object == "text_completion"


def test_a_streamed_completion_is_the_same_text(client, float_model):
    expected = float_model.generate(PROMPT, max_tokens=16)
    options = {"include_usage": True}
    chunks = list(
        client.completions.create(
            model=NAME, prompt=PROMPT, max_tokens=16, temperature=0, stream=True, stream_options=options
        )
    )
    assert "".join(c.choices[0].text for c in chunks if c.choices) == expected
    assert len(chunks) > 3
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].usage.completion_tokens == 16


def test_several_prompts_and_choices_come_in_order(client, float_model):
    prompts = [PROMPT, "The"]
    expected = float_model.generate(prompts, max_tokens=8)
    got = client.completions.create(model=NAME, prompt=prompts, max_tokens=8, temperature=0, n=2)
    assert [c.text for c in got.choices] == [expected[0], expected[0], expected[1], expected[1]]
    assert [c.index for c in got.choices] == [0, 1, 2, 3]
    assert got.usage.prompt_tokens == sum(len(float_model.tokenizer.encode(p)) for p in prompts)


def test_token_ids_are_a_prompt(client, float_model):
    ids = float_model.tokenizer.encode(PROMPT)
    got = client.completions.create(model=NAME, prompt=ids, max_tokens=8, temperature=0)
    assert got.choices[0].text == float_model.generate(PROMPT, max_tokens=8)


def test_choices_differ_by_seed_and_repeat(client):
    options = {"model": NAME, "prompt": PROMPT, "max_tokens": 12, "n": 3, "seed": 5, "temperature": 1.0}
    texts = [[c.text for c in client.completions.create(**options).choices] for _ in range(2)]
    assert texts[0] == texts[1]
    assert len(set(texts[0])) == 3


def test_a_completion_ends_before_a_stop_string(client, float_model):
    text = float_model.generate(PROMPT, max_tokens=24)
    stop = text[8:12]
    options = {"model": NAME, "prompt": PROMPT, "max_tokens": 24, "temperature": 0, "stop": [stop]}
    got = client.completions.create(**options).choices[0]
    assert (got.text, got.finish_reason) == (text[: text.index(stop)], "stop")
    pieces = [c.choices[0].text for c in client.completions.create(**options, stream=True)]
    assert "".join(pieces) == got.text


def test_completion_logprobs(client, float_model):
    got = client.completions.create(model=NAME, prompt=PROMPT, max_tokens=4, temperature=0, logprobs=2)
    logprobs = got.choices[0].logprobs
    ids = float_model.tokenizer.encode(PROMPT)
    first = float_model.logits(ids)[-1].log_softmax(-1)
    assert logprobs.token_logprobs[0] == pytest.approx(first.max().item(), abs=1e-4)
    assert "".join(logprobs.tokens) == got.choices[0].text
    assert all(2 <= len(top) <= 3 for top in logprobs.top_logprobs)
    assert logprobs.text_offset == [sum(map(len, logprobs.tokens[:i])) for i in range(4)]


def test_penalties_and_biases_change_what_is_said(client, float_model):
    options = {"model": NAME, "prompt": PROMPT, "max_tokens": 24, "temperature": 0}
    plain = client.completions.create(**options, logprobs=0).choices[0]
    forbidden = float_model.generate_tokens(float_model.tokenizer.encode(PROMPT), max_tokens=1).token_ids[0]
    biased = client.completions.create(**options, logprobs=0, logit_bias={str(forbidden): -100}).choices[0]
    assert biased.logprobs.tokens[0] != plain.logprobs.tokens[0]
    varied = client.completions.create(**options, logprobs=0, presence_penalty=2, frequency_penalty=2)
    assert len(set(varied.choices[0].logprobs.tokens)) > len(set(plain.logprobs.tokens))


# Chat


def test_a_chat_equals_the_engine(client, float_model):
    got = client.chat.completions.create(model=NAME, messages=CHAT, max_tokens=16, temperature=0)
    assert got.choices[0].message.content == float_model.chat(CHAT, max_tokens=16)
    assert got.choices[0].message.role == "assistant"
    assert got.usage.prompt_tokens == len(float_model.chat_tokens(CHAT))


def test_a_streamed_chat_is_the_same_text(client, float_model):
    stream = client.chat.completions.create(
        model=NAME, messages=CHAT, max_completion_tokens=16, temperature=0, stream=True
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(c.choices[0].delta.content or "" for c in chunks)
    assert text == float_model.chat(CHAT, max_tokens=16)
    assert chunks[-1].choices[0].finish_reason == "length"


def test_streamed_choices_of_a_chat_come_mixed_and_complete(client):
    options = {"model": NAME, "messages": CHAT, "max_tokens": 8, "n": 3, "seed": 1, "temperature": 1}
    whole = [c.message.content for c in client.chat.completions.create(**options).choices]
    pieces = ["", "", ""]
    for chunk in client.chat.completions.create(**options, stream=True):
        pieces[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert pieces == whole


def test_chat_logprobs(client):
    got = client.chat.completions.create(
        model=NAME, messages=CHAT, max_tokens=4, temperature=0, logprobs=True, top_logprobs=3
    )
    content = got.choices[0].logprobs.content
    assert len(content) == 4
    for entry in content:
        assert entry.top_logprobs[0].token == entry.token  # greedy
        assert entry.top_logprobs[0].logprob == pytest.approx(entry.logprob)
        assert bytes(entry.bytes).decode() == entry.token


def test_text_parts_are_one_text(client):
    content = [{"type": "text", "text": text} for text in ("Tell me about ", "the sea.")]
    options = {"model": NAME, "max_tokens": 8, "temperature": 0}
    parts = client.chat.completions.create(messages=[{"role": "user", "content": content}], **options)
    whole = client.chat.completions.create(messages=CHAT, **options)
    assert parts.choices[0].message.content == whole.choices[0].message.content


def test_what_is_not_served_is_refused_by_name(server):
    chat, base = "/v1/chat/completions", {"messages": CHAT, "max_tokens": 1}
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {}}}
    for extra, word in (
        ({"response_format": {"type": "json_schema"}}, "json_schema.schema"),
        ({"response_format": {**schema, "type": "grammar"}}, "response_format"),
        ({"tools": []}, "tools"),
        ({"chat_template": "{{ 1 }}"}, "chat_template"),
        ({"model": "other"}, "other"),
    ):
        response = server.post(chat, {**base, **extra})
        assert response.status_code == (404 if "model" in extra else 400)
        assert word in response.json()["error"]["message"]


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "kind": {"enum": ["ship", "whale", "storm"]},
        "size": {"type": "integer", "minimum": 1, "maximum": 99},
        "calm": {"type": "boolean"},
    },
    "required": ["name", "kind", "size", "calm"],
    "additionalProperties": False,
}


def json_schema(schema):
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}


def test_json_follows_its_schema_for_50_seeds(client):
    pytest.importorskip("llguidance")
    texts = []
    for seed in range(0, 50, 10):
        got = client.chat.completions.create(
            model=NAME, messages=CHAT, n=10, seed=seed, temperature=1, max_tokens=80,
            response_format=json_schema(SCHEMA),
        )  # fmt: skip
        texts += [(c.message.content, c.finish_reason) for c in got.choices]
    assert {reason for _, reason in texts} == {"stop"}
    for text, _ in texts:
        value = json.loads(text)
        assert list(value) == SCHEMA["required"]
        assert isinstance(value["name"], str)
        assert len(value["name"]) <= 12
        assert value["kind"] in SCHEMA["properties"]["kind"]["enum"]
        assert type(value["size"]) is int
        assert 1 <= value["size"] <= 99
        assert type(value["calm"]) is bool
    assert len({text for text, _ in texts}) > 40


def test_a_schema_that_cannot_be_followed_is_refused(server):
    pytest.importorskip("llguidance")
    for schema in ({"type": "nothing"}, {"$ref": "http://example.com/x"}, {"type": "string", "pattern": "("}):
        body = {"messages": CHAT, "max_tokens": 4, "response_format": json_schema(schema)}
        response = server.post("/v1/chat/completions", body)
        assert response.status_code == 400
        assert "response_format" in response.json()["error"]["message"]


def test_without_the_library_a_schema_is_refused(server, monkeypatch):
    from qcompiler.runtime.server import grammar

    monkeypatch.setattr(grammar.importlib.util, "find_spec", lambda name: None)
    body = {"messages": CHAT, "max_tokens": 4, "response_format": json_schema(SCHEMA)}
    response = server.post("/v1/chat/completions", body)
    assert response.status_code == 400
    assert "llguidance" in response.json()["error"]["message"]


# Around


def test_models_health_and_page(server, client):
    assert [m.id for m in client.models.list().data] == [NAME]
    assert client.models.retrieve(NAME).id == NAME
    with server.client() as http:
        assert http.get("/health").status_code == http.get("/ready").status_code == 200
        page = http.get("/")
        assert "text/html" in page.headers["content-type"]
        assert "sha256-" in page.headers["content-security-policy"]
        assert "http" not in page.text.split("<script>")[1]  # nothing from elsewhere
        assert http.get("/v1/models/other").status_code == 404
        assert http.get("/nothing").json()["error"]["code"] == 404
        assert set(http.get("/openapi.json").json()["paths"]) >= {"/v1/completions", "/metrics"}


def test_metrics_count_what_happened(server, client):
    def read():
        with server.client() as http:
            lines = http.get("/metrics").text.splitlines()
        return {k: float(v) for k, _, v in (s.rpartition(" ") for s in lines if not s.startswith("#"))}

    before = read()
    client.completions.create(model=NAME, prompt=PROMPT, max_tokens=7, temperature=0)
    after = read()
    for name, grown in (
        ("generated_tokens_total", 7),
        ("time_to_first_token_seconds_count", 1),
        ("inter_token_seconds_count", 6),
        ('sequences_total{reason="length"}', 1),
    ):
        assert after[f"qcompiler_{name}"] - before.get(f"qcompiler_{name}", 0) == grown
    assert after["qcompiler_cache_pages"] == 256
    assert after["qcompiler_ready"] == 1


# Many at once


def bodies(model, count, seed):
    """Prompts and lengths of all sizes; some begin alike."""
    chance = random.Random(seed)
    text = (PROMPT + ", there was a king who had three sons. The eldest ") * 8
    ids = model.tokenizer.encode(text)
    made = []
    for _ in range(count):
        start = 0 if chance.random() < 0.5 else chance.randrange(40)
        prompt = ids[start : start + 1 + int(chance.paretovariate(0.9) * 4) % 90]
        made.append((tuple(prompt), chance.choice([1, 2, 3, 4, 6, 8])))
    return made


def ask(prompt, count, **extra):
    return {"model": NAME, "prompt": list(prompt), "max_tokens": count, "temperature": 0, **extra}


@pytest.fixture(scope="module")
def alone(float_model):
    known = {}

    def answer(prompt, count):
        if (prompt, count) not in known:
            known[prompt, count] = float_model.generate_tokens(list(prompt), max_tokens=count).text
        return known[prompt, count]

    return answer


async def one(http, prompt, count, *, stream):
    if not stream:
        response = await http.post("/v1/completions", json=ask(prompt, count))
        assert response.status_code == 200, response.text
        return response.json()["choices"][0]["text"]
    text = ""
    async with http.stream("POST", "/v1/completions", json=ask(prompt, count, stream=True)) as response:
        assert response.status_code == 200
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                text += json.loads(line[6:])["choices"][0]["text"]
    return text


def unlimited(server):
    limits = httpx.Limits(max_connections=None)
    return httpx.AsyncClient(base_url=server.url, timeout=120, limits=limits, trust_env=False)


def test_200_requests_at_once_each_as_alone(server, float_model, alone):
    work = bodies(float_model, 200, seed=1)

    async def main():
        async with unlimited(server) as http:
            jobs = [one(http, p, n, stream=i % 2 == 0) for i, (p, n) in enumerate(work)]
            return await asyncio.gather(*jobs)

    got = asyncio.run(main())
    assert [i for i, (text, job) in enumerate(zip(got, work, strict=True)) if text != alone(*job)] == []
    server.rest()


def test_200_requests_with_disconnects_leave_no_page_behind(server, float_model, alone):
    work = bodies(float_model, 200, seed=2)
    chance = random.Random(3)

    async def leaves(http, prompt, stream):
        """A client that goes away: before the answer, or after some of it."""
        if not stream:
            job = asyncio.ensure_future(http.post("/v1/completions", json=ask(prompt, 500, ignore_eos=True)))
            await asyncio.sleep(chance.random() * 2)
            job.cancel()
            return
        body = ask(prompt, 500, stream=True, ignore_eos=True)
        async with http.stream("POST", "/v1/completions", json=body) as response:
            wanted = chance.randrange(6)
            async for line in response.aiter_lines():
                wanted -= line.startswith("data: ")
                if wanted <= 0:
                    break

    async def main():
        async with unlimited(server) as http:
            jobs = []
            for i, (prompt, count) in enumerate(work):
                stream = i % 2 == 0
                stays = chance.random() < 0.5
                jobs.append(
                    one(http, prompt, count, stream=stream) if stays else leaves(http, prompt, stream)
                )
            return await asyncio.gather(*jobs)

    got = asyncio.run(main())
    assert got.count(None) > 50
    wrong = [t for t, job in zip(got, work, strict=True) if t is not None and t != alone(*job)]
    assert wrong == []
    server.rest()
    with server.client() as http:
        lines = http.get("/metrics").text.splitlines()
    aborted = [s for s in lines if s.startswith('qcompiler_sequences_total{reason="aborted"}')]
    assert float(aborted[0].split()[-1]) > 20  # the others had not been queued yet
