"""Load a `transformers` model without its experts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from profiler.errors import EngineError, ModelError, first_line
from profiler.models.moe_modules import MoEBlock, find_moe_blocks
from profiler.models.resolve import ResolvedModel
from speculation.runtime.forward import is_supported
from speculation.runtime.storage.checkpoint import ExpertsModule
from speculation.runtime.storage.layout import ExpertLayout, Weight
from speculation.runtime.storage.mxfp4 import MXFP4, Mxfp4

EXPERTS_IMPLEMENTATION = "specmoe_offloaded"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def checkpoint_folder(model: ResolvedModel) -> Path:
    """The folder of a model's checkpoint; downloaded if the model is on the hub.

    Raises:
        ModelError: It cannot be downloaded.
    """
    if Path(model.location).is_dir():
        return Path(model.location)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        patterns = ["*.safetensors", "*.json", "*.model", "*.jinja", "tokenizer*"]
        return Path(snapshot_download(model.location, revision=model.metadata.revision, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(f"{model.location} cannot be downloaded: {first_line(error)}") from error


def model_config(folder: Path) -> tuple[Any, str | None]:
    """The config of a checkpoint without its quantization, and how its experts are packed: `mxfp4`, or None if they are not.

    Raises:
        ModelError: `transformers` does not know it.
        EngineError: The checkpoint is quantized in a way whose experts are not plain tensors.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # a config from elsewhere can make a model's class raise anything
        raise ModelError(f"transformers cannot read the config of {folder}: {first_line(error)}") from error
    if getattr(config, "transformers_weights", None):
        raise EngineError(f"{folder} names its weights in config.json (transformers_weights): this is not supported")
    quantization = getattr(config, "quantization_config", None)
    if quantization is None:
        return config, None
    is_entries = isinstance(quantization, dict)
    method = quantization.get("quant_method") if is_entries else getattr(quantization, "quant_method", quantization)
    if method != MXFP4:
        raise EngineError(
            f"{folder} is quantized ({method}): experts are offloaded in float32, bfloat16, float16 and {MXFP4}; choose such a "
            "checkpoint"
        )
    # Else transformers would unpack all experts, or look for kernels that compute them packed.
    del config.quantization_config
    return config, MXFP4


def skeleton(config: Any, dtype: torch.dtype) -> Any:
    """The model without any weights, on the meta device.

    Raises:
        ModelError: `transformers` cannot build it.
    """
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    except Exception as error:  # as above
        raise ModelError(f"transformers cannot build this model: {first_line(error)}") from error


def experts_modules(model: Any, packing: str | None = None) -> list[ExpertsModule]:
    """The experts modules of a model, in the order of its layers.

    Args:
        model: The model, without weights.
        packing: How its checkpoint packs experts.

    Raises:
        EngineError: The model has no experts, or they are not computed by `transformers`' experts interface.
    """
    blocks = find_moe_blocks(model)
    if not blocks:
        raise EngineError(f"{type(model).__name__} has no routers: choose a mixture-of-experts model")
    names = {id(module): name for name, module in model.named_modules()}
    found = [_experts_module(block, names[id(block.experts)], packing) for block in blocks]
    if len({module.num_experts for module in found}) > 1:
        raise EngineError(f"the layers of {type(model).__name__} have different numbers of experts: they cannot be offloaded")
    return found


def _experts_module(block: MoEBlock, name: str, packing: str | None) -> ExpertsModule:
    experts = block.experts
    parameters = dict(experts.named_parameters())
    if not is_supported(experts) or any("." in part for part in parameters) or not parameters:
        raise EngineError(
            f"{name} is a {type(experts).__name__}, which does not use the experts interface of transformers: this family "
            "cannot be offloaded"
        )
    if any(parameter.shape[0] != block.num_experts for parameter in parameters.values()):
        raise EngineError(f"{name}: a weight is not one per expert, so this family cannot be offloaded")
    layout = ExpertLayout(tuple(Weight(part, tuple(value.shape[1:]), value.dtype) for part, value in parameters.items()))
    if packing == MXFP4:
        try:
            layout = Mxfp4(layout).layout
        except ValueError as error:
            raise EngineError(f"{name} cannot be in {MXFP4}: {error}") from error
    return ExpertsModule(block.layer, name, layout, block.num_experts, is_transposed=bool(experts.is_transposed))


def load_without_experts(folder: Path, config: Any, dtype: torch.dtype, device: torch.device, empty: Any) -> Any:
    """Load all weights of a model but those of its experts, which get empty tensors.

    Args:
        folder: The checkpoint.
        config: Its config.
        dtype: The type of the weights.
        device: Where they go.
        empty: The same model without weights.

    Raises:
        ModelError: `transformers` cannot load it.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    classes = list(dict.fromkeys(type(block.experts) for block in find_moe_blocks(empty)))
    options: dict[str, Any] = {} if device.type == "cpu" else {"device_map": {"": device}}
    verbosity, shows_progress = logging.get_verbosity(), logging.is_progress_bar_enabled()
    # It would report every expert of the checkpoint as unexpected.
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        with _without_weights(classes):
            model = AutoModelForCausalLM.from_pretrained(
                folder, config=config, dtype=dtype, use_safetensors=True, trust_remote_code=False, **options
            )
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(f"transformers cannot load {folder}: {first_line(error)}") from error
    finally:
        logging.set_verbosity(verbosity)
        if shows_progress:
            logging.enable_progress_bar()
    return model.eval()


def input_width(experts: torch.nn.Module) -> int:
    """The width of what the experts of a module without weights get."""
    return int(experts._specmoe_width)  # type: ignore[arg-type]  # set where the weights were left out


@contextlib.contextmanager
def _without_weights(classes: Sequence[type[torch.nn.Module]]) -> Iterator[None]:
    """Until the end of the block, new modules of these classes have empty tensors instead of their parameters."""
    originals = {each: each.__init__ for each in classes}

    def emptied(original: Any) -> Any:
        def create(self: torch.nn.Module, *arguments: Any, **named: Any) -> None:
            original(self, *arguments, **named)
            up = next(value for name, value in self.named_parameters(recurse=False) if name in {"gate_up_proj", "up_proj"})
            object.__setattr__(self, "_specmoe_width", int(up.shape[1 if getattr(self, "is_transposed", False) else -1]))
            for name in [name for name, _ in self.named_parameters(recurse=False)]:
                delattr(self, name)
                # Not a parameter, so that it is not looked for in the checkpoint.
                setattr(self, name, torch.empty(0, device="cpu"))

        return create

    try:
        for each, original in originals.items():
            each.__init__ = emptied(original)  # type: ignore[method-assign] # on purpose, and put back below
        yield
    finally:
        for each, original in originals.items():
            each.__init__ = original  # type: ignore[method-assign] # put back
