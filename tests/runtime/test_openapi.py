"""The document that the server gives of itself, and schemathesis making requests up from it: no 5xx."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from server_case import NAME, serving

LIMITS = {
    "max_tokens": 2,
    "default_max_tokens": 2,
    "max_n": 2,
    "max_prompts": 4,
    "max_choices": 4,
    "max_stop": 3,
    "template_seconds": 20,
}
# The two left out ask that what the schema allows is taken and all else refused; some rules tie options
# together (top_logprobs needs logprobs), and numbers may come as text, which a schema does not say.
CHECKS = (
    "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance,"
    "response_headers_conformance,unsupported_method,allow_header_conformance"
)


@pytest.fixture(scope="module")
def server(tiny_q4):
    options = {"max_sequences": 4, "max_step_tokens": 64, "max_cache_tokens": 4096}
    with serving(tiny_q4, load_options=options, limits=LIMITS) as running:
        yield running
        running.rest()


def test_schemathesis_finds_no_server_error(server, tmp_path):
    pytest.importorskip("schemathesis")
    command = [
        str(Path(sys.executable).parent / "schemathesis"), "run", f"{server.url}/openapi.json",
        "--checks", CHECKS, "--phases", "examples,coverage,fuzzing", "--max-examples", "30",
        "--generation-deterministic", "--continue-on-failure", "--no-color",
    ]  # fmt: skip
    env = {**os.environ, "NO_PROXY": "*", "SCHEMATHESIS_HOOKS": ""}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    report = done.stdout + done.stderr
    assert done.returncode == 0, report[-20_000:]
    assert "Tested: 7" in report
    passed = re.search(r"(\d+) generated, (\d+) passed", report)
    assert passed is not None, report
    assert passed[1] == passed[2]
    assert int(passed[1]) > 500
    # Some of them got as far as the model.
    assert server.service.stats().counters.generated_tokens > 50
    assert server.service.stats().counters.failures == 0


def test_the_document_tells_this_servers_limits(server):
    with server.client() as client:
        schemas = client.get("/openapi.json").json()["components"]["schemas"]
    for name in ("CompletionRequest", "ChatRequest"):
        options = schemas[name]["properties"]
        first = {key: value["anyOf"][0] for key, value in options.items() if "anyOf" in value}
        assert first["model"]["enum"] == [NAME]
        assert (first["n"]["maximum"], first["max_tokens"]["maximum"]) == (2, 2)
        assert first["seed"]["maximum"] == 2**63 - 1
        assert options["stop"]["anyOf"][1]["maxItems"] == 3
    assert schemas["ChatRequest"]["properties"]["messages"]["maxItems"] == 2048


def test_what_the_document_calls_right_is_taken(server):
    """Its bounds are the server's: each option at its largest documented value is answered."""
    with server.client() as client:
        options = client.get("/openapi.json").json()["components"]["schemas"]["CompletionRequest"][
            "properties"
        ]
    tried = []
    for name, option in options.items():
        for place in option.get("anyOf", [option]):
            if "maximum" in place and name not in ("best_of", "logprobs"):
                value = int(place["maximum"]) if place["type"] == "integer" else place["maximum"]
                response = server.post("/v1/completions", {"prompt": "a", name: value})
                assert response.status_code == 200, (name, response.text)
                tried.append(name)
    assert {"n", "max_tokens", "seed", "temperature", "top_k", "repetition_penalty"} <= set(tried)


def test_numbers_that_vanish_in_fp32_are_no_fault(server):
    """Found by schemathesis: a penalty of 5e-324 made infinities of the logits."""
    body = {"prompt": [5, 5, 5], "max_tokens": 2}
    assert server.post("/v1/completions", {**body, "repetition_penalty": 5e-324}).status_code == 400
    greedy = server.post("/v1/completions", {**body, "temperature": 0}).json()["choices"][0]["text"]
    nearly = server.post("/v1/completions", {**body, "temperature": 5e-324}).json()["choices"][0]["text"]
    assert nearly == greedy


def test_a_method_that_is_not_served_names_those_that_are(server):
    with server.client() as client:
        response = client.get("/v1/completions")
    assert (response.status_code, response.headers["allow"]) == (405, "POST")
    assert json.loads(response.text)["error"]["code"] == 405


def test_small_answers_do_not_wait_for_acknowledgements(server):
    """Nagle's algorithm off: else each answer on a kept connection takes a client's delayed ACK of 40 ms."""
    import socket

    assert server.server.servers[0].sockets[0].getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
