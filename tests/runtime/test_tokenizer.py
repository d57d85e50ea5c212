"""Tokenizer: equal to transformers', pieces that are whole characters, stop strings across pieces."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompiler.kernels.errors import ArtifactError, InvalidInputError
from qcompiler.runtime.tokenizer import Detokenizer, TextStream, Tokenizer

TEXTS = [
    "Once upon a time",
    "",
    " leading",
    "naïve café — 漢字 🙂👩‍👩‍👧",
    "a</s>b",
    "\n\n\tdef f(x):\n  return x",
    "\ufffd",
]


@pytest.fixture(scope="module")
def tokenizer(tiny_folder):
    return Tokenizer(
        tiny_folder / "tokenizer.json", json.loads((tiny_folder / "tokenizer_config.json").read_text())
    )


@pytest.fixture(scope="module")
def bytefallback(tmp_path_factory):
    """A SentencePiece-style tokenizer: words by '▁', other characters by their bytes."""
    words = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{b:02X}>" for b in range(256)),
        "▁",
        "▁hello",
        "▁world",
        "é",
        "a",
        "b",
    ]
    spec = {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "vocab": {w: i for i, w in enumerate(words)},
            "merges": [],
            "byte_fallback": True,
            "unk_token": "<unk>",
        },
    }
    path = tmp_path_factory.mktemp("tok") / "tokenizer.json"
    path.write_text(json.dumps(spec))
    return Tokenizer(path)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("special", [True, False])
def test_encoding_equals_that_of_transformers(tokenizer, tiny_folder, text, special):
    from transformers import AutoTokenizer

    oracle = AutoTokenizer.from_pretrained(tiny_folder)
    ids = oracle.encode(text, add_special_tokens=special)
    assert tokenizer.encode(text, add_special_tokens=special) == ids
    assert tokenizer.decode(ids) == oracle.decode(ids, skip_special_tokens=True)


def test_special_tokens_come_from_the_post_processor(tokenizer):
    assert tokenizer.encode("a")[0] == tokenizer.token_id("<s>")
    assert tokenizer.encode("a", add_special_tokens=False) == tokenizer.encode("a")[1:]


def test_special_token_text_can_be_kept_as_text(tokenizer):
    eos = tokenizer.token_id("</s>")
    assert eos in tokenizer.encode("a</s>b")
    ids = tokenizer.encode("a</s>b", parse_special=False)
    assert eos not in ids
    assert tokenizer.decode(ids) == "a</s>b"
    assert eos in tokenizer.encode("a</s>b")  # the choice does not stick


@pytest.mark.parametrize("text", ["\ud800", "ok \udfff"])
def test_lone_surrogates_are_refused(tokenizer, text):
    with pytest.raises(InvalidInputError, match="surrogate"):
        tokenizer.encode(text)


def test_a_file_that_is_no_tokenizer_is_refused(tmp_path):
    (tmp_path / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(ArtifactError, match=r"tokenizer\.json"):
        Tokenizer(tmp_path / "tokenizer.json")


def test_a_tokenizer_that_contradicts_itself_is_refused(tiny_folder, tmp_path):
    spec = json.loads((tiny_folder / "tokenizer.json").read_text())
    spec["post_processor"]["processors"][1]["single"][0]["SpecialToken"]["id"] = "nowhere"
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(ArtifactError, match=r"tokenizer\.json"):
        Tokenizer(tmp_path / "tokenizer.json")


def pieces_of(tokenizer, ids):
    stream = Detokenizer(tokenizer)
    return [stream.add([i]) for i in ids] + [stream.flush()]


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_never_hold_half_a_character(tokenizer, text):
    ids = tokenizer.encode(text)
    pieces = pieces_of(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids)
    if "\ufffd" not in text:
        assert not any("\ufffd" in p for p in pieces)


def test_each_token_of_plain_text_is_given_out_at_once(tokenizer):
    ids = tokenizer.encode("Once upon a time", add_special_tokens=False)
    assert all(pieces_of(tokenizer, ids)[:-1])


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 2047), max_size=24))
def test_pieces_of_any_tokens_make_the_whole_text(tokenizer, ids):
    assert "".join(pieces_of(tokenizer, ids)) == tokenizer.decode(ids)


@pytest.mark.parametrize("text", ["hello world", "é🙂 hello", "aé b 漢字"])
def test_byte_fallback_and_leading_spaces(bytefallback, text):
    ids = bytefallback.encode(text)
    assert bytefallback.decode(ids) == text
    pieces = pieces_of(bytefallback, ids)
    assert "".join(pieces) == text
    assert not any("\ufffd" in p for p in pieces)


def test_a_stop_string_is_found_across_pieces(tokenizer):
    text = "one two three STOP four"
    ids = tokenizer.encode(text, add_special_tokens=False)
    stream = TextStream(tokenizer, ["e STOP"])
    shown = ""
    for token in ids:
        shown += stream.add([token])
        assert text.startswith(shown)
        if stream.stopped:
            break
    assert stream.stopped
    assert shown == stream.text == "one two thre"
    assert stream.finish() == ""


def test_the_first_of_several_stop_strings_wins(tokenizer):
    stream = TextStream(tokenizer, ["c d", "b"])
    stream.add(tokenizer.encode("a b c d", add_special_tokens=False))
    assert stream.stopped
    assert stream.text == "a "


def test_text_that_only_began_like_a_stop_string_comes_at_the_end(tokenizer):
    stream = TextStream(tokenizer, ["\n\nUser:"])
    shown = "".join(stream.add([t]) for t in tokenizer.encode("hi\n\nUse", add_special_tokens=False))
    assert shown == "hi"
    assert stream.finish() == "\n\nUse"
    assert stream.text == "hi\n\nUse"
    assert not stream.stopped


@settings(max_examples=150, deadline=None)
@given(
    st.text(alphabet="ab\n", max_size=30),
    st.lists(st.text(alphabet="ab\n", min_size=1, max_size=4), max_size=3),
)
def test_streamed_text_ends_where_a_search_of_the_whole_text_would(tokenizer, text, stops):
    ids = tokenizer.encode(text, add_special_tokens=False)
    stream = TextStream(tokenizer, stops)
    shown = "".join(stream.add([t]) for t in ids) + stream.finish()
    found = [at for s in stops if (at := text.find(s)) >= 0]
    # A longer stop string that starts earlier but ends in a later token loses to one complete now.
    assert shown == stream.text
    assert text.startswith(shown)
    assert bool(found) == stream.stopped
    if not found:
        assert shown == text
    elif len(stops) == 1:
        assert shown == text[: found[0]]
