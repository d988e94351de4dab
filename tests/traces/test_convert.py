"""Importing arrays: exact round trips, real traces where they are at hand, clear errors."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specgate.errors import TraceError
from specgate.traces.convert import main
from specgate.traces.datamodule import RoutingDataModule
from specgate.traces.importing import RawRouting, import_arrays
from specgate.traces.schema import Document
from specgate.traces.store import TraceReader
from tests.traces.helpers import header_for, stack_info, tree, write_trace

SHARED = Path(__file__).parents[3] / "shared" / "traces"
real = pytest.mark.skipif(not SHARED.is_dir(), reason="the real traces lie beside the repository, if at all")


def run(*args: Any) -> int:
    return main([str(a) for a in args])


def routing(T: int = 20, L: int = 3, K: int = 2, E: int = 8, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "experts": np.argsort(rng.random((T, L, E)), axis=2)[:, :, :K].astype(np.int16),
        "weights": -np.sort(-rng.random((T, L, K)), axis=2).astype(np.float16),
        "token_ids": rng.integers(0, 50, T).astype(np.int32),
        "seq_id": np.sort(rng.integers(0, 5, T)).astype(np.int32),
        "pos": np.arange(T, dtype=np.int32),
    }


@settings(max_examples=30, deadline=None)
@given(
    T=st.integers(1, 60), L=st.integers(1, 5), E=st.integers(1, 300), shard=st.integers(1, 70), data=st.data()
)
def test_npz_round_trip(
    tmp_path_factory: pytest.TempPathFactory, T: int, L: int, E: int, shard: int, data: st.DataObject
) -> None:
    K = data.draw(st.integers(1, min(E, 6)))
    tmp_path = tmp_path_factory.mktemp("npz")
    arrays = routing(T, L, K, E, seed=T)
    np.savez(tmp_path / "in.npz", **arrays)  # type: ignore[arg-type]
    assert run(tmp_path / "in.npz", tmp_path / "t", "--experts", E, "--tokens-per-shard", shard) == 0
    assert run(tmp_path / "t", tmp_path / "out.npz") == 0
    out = np.load(tmp_path / "out.npz")
    for key in ("experts", "weights", "token_ids", "pos"):
        assert np.array_equal(out[key], arrays[key]), key
    _, want = np.unique(arrays["seq_id"], return_inverse=True)
    assert np.array_equal(out["seq_id"], want)
    meta = tmp_path / "out.meta.json"
    options = ("--experts", int(out["num_experts"]), "--meta", meta)
    assert run(tmp_path / "out.npz", tmp_path / "again", *options) == 0
    a, b = TraceReader(tmp_path / "t"), TraceReader(tmp_path / "again")
    assert a.header.documents == b.header.documents
    assert np.array_equal(a.stack("decoder").sequences.document_S, b.stack("decoder").sequences.document_S)
    assert all(s.tokens["decoder"] >= shard for s in a.header.shards[:-1])


def test_export_of_one_stack_and_phase(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_trace(
        tmp_path / "t", {"encoder": stack_info(2, dropped=True), "decoder": stack_info()}, phases=(0, 1)
    )
    assert run(tmp_path / "t", tmp_path / "x.npz") == 1
    assert "choose one with --stack" in capsys.readouterr().err
    assert run(tmp_path / "t", tmp_path / "x.npz", "--stack", "encoder") == 1
    assert "choose one with --phase" in capsys.readouterr().err
    assert run(tmp_path / "t", tmp_path / "x.npz", "--stack", "encoder", "--phase", "decode") == 0
    out, view = np.load(tmp_path / "x.npz"), TraceReader(tmp_path / "t").stack("encoder")
    s = view.sequences
    tokens = np.concatenate(
        [np.arange(a, a + n) for a, n, p in zip(s.start_S, s.length_S, s.phase_S, strict=True) if p == 1]
    )
    for key in ("experts", "dropped", "hidden"):
        assert np.array_equal(out[key], view.gather(key, tokens))


def test_vllm_style_files_without_weights(tmp_path: Path) -> None:
    """One npy [T, L, K] per request, in no order within K: kept as it is, and said so."""
    parts = {"b": routing(7, seed=1)["experts"], "a": routing(4, seed=2)["experts"]}
    for name, experts in parts.items():
        np.save(tmp_path / f"{name}.npy", experts)
    assert (
        run(tmp_path / "b.npy", tmp_path / "a.npy", tmp_path / "t", "--experts", 8, "--model-id", "me/x") == 0
    )
    reader = TraceReader(tmp_path / "t")
    view = reader.stack("decoder")
    assert not view.info.has_weights
    assert view.info.score_semantics == "unranked"
    assert [d.name for d in reader.header.documents] == ["b", "a"]
    assert view.sequences.length_S.tolist() == [7, 4]
    assert np.array_equal(view.gather("experts", np.arange(11)), np.concatenate([parts["b"], parts["a"]]))
    assert view.gather("positions", np.arange(11)).tolist() == [*range(7), *range(4)]
    assert reader.header.extra["token_ids"] == "absent"


def test_unsorted_ranks_are_put_in_order_of_weight(tmp_path: Path) -> None:
    arrays = routing(30, K=3)
    shuffled = np.random.default_rng(1).permuted(np.tile(np.arange(3), (30, 3, 1)), axis=2)
    raw = RawRouting(
        experts=np.take_along_axis(arrays["experts"], shuffled, 2),
        weights=np.take_along_axis(arrays["weights"], shuffled, 2),
    )
    import_arrays(tmp_path, raw, 8)
    view = TraceReader(tmp_path).stack("decoder")
    index = np.arange(30)
    assert np.array_equal(view.gather("weights", index), arrays["weights"])
    tied = (np.diff(arrays["weights"], axis=2) == 0).any(2)
    assert np.array_equal(view.gather("experts", index)[~tied], arrays["experts"][~tied])


def test_interleaved_sequences_are_brought_together(tmp_path: Path) -> None:
    arrays = routing(12)
    ids = np.array([3, 1] * 6)
    header = import_arrays(tmp_path, RawRouting(arrays["experts"], arrays["weights"], sequence_ids=ids), 8)
    view = TraceReader(tmp_path).stack("decoder")
    assert [d.name for d in header.documents] == ["sequence-1", "sequence-3"]
    assert view.sequences.length_S.tolist() == [6, 6]
    order = [*range(1, 12, 2), *range(0, 12, 2)]
    assert np.array_equal(view.gather("experts", np.arange(12)), arrays["experts"][order])
    assert view.gather("positions", np.arange(12)).tolist() == [*range(6)] * 2


def test_sequences_by_offsets_and_by_a_fourth_axis(tmp_path: Path) -> None:
    experts = routing(12)["experts"]
    import_arrays(tmp_path / "a", RawRouting(experts, offsets=np.array([0, 4, 8, 12])), 8)
    import_arrays(tmp_path / "b", RawRouting(experts.reshape(3, 4, 3, 2)), 8)
    one, two = (TraceReader(tmp_path / p).stack("decoder") for p in "ab")
    assert one.sequences.length_S.tolist() == two.sequences.length_S.tolist() == [4, 4, 4]
    assert np.array_equal(one.gather("experts", np.arange(12)), experts)
    assert np.array_equal(two.gather("experts", np.arange(12)), experts)


def test_documents_named_by_meta_share_a_split(tmp_path: Path) -> None:
    np.savez(tmp_path / "in.npz", **routing(40))  # type: ignore[arg-type]
    meta = [{"seq": i, "source": "x", "topic": "even" if i % 2 == 0 else "odd", "n": i % 2} for i in range(5)]
    (tmp_path / "m.json").write_text(json.dumps(meta))
    options = ("--meta", tmp_path / "m.json", "--document-key", "source,n", "--domain-key", "topic")
    assert run(tmp_path / "in.npz", tmp_path / "t", "--experts", 8, *options) == 0
    header = TraceReader(tmp_path / "t").header
    assert {(d.name, d.domain) for d in header.documents} == {("x/0", "even"), ("x/1", "odd")}
    assert all(d.split for d in header.documents)
    assert run(tmp_path / "in.npz", tmp_path / "open", "--experts", 8, "--splits", "none") == 0
    assert {d.split for d in TraceReader(tmp_path / "open").header.documents} == {None}


def test_importing_again_changes_nothing_and_other_data_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "in.npz", **routing(40))  # type: ignore[arg-type]
    assert run(tmp_path / "in.npz", tmp_path / "t", "--experts", 8) == 0
    before = tree(tmp_path / "t")
    assert run(tmp_path / "in.npz", tmp_path / "t", "--experts", 8) == 0
    assert tree(tmp_path / "t") == before
    assert run(tmp_path / "in.npz", tmp_path / "t", "--experts", 9) == 1
    assert "another plan" in capsys.readouterr().err


BAD: list[tuple[dict[str, Any], Sequence[str], list[str]]] = [
    ({}, [], ["--experts E"]),
    (
        {"experts": None},
        ["--experts", "8"],
        ["no key named experts", "weights [20, 3, 2]", "--map experts=KEY"],
    ),
    ({}, ["--experts", "8", "--map", "weights=prob"], ["no key 'prob'", "token_ids [20]"]),
    ({}, ["--experts", "4"], ["at token", "experts 0 to 3"]),
    ({}, ["--experts", "1"], ["2 experts per token but only 1"]),
    ({"token_ids": np.zeros(19, int)}, ["--experts", "8"], ["token_ids has shape [19]", "[20]"]),
    ({"weights": np.ones((20, 3, 1))}, ["--experts", "8"], ["weights has shape [20, 3, 1]", "[20, 3, 2]"]),
    ({"experts": np.zeros((20, 3))}, ["--experts", "8"], ["[T, L, K]", "float64 [20, 3]"]),
    ({"experts": np.zeros((20, 3, 2), int)}, ["--experts", "8"], ["one expert twice"]),
    ({"experts": np.full((20, 3, 2), -1)}, ["--experts", "8"], ["expert -1"]),
    ({"offsets": np.array([0, 7])}, ["--experts", "8"], ["offsets", "20 tokens"]),
    ({}, ["--experts", "8", "--meta", "nowhere.json"], ["nowhere.json", "--meta"]),
    ({}, ["--experts", "8", "--vocab-size", "3"], ["vocab_size is 3"]),
    ({}, ["--experts", "70000"], ["70000", "65535"]),
]


@pytest.mark.parametrize(("change", "options", "words"), BAD)
def test_errors_say_what_and_what_to_do(
    tmp_path: Path,
    change: dict[str, Any],
    options: Sequence[str],
    words: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    arrays = {k: v for k, v in (routing() | change).items() if v is not None}
    np.savez(tmp_path / "in.npz", **arrays)
    assert run(tmp_path / "in.npz", tmp_path / "t", *options) == 1
    message = capsys.readouterr().err
    assert all(w in message for w in words), message
    assert message.count("\n") == 1


@pytest.mark.parametrize(
    ("meta", "words"),
    [
        ("{", ["not valid JSON"]),
        ("3", ["JSON list"]),
        ("[]", ["says nothing about sequence 0"]),
        (json.dumps([{"seq": i, "split": "dev"} for i in range(5)]), ["split 'dev'"]),
        (
            json.dumps([{"seq": i, "name": "same", "domain": f"d{i}"} for i in range(5)]),
            ["'same' is listed twice"],
        ),
    ],
)
def test_bad_meta(tmp_path: Path, meta: str, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(tmp_path / "in.npz", **routing())  # type: ignore[arg-type]
    (tmp_path / "m.json").write_text(meta)
    assert run(tmp_path / "in.npz", tmp_path / "t", "--experts", 8, "--meta", tmp_path / "m.json") == 1
    message = capsys.readouterr().err
    assert all(w in message for w in words), message


def test_files_that_are_not_there_or_not_arrays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.npz").write_bytes(b"nothing")
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    (tmp_path / "bad.parquet").write_bytes(b"nothing")
    for name, words in (
        ("absent.npz", "There is no file"),
        ("bad.npz", "not a readable npy or npz"),
        ("objects.npy", "not a readable npy or npz"),
        ("bad.parquet", "not a readable Parquet"),
        ("absent.parquet", "There is no file"),
    ):
        assert run(tmp_path / name, tmp_path / "t", *([] if "parquet" in name else ["--experts", 8])) == 1
        assert words in capsys.readouterr().err
    write_trace(tmp_path / "trace", {"decoder": stack_info()})
    assert run(tmp_path / "trace", tmp_path / "t") == 1
    assert "ends in .parquet or .npz" in capsys.readouterr().err
    assert run(tmp_path / "bad.npz", tmp_path / "t.parquet", "--experts", 8) == 1
    assert "import first" in capsys.readouterr().err


def test_as_a_program() -> None:
    command = [sys.executable, "-m", "specgate.traces.convert", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    assert "--map FIELD=KEY" in done.stdout
    assert "mine.parquet" in done.stdout


# --- real traces ---


@real
def test_gpt_oss_20b(tmp_path: Path) -> None:
    """The command of docs/traces.md, on the real trace: nothing lost, repeated prompts in one split."""
    source, meta = SHARED / "gpt_oss_20b_decode.npz", SHARED / "gpt_oss_20b_decode.meta.json"
    keys = ("--document-key", "dataset,category,prompt_tokens", "--domain-key", "dataset")
    assert run(source, tmp_path / "t", "--experts", 32, "--phase", "decode", "--meta", meta, *keys) == 0
    arrays, entries = np.load(source), json.loads(meta.read_text())
    reader = TraceReader(tmp_path / "t")
    view = reader.stack("decoder")
    index = np.arange(view.num_tokens)
    assert view.info == replace(
        view.info, layers=24, experts=32, top_k=4, hidden_dtype="none", has_weights=True
    )
    for field, key in (
        ("experts", "experts"),
        ("weights", "weights"),
        ("token_ids", "token_ids"),
        ("positions", "pos"),
    ):
        assert np.array_equal(view.gather(field, index), arrays[key])
    assert len(view.sequences) == 265
    assert len(reader.header.documents) == len(
        {(e["dataset"], e["category"], e["prompt_tokens"]) for e in entries}
    )
    assert len(reader.header.documents) < 265
    dm = RoutingDataModule(tmp_path / "t", phase="decode", use_hidden=False)
    scored = [
        int(b.mask_BT.sum())
        for x in (dm.train_dataloader(), dm.val_dataloader(), dm.test_dataloader())
        for b in x
    ]
    assert sum(scored) == 76_516


@real
@pytest.mark.parametrize(
    ("phase", "keys", "tokens", "sequences"),
    [
        (
            "prefill",
            ["experts=enc_experts", "weights=enc_scores", "token_ids=enc_tokens", "sequence_ids=enc_seq_id"],
            2048,
            32,
        ),
        ("decode", ["experts=dec_experts", "weights=dec_scores", "token_ids=dec_tokens"], 640, 64),
    ],
)
def test_flame_moe(tmp_path: Path, phase: str, keys: list[str], tokens: int, sequences: int) -> None:
    source = SHARED / "flame_moe_290m_dynande.npz"
    assert run(source, tmp_path / "t", "--experts", 64, "--phase", phase, "--map", *keys) == 0
    view = TraceReader(tmp_path / "t").stack("decoder")
    assert view.info.layer_map == [f"layers.{i}" for i in range(2, 10)]
    assert (view.num_tokens, len(view.sequences)) == (tokens, sequences)
    want = np.load(source)[keys[0].split("=")[1]].reshape(tokens, 8, 6)
    assert np.array_equal(view.gather("experts", np.arange(tokens)), want)


def test_import_keeps_given_splits(tmp_path: Path) -> None:
    experts = routing(6)["experts"].reshape(3, 2, 3, 2)
    given_ = [Document("a", "x", "test"), Document("b", "x"), Document("a", "x", "test")]
    header = import_arrays(tmp_path, RawRouting(experts), 8, documents=given_, splits=(1.0, 0.0, 0.0))
    assert header.documents == [Document("a", "x", "test"), Document("b", "x", "train")]
    assert TraceReader(tmp_path).stack("decoder").sequences.document_S.tolist() == [0, 1, 0]
    with pytest.raises(TraceError, match="2 documents for 3 sequences"):
        import_arrays(tmp_path / "x", RawRouting(experts), 8, documents=given_[:2])


def test_header_for_is_what_import_writes(tmp_path: Path) -> None:
    """An imported trace mixes with a collected one of the same shape."""
    stacks = {"decoder": stack_info(3, 8, 2, D=None, hidden="none")}
    write_trace(tmp_path / "collected", stacks, header=replace(header_for(stacks)))
    import_arrays(
        tmp_path / "imported",
        RawRouting(**{k: routing()[k] for k in ("experts", "weights")}),
        8,
        phase="prefill",
    )
    dm = RoutingDataModule([tmp_path / "collected", tmp_path / "imported"])
    assert dm.documents[-1] == "sequence-0"
    assert dm.domains[-1] == "unknown"
