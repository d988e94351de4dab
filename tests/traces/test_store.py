"""Traces on disk: round trips of any shape, kills at any moment, flipped bytes anywhere, clear sentences."""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from specgate.errors import TraceError
from specgate.traces.arrays import map_safetensors, quantise_int8
from specgate.traces.store import StackArrays, TraceReader, TraceWriter
from tests.traces.helpers import arrays_for, header_for, routers_for, stack_info, tree, write_trace

LIMIT = 2**17  # most numbers of [T, L, E] in one example


@st.composite
def shapes(draw: st.DrawFn) -> tuple[int, int, int, int]:
    """Any T (0 to 512), L, E and K <= E (1 to 512), as long as the arrays stay small."""
    size = st.one_of(st.integers(1, 8), st.integers(1, 512), st.sampled_from([255, 256, 257, 511, 512]))
    E = draw(size)
    K = draw(st.one_of(st.just(1), st.just(E), st.integers(1, E)))
    L = draw(st.integers(1, max(1, min(512, LIMIT // E))))
    T = draw(st.one_of(st.just(0), st.integers(1, max(1, min(512, LIMIT // (E * L))))))
    return T, L, E, K


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    shape=shapes(),
    cuts=st.lists(st.integers(1, 40), max_size=6),
    kind=st.sampled_from(["none", "fp16", "int8"]),
    dropped=st.booleans(),
    weights=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_any_shape_round_trips(
    tmp_path_factory: pytest.TempPathFactory,
    shape: tuple[int, int, int, int],
    cuts: list[int],
    kind: str,
    dropped: bool,
    weights: bool,
    seed: int,
) -> None:
    T, L, E, K = shape
    lengths: list[int] = []
    for c in [*cuts, T]:
        if (c := min(c, T - sum(lengths))) > 0:
            lengths.append(c)
    info = stack_info(L, E, K, D=3, hidden=kind, dropped=dropped, has_weights=weights)
    half = len(lengths) // 2
    path = tmp_path_factory.mktemp("trace")
    content = write_trace(path, {"decoder": info}, [lengths[:half], lengths[half:]], seed=seed)["decoder"]
    reader = TraceReader(path)
    view = reader.stack("decoder")
    assert view.num_tokens == T
    everything = np.arange(T)
    for field in ("experts", "weights", "token_ids", "positions", "dropped"):
        given_ = [getattr(c, field) for c in content]
        if given_[0] is None:
            assert field not in view.fields
            continue
        assert np.array_equal(view.gather(field, everything), np.concatenate(given_)), field
    if kind == "fp16":
        assert np.array_equal(view.gather("hidden", everything), np.concatenate([c.hidden for c in content]))
    if kind == "int8":
        q = np.concatenate([c.hidden for c in content]).astype(np.float32)
        scale = np.concatenate([c.hidden_scale for c in content]).astype(np.float32)
        assert np.array_equal(view.gather("hidden", everything), q * scale[..., None])
    assert view.gather("experts", everything).dtype == (np.uint8 if E <= 256 else np.uint16)
    s = view.sequences
    assert s.length_S.tolist() == lengths
    assert s.start_S.tolist() == (np.cumsum([0, *lengths])[:-1]).tolist()
    assert np.array_equal(s.document_S, np.concatenate([c.seq_document for c in content]))
    assert np.array_equal(s.domain_S, s.document_S % 3)
    assert reader.shard_meta(1) == {"count": 1}
    # Written again elsewhere, the bytes are the same; and the safetensors library reads what we map.
    again = tmp_path_factory.mktemp("again")
    write_trace(again, {"decoder": info}, [lengths[:half], lengths[half:]], seed=seed)
    assert tree(path) == tree(again)
    for shard in reader.header.shards:
        mapped, _ = map_safetensors(path / shard.file)
        read = safetensors.numpy.load_file(path / shard.file)
        assert mapped.keys() == read.keys()
        assert all(np.array_equal(mapped[k], read[k]) and mapped[k].dtype == read[k].dtype for k in read)
    shutil.rmtree(path)
    shutil.rmtree(again)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_gather_across_shards_equals_concatenation(data: st.DataObject, two_stacks: Path) -> None:
    view = TraceReader(two_stacks, verify=False).stack("decoder")
    index = np.array(
        data.draw(
            st.lists(st.lists(st.integers(0, view.num_tokens - 1), min_size=3, max_size=3), max_size=9)
        ),
        dtype=np.int64,
    ).reshape(-1, 3)
    for field in view.fields:
        whole = np.concatenate([view.shard_arrays(i)[field] for i in range(3)])
        if field == "hidden":
            scale = np.concatenate([view.shard_arrays(i)["hidden_scale"] for i in range(3)])
            whole = whole.astype(np.float32) * scale.astype(np.float32)[..., None]
        assert np.array_equal(view.gather(field, index), whole[index]), field


@pytest.fixture(scope="module")
def two_stacks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small trace with two stacks, both phases, three shards and routers."""
    path = tmp_path_factory.mktemp("store") / "trace"
    stacks = {
        "encoder": stack_info(2, 8, 1, hidden="fp16", dropped=True),
        "decoder": stack_info(2, 300, 2, hidden="int8"),
    }
    write_trace(path, stacks, phases=(0, 1))
    return path


def test_gather_refuses_what_is_not_there(two_stacks: Path) -> None:
    view = TraceReader(two_stacks).stack("decoder")
    with pytest.raises(IndexError):
        view.gather("experts", np.array([view.num_tokens]))
    with pytest.raises(IndexError):
        view.gather("experts", np.array([-1]))
    with pytest.raises(TraceError, match="does not record 'dropped'"):
        view.gather("dropped", np.array([0]))
    with pytest.raises(TraceError, match="no stack 'middle'; it has decoder, encoder"):
        TraceReader(two_stacks).stack("middle")


def test_arrays_are_mapped_not_read(tmp_path: Path) -> None:
    """Slicing one token of a 64 MB shard must not read the shard (resident memory is counted)."""
    file = tmp_path / "big.safetensors"
    safetensors.numpy.save_file(
        {"a": np.zeros((2**20, 64), np.uint8), "b": np.arange(7, dtype=np.int64)}, file
    )

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    if not Path("/proc/self/statm").exists():
        pytest.skip("counts pages through /proc")
    before = resident()
    arrays, _ = map_safetensors(file)
    assert arrays["a"][2**19].sum() == 0
    assert resident() - before < 8 * 2**20
    assert not arrays["a"].flags.writeable
    assert arrays["b"].tolist() == list(range(7))


def test_reader_and_view_survive_pickling(two_stacks: Path) -> None:
    reader = TraceReader(two_stacks)
    want = reader.stack("encoder").gather("experts", np.arange(5))
    data = pickle.dumps(reader)
    assert len(data) < 20_000  # the header, not the arrays
    assert np.array_equal(pickle.loads(data).stack("encoder").gather("experts", np.arange(5)), want)


def test_routers_come_back(two_stacks: Path) -> None:
    reader = TraceReader(two_stacks)
    want = routers_for(reader.header.stacks)
    routers = reader.routers("decoder")
    assert routers is not None
    assert list(routers) == [0, 1]
    assert torch.equal(routers[1]["router_weight"], want["decoder.1.router_weight"])
    assert set(routers[0]) == {"norm_weight", "router_weight"}


@pytest.mark.parametrize(
    ("key", "shape"),
    [
        ("decoder.0.weight", (8,)),
        ("decoder.9.norm_weight", (4,)),
        ("decoder.0.router_weight", (3, 4)),
        ("x", (1,)),
    ],
)
def test_routers_of_wrong_name_or_shape(tmp_path: Path, key: str, shape: tuple[int, ...]) -> None:
    info = stack_info()
    writer = TraceWriter(tmp_path, header_for({"decoder": info}), {}, 1)
    writer.write_shard(0, {"decoder": arrays_for(info, [3], 0)})
    with pytest.raises(TraceError, match=key):
        writer.finish(routers={key: torch.zeros(shape)})


# --- damage ---


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_flipped_byte_is_noticed_anywhere(data: st.DataObject, two_stacks: Path) -> None:
    files = sorted(f for f in two_stacks.rglob("*") if f.is_file())
    assert {f.name for f in files} >= {"trace.json", "plan.json", "routers.safetensors", "00000.safetensors"}
    file = data.draw(st.sampled_from(files))
    content = file.read_bytes()
    at = data.draw(st.integers(0, len(content) - 1))
    damaged = bytearray(content)
    damaged[at] ^= data.draw(st.integers(1, 255))
    try:
        file.write_bytes(damaged)
        with pytest.raises(TraceError) as error:
            TraceReader(two_stacks)
        assert file.name in str(error.value)
    finally:
        file.write_bytes(content)
    TraceReader(two_stacks)


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda f: f.write_bytes(f.read_bytes()[:-1]), ["damaged", "bytes", "expected"]),
        (lambda f: f.write_bytes(b""), ["damaged", "0 bytes"]),
        (lambda f: f.write_bytes(f.read_bytes() + b"x"), ["damaged"]),
        (lambda f: f.unlink(), ["missing"]),
    ],
)
def test_damaged_shards_are_named_even_without_hashing(
    tmp_path: Path, harm: Callable[[Path], Any], words: list[str]
) -> None:
    write_trace(tmp_path, {"decoder": stack_info()})
    harm(tmp_path / "shards/00001.safetensors")
    with pytest.raises(TraceError) as error:
        TraceReader(tmp_path, verify=False)
    assert all(
        w in str(error.value) for w in [*words, "shards/00001.safetensors", "run the collection again"]
    )


@pytest.mark.parametrize("length", [0, 4, 8, 60, 400])
def test_mapping_a_truncated_file(tmp_path: Path, length: int) -> None:
    write_trace(tmp_path, {"decoder": stack_info()})
    file = tmp_path / "shards/00001.safetensors"
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(TraceError, match="run the collection again"):
        map_safetensors(file)


def test_not_a_trace_missing_and_incomplete(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="There is no trace at"):
        TraceReader(tmp_path / "nowhere")
    with pytest.raises(TraceError, match="is not a trace"):
        TraceReader(tmp_path)
    write_trace(tmp_path, {"decoder": stack_info()})
    (tmp_path / "trace.json").unlink()
    with pytest.raises(TraceError, match=r"incomplete trace \(3 shards.*re-run the collection to resume"):
        TraceReader(tmp_path)


# --- writing ---


def spoil(**changes: Any) -> Callable[[StackArrays], StackArrays]:
    return lambda a: replace(a, **{k: v(getattr(a, k)) for k, v in changes.items()})


def put(index: Any, value: Any) -> Callable[[np.ndarray], np.ndarray]:
    def change(a: np.ndarray) -> np.ndarray:
        a = a.copy()
        a[index] = value
        return a

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (spoil(experts=put((4, 1, 0), 8)), ["expert 8", "token 4", "layer 1", "0 to 7"]),
        (spoil(experts=put((4, 1, 0), -1)), ["-1", "0 to 255"]),
        (spoil(experts=lambda a: a[..., [0, 0]]), ["one expert twice"]),
        (spoil(experts=lambda a: a[:, :2]), ["experts", "[8, 2, 2]", "[8, 3, 2]"]),
        (spoil(experts=lambda a: a.astype(float)), ["float64", "integers"]),
        (spoil(weights=lambda a: None), ["weights", "is missing"]),
        (spoil(weights=put((0, 0, 0), np.nan)), ["weights", "NaN"]),
        (spoil(hidden=lambda a: a.astype(np.float32) * 0 + 1e6), ["hidden", "65504", "int8"]),
        (spoil(hidden_scale=lambda a: np.ones((8, 3))), ["hidden_scale", "not in the header"]),
        (spoil(token_ids=put(0, 100)), ["token ids", "100", "vocab_size"]),
        (spoil(positions=put(0, 2**31)), ["positions", str(2**31)]),
        (spoil(seq_offsets=put(1, 0)), ["seq_offsets", "8 tokens"]),
        (spoil(seq_offsets=put(2, 7)), ["seq_offsets", "8 tokens"]),
        (spoil(seq_document=put(0, 6)), ["seq_document", "6 documents"]),
        (spoil(seq_phase=put(0, 1)), ["phase", "prefill"]),
    ],
)
def test_arrays_that_contradict_the_header(
    tmp_path: Path, change: Callable[[StackArrays], StackArrays], words: list[str]
) -> None:
    info = stack_info()
    writer = TraceWriter(tmp_path, header_for({"decoder": info}), {}, 1)
    with pytest.raises(TraceError) as error:
        writer.write_shard(0, {"decoder": change(arrays_for(info, [5, 3], 0))})
    assert all(w in str(error.value) for w in words), str(error.value)
    assert not writer.done(0)
    with pytest.raises(TraceError, match="lacks 1 of 1 shards"):
        writer.finish()


def test_wrong_shard_or_stack(tmp_path: Path) -> None:
    info = stack_info()
    writer = TraceWriter(tmp_path, header_for({"decoder": info}), {}, 2)
    with pytest.raises(TraceError, match="0 to 1"):
        writer.write_shard(2, {"decoder": arrays_for(info, [1], 0)})
    with pytest.raises(TraceError, match="encoder"):
        writer.write_shard(0, {"encoder": arrays_for(info, [1], 0)})
    with pytest.raises(TraceError, match="at least 1 shard"):
        TraceWriter(tmp_path / "x", header_for({"decoder": info}), {}, 0)
    with pytest.raises(TraceError, match="not written yet"):
        writer.shard_meta(1)


@given(
    st.integers(1, 5).flatmap(
        lambda d: st.lists(st.lists(st.floats(-6e4, 6e4, width=32), min_size=d, max_size=d), max_size=5)
    )
)
def test_int8_errs_by_half_a_step(rows: list[list[float]]) -> None:
    x = np.array(rows, np.float32).reshape(len(rows), 1, -1 if rows else 1)
    q, scale = quantise_int8(x)
    back = q.astype(np.float32) * scale.astype(np.float32)[..., None]
    biggest = np.abs(x).max(axis=-1, keepdims=True, initial=0)
    # half a step, plus what rounding the scale to fp16 costs (2^-11 of the largest; tiny values underflow)
    assert (np.abs(back - x) <= biggest / 254 * 1.01 + biggest * 2**-11 + 1e-5).all()
