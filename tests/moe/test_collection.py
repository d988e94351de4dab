"""Collections from start to finish: contents, control, estimates, and what is refused.

Letters: B sequences, T tokens, N flat tokens.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace as Tiny
from typing import Any

import numpy as np
import pytest
import torch

from specgate.errors import ConfigError, SpecgateError, TextError
from specgate.moe import planning
from specgate.moe.batches import Settings
from specgate.moe.collection import choose_threads, collect
from specgate.moe.families import moe_layers
from specgate.moe.hosts import Host
from specgate.moe.recorder import Recorder
from specgate.moe.text import TextDocument
from specgate.traces.store import TraceReader
from tests.moe.tiny_hosts import DECODE, KINDS, PREFILL, QUIET, Hosts, Paths, Texts

Patch = pytest.MonkeyPatch


@pytest.mark.parametrize("kind", list(KINDS))
def test_contents_follow_the_text_and_the_settings(
    kind: str, whole: Paths, hosts: Hosts, documents: Texts
) -> None:
    family, settings = KINDS[kind]
    host = hosts[family]
    reader = TraceReader(whole[kind])
    header = reader.header
    assert header.model_id == family
    assert header.phases == [settings.phase]
    assert header.routing_control["agreement"] == 1.0
    assert {d.split for d in header.documents} == {"train", "validation", "test"}
    texts = {d.name: d for d in documents}
    for d in header.documents:
        assert texts[d.name].split == d.split
        assert texts[d.name].domain == d.domain
    decisions = 0
    for name, info in header.stacks.items():
        view = reader.stack(name)
        table = view.sequences
        decisions += view.num_tokens * info.layers
        assert [x.name for x in moe_layers(host.model) if x.stack == name] == info.layer_map
        assert set(table.phase_S.tolist()) == {settings.phase == "decode"}
        assert table.length_S.max() == settings.length
        routers = reader.routers(name)
        assert sorted(routers) == list(range(info.layers))
        for s in range(len(table)):
            tokens = table.start_S[s] + np.arange(table.length_S[s])
            ids, positions = view.gather("token_ids", tokens), view.gather("positions", tokens)
            first = 0 if settings.phase == "prefill" or family == "switch_transformers" else 8
            assert positions.tolist() == list(range(first, first + len(tokens)))
            if settings.phase == "prefill":
                shifted = name == "decoder" and len(header.stacks) > 1
                piece = host.tokenizer.decode(ids[1:] if shifted else ids)
                assert piece in texts[header.documents[table.document_S[s]].name].text
    assert header.routing_control["decisions"] == decisions
    if family == "switch_transformers":
        assert set(header.stacks) == ({"decoder"} if settings.phase == "decode" else {"encoder", "decoder"})
    else:
        assert len(view.sequences) == settings.sequences


def test_decode_traces_are_what_generation_did(hosts: Hosts, documents: Texts, tmp_path: Path) -> None:
    """Greedy generation done again by hand: same tokens, same experts at each step, nothing after the end."""
    host = hosts["olmoe"]
    settings = replace(DECODE, temperature=0.0, sequences=6, batch_size=6, hidden="fp16")
    job = planning.prepare(host, documents, settings)
    first = job.batch(0)
    free = [host.model.generate(
        torch.tensor(job.runner.text.ids[w.document][w.start : w.stop]).long()[None], max_new_tokens=11,
        do_sample=False, eos_token_id=-1, pad_token_id=0,
    )[0, 8:].tolist() for w in first]  # fmt: skip
    ends = free[0][4]  # a token that the first text generates is made to end a text
    job.runner.eos_ids = [ends]
    old = host.model.generation_config.eos_token_id
    host.model.generation_config.eos_token_id = ends
    arrays = job.runner.run(0, first).arrays["decoder"]
    host.model.generation_config.eos_token_id = old
    expected = []
    for row in free:
        stop = row.index(ends) if ends in row else 10
        expected.append(row[: min(stop, 10)])
    cut = np.split(arrays.token_ids, arrays.seq_offsets[1:-1])
    assert [c.tolist() for c in cut] == [row for row in expected if row]
    assert any(len(row) < 10 for row in expected)
    with Recorder(host.model) as recorder:
        bounds = zip(arrays.seq_offsets, arrays.seq_offsets[1:], strict=False)
        for w, row, (start, end) in zip(first, [row for row in expected if row], bounds, strict=False):
            prompt = job.runner.text.ids[w.document][w.start : w.stop].tolist()
            host.model(torch.tensor([prompt + row]))
            read = recorder.take()["decoder"][0].experts_BTLK[0, 8:].numpy()
            assert (read == arrays.experts[start:end]).mean() > 0.98


def test_sampling_depends_on_seed_and_batch_alone(hosts: Hosts, documents: Texts) -> None:
    job = planning.prepare(hosts["olmoe"], documents, DECODE)
    torch.manual_seed(1)
    one = job.runner.run(3, job.batch(3)).arrays["decoder"].token_ids
    torch.manual_seed(2)
    assert np.array_equal(one, job.runner.run(3, job.batch(3)).arrays["decoder"].token_ids)
    assert not np.array_equal(one, job.runner.run(4, job.batch(3)).arrays["decoder"].token_ids)


def test_control_stops_at_a_wrong_decision(
    hosts: Hosts, documents: Texts, tmp_path: Path, monkeypatch: Patch
) -> None:
    router = moe_layers(hosts["olmoe"].model)[1].router
    original = type(router).forward

    def worst(self: Any, hidden: torch.Tensor) -> Any:
        logits, weights, experts = original(self, hidden)
        return logits, weights, (-logits).topk(2).indices if self is router else experts

    monkeypatch.setattr(type(router), "forward", worst)
    with pytest.raises(SpecgateError, match=r"in batch 0, sequence 0, token 0: model.layers.1.mlp"):
        collect(hosts["olmoe"], documents, PREFILL, tmp_path / "a", QUIET)
    unchecked = collect(hosts["olmoe"], documents, replace(PREFILL, control="none"), tmp_path / "b", QUIET)
    assert unchecked.header.routing_control["agreement"] is None


def test_sampled_control_checks_some_batches(hosts: Hosts, documents: Texts, tmp_path: Path) -> None:
    outcome = collect(hosts["olmoe"], documents, replace(PREFILL, control="sample"), tmp_path / "t", QUIET)
    control = outcome.header.routing_control
    lengths = TraceReader(tmp_path / "t").stack("decoder").sequences.length_S
    assert control["decisions"] == lengths[:4].sum() * 3  # of 8 batches only the first
    assert control["agreement"] == 1.0
    assert control["agreement_stored_hidden"] > 0.9


def test_hidden_layers_are_a_subset(hosts: Hosts, documents: Texts, tmp_path: Path) -> None:
    settings = replace(PREFILL, hidden_layers=(2, 0))
    collect(hosts["olmoe"], documents, settings, tmp_path / "t", QUIET)
    view = TraceReader(tmp_path / "t").stack("decoder")
    assert view.info.hidden_layers == [0, 2]
    assert view.gather("hidden", np.arange(5)).shape == (5, 2, 32)
    with pytest.raises(ConfigError, match=r"hidden_layers=\[7\] does not fit the decoder"):
        collect(hosts["olmoe"], documents, replace(PREFILL, hidden_layers=(7,)), tmp_path / "u", QUIET)


def test_a_full_disk_is_noticed_before_anything_is_written(
    hosts: Hosts, documents: Texts, tmp_path: Path, monkeypatch: Patch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(planning.shutil, "disk_usage", lambda place: usage._replace(free=1000))
    with pytest.raises(SpecgateError, match=r"needs .* KB but the disk of .* has 1.0 KB free; choose"):
        collect(hosts["olmoe"], documents, PREFILL, tmp_path / "t", QUIET)
    assert not (tmp_path / "t").exists()


def test_the_estimate_is_what_arrives(whole: Paths, hosts: Hosts, documents: Texts) -> None:
    for kind in ("olmoe prefill", "switch prefill"):
        family, settings = KINDS[kind]
        job = planning.prepare(hosts[family], documents, settings)
        header = TraceReader(whole[kind]).header
        assert {name: header.tokens(name) for name in header.stacks} == job.tokens
        written = sum(s.bytes for s in header.shards)
        assert job.bytes <= written <= job.bytes * planning.SLACK + 4096 * len(header.shards)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"phase": "both"}, "phase='both' is not known; choose one of prefill, decode"),
        ({"hidden": "fp32"}, "hidden='fp32' is not known"),
        ({"control": "some"}, "control='some' is not known"),
        ({"sequences": 0}, "sequences=0 is too small"),
        ({"length": 2}, "length=2 is too small"),
        ({"temperature": -1.0}, "temperature=-1.0 is negative"),
    ],
)
def test_settings_are_checked(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        Settings(**change)


def test_text_and_positions_that_do_not_fit(hosts: Hosts, documents: Texts, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="300 tokens do not fit the model's 256 positions"):
        collect(hosts["olmoe"], documents, replace(PREFILL, length=300), tmp_path / "t", QUIET)
    short = [TextDocument("a", "a", "train", "x")]
    with pytest.raises(TextError, match="No document is long enough"):
        collect(hosts["olmoe"], short, PREFILL, tmp_path / "t", QUIET)


def test_a_resumed_collection_keeps_its_threads(hosts: Hosts, whole: Paths, tmp_path: Path) -> None:
    assert choose_threads(hosts["olmoe"], whole["olmoe prefill"]) == 1
    assert choose_threads(hosts["olmoe"], tmp_path) == 1  # a small host
    assert choose_threads(hosts["olmoe"], tmp_path, wanted=3) == 3
    (tmp_path / "plan.json").write_text('{"num_shards": 1, "plan": {"threads": 7}}')
    assert choose_threads(hosts["olmoe"], tmp_path) == 7


def test_every_family_is_collected(tiny: Tiny, documents: Texts, tmp_path: Path) -> None:
    for name in tiny.families:
        host = Host(tiny.host(name), tiny.tokenizer(), load_family(name), name, "")
        for settings in (PREFILL, DECODE):
            small = replace(settings, sequences=8, shard_sequences=4)
            outcome = collect(host, documents, small, tmp_path / f"{name}-{settings.phase}", QUIET)
            assert outcome.header.routing_control["agreement"] == 1.0
            TraceReader(tmp_path / f"{name}-{settings.phase}")


def load_family(name: str) -> Any:
    from specgate.moe.families import FAMILIES

    return FAMILIES[name]


def test_shards_stay_small_enough_for_memory(hosts: Hosts, documents: Texts, monkeypatch: Patch) -> None:
    assert planning.prepare(hosts["olmoe"], documents, PREFILL).num_shards == 4
    monkeypatch.setattr(planning, "SHARD_BYTES", 10)
    job = planning.prepare(hosts["olmoe"], documents, PREFILL)
    assert job.num_shards == job.num_batches == 8
    assert [list(job.batches_of(i)) for i in range(8)] == [[i] for i in range(8)]


def test_collecting_leaves_the_random_state_alone(hosts: Hosts, documents: Texts, tmp_path: Path) -> None:
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    collect(hosts["olmoe"], documents, replace(DECODE, sequences=4), tmp_path / "t", QUIET)
    assert torch.equal(torch.rand(3), expected)
