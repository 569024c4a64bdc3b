"""The PEFT adapter format: `adapter_config.json` and the tensor names of the five methods.

Knows keys, names, shapes and scales. Does not know tensors or files; torch is never imported here.
Source: PEFT 0.21.2 (https://github.com/huggingface/peft, Apache-2.0), whose meaning of each key is kept exactly.
"""

from adapterhub.peft_format.config import MAX_RANK, AdapterConfig
from adapterhub.peft_format.parse import parse_adapter_config
from adapterhub.peft_format.tensors import SHARED_VERA_A, SHARED_VERA_B, ModuleTensors, TensorInfo, map_tensors

__all__ = [
    "MAX_RANK",
    "SHARED_VERA_A",
    "SHARED_VERA_B",
    "AdapterConfig",
    "ModuleTensors",
    "TensorInfo",
    "map_tensors",
    "parse_adapter_config",
]
