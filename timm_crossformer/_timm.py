"""Every private name of timm this package uses, in one place."""
from typing import Any, Optional, Sequence, Union

from timm.models._features import feature_take_indices as feature_take_indices
from timm.models._hub import save_config_for_hf as save_config_for_hf
from timm.models._manipulate import checkpoint_seq as checkpoint_seq

try:
    from timm.models._input import update_model_input_size as update_model_input_size
except ImportError:  # timm before 1.0.31 records no arguments
    from torch import nn

    def update_model_input_size(
            model: nn.Module,
            img_size: Optional[Union[int, Sequence[int]]],
            **model_args: Any,
    ) -> None:
        """Do nothing: this timm would not read the record."""
