"""Loads the model that is traced: a bundled reference MoE, a local directory or a name on the hub."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from specgate.errors import CheckpointError, ConfigError
from specgate.moe.families import Family, find_family, moe_layers

REFERENCE = Path(__file__).parent / "reference"
DTYPES = ("auto", "float32", "bfloat16", "float16")
CHUNK = 1 << 20
HASHED_BYTES = 1 << 30  # larger weight files count by name and size only


@dataclass(frozen=True)
class Host:
    """A model that is ready to be traced.

    Attributes:
        model: in evaluation mode, on its device.
        tokenizer: its tokeniser.
        family: its row of the table of architectures.
        model_id: bundled name, directory name or hub name.
        revision: commit on the hub, or a hash of the local files.
    """

    model: nn.Module
    tokenizer: Any
    family: Family
    model_id: str
    revision: str

    @property
    def device(self) -> torch.device:
        """Where the inputs go."""
        return next(self.model.parameters()).device


def bundled_hosts() -> list[str]:
    """Names of the reference MoEs inside the package."""
    return sorted(path.parent.name for path in REFERENCE.glob("*/config.json"))


def local_directory(name_or_path: str) -> Path | None:
    """Where a model lies on this machine: a bundled one by its name, or a directory; None if it does not."""
    if name_or_path in bundled_hosts():
        return REFERENCE / name_or_path
    path = Path(name_or_path).expanduser()
    return path if (path / "config.json").is_file() else None


def load_host(
    name_or_path: str,
    revision: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    device_map: str | dict[str, Any] | None = None,
) -> Host:
    """Loads model and tokeniser; weights from safetensors only, code from transformers only.

    Args:
        name_or_path: a bundled name (``switch_ref``, ``olmoe_ref``), a directory, or a name on the hub.
        revision: branch, tag or commit on the hub.
        dtype: ``auto`` is float32 on the CPU and the checkpoint's own elsewhere.
        device: ``auto`` (the GPU where there is one), ``cpu``, ``cuda``, ``cuda:1``, ...
        device_map: passed to transformers to spread a model over devices; then ``device`` has no say.

    Raises:
        UnknownArchitectureError: if the architecture has no adapter.
        CheckpointError: if it cannot be found, downloaded or read.
        ConfigError: for an unknown dtype or device.
    """
    quiet_imports()
    import transformers

    if dtype not in DTYPES:
        raise ConfigError(f"dtype={dtype!r} is not known; choose one of {', '.join(DTYPES)}.")
    target = resolve_device(device)
    if dtype == "auto" and target.type == "cpu" and device_map is None:
        dtype = "float32"

    path = resolve_model(name_or_path)
    where: dict[str, Any] = {"revision": revision} if revision else {}
    with readable_errors(name_or_path):
        config = transformers.AutoConfig.from_pretrained(path, **where)
    family = find_family(config)
    kwargs: dict[str, Any] = {"dtype": dtype, "use_safetensors": True, **where}
    if device_map is not None:
        kwargs["device_map"] = device_map
    if (getattr(config, "quantization_config", None) or {}).get("quant_method") == "mxfp4":
        kwargs["quantization_config"] = transformers.Mxfp4Config(dequantize=True)
    auto = transformers.AutoModelForSeq2SeqLM if len(family.stacks) > 1 else transformers.AutoModelForCausalLM
    with readable_errors(name_or_path):
        model, info = auto.from_pretrained(path, output_loading_info=True, **kwargs)
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, **where)
    if missing := sorted(info["missing_keys"]):
        raise CheckpointError(
            f"The weights of {name_or_path!r} lack {len(missing)} tensors ({missing[0]}, ...) and would be "
            "random; copy or download the model again."
        )
    moe_layers(model)  # a dense or bypassing variant is refused here, before anything is traced
    if device_map is None:
        model.to(target)
    model.eval().requires_grad_(False)
    commit = getattr(config, "_commit_hash", None) or revision
    return Host(
        model=model,
        tokenizer=tokenizer,
        family=family,
        model_id=path.name if isinstance(path, Path) else path,
        revision=fingerprint(path) if isinstance(path, Path) else str(commit or ""),
    )


def quiet_imports() -> None:
    """Drops what torchao says of itself when transformers imports it."""
    for chatty in (
        "torchao",
        "torch.utils._pytree",
        "root",
    ):  # what transformers imports along, where it is there
        logging.getLogger(chatty).addFilter(_unasked)


def resolve_device(device: str) -> torch.device:
    """The device that a name means; ``auto`` is the GPU where there is one.

    Raises:
        ConfigError: for an unknown name, or a GPU where there is none.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        target = torch.device(device)
    except RuntimeError:
        raise ConfigError(f"device={device!r} is not a device; write auto, cpu, cuda or cuda:1.") from None
    if target.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device={device!r} was asked for but torch sees no GPU; write device=cpu.")
    return target


def _unasked(record: logging.LogRecord) -> bool:
    """Drops what torchao says of itself when transformers imports it: nothing here depends on it."""
    said = record.getMessage()
    return not any(
        text in said for text in ("_C_", "Detected no triton", "is an Enum subclass and is now natively")
    )


def resolve_model(name_or_path: str) -> Path | str:
    """The directory of a bundled or local model, else the hub name as it is."""
    if not str(name_or_path).strip():
        raise CheckpointError("moe.path is empty; give a directory or a name on the hub.")
    if name_or_path in bundled_hosts():
        return REFERENCE / name_or_path
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise CheckpointError(
                f"{path} holds no config.json; give a directory written by save_pretrained, or a hub name."
            )
        return path.resolve()
    looks_local = name_or_path.startswith((".", "/", "~")) or name_or_path.count("/") > 1
    if looks_local:
        raise CheckpointError(
            f"Directory {name_or_path} does not exist; give a model directory or a hub name."
        )
    if "/" not in name_or_path:
        raise CheckpointError(
            f"No model is called {name_or_path!r}; bundled: {', '.join(bundled_hosts()) or 'none'}; "
            "anything else is a directory or a hub name like google/switch-base-8."
        )
    return name_or_path


class readable_errors:
    """Turns what transformers raises at a missing or unreadable model into one sentence."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if not isinstance(error, OSError | ValueError | RuntimeError | SafetensorError):
            return
        reason = " ".join(str(error).split())
        if (
            "not a valid model identifier" in reason
            or "couldn't connect" in reason
            or "offline" in reason.lower()
        ):
            remedy = "check the name and the network, or give a local directory"
        elif isinstance(error, SafetensorError):
            remedy = "its weights are damaged, copy or download it again"
        elif "safetensors" in reason.lower():
            remedy = "only safetensors weights are read, so convert it with save_pretrained"
        else:
            remedy = "check that it is a whole transformers model directory"
        first = reason.split(". ")[0].rstrip(".")[:160]
        raise CheckpointError(f"Cannot load the model {self.name!r} ({first}); {remedy}.") from error


def fingerprint(path: Path) -> str:
    """A short hash over the configuration and the weights of a local model."""
    digest = hashlib.sha256()
    for file in sorted([*path.glob("config.json"), *path.glob("*.safetensors"), *path.glob("*.index.json")]):
        size = file.stat().st_size
        digest.update(f"{file.name} {size};".encode())
        if size <= HASHED_BYTES:
            with file.open("rb") as f:
                while part := f.read(CHUNK):
                    digest.update(part)
    return f"sha256:{digest.hexdigest()[:16]}"
