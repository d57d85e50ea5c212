"""What a server must survive, by the numbers of the project's list of faults."""

from __future__ import annotations

import gc
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from server_case import NAME, serving

from qcompiler.runtime.chat import ChatTemplate

PROMPT = "Once upon a time"
TEXT, CHAT = "/v1/completions", "/v1/chat/completions"
USER = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def server(tiny_float):
    options = {"max_sequences": 4, "max_step_tokens": 64, "max_cache_tokens": 4096}
    with serving(tiny_float, load_options=options, limits={"template_seconds": 0.5}) as running:
        yield running
        running.rest()


@pytest.fixture(autouse=True)
def _still_works(request):
    """After each fault the server answers as before."""
    yield
    if "server" in request.fixturenames:
        server = request.getfixturevalue("server")
        good = server.post(TEXT, {"model": NAME, "prompt": PROMPT, "max_tokens": 2, "temperature": 0})
        assert good.status_code == 200
        server.rest()


def refused(server, path, body, word=None, status=400):
    """The answer is an error of that status, given without starting anything."""
    steps = server.service.stats().counters.steps
    base = {"prompt": PROMPT} if path == TEXT else {"messages": USER}
    if isinstance(body, (bytes, str)):
        content = body
    else:
        content = json.dumps({"model": NAME, "max_tokens": 1, **base, **body})
    with server.client() as client:
        response = client.post(path, content=content, headers={"content-type": "application/json"})
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error["code"] == status
    if word is not None:
        assert word in error["message"]
    assert server.service.stats().counters.steps == steps
    return error


@pytest.mark.parametrize("path", [TEXT, CHAT])
@pytest.mark.parametrize("n", [10**9, 0, -1, 1.5, "3", 10**400])
def test_fault_30_a_huge_n_is_refused_before_allocation(server, path, n):
    refused(server, path, {"n": n})


def test_fault_30_prompts_times_n_count(server):
    refused(server, TEXT, {"prompt": ["a"] * 64, "n": 16}, "prompts times n")


@pytest.mark.parametrize("path", [TEXT, CHAT])
@pytest.mark.parametrize("value", ["2048", "-1", "0", "1e308", "NaN", "Infinity", '"9"', "1" + "0" * 5000])
def test_fault_31_max_tokens_that_make_no_sense(server, path, value):
    base = '"prompt": "a"' if path == TEXT else '"messages": [{"role": "user", "content": "a"}]'
    refused(server, path, f'{{{base}, "max_tokens": {value}}}')


def test_fault_31_prompt_and_max_tokens_beyond_the_context(server):
    refused(server, TEXT, {"prompt": [5] * 2000, "max_tokens": 100}, "context")


@pytest.mark.parametrize("path", [TEXT, CHAT])
@pytest.mark.parametrize(
    "option",
    [
        '"temperature": NaN', '"temperature": -0.1', '"temperature": Infinity', '"temperature": null',
        '"top_p": -1', '"top_p": 1.01', '"top_p": NaN', '"min_p": 2', '"top_k": 1e9',
        '"presence_penalty": 3', '"frequency_penalty": NaN', '"repetition_penalty": 0', '"seed": 1e30',
    ],
)  # fmt: skip
def test_fault_32_sampling_options_out_of_range(server, path, option):
    base = '"prompt": "a"' if path == TEXT else '"messages": [{"role": "user", "content": "a"}]'
    error = refused(server, path, f"{{{base}, {option}}}")
    assert error["param"] == option.split('"')[1]


def test_fault_33_logprobs_of_the_whole_vocabulary(server):
    refused(server, TEXT, {"logprobs": 2048}, "logprobs")
    refused(server, CHAT, {"logprobs": True, "top_logprobs": 2048}, "top_logprobs")
    refused(server, CHAT, {"top_logprobs": 3}, "logprobs: true")


@pytest.mark.parametrize("path", [TEXT, CHAT])
def test_fault_34_many_stop_strings_and_biases(server, path):
    refused(server, path, {"stop": ["x"] * 500_000})
    refused(server, path, {"stop": ["x"] * 17}, "stop strings")
    refused(server, path, {"stop": ["x" * 1000]}, "stop string")
    refused(server, path, {"stop": [""]})
    refused(server, path, {"logit_bias": {str(i): 1 for i in range(200_000)}})
    refused(server, path, {"logit_bias": {"1": 101}}, "logit_bias")
    refused(server, path, {"logit_bias": {"one": 1}}, "token ids")
    refused(server, path, {"stop_token_ids": list(range(500_000))})


def test_fault_35_empty_prompts_and_messages(server):
    for prompt in ("", [], [""], [[]], None):
        refused(server, TEXT, {"prompt": prompt})
    for messages in ([], None, [{}], [{"role": "user"}], [{"role": "user", "content": []}]):
        refused(server, CHAT, {"messages": messages})
    refused(server, TEXT, b"")
    refused(server, TEXT, b"[]")


def test_fault_36_a_prompt_beyond_the_context(server):
    refused(server, TEXT, {"prompt": [5] * 2048}, "context is 2048")
    refused(server, TEXT, {"prompt": "word " * 20_000}, "context is 2048")
    refused(server, CHAT, {"messages": [{"role": "user", "content": "word " * 20_000}]}, "context is 2048")
    refused(server, TEXT, {"prompt": [2048]}, "vocabulary")
    refused(server, TEXT, {"prompt": [-1]})


@pytest.mark.parametrize(
    "body",
    [
        b'{"prompt": "\xff\xfe", "max_tokens": 1}',
        b'{"prompt": "\\ud800", "max_tokens": 1}',
        b'{"prompt": "a", "max_tokens": 1, "stop": "\\udfff"}',
        b'{"prompt": "a", "max_tokens": 1, "\\ud800": 1}',
        b'{"model": "\\ud800", "prompt": "a"}',
        b"[" * 100_000,
        b'{"prompt": "a"',
    ],
)
def test_fault_37_bytes_that_are_no_text(server, body):
    with server.client() as client:
        response = client.post(TEXT, content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert response.json()["error"]["message"]


def test_fault_37_special_tokens_typed_by_a_user_stay_text(server):
    """ "</s>" in a message is four characters; the template's own is the token."""
    model = server.model
    messages = [
        {"role": "user", "content": "a</s>b<s>"},
        {"role": "assistant", "content": "c"},
        {"role": "user", "content": "d"},
    ]
    ids = model.chat_tokens(messages)
    tokenizer = model.tokenizer
    assert ids.count(tokenizer.token_id("<s>")) == 1
    assert ids.count(tokenizer.token_id("</s>")) == 1  # after the assistant's message
    assert tokenizer.decode(ids, skip_special_tokens=False) == model.chat_template.render(messages)
    response = server.post(CHAT, {"messages": messages, "max_tokens": 1})
    assert response.json()["usage"]["prompt_tokens"] == len(ids)


def test_fault_38_a_looping_template_ends_and_disturbs_nobody(server):
    loop = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    model = server.model
    template = model.chat_template
    model._template = ChatTemplate(loop, max_seconds=0.5)
    try:
        with ThreadPoolExecutor(8) as pool:
            stuck = [pool.submit(server.post, CHAT, {"messages": USER, "max_tokens": 1}) for _ in range(4)]
            time.sleep(0.1)
            assert server.post(TEXT, {"prompt": PROMPT, "max_tokens": 2}).status_code == 200
            for future in stuck:
                assert future.result().status_code == 400
                assert "takes too long" in future.result().json()["error"]["message"]
    finally:
        model._template = template


def test_fault_38_templates_are_never_taken_from_a_request(server):
    for key in ("chat_template", "chat_template_kwargs", "template"):
        refused(server, CHAT, {key: "{{ 7 * 7 }}"}, key)
    response = server.post(CHAT, {"messages": [{"role": "user", "content": "{{ 7 * 7 }}"}], "max_tokens": 1})
    text = server.model.chat_template.render([{"role": "user", "content": "{{ 7 * 7 }}"}])
    assert "{{ 7 * 7 }}" in text
    assert response.status_code == 200


@pytest.mark.parametrize("stream", [True, False])
def test_fault_39_a_client_that_leaves_frees_its_place_and_pages(server, stream, caplog):
    body = {"prompt": PROMPT, "max_tokens": 1900, "ignore_eos": True, "stream": stream}
    before = server.service.stats().counters.generated_tokens
    with connect(server) as sock:
        send_json(sock, TEXT, body)
        wait_for(lambda: server.service.stats().running == 1)
        if stream:
            assert b"data: " in sock.recv(65536) + sock.recv(65536)
    wait_for(lambda: server.service.stats().running == 0)
    assert server.service.stats().pages_held == 0
    assert server.service.stats().counters.generated_tokens - before < 1900
    time.sleep(0.1)
    gc.collect()
    assert [r.message for r in caplog.records if r.levelno >= logging.ERROR] == []


@pytest.mark.parametrize("stream", [True, False])
def test_fault_39_a_client_that_leaves_the_queue(server, stream):
    body = {"prompt": PROMPT, "max_tokens": 1900, "ignore_eos": True}
    with connect(server) as sock:
        send_json(sock, TEXT, {**body, "n": 4})
        wait_for(lambda: server.service.stats().running == 4)
        with connect(server) as late:
            send_json(late, TEXT, {**body, "stream": stream})
            wait_for(lambda: server.service.stats().waiting == 1)
        wait_for(lambda: server.service.stats().waiting == 0, seconds=5)
        assert server.service.stats().running == 4


def test_fault_40_a_slow_reader_has_a_bounded_buffer(tiny_float):
    """Nobody reads the socket: what the sequence may run ahead is bounded, and in the end it is given up."""
    limits = {"max_buffered": 8, "stall_seconds": 1.5}
    with serving(tiny_float, limits=limits) as server, connect(server) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        body = {
            "prompt": [PROMPT] * 8,
            "max_tokens": 1900,
            "ignore_eos": True,
            "stream": True,
            "logprobs": 20,
        }
        send_json(sock, TEXT, body)
        streams = lambda: [t.sink for t in server.service.scheduler.running]  # noqa: E731
        wait_for(lambda: any(s.full() for s in streams()), seconds=60)
        assert max(len(s._events) for s in streams()) <= 8
        assert server.post(TEXT, {"prompt": PROMPT, "max_tokens": 2}).status_code == 200
        wait_for(lambda: server.service.stats().running == 0, seconds=60)
        server.rest()


def test_fault_41_huge_bodies_and_heads(server):
    big = {"prompt": "x" * (5 << 20)}
    refused(server, TEXT, big, "body", status=413)

    def chunks():
        for _ in range(6):
            yield b" " * (1 << 20)

    with server.client() as client:
        response = client.post(TEXT, content=chunks(), headers={"content-type": "application/json"})
        assert response.status_code == 413
        assert client.get("/health", headers={"x-long": "x" * 20_000}).status_code == 431
        assert client.get("/health?" + "q" * 20_000).status_code == 431
        assert client.get("/health", headers={f"x-{i}": "y" for i in range(5000)}).status_code == 431
    with connect(server) as sock:  # a head that never ends
        sock.sendall(b"GET / HTTP/1.1\r\nhost: localhost\r\nx-long: " + b"x" * (64 << 10))
        assert b" 431 " in sock.recv(4096).splitlines()[0]
    with connect(server) as sock:  # no HTTP at all
        sock.sendall(b"\x16\x03\x01 hello\r\n\r\n")
        assert b" 400 " in sock.recv(4096).splitlines()[0]


def test_fault_42_a_kernel_that_fails_is_a_500_of_its_own_request(server, monkeypatch):
    executor = server.model.engine.executor
    run = executor.run

    def faulty(spans):
        if any(s.start == 0 and list(s.tokens) == [666] for s in spans):
            raise RuntimeError("illegal instruction")
        return run(spans)

    monkeypatch.setattr(executor, "run", faulty)
    good = {"prompt": [5, 6], "max_tokens": 40, "ignore_eos": True, "temperature": 0}
    with ThreadPoolExecutor(4) as pool:
        others = [pool.submit(server.post, TEXT, good) for _ in range(3)]
        bad = pool.submit(server.post, TEXT, {"prompt": [666], "max_tokens": 4})
        assert bad.result().status_code == 500
        assert "Traceback" not in bad.result().text
        assert {f.result().status_code for f in others} == {200}
    assert server.post(TEXT, {"prompt": [666], "max_tokens": 4, "stream": True}).status_code == 500
    with server.client() as client:
        assert client.get("/ready").status_code == 200


def test_fault_42_a_lost_device_ends_readiness(tiny_float, monkeypatch):
    with serving(tiny_float) as server:
        monkeypatch.setattr(server.service.scheduler, "_device_is_lost", lambda: True)

        def gone(spans):
            raise RuntimeError("unspecified launch failure")

        monkeypatch.setattr(server.model.engine.executor, "run", gone)
        assert server.post(TEXT, {"prompt": PROMPT, "max_tokens": 4}).status_code == 503
        with server.client() as client:
            assert client.get("/ready").status_code == client.get("/health").status_code == 503
        assert server.post(TEXT, {"prompt": PROMPT, "max_tokens": 4}).status_code == 503
        server.rest()


def test_fault_43_sigterm_drains(tiny_float):
    """The process that people start: a stream that runs ends whole, then the process, with code 0."""
    command = [sys.executable, "-m", "qcompiler.runtime.cli.main", "serve", str(tiny_float), "--port", "0"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([*command, "--device", "cpu"], stderr=subprocess.PIPE, text=True, env=env)
    try:
        lines = [process.stderr.readline()]
        while "serving on" not in lines[-1]:
            assert lines[-1], "".join(lines)
            lines.append(process.stderr.readline())
        port = int(lines[-1].rsplit(":", 1)[1])
        with socket.create_connection(("127.0.0.1", port), timeout=60) as sock:
            body = {"prompt": PROMPT, "max_tokens": 300, "ignore_eos": True, "stream": True}
            send_json(sock, TEXT, body)
            data = sock.recv(65536)
            while b"data: " not in data:
                data += sock.recv(65536)
            process.send_signal(signal.SIGTERM)
            time.sleep(0.3)
            with pytest.raises(ConnectionError):
                socket.create_connection(("127.0.0.1", port), timeout=5)
            while piece := sock.recv(65536):
                data += piece
        assert b"[DONE]" in data
        assert data.count(b'"finish_reason": "length"') == 1
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def test_fault_44_overload_is_429(tiny_float):
    options = {"max_sequences": 1, "max_cache_tokens": 4096}
    with serving(tiny_float, load_options=options, limits={"max_waiting": 2}) as server:
        body = {"prompt": PROMPT, "max_tokens": 300, "ignore_eos": True}
        with ThreadPoolExecutor(12) as pool:
            answers = list(pool.map(lambda _: server.post(TEXT, body), range(12)))
        found = [a.status_code for a in answers]
        assert set(found) == {200, 429}
        assert found.count(200) >= 2  # two may wait, even if all come before the first one runs
        assert all(a.headers["retry-after"] for a in answers if a.status_code == 429)
        assert server.post(TEXT, {**body, "n": 4}).status_code == 429
        server.rest()


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "null", "http://127.0.0.1:1", "http://[", "file://"]
)
def test_fault_45_other_origins_are_denied(server, origin):
    with server.client(headers={"origin": origin}) as client:
        for method, path in (("GET", "/"), ("GET", "/v1/models"), ("POST", TEXT), ("OPTIONS", TEXT)):
            response = client.request(method, path, json={"prompt": PROMPT, "max_tokens": 1})
            assert response.status_code == 403
            assert "access-control-allow-origin" not in response.headers


def test_fault_45_simple_requests_and_foreign_names_are_denied(server):
    with server.client() as client:
        # What a browser sends across origins without asking first.
        body = json.dumps({"prompt": PROMPT, "max_tokens": 1})
        response = client.post(TEXT, content=body, headers={"content-type": "text/plain"})
        assert response.status_code in (400, 415, 422)
        assert client.get("/health", headers={"host": "evil.example"}).status_code == 403
        assert client.get("/health", headers={"host": f"localhost:{server.port}"}).status_code == 200
        assert client.get("/health", headers={"origin": server.url}).status_code == 200


def test_fault_45_an_allowed_origin_may_ask(tiny_float):
    with serving(tiny_float, allow_origins=["https://app.example"]) as server, server.client() as client:
        headers = {"origin": "https://app.example"}
        preflight = client.options(TEXT, headers={**headers, "access-control-request-method": "POST"})
        assert preflight.status_code == 204
        response = client.get("/v1/models", headers=headers)
        assert response.headers["access-control-allow-origin"] == "https://app.example"
        assert client.get("/v1/models", headers={"origin": "https://other.example"}).status_code == 403


def test_api_keys(tiny_float, tmp_path):
    from qcompiler.runtime.server.main import read_api_keys

    (tmp_path / "keys").write_text("# clients\nfirst\n\nsecond \n")
    keys = read_api_keys(tmp_path / "keys")
    assert keys == ("first", "second")
    with serving(tiny_float, api_keys=keys) as server, server.client() as client:
        for header in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic first"}):
            assert client.get("/v1/models", headers=header).status_code == 401
            assert client.get("/metrics", headers=header).status_code == 401
        for key in keys:
            assert client.get("/v1/models", headers={"authorization": f"Bearer {key}"}).status_code == 200
        assert client.get("/ready").status_code == client.get("/").status_code == 200


def test_what_the_command_refuses_before_it_loads(tiny_float, tmp_path, capsys):
    from qcompiler.runtime.cli.main import run

    (tmp_path / "empty").write_text("# none\n")
    (tmp_path / "limits").write_text('{"max_n": 0}')
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for arguments, word in (
            (["--port", port], "cannot listen"),
            (["--api-key-file", str(tmp_path / "empty")], "API key"),
            (["--api-key-file", str(tmp_path / "absent")], "No such file"),
            (["--limits", str(tmp_path / "limits")], "max_n"),
            (["--host", "no.such.host.invalid"], "cannot listen"),
        ):
            assert run(["serve", str(tiny_float), *arguments]) == 2
            assert word in capsys.readouterr().err


def connect(server):
    return socket.create_connection(("127.0.0.1", server.port), timeout=60)


def send_json(sock, path, body):
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    sock.sendall(f"{head}content-length: {len(content)}\r\nconnection: close\r\n\r\n".encode() + content)


def wait_for(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)
