"""The header: round trip, digest, and one clear sentence for each thing that makes no sense."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specgate.errors import TraceError
from specgate.traces.schema import Document, ShardInfo, TraceHeader, canonical_json, expert_dtype, split_of
from tests.traces.helpers import header_for, stack_info


def test_header_round_trip() -> None:
    header = header_for(
        {"encoder": stack_info(), "decoder": stack_info(hidden="int8", dropped=True, expert_capacity=64)},
        shards=[
            ShardInfo(
                "shards/00000.safetensors",
                "ab",
                3,
                {"encoder": 1, "decoder": 2},
                {"encoder": 1, "decoder": 1},
            )
        ],
        routing_control={"agreement": 1.0, "decisions": 12345678901234},
        extra={"über": [1, 2.5, None, {"x": True}]},
    )
    text = header.to_json()
    assert TraceHeader.from_json(text) == header
    assert TraceHeader.from_json(text).to_json() == text
    assert header.tokens("decoder") == 2
    assert header.domains == ["domain-0", "domain-1", "domain-2"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"top_k": 9}, ["top_k 9", "only 8 experts"]),
        ({"experts": 65536}, ["65536", "65535"]),
        ({"experts": 0}, ["0 experts"]),
        ({"layers": 0, "layer_map": [], "hidden_layers": []}, ["0 layers"]),
        ({"top_k": 0}, ["top_k 0"]),
        ({"layer_map": ["a"]}, ["names 1 modules", "3 MoE layers"]),
        ({"hidden_dtype": "bf16"}, ["bf16", "none, fp16, int8"]),
        ({"hidden_size": None}, ["no hidden_size"]),
        ({"hidden_layers": [0, 3]}, ["[0, 3]", "0 to 2"]),
        ({"hidden_layers": [1, 0]}, ["[1, 0]", "ascending"]),
        ({"hidden_dtype": "none"}, ["lists hidden_layers"]),
        ({"top_k": True}, ["top_k True"]),
    ],
)
def test_stack_that_makes_no_sense(change: dict[str, Any], words: list[str]) -> None:
    header = header_for({"decoder": replace(stack_info(), **change)})
    with pytest.raises(TraceError) as error:
        header.check()
    assert all(w in str(error.value) for w in words), str(error.value)
    assert "'decoder'" in str(error.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"stacks": {}}, ["at least one stack"]),
        ({"stacks": {"a/b": stack_info()}}, ["'a/b'"]),
        ({"vocab_size": 0}, ["vocab_size 0"]),
        ({"phases": ["training"]}, ["training", "prefill, decode"]),
        ({"phases": []}, ["phases []"]),
        ({"documents": [Document("a", "x", "dev")]}, ["'dev'", "train, validation, test"]),
        ({"documents": [Document("a", "x"), Document("a", "y")]}, ["'a'", "twice"]),
        ({"shards": [ShardInfo("f", "", 1, {"other": 1}, {"other": 1})]}, ["other", "decoder"]),
        ({"format_version": 2}, ["version 2", "reads 1"]),
        ({"extra": {"x": object()}}, ["plain JSON"]),
        ({"extra": {"x": float("nan")}}, ["plain JSON"]),
    ],
)
def test_header_that_makes_no_sense(change: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(TraceError) as error:
        replace(header_for({"decoder": stack_info()}), **change).check()
    assert all(w in str(error.value) for w in words), str(error.value)


def test_largest_stack_is_fine() -> None:
    replace(header_for({"decoder": stack_info(E=65535, K=65535)})).check()


INTACT = header_for({"decoder": stack_info()}).to_json()


def edited(**change: Any) -> str:
    body = json.loads(INTACT)
    return canonical_json(body | change)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", ["not valid JSON"]),
        ("[]\n", ["JSON object"]),
        (edited(format_version=7), ["format version 7"]),
        (edited(seed=5), ["changed after it was written"]),
        (edited(header_sha256="0" * 64), ["changed after it was written"]),
        (edited(colour="red"), ["changed after it was written"]),
        (INTACT.replace("\n ", "\n\t", 1), ["changed after it was written"]),  # the same JSON, another byte
    ],
)
def test_edited_header_is_refused(text: str, words: list[str]) -> None:
    with pytest.raises(TraceError) as error:
        TraceHeader.from_json(text, "here/trace.json")
    assert all(w in str(error.value) for w in [*words, "here/trace.json"]), str(error.value)


@given(st.data())
def test_any_changed_byte_of_a_header_is_noticed(data: st.DataObject) -> None:
    original = INTACT.encode()
    at = data.draw(st.integers(0, len(original) - 1))
    flipped = bytearray(original)
    flipped[at] ^= data.draw(st.integers(1, 255))
    text = flipped.decode("utf-8", "replace")
    with pytest.raises(TraceError):
        TraceHeader.from_json(text)


def test_expert_dtype() -> None:
    assert expert_dtype(256).name == "uint8"
    assert expert_dtype(257).name == "uint16"


def test_split_of_is_stable_and_keeps_the_shares() -> None:
    # Literal splits guard against a change of the hash, which would unlock test documents of existing traces.
    assert [split_of(n) for n in ("doc-0", "doc-2", "doc-7", "doc-8")] == [
        "train",
        "test",
        "validation",
        "test",
    ]
    names = [f"document {i}" for i in range(4000)]
    shares = [
        sum(split_of(n, (0.6, 0.3, 0.1)) == s for n in names) / 4000 for s in ("train", "validation", "test")
    ]
    assert shares == pytest.approx([0.6, 0.3, 0.1], abs=0.03)
    assert {split_of(n, (1.0, 0.0, 0.0)) for n in names} == {"train"}


@pytest.mark.parametrize("ratios", [(0.5, 0.5, 0.5), (1.2, -0.1, -0.1), (1.0,)])
def test_ratios_that_make_no_sense(ratios: Any) -> None:
    with pytest.raises(TraceError, match="add up to 1"):
        split_of("a", ratios)
