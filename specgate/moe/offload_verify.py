"""Checks an offloaded model against the resident one, a layer at a time, so that the whole need not fit.

Letters: B sequences, T tokens, E experts of a layer.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from specgate.errors import CheckpointError, StoreError
from specgate.moe.expert_tensors import expert_parts
from specgate.moe.families import MoELayer

KERNELS = "_experts_implementation"
PROMPT, STEPS = 24, 2  # tokens that a check reads at once, and single tokens after them


class CheckpointExperts:
    """Experts read from a model directory's safetensors files, one at a time and unpacked.

    Args:
        folder: of the model.
        layers: its MoE layers.
        dtype: of what is read; the checkpoint's own may differ.

    Raises:
        CheckpointError: if the directory has no safetensors files, or lacks an expert.
    """

    def __init__(self, folder: Path, layers: Sequence[MoELayer], dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._file_of: dict[str, Path] = {}
        for file in sorted(folder.glob("*.safetensors")):
            try:
                with safe_open(file, framework="pt") as opened:
                    self._file_of |= dict.fromkeys(opened.keys(), file)
            except (OSError, SafetensorError) as error:
                raise CheckpointError(
                    f"{file} cannot be read ({error}); copy or download it again."
                ) from error
        if not self._file_of:
            raise CheckpointError(
                f"{folder} holds no .safetensors file; only such weights are read, so convert the model with "
                "save_pretrained."
            )
        self._parts = [expert_parts(layer, self._file_of) for layer in layers]

    def tensors(self, layer: int, expert: int) -> dict[str, Tensor]:
        """One expert's tensors on the CPU, by name.

        Raises:
            StoreError: if they cannot be read.
        """
        out = {}
        for name, parts in self._parts[layer][expert].items():
            rows = []
            for part in parts:
                file = self._file_of[part.tensor]
                try:
                    with safe_open(file, framework="pt") as opened:
                        if part.index is None:
                            rows.append(opened.get_tensor(part.tensor))
                        else:
                            rows.append(opened.get_slice(part.tensor)[part.index])
                except (OSError, SafetensorError) as error:
                    raise StoreError(
                        f"Tensor {part.tensor} cannot be read from {file} ({error}); copy the file again."
                    ) from error
            out[name] = (rows[0] if len(rows) == 1 else torch.cat(rows)).to(self._dtype)
        return out


def verify_model(
    model: nn.Module, layers: Sequence[MoELayer], original: CheckpointExperts, exact: bool, seed: int = 0
) -> list[float]:
    """Runs a few tokens and repeats what every MoE layer did with the experts of the checkpoint in memory.

    Needs the memory of one layer's experts, for the time of the check.

    Args:
        model: offloaded.
        layers: its MoE layers.
        original: where the weights come from, by another way than the store's.
        exact: the outputs must be equal bit for bit (codec ``none``).

    Returns:
        Per layer the largest difference of an output, over the largest output.

    Raises:
        StoreError: if ``exact`` and a layer differs.
    """
    calls: list[list[tuple[str, tuple[Tensor, ...], Tensor]]] = [[] for _ in layers]

    def keep(at: int) -> Any:
        def hook(module: Any, args: tuple[Any, ...], output: Tensor) -> None:
            chosen = getattr(module.config, KERNELS) if hasattr(module, "config") else ""
            calls[at].append((chosen, tuple(t.clone() for t in args), output.clone()))

        return hook

    handles = [layer.experts.register_forward_hook(keep(i)) for i, layer in enumerate(layers)]
    try:
        _run(model, seed)
    finally:
        for handle in handles:
            handle.remove()
    errors = []
    with torch.no_grad():
        for i, layer in enumerate(layers):
            resident: Any = _resident(layer, original, i, calls[i][0][2].device)
            worst = 0.0
            for chosen, args, output in calls[i]:
                if chosen:  # generate() decodes with other kernels than it reads the prompt with
                    setattr(resident.config, KERNELS, chosen)
                wanted = resident(*args)
                if exact and not torch.equal(wanted, output):
                    raise StoreError(
                        f"verify: {layer.name} gives other values offloaded than resident (difference "
                        f"{float((wanted - output).abs().max()):.3g}); please report it with your model, GPU "
                        "and versions."
                    )
                scale = float(wanted.abs().max()) or 1.0
                worst = max(worst, float((wanted.float() - output.float()).abs().max()) / scale)
            errors.append(worst)
            calls[i].clear()
    return errors


def _run(model: Any, seed: int) -> None:
    """A prompt of random tokens, and some tokens after it."""
    generator = torch.Generator().manual_seed(seed)
    ids_BT = torch.randint(2, int(model.config.vocab_size), (1, PROMPT), generator=generator)
    ids_BT = ids_BT.to(model.device)
    with torch.no_grad():
        model.generate(
            ids_BT,
            attention_mask=torch.ones_like(ids_BT),
            max_new_tokens=STEPS + 1,
            min_new_tokens=STEPS + 1,
            do_sample=False,
            pad_token_id=0,
        )


def _resident(layer: MoELayer, original: CheckpointExperts, index: int, device: torch.device) -> nn.Module:
    """The family's own experts module with all its weights."""
    experts: Any = layer.experts
    tensors = [original.tensors(index, expert) for expert in range(layer.num_experts)]
    module: Any = experts.original.__new__(experts.original)
    nn.Module.__init__(module)
    pieces_of = getattr(experts, "shapes", ())  # at full residency the module has them as plain attributes
    kept = {k: v for k, v in vars(experts).items() if k not in vars(module) and k not in pieces_of}
    vars(module).update(kept)
    if "config" in kept:
        module.config = copy.copy(kept["config"])
    module._modules = dict(experts._modules)
    if "template" in kept:
        (template,) = kept["template"]
        for expert, pieces in enumerate(tensors):
            one = copy.deepcopy(template).to_empty(device=device)
            for name, tensor in pieces.items():
                getattr(one, name).weight = nn.Parameter(tensor.to(device), requires_grad=False)
            module[f"expert_{expert}"] = one
    else:
        for name in experts.shapes:
            stacked = torch.stack([pieces[name] for pieces in tensors]).to(device)
            module.register_parameter(name, nn.Parameter(stacked, requires_grad=False))
    resident: nn.Module = module.eval()
    return resident
