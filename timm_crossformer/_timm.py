"""Every private name of timm this package uses, in one place."""
from typing import Any, Dict

from timm.models._features import feature_take_indices as feature_take_indices
from timm.models._hub import save_config_for_hf as save_config_for_hf
from timm.models._input import update_model_input_size as update_model_input_size
from timm.models._manipulate import checkpoint_seq as checkpoint_seq
from torch import nn


def device_and_dtype(module: nn.Module) -> Dict[str, Any]:
    """Return where new parts of a module belong, as arguments of their constructors."""
    parameter = next(module.parameters(), None)
    return {} if parameter is None else {'device': parameter.device, 'dtype': parameter.dtype}
