"""What a model looks at: attention weights as they run, beside a forward pass."""
from contextlib import ExitStack
from typing import Any, Dict, List, Sequence, Tuple, cast

import torch
from torch import Tensor, nn

from ._modes import evaluating
from .layers.attention import GroupAttention
from .model import CrossFormerStage
from .ops.cpu import promote
from .ops.grouping import group_index


@torch.no_grad()
def attention_from(model: nn.Module, image: Tensor, at: Sequence[float]) -> List[List[Tensor]]:
    """Say how much every token is attended to by the token that holds a point of the image, in every block.

    The model runs once, as in evaluation, with whatever attention it has; queries, keys and position biases are looked
    at on their way. Afterwards it is as it was, even if it fails.

    Args:
        model: A CrossFormer, a pyramid of `features_only=True`, or a module that hands the image on to one as it is.
        image: One image [1, channels, height, width], normalised as the model wants it, of any size.
        at: Point (x, y), from 0 to 1: fractions of the image's width, from the left, and height, from the top.

    Returns:
        For every stage, for every block, weights [heads, H, W], in fp32 or fp64, over the map of the stage. They are 0
        outside the group of the token, and sum to 1 for every head. Even blocks are short-distance attention, odd ones
        long-distance attention. `token_at` says which token asks.

    Raises:
        ValueError: The model holds no CrossFormer or more than one, or scales the image; the image is not one image;
            the point lies outside.
    """
    stages = [module for module in model.modules() if isinstance(module, CrossFormerStage)]
    if not stages:
        raise ValueError(
            f'`model` needs to be or to hold a CrossFormer of timm_crossformer, got {type(model).__name__}. Create it '
            'with timm.create_model, and pass it before tracing, scripting or export.')
    if image.ndim != 4 or image.shape[0] != 1:
        raise ValueError(
            f'`image` needs shape [1, channels, height, width], got {list(image.shape)}. Pass images one by one.')
    height, width = image.shape[2:]
    tokens = [token_at(at, height, width, stage) for stage in range(len(stages))]
    sizes = [(-(-height // (4 * 2 ** i)), -(-width // (4 * 2 ** i))) for i in range(len(stages))]
    stage_of = {block.attn: i for i, stage in enumerate(stages) for block in cast(Any, stage.blocks)}
    maps: List[List[Tensor]] = [[] for _ in stages]
    seen: Dict[nn.Module, Tensor] = {}

    def keep(module: nn.Module, args: Any, out: Tensor) -> None:
        seen[module] = out

    def weigh(attn: Any, args: Any, out: Tensor) -> None:
        qkv, table = seen.pop(attn.qkv), seen.pop(attn.pos_bias)
        stage = stage_of[attn]
        if tuple(qkv.shape[1:3]) != sizes[stage]:
            raise ValueError(
                f'`model` needs to hand the image to one CrossFormer as it is: stage {stage} should have a map of '
                f'{sizes[stage]} tokens, got {tuple(qkv.shape[1:3])}. Pass the CrossFormer inside.')
        maps[stage].append(_weights_of(attn, qkv, table, tokens[stage]))

    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        for attn in stage_of:
            for part, hook in ((attn.qkv, keep), (attn.pos_bias, keep), (attn, weigh)):
                stack.callback(part.register_forward_hook(hook).remove)
        stack.enter_context(torch.compiler.set_stance('force_eager'))  # compiled code runs no hook
        model(image)
    return maps


def token_at(at: Sequence[float], height: int, width: int, stage: int) -> Tuple[int, int]:
    """Find the token that holds a point of an image.

    Args:
        at: Point (x, y), from 0 to 1: fractions of the width, from the left, and of the height, from the top.
        height: Of the image, in pixels.
        width: Of the image, in pixels.
        stage: From 0 up. A token of it stands for 4 * 2 ** stage pixels per side.

    Returns:
        Row and column in the map of the stage.

    Raises:
        ValueError: The point lies outside the image.
    """
    if len(at) != 2 or not all(0 <= part <= 1 for part in at):
        raise ValueError(
            f'`at` needs two numbers from 0 to 1, got {tuple(at)}. Pass x / width and y / height of the point.')
    x, y = at
    column, row = min(int(x * width), width - 1), min(int(y * height), height - 1)  # the far edge is the last pixel
    return row // (4 * 2 ** stage), column // (4 * 2 ** stage)


def _weights_of(attn: GroupAttention, qkv: Tensor, table: Tensor, token: Tuple[int, int]) -> Tensor:
    """Compute the weights [heads, H, W] of one token of a map.

    Args:
        attn: Has the groups.
        qkv: Queries, keys and values of one image [1, H, W, 3 * C].
        table: Position biases [heads or 1, 2 * TH - 1, 2 * TW - 1].
        token: Row and column.
    """
    _, H, W, _ = qkv.shape
    rows, cols = attn.layouts(H, W)
    index, real, inverse = group_index(H, W, rows, cols, qkv.device)
    group, asking = divmod(int(inverse[token[0] * W + token[1]]), index.shape[1])
    member = real[group].nonzero()[:, 0]  # those that exist
    keys = index[group, member]
    parts = promote(qkv[0].flatten(0, 1)).unflatten(1, [3, attn.num_heads, -1])  # H * W, 3, heads, head_dim
    q, k = parts[index[group, asking], 0], parts[keys, 1]
    TH, TW = (table.shape[1] + 1) // 2, (table.shape[2] + 1) // 2
    dy, dx = asking // cols[1] - member // cols[1], asking % cols[1] - member % cols[1]
    bias = table[:, TH - 1 + dy, TW - 1 + dx].to(q.dtype)
    scores = torch.einsum('hd,nhd->hn', q * q.shape[-1] ** -0.5, k) + bias
    weights = scores.new_zeros(attn.num_heads, H * W)
    weights[:, keys] = scores.softmax(dim=-1)
    return weights.unflatten(1, [H, W])
