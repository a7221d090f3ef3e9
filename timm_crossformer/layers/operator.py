"""Operators of graphs that torch.compile makes for inference."""
from typing import Any, Callable

import torch
from torch import Tensor


def operator(name: str, fake: Callable[..., Tensor]) -> Callable[[Callable[..., Tensor]], Any]:
    """Make a function of typed arguments an operator that compilers do not look into.

    `torch.library.custom_op` does so, too, but looks for shared memory among arguments and results in every call: with
    20 operators that is 2% of the time of one image. Here it is up to the function to return memory of its own.

    Args:
        name: As in `torch.ops.timm_crossformer.name`.
        fake: Returns an empty result, given the same arguments.
    """
    full_name = f'timm_crossformer::{name}'

    def register(function: Callable[..., Tensor]) -> Any:
        schema = torch.library.infer_schema(function, mutates_args=())
        torch.library.define(full_name, schema, tags=torch.Tag.pt2_compliant_tag)
        torch.library.impl(full_name, 'CompositeExplicitAutograd', function)
        torch.library.register_fake(full_name, fake)
        return getattr(torch.ops.timm_crossformer, name).default

    return register
