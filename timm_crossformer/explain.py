"""What a model looks at: attention weights as they run, beside a forward pass."""
from typing import Any, Callable, Dict, List, Sequence, Tuple, cast

import torch
from torch import Tensor, nn

from ._modes import evaluation_copy
from .layers.attention import GroupAttention
from .model import CrossFormerStage
from .ops.cpu import promote
from .ops.grouping import group_index


@torch.no_grad()
def attention_from(model: nn.Module, image: Tensor, at: Sequence[float]) -> List[List[Tensor]]:
    """Say how much every token is attended to by the token that holds a point of the image, in every block.

    The model runs once, as in evaluation, with whatever attention it has; queries, keys and position biases are looked
    at on their way. What runs are copies of its modules, with its weights: other threads may use the model, or train
    it, at the same time, and it is as it was, even if it fails.

    Args:
        model: A CrossFormer, a pyramid of `features_only=True`, or a module that hands the image on to one as it is.
        image: One image [1, channels, height, width], normalised as the model wants it, of any size.
        at: Point (x, y), from 0 to 1: fractions of the image's width, from the left, and height, from the top.

    Returns:
        For every stage, for every block, weights [heads, H, W], in fp32 or fp64, over the map of the stage. They are 0
        outside the group of the token, and sum to 1 for every head. Even blocks are short-distance attention, odd ones
        long-distance attention. `token_at` says which token asks.

    Raises:
        ValueError: The model holds no CrossFormer or more than one, scales or repeats the image, or runs a block never
            or more than once, or without its attention; the image is not one image; the point lies outside.
    """
    given, model = type(model).__name__, evaluation_copy(model)
    names = {module: name for name, module in model.named_modules()}
    stages = [module for module in names if isinstance(module, CrossFormerStage)]
    if not stages:
        raise ValueError(
            f'`model` needs to be or to hold a CrossFormer of timm_crossformer, got {given}. Create it with '
            'timm.create_model, and pass it before tracing, scripting or export.')
    networks = sum(isinstance(stage.downsample, nn.Identity) for stage in stages)  # in first stages alone
    if networks != 1:
        raise ValueError(
            f'`model` needs to hold one CrossFormer, got {networks} in {given}. Pass the one to look into.')
    if image.ndim != 4 or image.shape[0] != 1:
        raise ValueError(
            f'`image` needs shape [1, channels, height, width], got {list(image.shape)}. Pass images one by one.')
    height, width = image.shape[2:]
    seen: Dict[str, List[Tensor]] = {}
    maps: List[List[List[Tensor]]] = []
    for i, stage in enumerate(stages):
        token = token_at(at, height, width, i)
        size = -(-height // (4 * 2 ** i)), -(-width // (4 * 2 ** i))
        maps.append([])
        for block in cast(nn.Module, stage.blocks).children():
            inside = [module for module in block.modules() if isinstance(module, GroupAttention)]
            if len(inside) != 1:
                raise ValueError(
                    f'`model` needs one GroupAttention in every block, got {len(inside)} in {names[block]}. Pass it '
                    'before its attention is replaced.')
            name = names[inside[0]]
            seen[name] = _watch(inside[0], f'stage {i}', name, token, size)
            maps[i].append(seen[name])
    model(image)
    for name, found in seen.items():
        if len(found) != 1:
            raise ValueError(
                f'`model` needs to run every block once, got {len(found)} runs of {name}. Pass the CrossFormer inside, '
                'with all of its blocks.')
    return [[found[0] for found in blocks] for blocks in maps]


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


def _watch(attn: GroupAttention, stage: str, name: str, token: Tuple[int, int], size: Tuple[int, int]) -> List[Tensor]:
    """Hook an attention, and return a list that gets the weights of every run of it.

    Args:
        attn: To watch from now on.
        stage: Its stage, for messages.
        name: Its name, for messages.
        token: Row and column of the token that asks.
        size: Rows and columns that the map should have.
    """
    parts: Dict[str, Tensor] = {}
    found: List[Tensor] = []

    def keep(part: str) -> Callable[..., None]:
        return lambda module, args, out: parts.update({part: out})

    def weigh(module: Any, args: Any, out: Any) -> None:
        if len(parts) != 2:
            raise ValueError(
                f'`model` needs attention that runs its `qkv` and its `pos_bias`, got {sorted(parts)} of {name}. '
                'Pass it before its attention is replaced.')
        qkv, table = parts.pop('qkv'), parts.pop('pos_bias')
        images, *got = qkv.shape[:3]
        if images != 1 or tuple(got) != size:
            raise ValueError(
                f'`model` needs to hand the image to one CrossFormer as it is: {stage} should have a map of {size} '
                f'tokens, got {f"{images} of " * (images != 1)}{tuple(got)}. Pass the CrossFormer inside.')
        found.append(_weights_of(attn, qkv, table, token))

    attn.qkv.register_forward_hook(keep('qkv'))
    attn.pos_bias.register_forward_hook(keep('pos_bias'))
    attn.register_forward_hook(weigh)
    return found


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
