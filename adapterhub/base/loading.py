"""Load the base for training or serving: both see the same values.

torch, transformers and bitsandbytes are imported inside the functions, so that importing this module stays cheap.
Source of NF4 with double quantization: https://arxiv.org/abs/2305.14314, section 3.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from adapterhub.base.identity import Base
from adapterhub.settings import Settings

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["forget_quantizer_", "load_model", "load_tokenizer", "quiet_libraries", "use_threads"]


def quiet_libraries() -> None:
    """Keep progress bars and notices of libraries off the terminal; errors still appear."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for name in ("bitsandbytes", "bitsandbytes.backends.cpu.ops", "bitsandbytes.cextension", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


def use_threads(settings: Settings) -> None:
    """Give torch the CPU threads that the settings name; 0 leaves torch its own choice."""
    if settings.threads:
        import torch

        torch.set_num_threads(settings.threads)


def load_tokenizer(base: Base) -> PreTrainedTokenizerBase:
    """Load the tokenizer of the base from its folder; never contacts a hub."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(base.folder, local_files_only=True)


def load_model(base: Base, *, device: str = "cpu", keep_quantized: bool | None = None) -> PreTrainedModel:
    """Load the frozen base in float32 arithmetic, in eval mode, without gradients.

    keep_quantized: True keeps bitsandbytes layers, which unpack their weights at every step; False replaces them by
    plain linears that hold the dequantized values, the same numbers. None means True on CUDA and False on CPU.
    """
    import torch
    from transformers import AutoModelForCausalLM

    quiet_libraries()
    keep = device != "cpu" if keep_quantized is None else keep_quantized
    options: dict[str, Any] = {}
    if base.quantization == "nf4":
        options = {"quantization_config": _nf4_config(torch.float32), "device_map": {"": device}}
    model = AutoModelForCausalLM.from_pretrained(base.folder, dtype=torch.float32, local_files_only=True, **options)
    if base.quantization == "nf4" and keep:
        _stop_repacking_(model)
    elif base.quantization == "nf4":
        _dequantize_(model)
    if base.quantization == "int8":
        _round_to_int8_(model)
    model.requires_grad_(False)
    if device != "cpu" and "device_map" not in options:
        torch.nn.Module.to(model, device)
    return model.eval()


def _nf4_config(compute_dtype: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )


def _stop_repacking_(model: PreTrainedModel) -> None:
    """Forbid bitsandbytes to repack 4-bit weights for AVX512-BF16 in the first evaluation.

    Repacked layers round their scales to bfloat16 and pass no gradients (bitsandbytes 0.50, nn/modules.py).
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010  # pyright sees only nn.Module here.


def forget_quantizer_(model: PreTrainedModel) -> None:
    """Remove the marks of a quantizer from a model whose weights are plain numbers.

    TRL and PEFT look at these marks and would treat the plain copy as 4-bit: bfloat16 casts, Linear4bit adapters.
    """
    marks: dict[str, Any] = {"is_loaded_in_4bit": False, "is_quantized": False, "hf_quantizer": None}
    for mark, value in (marks | {"quantization_method": None}).items():
        if hasattr(model, mark):
            setattr(model, mark, value)
    if hasattr(model.config, "quantization_config"):
        delattr(model.config, "quantization_config")


def _dequantize_(model: PreTrainedModel) -> None:
    """Replace every Linear4bit by a Linear holding its dequantized weight, and drop the quantizer marks."""
    import torch
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn.modules import Linear4bit

    for name, module in list(model.named_modules()):
        if not isinstance(module, Linear4bit):
            continue
        packed: Any = module.weight
        weight = dequantize_4bit(packed.data, packed.quant_state).to(torch.float32)
        plain = torch.nn.Linear(module.in_features, module.out_features, bias=module.bias is not None, device="meta")
        plain.weight = torch.nn.Parameter(weight, requires_grad=False)
        if module.bias is not None:
            plain.bias = torch.nn.Parameter(module.bias.data.to(torch.float32), requires_grad=False)
        model.set_submodule(name, plain)
    forget_quantizer_(model)


def _round_to_int8_(model: PreTrainedModel) -> None:
    """Round each linear to 127 steps per output row, keeping float32 storage: the values of int8 weights, exactly."""
    import torch

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and not name.startswith("lm_head"):
            scale = module.weight.data.abs().amax(dim=1, keepdim=True).clamp_min(1e-12) / 127
            module.weight.data = torch.round(module.weight.data / scale) * scale
