"""Reads config.json with transformers' own config class; code in a checkpoint runs only on request."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from qcompiler.checkpoint.files import read_json
from qcompiler.kernels.errors import InvalidInputError, UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def load_config(folder: Path, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The config of a local checkpoint.

    A config with `auto_map` names Python code beside it. Without `trust_remote_code` that code is
    ignored where transformers itself knows the model type, and the model refused where it does not.

    Raises:
        InvalidInputError: No config.json, not JSON, or values that its class refuses.
        UnsupportedModelError: An unknown model type, or a checkpoint that is quantized already.
    """
    import transformers
    from huggingface_hub.errors import StrictDataclassError
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    raw = read_json(folder / "config.json")
    kind = raw.get("model_type")
    if not isinstance(kind, str):
        raise InvalidInputError(f"{folder / 'config.json'} names no model_type")
    if raw.get("quantization_config"):
        method = raw["quantization_config"]
        method = method.get("quant_method", "unknown") if isinstance(method, dict) else method
        raise UnsupportedModelError(
            f"{folder} is quantized already (quantization_config: {method})",
            hint="Start from the original weights.",
        )
    if kind not in CONFIG_MAPPING_NAMES and not trust_remote_code:
        if "auto_map" in raw:
            raise UnsupportedModelError(
                f"{kind!r} is defined by Python code that ships with it (auto_map), which is not run",
                hint="If you trust its author, pass --trust-remote-code.",
            )
        raise UnsupportedModelError(
            f"transformers {transformers.__version__} does not know model type {kind!r}",
            hint="A newer transformers may know it.",
        )
    try:
        return transformers.AutoConfig.from_pretrained(
            folder, trust_remote_code=trust_remote_code, local_files_only=not trust_remote_code
        )
    except (ValueError, KeyError, TypeError, AttributeError, OSError, StrictDataclassError) as error:
        raise InvalidInputError(
            f"{folder / 'config.json'} is refused by transformers' {kind} config: {error}"
        ) from error
