"""The model to capture, as its config tells it: class and dtype, built on the meta device without weights.

A `ModelSource` comes from a checkpoint or from a config alone. Nothing is
allocated for parameters; non-persistent buffers (rotary frequencies and the
like) are computed on the CPU by the model's own initialisation.
"""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qcompiler.capture import attention, experts
from qcompiler.kernels.errors import InvalidInputError, UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from qcompiler.checkpoint import Checkpoint


@dataclass
class ModelSource:
    """A model's config and class, and its checkpoint if there is one.

    Attributes:
        config: The transformers config.
        model_class: The transformers class that is captured.
        checkpoint: Where the weights are read from; None for a config alone.
        name: What the user called the model.
    """

    config: PreTrainedConfig
    model_class: type[PreTrainedModel]
    checkpoint: Checkpoint | None = None
    name: str = ""
    _skeleton: PreTrainedModel | None = field(default=None, repr=False)

    @classmethod
    def from_config(cls, config: PreTrainedConfig, name: str = "") -> ModelSource:
        """A source without weights.

        Args:
            config: A transformers config; it is copied.
            name: What to call the model in messages.

        Raises:
            UnsupportedModelError: No transformers class fits, or it is of a kind that is not captured.
        """
        config = copy.deepcopy(config)
        return cls(config, resolve_class(config), name=name or config.model_type)

    @classmethod
    def from_pretrained(
        cls, model: str | Path, *, trust_remote_code: bool = False, revision: str | None = None
    ) -> ModelSource:
        """A source with weights, from a local folder or (when the user named one) a hub id.

        Args:
            model: Folder or "owner/name".
            trust_remote_code: Run modelling code that ships with the checkpoint. Never implied.
            revision: Branch, tag or commit, when `model` is a hub id.

        Raises:
            InvalidInputError: The checkpoint is missing or damaged.
            UnsupportedModelError: The model is of a kind that is not captured.
        """
        from qcompiler.checkpoint import Checkpoint, load_config, locate

        folder = locate(model, code=trust_remote_code, revision=revision)
        config = load_config(folder, trust_remote_code=trust_remote_code)
        model_class = resolve_class(config, folder if trust_remote_code else None)
        source = cls(config, model_class, name=str(model))
        source.checkpoint = Checkpoint.open(folder, source.skeleton())
        if source.checkpoint.untied():
            # as transformers does: the stored values win over the config's word
            source.checkpoint.close()
            config.tie_word_embeddings = False
            source._skeleton = None
            source.checkpoint = Checkpoint.open(folder, source.skeleton())
        return source

    def skeleton(self, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """The model on the meta device, in eval mode, with our attention and experts implementations.

        Args:
            dtype: Parameter dtype; the config's own if None.
        """
        if self._skeleton is None or (dtype is not None and self._skeleton.dtype != dtype):
            self._skeleton = build_skeleton(self.model_class, self.config, dtype)
        return self._skeleton


def resolve_class(config: PreTrainedConfig, remote_folder: Path | None = None) -> type[PreTrainedModel]:
    """The transformers class that a config stands for.

    The class named in `config.architectures` where there is one, else the masked or causal language
    model of that type, else its bare encoder.

    Raises:
        UnsupportedModelError: No class is known, or it is not a text decoder or encoder.
    """
    import transformers
    from transformers.models.auto import modeling_auto

    kind = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{kind} is an encoder-decoder model: its decoder attends to a second sequence (cross-attention)",
            hint="Decoder-only and encoder-only text models can be compiled.",
        )
    name = (getattr(config, "architectures", None) or [None])[0]
    auto_map = getattr(config, "auto_map", None) or {}
    if remote_folder is not None and auto_map:
        return _remote_class(auto_map, remote_folder)
    if name is None:
        # BERT and its kin are in both tables; they are decoders only where the config says so
        heads: list[Any] = [
            modeling_auto.MODEL_FOR_MASKED_LM_MAPPING,
            modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING,
        ]
        if getattr(config, "is_decoder", False):
            heads.reverse()
        for mapping in (*heads, modeling_auto.MODEL_MAPPING):
            if type(config) in mapping:
                found: Any = mapping[type(config)]
                found = found[0] if isinstance(found, (list, tuple)) else found
                return _only_text(found, config)
        raise UnsupportedModelError(f"transformers {transformers.__version__} has no text model for {kind!r}")
    found = getattr(transformers, name, None)
    if found is None:
        hint = "A newer transformers may know it."
        if auto_map:
            hint = "Its code ships with the checkpoint; --trust-remote-code runs that code."
        raise UnsupportedModelError(
            f"transformers {transformers.__version__} has no class {name!r} ({kind})", hint=hint
        )
    return _only_text(found, config)


def _only_text(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> type[PreTrainedModel]:
    kind = config.model_type
    hint = "Text decoders and encoders can be compiled; point to a text-only checkpoint of the model."
    parts = [key for key in getattr(config, "sub_configs", {}) if getattr(config, key, None) is not None]
    # a bundle of options (mpt's attn_config) is no model of its own
    other = [
        part for part in parts if part != "text_config" and hasattr(getattr(config, part), "hidden_size")
    ]
    if other:
        raise UnsupportedModelError(
            f"{kind} ({model_class.__name__}) has parts beside its text model: {', '.join(other)}", hint=hint
        )
    if model_class.main_input_name != "input_ids":
        raise UnsupportedModelError(
            f"{kind} ({model_class.__name__}) takes {model_class.main_input_name}, not tokens", hint=hint
        )
    return model_class


def _remote_class(auto_map: dict[str, Any], folder: Path) -> type[PreTrainedModel]:
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    for key in ("AutoModelForCausalLM", "AutoModelForMaskedLM", "AutoModel"):
        if key in auto_map:
            return get_class_from_dynamic_module(auto_map[key], str(folder))
    raise InvalidInputError(f"auto_map of {folder} names no model class, only {sorted(auto_map)}")


def build_skeleton(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, dtype: torch.dtype | None
) -> PreTrainedModel:
    """The model on the meta device with our attention and experts implementations, in eval mode."""
    attention.register()
    experts.register()
    config = copy.deepcopy(config)
    options: dict[str, Any] = {"attn_implementation": attention.IMPLEMENTATION}
    if dtype is not None:
        options["dtype"] = dtype
    try:
        with torch.device("meta"):
            model = model_class._from_config(config, **options)
    except KeyError as error:
        if error.args != (attention.IMPLEMENTATION,):
            raise
        raise UnsupportedModelError(
            f"{config.model_type} picks its attention from a table of its own instead of calling "
            "an attention function of transformers, so it cannot be replaced by one op"
        ) from error
    except (ValueError, ImportError) as error:
        raise UnsupportedModelError(f"{config.model_type} cannot be built for capture: {error}") from error
    if model._can_set_experts_implementation():
        model.set_experts_implementation(experts.IMPLEMENTATION)
    _settle_parameters(model)
    return model.eval()


def _settle_parameters(model: PreTrainedModel) -> None:
    """Parameters on the meta device whatever made them, in fp32 where `from_pretrained` keeps them so."""
    pinned = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    if model.dtype == torch.float16:
        pinned |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
    kept = (
        re.compile(r"(^|\.)(" + "|".join(re.escape(name) for name in sorted(pinned)) + r")(\.|$)")
        if pinned
        else None
    )
    half = model.dtype in (torch.float16, torch.bfloat16)
    persistent = set(model.state_dict())
    settled: dict[int, torch.Tensor] = {}
    for path, module in model.named_modules():
        for store in (module._parameters, module._buffers):
            for leaf, tensor in store.items():
                name = f"{path}.{leaf}" if path else leaf
                if tensor is None or name not in persistent:
                    continue
                dtype = torch.float32 if half and kept is not None and kept.search(name) else tensor.dtype
                if tensor.is_meta and tensor.dtype == dtype:
                    continue
                if id(tensor) not in settled:
                    moved = torch.empty_like(tensor, device="meta", dtype=dtype)
                    settled[id(tensor)] = (
                        torch.nn.Parameter(moved, False) if store is module._parameters else moved
                    )
                store[leaf] = settled[id(tensor)]
