"""``mode=transitions``: matrices and flows against counting by loops; what is written, drawn and said."""

from __future__ import annotations

import json
import math
from collections import Counter
from itertools import combinations, pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from rich.console import Console
from safetensors import safe_open
from safetensors.numpy import load_file

from specgate.errors import ConfigError
from specgate.report.flow_page import information_plot, matrix_plot
from specgate.report.flows import count_paths, mine, path_codes, unpack
from specgate.report.modes import MODES
from specgate.report.publish import publish
from specgate.report.record import Run, read_record
from specgate.report.sankey import chosen, flow_plot, layout, order_experts
from specgate.report.transitions import FlowSettings, count, explore, matrices, mutual_information, summary
from specgate.traces.batch import StackSpec
from specgate.traces.datamodule import RoutingDataModule
from tests.predictors.support import EXPERTS, LAYERS, VOCAB, make_batch
from tests.traces.helpers import header_for, stack_info, write_trace


def spec_of(phase: str, K: int) -> StackSpec:
    return StackSpec(LAYERS, EXPERTS, K, None, VOCAB, phase)


def random_paths(N: int, L: int, E: int, K: int, seed: int = 0) -> np.ndarray:
    """Routing with structure: the next layer's experts often follow from this one's."""
    rng = np.random.default_rng(seed)
    experts = np.argsort(rng.random((N, L, E)), axis=2)[:, :, :K]
    for layer in range(1, L):
        follow = rng.random(N) < 0.5
        experts[follow, layer] = (experts[follow, layer - 1] + 1) % E
    return experts.astype(np.uint8)


# --- matrices ---


@pytest.mark.parametrize(("phase", "K"), [("prefill", 1), ("decode", 2)])
def test_matrices_are_those_of_a_loop(phase: str, K: int) -> None:
    batches = [make_batch(phase, K=K, B=4, T=9, hidden=False, seed=s) for s in range(3)]
    chain, experts_NLK = count(batches, spec_of(phase, K), FlowSettings(horizons=3))
    arrays = matrices(chain)
    tokens = sum(int(b.mask_BT.sum()) for b in batches)
    assert experts_NLK.shape == (tokens, LAYERS, K)
    uses: Counter[tuple[int, int]] = Counter()
    pairs: Counter[tuple[int, ...]] = Counter()
    trials: Counter[tuple[int, ...]] = Counter()
    for batch in batches:
        for b, t in batch.mask_BT.nonzero().tolist():
            for layer in range(LAYERS):
                now = batch.experts_BTLK[b, t, layer].tolist()
                uses.update((layer, e) for e in now)
                for h in (1, 2, 3):
                    column, follower = layer + h, t + (layer + h) // LAYERS
                    there = follower == t or (
                        phase == "decode" and follower < 9 and bool(batch.valid_BT[b, follower])
                    )
                    if there:
                        later = batch.experts_BTLK[b, follower, column % LAYERS].tolist()
                        trials.update((layer, h, e) for e in now)
                        pairs.update((layer, h, e, f) for e in now for f in later)
    for layer, h, e, f in product(range(LAYERS), (1, 2, 3), range(EXPERTS), range(EXPERTS)):
        cell, n = (layer, h - 1, e, f), trials[layer, h, e]
        assert arrays["count_LHEE"][cell] == pairs[layer, h, e, f]
        assert arrays["trials_LHE"][cell[:3]] == n
        popularity = uses[(layer + h) % LAYERS, f] / tokens
        if n == 0:
            assert math.isnan(arrays["p_LHEE"][cell])
        else:
            p = pairs[layer, h, e, f] / n
            assert arrays["p_LHEE"][cell] == pytest.approx(p)
            assert arrays["lift_LHEE"][cell] == pytest.approx(p / popularity)
    sums = arrays["p_LHEE"].sum(-1)
    np.testing.assert_allclose(sums[~np.isnan(sums)], K, rtol=1e-5)
    kinds = {
        (layer, h): 0 if layer + h < LAYERS else 1 if phase == "decode" else -1
        for layer in range(3)
        for h in (1, 2, 3)
    }
    assert {(i, j + 1): int(k) for (i, j), k in np.ndenumerate(arrays["kind_LH"])} == kinds


def test_information_of_known_cases() -> None:
    bits, entropy = mutual_information(np.eye(4) * 5)
    assert (bits, entropy) == pytest.approx((2.0, 2.0))
    bits, entropy = mutual_information(np.outer([1, 2, 3], [4.0, 4.0, 8.0]))
    assert (bits, entropy) == pytest.approx((0.0, 1.5))
    counts = np.random.default_rng(0).integers(0, 9, (5, 5)).astype(float)
    p = counts / counts.sum()
    by_hand = sum(
        p[i, j] * math.log2(p[i, j] / (p[i].sum() * p[:, j].sum()))
        for i, j in np.ndindex(5, 5)
        if p[i, j] > 0
    )
    assert mutual_information(counts)[0] == pytest.approx(by_hand)


def test_summary_names_the_strongest_transition() -> None:
    batches = [make_batch("decode", K=1, B=4, T=12, hidden=False, seed=s) for s in range(4)]
    for batch in batches:
        batch.experts_BTLK[:, :, 1][batch.experts_BTLK[:, :, 0] == 2] = 5
    chain, _ = count(batches, spec_of("decode", 1), FlowSettings(horizons=2))
    arrays = matrices(chain)
    rows = summary(arrays, min_count=5)
    assert [(r["source_layer"], r["horizon"], r["kind"]) for r in rows] == [
        (0, 1, "within"), (0, 2, "within"), (1, 1, "within"), (1, 2, "wrapped"),
        (2, 1, "wrapped"), (2, 2, "wrapped"),
    ]  # fmt: skip
    assert [r["target_layer"] for r in rows] == [1, 2, 2, 0, 0, 1]
    best = rows[0]["strongest"]
    lift = arrays["lift_LHEE"][0, 0]
    often = [(lift[e, f], e, f) for e, f in np.ndindex(6, 6) if arrays["count_LHEE"][0, 0, e, f] >= 5]
    assert (best["source"], best["target"]) == max(often)[1:]
    assert best["p"] == 1.0
    assert summary(arrays, min_count=10**6)[0]["strongest"] is None
    assert rows[0]["information_share"] > 2 * rows[2]["information_share"]


# --- flows ---


@pytest.mark.parametrize(("E", "K", "M"), [(5, 1, 4), (5, 2, 3), (200, 1, 4), (130, 3, 4)])
def test_paths_are_counted_as_by_a_dictionary(E: int, K: int, M: int) -> None:
    """Small spaces of paths take the dense way, large ones the sorted one."""
    experts = random_paths(300, M, E, K).astype(np.uint16)
    codes, counts = count_paths(experts, E)
    by_hand = Counter(path for token in experts.tolist() for path in product(*token))
    found = {tuple(path): int(n) for path, n in zip(unpack(codes, M, E).tolist(), counts, strict=True)}
    assert found == dict(by_hand)
    assert codes.tolist() == sorted(codes.tolist())


def test_chunks_do_not_change_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    experts = random_paths(500, 4, 200, 2)
    whole = count_paths(experts, 200)
    monkeypatch.setattr("specgate.report.flows._CHUNK", 16 * 70)
    np.testing.assert_array_equal(count_paths(experts, 200)[0], whole[0])
    np.testing.assert_array_equal(count_paths(experts, 200)[1], whole[1])


def test_packing_is_one_to_one() -> None:
    experts = np.array([[[3], [0], [6]], [[0], [3], [6]]])
    assert path_codes(experts, 7).tolist() == [[3 * 49 + 6], [3 * 7 + 6]]
    assert unpack(path_codes(experts, 7)[:, 0], 3, 7).tolist() == [[3, 0, 6], [0, 3, 6]]
    with pytest.raises(ConfigError, match="too long to count"):
        count_paths(np.zeros((2, 11, 1), dtype=np.int64), 64)


@pytest.mark.parametrize("K", [1, 2])
def test_mining_ranks_and_lifts_by_brute_force(K: int) -> None:
    L, E, N, M = 5, 4, 400, 3
    experts = random_paths(N, L, E, K, seed=3)
    found = mine(experts, E, M, top=6, min_count=4)
    rows = []
    for start in range(L - M + 1):
        token_sets = [[set(token[layer].tolist()) for layer in range(L)] for token in experts]

        def share(wanted: dict[int, int], token_sets: list[Any] = token_sets) -> float:
            return sum(all(e in s[layer] for layer, e in wanted.items()) for s in token_sets) / N

        for path in product(range(E), repeat=M):
            wanted = {start + m: e for m, e in enumerate(path)}
            n = round(share(wanted) * N)
            if n < 4:
                continue
            alone = math.prod(share({layer: e}) for layer, e in wanted.items())
            steps = [share({start + m: path[m], start + m + 1: path[m + 1]}) for m in range(M - 1)]
            chain = math.prod(steps) / math.prod(share({start + m: path[m]}) for m in range(1, M - 1))
            rows.append((start, list(path), n, n / N / alone, n / N / chain))
    frequent = sorted(rows, key=lambda r: (-r[2], r[0], r[1]))[:6]
    assert [(r["start"], r["experts"], r["count"]) for r in found["frequent"]] == [r[:3] for r in frequent]
    strong = sorted(rows, key=lambda r: -r[2] / N * math.log2(r[3]))[:6]
    assert [r["count"] * math.log2(r["lift"]) for r in found["strong"]] == pytest.approx(
        [r[2] * math.log2(r[3]) for r in strong], abs=0.05
    )
    of = {(r[0], tuple(r[1])): r for r in rows}
    for row in found["frequent"] + found["strong"]:
        _, _, n, lift, chain = of[row["start"], tuple(row["experts"])]
        assert row["share"] == pytest.approx(n / N)
        assert row["lift"] == pytest.approx(lift, abs=1e-3)
        assert row["lift_chain"] == pytest.approx(chain, abs=1e-3)
    if K == 1:
        first = Counter(map(tuple, experts[:, 1:4, 0].tolist()))
        falling = sorted(first.values(), reverse=True)
        half = next(i for i in range(len(falling) + 1) if sum(falling[:i]) >= N / 2)
        assert found["starts"][1] == {
            "start": 1, "distinct": len(first), "half": half,
            "top_share": pytest.approx(sum(falling[:6]) / N),
        }  # fmt: skip
    else:
        assert set(found["starts"][0]) == {"start", "distinct"}


def test_a_planted_flow_is_found_first() -> None:
    rng = np.random.default_rng(5)
    experts = rng.integers(0, 32, (5000, 8, 1)).astype(np.uint8)
    experts[:150, 2:6, 0] = [7, 7, 30, 1]
    best = mine(experts, 32, 4, top=3, min_count=10)["strong"][0]
    assert (best["start"], best["experts"]) == (2, [7, 7, 30, 1])
    assert 150 <= best["count"] <= 153
    assert best["lift"] > 1000
    with pytest.raises(ConfigError, match=r"length 9 is outside 2\.\.8"):
        mine(experts, 32, 9, 3, 1)


# --- pictures ---


def pairs_of(experts: np.ndarray, E: int) -> np.ndarray:
    found = np.zeros((experts.shape[1] - 1, E, E))
    for token in experts[:, :, 0].tolist():
        for layer in range(len(found)):
            found[layer, token[layer], token[layer + 1]] += 1 / len(experts)
    return found


def test_ribbons_of_a_block_do_not_overlap() -> None:
    pair_LEE = pairs_of(random_paths(400, 4, 6, 1), 6)
    assert all(sorted(order.tolist()) == list(range(6)) for order in order_experts(pair_LEE))
    bottom, height, leave, reach = layout(pair_LEE)
    for layer in range(3):
        for middle, shares, at in (
            (leave[layer], pair_LEE[layer], layer),
            (reach[layer].T, pair_LEE[layer].T, layer + 1),
        ):
            for e in range(6):
                edges = sorted((m - w / 2, m + w / 2) for m, w in zip(middle[e], shares[e], strict=True))
                assert edges[0][0] == pytest.approx(bottom[at, e])
                assert edges[-1][1] == pytest.approx(bottom[at, e] + height[at, e])
                for (_, end), (start, _) in pairwise(edges):
                    assert end == pytest.approx(start, abs=1e-9)
    for one, other in combinations(range(6), 2):
        low, high = sorted((one, other), key=lambda e: bottom[1, e])
        assert bottom[1, low] + height[1, low] <= bottom[1, high] + 1e-12


def test_drawn_paths_share_no_step() -> None:
    paths: list[Any] = [
        {"start": s, "experts": e, "share": 0.1}
        for s, e in ((0, [1, 2, 3]), (1, [2, 3, 4]), (0, [1, 1, 3]), (1, [3, 3, 4]))
    ]
    assert [paths.index(p) for p in chosen(paths)] == [0, 2, 3]
    assert len(chosen(paths, most=1)) == 1
    drawn = flow_plot(pairs_of(random_paths(200, 4, 6, 1), 6), chosen(paths), "title")
    assert len(drawn.axes[0].collections) == 1 + 3  # the transitions, and each path
    named = {text.get_text() for text in drawn.axes[0].texts}
    assert {"1", "2", "3"} <= named


def test_heat_maps_hold_the_lifts_in_their_order() -> None:
    batches = [make_batch("prefill", K=1, B=6, T=12, hidden=False, seed=s) for s in range(6)]
    chain, _ = count(batches, spec_of("prefill", 1), FlowSettings(horizons=1))
    arrays = matrices(chain)
    drawn = matrix_plot(arrays, "title")
    assert [axes.get_title() for axes in drawn.axes[:2]] == ["layer 0 → 1", "layer 1 → 2"]
    grid = np.asarray(drawn.axes[0].images[0].get_array())
    order = [int(text.get_text()) for text in drawn.axes[0].get_xticklabels()]
    assert sorted(order) == list(range(EXPERTS))
    with np.errstate(divide="ignore"):
        np.testing.assert_allclose(grid, np.log2(arrays["lift_LHEE"][0, 0][:, order]).clip(-3, 3), rtol=1e-5)
    assert (np.diff(grid.argmax(0)) >= 0).all()
    pairs = summary(arrays, 1)
    line = information_plot(pairs, {}, "title").axes[0].lines[0]
    assert np.asarray(line.get_ydata()).tolist() == [row["information_share"] for row in pairs]


# --- the mode ---


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory) -> dict[str, RoutingDataModule]:
    """A decode trace with K = 2, an id-only one without weights, a prefill one with K = 1."""
    folder = tmp_path_factory.mktemp("flows")
    made = {}
    for name, phase, K, more in (
        ("ranked", "decode", 2, {}), ("bare", "decode", 2, {"has_weights": False}), ("one", "prefill", 1, {}),
    ):  # fmt: skip
        hidden: dict[str, Any] = {"D": None, "hidden": "none"} if name == "bare" else {"D": 4}
        stack = {"decoder": stack_info(L=3, E=8, K=K, **(hidden | more))}
        header = header_for(stack, documents=30, phases=[phase])
        number = int(phase == "decode")
        write_trace(
            folder / name, stack, shards=[[12] * 40], header=header, phases=(number,), routers=name != "bare"
        )
        made[name] = RoutingDataModule(folder / name, phase=phase, window=8, batch_size=4)
    return made


def test_mode_writes_matrices_flows_and_a_report(
    traces: dict[str, RoutingDataModule], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("specgate.report.canvas.DPI", 40)
    assert "transitions" in MODES
    for data in traces.values():  # the locked split stays shut
        monkeypatch.setattr(data, "test_dataloader", lambda: pytest.fail("opened the locked test split"))
    content = explore(FlowSettings(horizons=2, length=9, set_length=2, top=5, min_count=2), traces, tmp_path)
    path = Run("benchmark.py").write(tmp_path, **content)
    record = read_record(path)
    assert {name: set(flows) for name, flows in record["flows"].items()} == {
        "ranked": {"heaviest", "all"}, "bare": {"all"}, "one": {"heaviest"},
    }  # fmt: skip
    assert [(left["trace"], left["what"]) for left in record["skipped"]] == [
        ("bare", "flows of the heaviest expert")
    ]
    assert record["flows"]["ranked"]["heaviest"]["length"] == 3  # no longer than the stack
    for name, data in traces.items():
        found = record["transitions"][name]
        train = sum(int(batch.mask_BT.sum()) for batch in data.train_dataloader())
        assert found["tokens"] == train
        with safe_open(tmp_path / found["export"], "numpy") as file:
            assert json.loads(file.metadata()["specgate"])["trace"] == name
        arrays = load_file(tmp_path / found["export"])
        assert ("first_LEE" in arrays) == (name != "bare")
        if name != "bare":
            np.testing.assert_allclose(arrays["first_LEE"].sum((1, 2)), 1.0, rtol=1e-5)
        assert arrays["count_LHEE"][0, 0].sum() == train * data.spec.top_k**2
    with (tmp_path / "printed.txt").open("w") as printed:
        page = publish(record, tmp_path, Console(width=150, file=printed))
    pictures = {file.name for file in (tmp_path / "plots").iterdir()}
    kinds = {"ranked": 3, "bare": 2, "one": 3}
    assert {name: sum(p.startswith(f"{name}-") for p in pictures) for name in kinds} == kinds
    assert page.read_text().count("data:image/png;base64,") == 8
    strongest = record["flows"]["one"]["heaviest"]["strong"][0]["experts"]
    for text in (
        page.read_text(),
        (tmp_path / "tables.md").read_text(),
        (tmp_path / "printed.txt").read_text(),
    ):
        assert " → ".join(map(str, strongest)) in text
    again = explore(
        FlowSettings(horizons=2, length=9, set_length=2, top=5, min_count=2), traces, tmp_path / "b"
    )
    assert again == content


def test_fewer_tokens_and_another_split(traces: dict[str, RoutingDataModule], tmp_path: Path) -> None:
    data = {"one": traces["one"]}
    some = explore(FlowSettings(max_tokens=1), data, tmp_path)
    everything = explore(FlowSettings(split="validation"), data, tmp_path)
    assert 0 < some["transitions"]["one"]["tokens"] <= 64 * 8
    validation = sum(int(batch.mask_BT.sum()) for batch in traces["one"].val_dataloader())
    assert everything["transitions"]["one"]["tokens"] == validation


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"split": "test"}, "split='test' is not for exploring"),
        ({"horizons": 0}, "transitions.horizons is 0"),
        ({"length": 1}, "transitions.length is 1"),
        ({"set_length": 1}, "transitions.set_length is 1"),
        ({"min_count": 0}, "transitions.min_count is 0"),
    ],
)
def test_senseless_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FlowSettings(**settings)


def test_the_configuration_names_the_settings(root: Path) -> None:
    config: Any = OmegaConf.load(root / "conf" / "benchmark.yaml")
    plain: Any = OmegaConf.to_container(config, resolve=False)
    values = plain["transitions"] | {"horizons": config.lookahead}
    assert FlowSettings(**values) == FlowSettings()


def test_torch_and_numpy_agree_on_experts_above_a_byte() -> None:
    batch = make_batch("prefill", K=1, hidden=False)
    wide = StackSpec(LAYERS, 300, 1, None, VOCAB, "prefill")
    batch.experts_BTLK[0, 0, 0] = 299
    _, experts = count([batch], wide, FlowSettings())
    assert experts.dtype == np.uint16
    assert torch.equal(torch.from_numpy(experts.astype(np.int64)), batch.experts_BTLK[batch.mask_BT])
