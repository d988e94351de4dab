"""What foreseeing costs while decoding: the speculation kernel against the same predictor in torch ops,
interleaved.

``python -m benchmarks.speculation`` (``--help`` for the options). Random weights of a model's true shape;
times do not depend on their values. A reading is one decoded token, so L + 1 source points; reported are
medians per source point.

    torch               step, calibration, merge, threshold and the list of experts on the host
    torch, on device    the same without the list: nothing waits for the device
    torch, graph        that, captured into one CUDA graph per token
    kernel              launches alone
    kernel, polled      each launch waited for: the list of experts on the host
    kernel, graph       launches captured into one CUDA graph per token

The fair pairs are "torch" with "kernel, polled" and "torch, on device" with "kernel".

Letters: B sequences, T tokens, L MoE layers, E experts, K experts per token, D hidden size, H horizons, V
ids.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from specgate.calibration.registry import make_calibrator
from specgate.metrics.timing import as_cuda_graph, time_interleaved
from specgate.predictors import predictor_class
from specgate.predictors.base import Predictor
from specgate.predictors.speculation import RUNNABLE, speculate_in_torch, speculation_parts
from specgate.report.record import Run, describe_hardware, read_record
from specgate.runtime.speculate import Speculator
from specgate.traces.batch import INVALID, RoutingBatch

#: L, E, K, D of models' MoE layers; the vocabulary is cut, no time depends on it.
SHAPES = {
    "olmoe-1b-7b": (16, 64, 8, 2048),
    "qwen3-30b-a3b": (48, 128, 8, 2048),
    "mixtral-8x7b": (32, 8, 2, 4096),
    "gpt-oss-20b": (24, 32, 4, 2880),
    "switch-base-128": (6, 128, 1, 768),
}
VOCAB = 4096


def random_predictor(name: str, shape: tuple[int, int, int, int], horizons: int) -> Predictor:
    """A calibrated predictor of that shape."""
    L, E, K, D = shape
    g = torch.Generator().manual_seed(0)
    options: dict[str, Any] = {}
    if predictor_class(name).uses_routers:
        options["routers"] = {
            layer: {"norm_weight": torch.ones(D), "router_weight": torch.randn(E, D, generator=g) / D**0.5}
            for layer in range(L)
        }
    predictor = predictor_class(name)(
        layers=L,
        experts=E,
        top_k=K,
        vocab_size=VOCAB,
        phase="decode",
        hidden_size=D,
        lookahead=horizons,
        **options,
    )
    predictor.calibrator = make_calibrator("temperature", predictor)
    return predictor.eval()


def random_window(
    predictor: Predictor, batch: int, tokens: int, device: torch.device, dtype: torch.dtype
) -> RoutingBatch:
    """Routing of ``tokens`` tokens of each sequence, as a host model would have left it."""
    L, E, K, D = predictor.layers, predictor.experts, predictor.top_k, predictor.hidden_size
    assert D is not None
    g = torch.Generator().manual_seed(0)
    shape = (batch, tokens)
    valid = torch.ones(shape, dtype=torch.bool)
    window = RoutingBatch(
        experts_BTLK=torch.rand(*shape, L, E, generator=g).topk(K, dim=-1).indices,
        weights_BTLK=torch.rand(*shape, L, K, generator=g),
        token_ids_BT=torch.randint(0, VOCAB, shape, generator=g),
        positions_BT=torch.arange(tokens).expand(shape).clone(),
        valid_BT=valid,
        mask_BT=valid,
        domain_B=torch.zeros(batch, dtype=torch.int64),
        document_B=torch.arange(batch),
        hidden_BTLD=torch.randn(*shape, L, D, generator=g).to(dtype),
        phase="decode",
    )
    return window.to(device)


class Contest:
    """The two ways to foresee, each as a call per decoded token."""

    def __init__(
        self, predictor: Predictor, window: RoutingBatch, threshold: float, weights: torch.dtype
    ) -> None:
        self.predictor, self.window, self.threshold = predictor, window, threshold
        B, T = window.token_ids_BT.shape
        device = window.token_ids_BT.device
        self.layers = range(-1, predictor.layers)
        parts = speculation_parts(predictor, dtype=weights)
        self.speculator = Speculator(parts, threshold=threshold, batch=B, device=device, context=T)
        self.ids_B = window.token_ids_BT[:, -1].contiguous()
        assert window.hidden_BTLD is not None
        hidden, experts, router = (
            x[:, -1] for x in (window.hidden_BTLD, window.experts_BTLK, window.weights_BTLK)
        )
        self.inputs = [
            tuple(x[:, layer].contiguous() for x in (hidden, experts, router))
            for layer in range(predictor.layers)
        ]
        for _ in range(T):  # the attention looks back on as many tokens as torch's does
            self.kernel()
        while self.speculator.poll_forecast() is not None:
            pass

    def launch(self, layer: int) -> None:
        """One source point."""
        if layer < 0:
            self.speculator.launch(-1, token_ids=self.ids_B)
        else:
            self.speculator.launch(layer, *self.inputs[layer])

    def kernel(self) -> None:
        """Launches of one token."""
        for layer in self.layers:
            self.launch(layer)

    def polled(self) -> None:
        """Launches of one token, each waited for."""
        self.speculator.poll_forecast(newest=True)
        for layer in self.layers:
            self.launch(layer)
            while self.speculator.poll_forecast() is None:
                pass

    @torch.no_grad()
    def torch_list(self) -> None:
        """The same in torch, lists and all."""
        for layer in self.layers:
            speculate_in_torch(self.predictor, self.window, layer, self.threshold)

    @torch.no_grad()
    def torch_mask(self) -> torch.Tensor:
        """Merged probabilities and what reaches the threshold, left on the device."""
        for layer in self.layers:
            p_BHE = self.predictor.step_probabilities(self.window, layer)
            p_BHE = p_BHE[:, : int((self.kinds[layer + 1] != INVALID).sum())]
            p_HE = 1 - (1 - p_BHE).prod(0)
            mask_HE = p_HE >= self.threshold
        return mask_HE

    @property
    def kinds(self) -> torch.Tensor:
        """Kinds of target, on the host."""
        if not hasattr(self, "_kinds"):
            self._kinds = self.predictor.kinds.cpu()
        return self._kinds

    def calls(self) -> dict[str, Callable[[], object]]:
        """What to time."""
        found: dict[str, Callable[[], object]] = {
            "torch": self.torch_list,
            "torch, on device": self.torch_mask,
            "kernel": self.kernel,
            "kernel, polled": self.polled,
        }
        if self.ids_B.is_cuda:
            found["torch, graph"] = as_cuda_graph(self.torch_mask)[0]
            found["kernel, graph"] = as_cuda_graph(self.kernel_tensor)[0]
        return found

    def kernel_tensor(self) -> torch.Tensor:
        """:meth:`kernel`, as a call that gives a tensor."""
        self.kernel()
        return self.ids_B


def matrix_bytes(speculator: Speculator) -> int:
    """What the launches of one token read of matrices, rows of zeros in between not subtracted."""
    tensors = {key: x for key, x in speculator.tensors.items() if key in ("first", "attend", "more", "last")}
    held = sum(x.numel() * x.element_size() for x in tensors.values())
    if "router" in speculator.tensors:
        router = speculator.tensors["router"]
        H, L = int(speculator.sizes["horizons"]), speculator.layers
        asked = sum(min(H, L - 1 - layer) for layer in range(L))
        held += asked * router[0].numel() * router.element_size()
    return held


def measure(args: argparse.Namespace, name: str, shape: str, batch: int, dtype: str) -> dict[str, Any]:
    """Medians of one predictor, shape, batch and type of weights."""
    device = torch.device(args.device)
    predictor = random_predictor(name, SHAPES[shape], args.horizons).to(device)
    hidden = torch.bfloat16 if device.type == "cuda" else torch.float32
    window = random_window(predictor, batch, args.context, device, hidden)
    contest = Contest(predictor, window, args.threshold, getattr(torch, dtype))
    points = len(contest.layers)
    timings = time_interleaved(contest.calls(), device, repeats=args.rounds, budget=args.seconds)
    us = {key: round(timing.median / points, 3) for key, timing in timings.items()}
    spread = {
        key: [round(timing.low / points, 3), round(timing.high / points, 3)]
        for key, timing in timings.items()
    }
    ratios = {
        "on the host": us["torch"] / us["kernel, polled"],
        "on the device": us["torch, on device"] / us["kernel"],
    }
    if "kernel, graph" in us:
        ratios["graphs"] = us["torch, graph"] / us["kernel, graph"]
    megabytes = matrix_bytes(contest.speculator) / points / 1e6
    return {
        "predictor": name,
        "shape": shape,
        "batch": batch,
        "weights": dtype,
        "context": args.context,
        "microseconds": us,
        "p10_p90": spread,
        "times_faster": {key: round(value, 2) for key, value in ratios.items()},
        "matrix_mb_per_point": round(megabytes, 3),
    }


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [cls.name for cls in RUNNABLE]
    parser.add_argument("--predictors", nargs="*", default=names, choices=names)
    parser.add_argument("--shapes", nargs="*", default=["olmoe-1b-7b"], choices=list(SHAPES))
    parser.add_argument("--batches", nargs="*", type=int, default=[1, 8])
    parser.add_argument(
        "--weights", nargs="*", default=["float32", "bfloat16"], choices=["float32", "bfloat16"]
    )
    parser.add_argument("--horizons", type=int, default=3)
    parser.add_argument("--context", type=int, default=160, help="tokens that are looked back on")
    parser.add_argument("--threshold", type=float, default=0.5)
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument(
        "--seconds", type=float, default=30.0, help="for each case; three rounds are always made"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("outputs/benchmarks/speculation"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    log, rows = Run("speculation.py", vars(args) | {"out": str(args.out)}), []
    for shape in args.shapes:
        for name in args.predictors:
            for batch in args.batches:
                for dtype in args.weights:
                    row = measure(args, name, shape, batch, dtype)
                    rows.append(row)
                    print(f"{name}, {shape}, batch {batch}, {dtype}: microseconds per source point")
                    for variant, us in row["microseconds"].items():
                        low, high = row["p10_p90"][variant]
                        print(f"  {variant:18s} {us:10.1f}  ({low:.1f} to {high:.1f})")
                    ratios = ", ".join(f"{key} {value:.1f}" for key, value in row["times_faster"].items())
                    print(f"  times faster: {ratios}; matrices {row['matrix_mb_per_point']:.2f} MB a point")
    command = shlex.join(["python", "-m", "benchmarks.speculation", *sys.argv[1:]])
    path = log.write(args.out, command=command, speculation=rows, threads=args.threads, device=args.device)
    print(f"on {describe_hardware(read_record(path)['hardware'])}, {args.threads} CPU thread(s)")
    print(path)


if __name__ == "__main__":
    main()
