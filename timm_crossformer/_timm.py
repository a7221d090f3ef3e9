"""Every private name of timm this package uses, and stand-ins for what older versions lack, in one place."""
import inspect
from typing import Any, Dict, Optional

from timm.models._features import feature_take_indices as feature_take_indices
from timm.models._hub import save_config_for_hf as save_config_for_hf
from timm.models._manipulate import checkpoint_seq as checkpoint_seq
from torch import nn

try:
    from timm.models._input import update_model_input_size as update_model_input_size
except ImportError:  # before 1.0.31

    def update_model_input_size(  # type: ignore[misc]
            model: nn.Module, img_size: Any, **model_args: Any) -> None:
        """Record what a model is made of after a change, as timm does where it can."""
        args = {**getattr(model, '_model_args', {}), **{k: v for k, v in model_args.items() if v is not None}}
        args['img_size'] = img_size if img_size is None else (
            tuple(img_size) if isinstance(img_size, (list, tuple)) else (img_size, img_size))
        model._model_args = {key: value for key, value in args.items() if value is not None}  # type: ignore[assignment]


def device_and_dtype(module: nn.Module) -> Dict[str, Any]:
    """Return where new parts of a module belong, as arguments of their constructors."""
    parameter = next(module.parameters(), None)
    return {} if parameter is None else {'device': parameter.device, 'dtype': parameter.dtype}


def reset_head(head: Any, num_classes: int, pool_type: Optional[str], **dd: Any) -> None:
    """Replace the classifier of a `ClassifierHead`, on its device; before 1.0.29, timm knows the default one alone."""
    knows = 'device' in inspect.signature(head.reset).parameters
    head.reset(num_classes, pool_type=pool_type, **(dd if knows else {}))
    if not knows:
        head.to(**dd)
