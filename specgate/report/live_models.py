"""The models that mode=live runs: each variant opened for itself, prompts, and a model of random weights.

Letters: T tokens.
"""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specgate.errors import ConfigError
from specgate.moe.families import moe_layers
from specgate.moe.hosts import REFERENCE, load_host, quiet_imports, resolve_model
from specgate.moe.offload import ROUTERS, offload
from specgate.moe.offload_plan import GB
from specgate.moe.text import bundled_documents
from specgate.report.live_settings import Budget, LiveSettings, Way
from specgate.report.replay_shape import ModelShape
from specgate.runtime.layout import aligned
from specgate.runtime.store_settings import PAGE

SPECIALS = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}  # of the bundled tokenizers


@dataclass(frozen=True)
class Prompt:
    """Text to go on from.

    Attributes:
        name: of its document.
        ids_1T: the prompt.
        next_T: how the document goes on.
    """

    name: str
    ids_1T: Tensor
    next_T: list[int]


def save_wide(shape: ModelShape, folder: Path, device: torch.device, seed: int) -> Path:
    """Writes a model of a shape with random weights, and the tokenizer of ``olmoe_ref``.

    Raises:
        ConfigError: if the shape has other token ids than the tokenizer.
    """
    shape.require_indexed()
    quiet_imports()
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(REFERENCE / "olmoe_ref")
    if len(tokenizer) > shape.vocabulary:
        raise ConfigError(
            f"Shape {shape.name} has {shape.vocabulary} token ids and the text needs {len(tokenizer)}; set "
            "shape.config.vocab_size."
        )
    config = transformers.AutoConfig.for_model(**(dict(shape.config) | SPECIALS))
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.device(device):
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=shape.torch_dtype)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    del model
    forget(device)
    return folder


def read_prompts(model: str, settings: LiveSettings) -> list[Prompt]:
    """The beginnings of test documents of the bundled text, spread evenly; the first is to warm up with.

    Raises:
        ConfigError: if there are not so many documents of that length.
    """
    quiet_imports()
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(resolve_model(model))
    length = settings.prompt_tokens + settings.new_tokens
    documents = [d for d in bundled_documents(settings.domains) if d.split == "test"]
    wanted = settings.prompts + 1
    found: list[Prompt] = []
    step = max(1, len(documents) // (4 * wanted))
    for start in range(step):
        for document in documents[start::step]:
            ids = tokenizer(document.text, add_special_tokens=False, verbose=False)["input_ids"]
            if len(ids) >= length:
                prompt = torch.tensor([ids[: settings.prompt_tokens]])
                found.append(Prompt(document.name, prompt, ids[settings.prompt_tokens : length]))
        if len(found) >= wanted:
            break
    if len(found) < wanted:
        raise ConfigError(
            f"{len(found)} test documents of the bundled text have {length} tokens and {wanted} are "
            "needed (one to warm up); ask for fewer or shorter prompts."
        )
    return [found[i * (len(found) - 1) // max(1, wanted - 1)] for i in range(wanted)]


def dtype_of(model: str, dtype: str) -> str:
    """The dtype that all variants run in: ``auto`` is the checkpoint's own."""
    import transformers

    if dtype != "auto":
        return dtype
    config = transformers.AutoConfig.from_pretrained(resolve_model(model))
    return str(getattr(config, "dtype", None) or "float32").removeprefix("torch.")


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' own progress bars, which would write into ours."""
    from transformers.utils import logging

    before = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if before:
            logging.enable_progress_bar()


@contextmanager
def opened(
    budget: Budget, model: str, settings: LiveSettings, device: torch.device, dtype: str, folder: Path
) -> Iterator[Any]:
    """The model of a variant, ready to generate; its memory is given back afterwards.

    Args:
        folder: for what accelerate writes.

    Raises:
        SpecgateError: what loading and ``specgate.offload`` refuse.
    """
    way = budget.way
    try:
        if way.kind == "resident":
            yield _as_transformers_loads(model, dtype, str(device))
        elif way.kind == "offload":
            with make_offload(model, settings, device, dtype, budget.gb, way) as offloaded:
                warm = getattr(offloaded.specgate.store, "warm", None)
                if way.host and warm is not None:
                    warm(host=True)
                yield offloaded
        else:
            accelerate: Any = import_module("accelerate")
            plain = _as_transformers_loads(model, dtype, "cpu")
            if way.kind == "accelerate_cpu":
                yield accelerate.cpu_offload(plain, execution_device=device)
            else:
                with tempfile.TemporaryDirectory(dir=folder) as scratch:
                    yield accelerate.disk_offload(plain, scratch, execution_device=device)
    finally:
        forget(device)


def make_offload(
    model: str,
    settings: LiveSettings,
    device: torch.device,
    dtype: str,
    gb: float | None,
    way: Way,
) -> Any:
    """``specgate.offload`` with the settings; planned, not entered.

    Args:
        gb: budget; None: what is free, for a plan alone.
        way: which of them: predictor, eviction, and whether all experts are in host memory, or none.
    """
    eviction = way.eviction or settings.eviction
    predictor: Any = ROUTERS if way.routers else list(settings.checkpoints) if way.predicts else None

    def planned(host_gb: float | None) -> Any:
        return offload(
            model,
            gb,
            predictor,
            device=str(device),
            dtype=dtype,
            host_gb=host_gb,
            packed=settings.packed,
            eviction=eviction,
            context=settings.prompt_tokens + settings.new_tokens,
            threshold=settings.threshold,
            # All in host memory: each opening reads the whole file, which the page cache may hold.
            direct=False if way.host else None,
        )

    made = planned(0.0)
    if not way.host:
        return made
    slabs = made.plan.blocks * aligned(made.plan.block, PAGE)
    return planned((slabs + 1) / GB)


def _as_transformers_loads(model: str, dtype: str, device: str) -> Any:
    """The plain model, so that it can give the same bits as an offloaded one.

    Its parameters ask for gradients, as transformers leaves them: torch may choose another matrix product for
    those that do not. And its experts are copied: on the CPU transformers may leave them in the mapped file,
    at any multiple of 8 bytes, and the last bit of a product depends on that. Slots are aligned.
    """
    loaded = load_host(model, dtype=dtype, device=device).model
    for layer in moe_layers(loaded) if torch.device(device).type == "cpu" else ():
        for parameter in layer.experts.parameters():
            parameter.data = parameter.data.clone()
    return loaded.requires_grad_(True)


def forget(device: torch.device) -> None:
    """Gives back what nothing refers to any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
