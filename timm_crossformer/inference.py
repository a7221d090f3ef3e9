"""The inference form: the same network for those who ask for speed, by timm's convention of reparameterizing.

Every shortcut past a layer lives here, in modules of other names and classes. A block with anything in it that we do
not know stays as it is, and every layer of it is called. So is every layer of a block of the form, on whole maps, once
somebody watches it or has replaced one.
"""
from contextlib import ExitStack
from typing import Any, Callable, Dict, Iterator, List, Mapping, Optional, Sequence, Set, Tuple, Type, Union, cast

import torch
import torch.nn.functional as F
from timm.layers import GELU, DropPath, GELUTanh, LayerNorm, Mlp, RmsNorm
from timm.utils import reparameterize_model
from torch import Tensor, nn

from ._modes import evaluating
from ._torch import as_written, has_hooks, is_eager_inference, is_known, is_symbol
from .config import resolve_img_size
from .layers import CrossFormerBlock, CrossScaleEmbed, DynamicPosBias, GroupAttention
from .layers.position_bias import group_offsets
from .ops import packing
from .ops.grouping import Layout, map_layout
from .ops.operator import attend_groups

for name in ('attend_groups', 'map_layout', 'group_offsets'):  # one node each to a tracer, as in the layers
    torch.fx.wrap(name)

# Numbers of a map in a part, 2 MiB in fp32 and four times as much within the MLP: above 32 MiB glibc maps fresh pages
# for every result, at the cost of a fault each.
_PART = 1 << 19

# About as many numbers of a weight tell whether somebody wrote to it. Each is far from the processor.
_LOOKED_AT = 16

_NORMS = (nn.LayerNorm, nn.RMSNorm, LayerNorm, RmsNorm)
_RATES = (nn.Dropout, DropPath, nn.Identity)  # nothing, in evaluation
# The layers of a block whose work we know: with these, every token of a map is treated by itself but in attention.
_LAYERS: Dict[str, Tuple[Type[nn.Module], ...]] = {
    '': (CrossFormerBlock,),
    'norm1': _NORMS,
    'attn': (GroupAttention,),
    'attn.pos_bias': (DynamicPosBias,),
    'attn.qkv': (nn.Linear,),
    'attn.attn_drop': _RATES,
    'attn.proj': (nn.Linear,),
    'attn.proj_drop': _RATES,
    'drop_path1': _RATES,
    'norm2': _NORMS,
    'mlp': (Mlp,),
    'mlp.fc1': (nn.Linear,),
    'mlp.act': (nn.GELU, GELU, GELUTanh, nn.ReLU, nn.SiLU),
    'mlp.drop1': _RATES,
    'mlp.norm': (nn.Identity,),
    'mlp.fc2': (nn.Linear,),
    'mlp.drop2': _RATES,
    'drop_path2': _RATES,
}
_BIAS_LAYERS = (nn.Sequential, nn.Linear, nn.LayerNorm, nn.ReLU)


# Methods that our shortcuts stand in the place of.
_METHODS = frozenset(('__call__', '_call_impl', 'forward', '_conv_forward', 'layouts', 'bias_table', 'attend'))


def reparameterize(
        model: nn.Module,
        img_size: Optional[Union[int, Tuple[int, int]]] = None,
        device: Optional[Union[str, torch.device]] = None,
) -> nn.Module:
    """Return a copy of a model, or of one that holds CrossFormers, for inference: equal to 1e-5, and faster.

    As `timm.models.reparameterize_model` does, and besides for an image size and a device.

    Args:
        model: Any module.
        img_size: Image size, in pixels, whose position biases are to be constants, a number or (height, width). None:
            those of groups of `group_size`, which is all that images of 224 pixels need. At any other size the form
            is right as well, and computes its position biases in every call, as the model does.
        device: Where to move the copy.

    Raises:
        ValueError: Nothing in the model is a CrossFormer. The image size is none, or the model does not take an image
            of it alone.
    """
    size = resolve_img_size(img_size)
    fast = reparameterize_model(as_written(model))
    attentions = [module for module in fast.modules() if isinstance(module, InferenceAttention)]
    if not attentions:
        raise ValueError(
            'The model needs a CrossFormer with blocks that nobody has changed, got '
            f'{type(model).__name__} without one. Reparameterize before layers are replaced or watched, or leave it.')
    fast = fast.to(device) if device is not None else fast
    if size is not None:
        table = attentions[0].table
        channels = next(m.in_chans for m in fast.modules() if isinstance(getattr(m, 'in_chans', None), int))
        image = torch.zeros(1, cast(int, channels), *size, device=table.device, dtype=table.dtype)
        try:
            found = map_sizes(fast, image)
        except Exception as e:
            raise ValueError(
                f'`img_size` is for models that take an image alone, here {list(image.shape)}, and the '
                f'{type(model).__name__} does not: {e} Leave `img_size` out, or reparameterize the CrossFormer alone.'
            ) from e
        if not found:
            raise ValueError(
                f'`forward` of the {type(model).__name__}, copied, runs other layers than those of the copy. Put a '
                'module around it in place of a function, or leave `img_size` out.')
        for block, sizes in found.items():
            for height, width in sizes:
                block.attn.prepare(height, width)
    return fast


def map_sizes(fast: nn.Module, image: Tensor) -> Dict['InferenceBlock', Set[Tuple[int, int]]]:
    """Run an inference form on an image, and return the height and width of every map that each block was called on."""
    sizes: Dict[InferenceBlock, Set[Tuple[int, int]]] = {}
    with ExitStack() as stack, evaluating(fast), torch.no_grad():
        for block in fast.modules():
            if isinstance(block, InferenceBlock):
                handle = block.register_forward_pre_hook(
                    lambda block, args, kwargs: sizes.setdefault(block, set()).add(
                        tuple(next(iter([*args, *kwargs.values()])).shape[1:3])), with_kwargs=True)
                stack.callback(handle.remove)
        fast(image)
    return sizes


def inference_form(block: nn.Module) -> nn.Module:
    """Return the inference form of a block, or the block itself if it is not what the package made of it."""
    known = _is_made_of(block, _LAYERS, ('cooling.', 'attn.pos_bias.mlp.')) and all(
        _is_ours(layer, _BIAS_LAYERS) for layer in block.get_submodule('attn.pos_bias.mlp').modules())
    # A rate that is on in evaluation is meant to be on: uncertainty by dropout.
    known = known and not any(
        layer.training and not block.training for layer in block.modules() if isinstance(layer, (nn.Dropout, DropPath)))
    return InferenceBlock(cast(CrossFormerBlock, block)) if known else block


def check_form(state_dict: Mapping[str, Any], model: nn.Module) -> None:
    """Raise ValueError if weights are those of an inference form, and a model is none."""
    if any('.attn.position.' in key for key in state_dict) and not any(
            isinstance(module, InferenceBlock) for module in model.modules()):
        raise ValueError(
            'The weights are those of a model that was reparameterized for inference, and this model was not. Save the '
            'weights before `reparameterize`, or load these into a model after it.')


def pack_convolutions(embed: nn.Module) -> None:
    """Put packed convolutions in the place of those of a cross-scale embedding; others stay as they are."""
    convs = embed.convs if _is_ours(embed, (CrossScaleEmbed,)) else nn.ModuleList()
    for name, conv in cast(nn.ModuleList, convs).named_children():
        if isinstance(conv, nn.Conv2d) and _is_ours(conv, (nn.Conv2d,)) and _is_simple(conv):
            setattr(convs, name, PackedConv(conv))


def _is_simple(conv: nn.Conv2d) -> bool:
    """Return whether a convolution is of the kind that `PackedConv` knows."""
    return not isinstance(conv.padding, str) and (
        conv.dilation == (1, 1) and conv.groups == 1 and conv.padding_mode == 'zeros') and all(
        a == b for a, b in (conv.kernel_size, conv.stride, conv.padding))


def _is_made_of(
        block: nn.Module, layers: Mapping[str, Sequence[Type[nn.Module]]], others: Tuple[str, ...]) -> bool:
    """Return whether a block has these very layers, each ours of one of these classes, beside others by their names."""
    found = {name: layer for name, layer in block.named_modules() if not f'{name}.'.startswith(others)}
    return set(found) == set(layers) and all(_is_ours(layer, layers[name]) for name, layer in found.items())


def _is_ours(module: nn.Module, kinds: Sequence[Type[nn.Module]]) -> bool:
    """Return whether a module is of one of these very classes, as written, with weights of its own, and unwatched."""
    kind = type(module)
    weights = [*module.parameters(recurse=False), *(getattr(module, name, None) for name in ('weight', 'bias'))]
    return (
        kind in kinds and not has_hooks(module)
        and _is_as_written(kind)
        and _METHODS.isdisjoint(module.__dict__)  # else the instance has one of its own
        and all(weight is None or type(weight) is nn.Parameter for weight in weights)
        and len(getattr(module, 'normalized_shape', ('channels',))) == 1)


def _is_as_written(kind: Type[nn.Module]) -> bool:
    """Return whether the methods of a class come from the files of it and of those that it inherits from."""
    files = {base.__module__ for base in kind.__mro__}
    methods = (getattr(kind, name, None) for name in _METHODS)
    return all(method is None or getattr(method, '__globals__', {}).get('__name__') in files for method in methods)


class _Cache:
    """What a layer has packed last. It is neither copied nor saved with the layer."""

    def __init__(self) -> None:
        self.entry: Optional[Tuple[Any, ...]] = None

    def __deepcopy__(self, memo: Dict[int, Any]) -> '_Cache':
        return _Cache()

    def __reduce__(self) -> Tuple[Any, ...]:
        return _Cache, ()


def _frozen(p: nn.Parameter) -> nn.Parameter:
    """Return a parameter that does not learn: the same, so that layers that share it still do."""
    if not p.is_inference():
        return cast(nn.Parameter, p.requires_grad_(False))
    with torch.inference_mode(False):  # else it would not say when it changes
        return nn.Parameter(p.clone(), requires_grad=False)


def _is_constant(p: Tensor) -> bool:
    """Return whether a weight is neither computed, nor given for one call, nor learns in this one."""
    return type(p) is nn.Parameter and not (p.requires_grad and torch.is_grad_enabled())


class _Packed(nn.Module):
    """A layer that does not learn; on a CPU it has its weight once more in an order of oneDNN's."""

    def __init__(self, layer: Union[nn.Linear, nn.Conv2d]):
        super().__init__()
        self.weight = _frozen(cast(nn.Parameter, layer.weight))
        self.bias = None if layer.bias is None else _frozen(cast(nn.Parameter, layer.bias))
        self._packed = _Cache()

    @torch.jit.unused
    def _suits_packing(self, x: Tensor) -> bool:
        weight, bias = self.weight, self.bias
        return is_eager_inference(x) and packing.suits(x, weight) and _is_constant(weight) and (
            bias is None or _is_constant(bias))

    def _pack(self, pack: Callable[..., Tensor], *args: Any) -> Tensor:
        """Return the weight packed, which must not be older than the weight."""
        weight = self.weight
        version = 0 if weight.is_inference() else weight._version
        state = weight.data_ptr(), version, args
        entry = self._packed.entry
        # Written to by `data` or by NumPy, a weight keeps its version: look at some of its numbers.
        if entry is None or entry[0] is not weight or entry[1] != state or not torch.equal(entry[2], entry[3]):
            seen = weight.detach().diagonal()[..., ::max(1, min(weight.shape[:2]) // _LOOKED_AT)]
            self._packed.entry = entry = weight, state, seen, seen.clone(), pack(weight.detach(), *args)
        return cast(Tensor, entry[-1])

    def extra_repr(self) -> str:
        """Name the shape of the weight."""
        return f'weight={list(self.weight.shape)}, bias={self.bias is not None}'


class PackedLinear(_Packed):
    """`nn.Linear` for inference, with GELU if asked for."""

    def __init__(self, linear: nn.Linear, gelu: bool = False):
        """
        Args:
            linear: Whose weights to take.
            gelu: Apply GELU to the result.
        """
        super().__init__(linear)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.gelu = gelu

    def forward(self, x: Tensor) -> Tensor:
        """Transform x [..., in_features]."""
        if not torch.jit.is_scripting() and self._suits_packing(x):
            return self._multiply(x)
        x = F.linear(x, self.weight, self.bias)
        return F.gelu(x) if self.gelu else x

    @torch.jit.unused
    def _multiply(self, x: Tensor) -> Tensor:
        return packing.linear(x, self._pack(packing.pack_linear), self.bias, self.gelu)


class PackedConv(_Packed):
    """`nn.Conv2d` with a square kernel and zeros around, for inference: one image has fewer numbers than its weight."""

    def __init__(self, conv: nn.Conv2d):
        super().__init__(conv)
        self.in_channels, self.out_channels, self.kernel_size = conv.in_channels, conv.out_channels, conv.kernel_size
        self.stride = conv.stride[0]
        self.padding = int(conv.padding[0])

    def forward(self, x: Tensor) -> Tensor:
        """Convolve x [B, C, H, W]."""
        if not torch.jit.is_scripting() and self._suits_packing(x):
            return self._convolve(x)
        return F.conv2d(x, self.weight, self.bias, [self.stride, self.stride], [self.padding, self.padding])

    @torch.jit.unused
    def _convolve(self, x: Tensor) -> Tensor:
        packed = self._pack(packing.pack_conv, self.stride, self.padding, x.shape)
        return packing.conv(x, packed, self.bias, self.stride, self.padding)


class InferenceAttention(nn.Module):
    """Attention inside groups, with the position biases of groups up to a size as a constant table."""

    table: Tensor

    def __init__(self, attn: GroupAttention):
        super().__init__()
        self.num_heads = attn.num_heads
        self.group_size = attn.group_size
        self.interval = attn.interval
        self.grouping = attn.grouping
        self.fit_groups = attn.fit_groups
        self.legacy_size = attn.legacy_size
        self.position = attn.pos_bias.requires_grad_(False)  # for groups larger than the table
        self.qkv = PackedLinear(attn.qkv)
        self.proj = PackedLinear(attn.proj)
        self.register_buffer('table', self._compute_table(*self.group_size, attn.qkv.weight.device))

    @torch.jit.ignore
    def prepare(self, height: int, width: int) -> None:
        """Let the table serve a map of height x width tokens."""
        rows, cols = self.layouts(height, width)
        gh, gw = (max(self.table.shape[i + 1] // 2 + 1, layout[1]) for i, layout in enumerate((rows, cols)))
        self.table = self._compute_table(gh, gw, self.table.device)

    @torch.jit.ignore
    def set_groups(self, *args: Any) -> None:
        """Raise ValueError: the groups are those of the model that this was made from."""
        raise ValueError(
            'The groups of a model that is reparameterized for inference stay as they are. Call `set_input_size` '
            'before it is reparameterized.')

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> 'InferenceAttention':
        before = self.table
        super()._apply(fn, recurse)
        if (self.table.dtype, self.table.device) != (before.dtype, before.device):  # computed in its precision
            height, width = (side // 2 + 1 for side in self.table.shape[1:])
            self.table = self._compute_table(height, width, self.table.device)
        return self

    @torch.jit.ignore
    @torch.no_grad()
    def _compute_table(self, height: int, width: int, device: torch.device) -> Tensor:
        return self.position(group_offsets(height, width, self.legacy_size, device)).contiguous()

    def layouts(self, height: int, width: int) -> Tuple[Layout, Layout]:
        """Lay out the rows and columns of a map of height x width tokens."""
        return map_layout(height, width, self.group_size, self.interval, self.grouping, self.fit_groups)

    def bias_table(self, rows: Layout, cols: Layout, device: torch.device) -> Tensor:
        """Return the bias of every offset inside a group, at least [heads or 1, 2 * gh - 1, 2 * gw - 1]."""
        known = True
        if not torch.jit.is_scripting():
            known = is_known(rows[1], cols[1])
        if known and 2 * rows[1] - 1 <= self.table.shape[1] and 2 * cols[1] - 1 <= self.table.shape[2]:
            return self.table
        return self.position(group_offsets(rows[1], cols[1], self.legacy_size, device))

    def forward(self, x: Tensor) -> Tensor:
        """Attend inside the groups of tokens x [B, H, W, C]."""
        rows, cols = self.layouts(x.shape[1], x.shape[2])
        return self.attend(x, self.bias_table(rows, cols, x.device), rows, cols)

    def attend(self, x: Tensor, table: Tensor, rows: Layout, cols: Layout) -> Tensor:
        """Attend inside the groups of tokens x [B, H, W, C], laid out as given."""
        return self.proj(attend_groups(self.qkv(x), table, self.num_heads, rows, cols))


class InferenceBlock(nn.Module):
    """A block that does not learn; on a CPU, wide maps pass through it part by part.

    A whole map would go to main memory and back at every step. A part holds whole groups, so that attention does not
    notice, and everything else between two residuals treats each token by itself.
    """

    def __init__(self, block: CrossFormerBlock):
        super().__init__()
        mlp, act = cast(Mlp, block.mlp), block.mlp.act
        gelu = isinstance(act, (nn.GELU, GELU)) and getattr(act, 'approximate', 'none') == 'none'
        self.attn_norm = block.norm1.requires_grad_(False)
        self.attn = InferenceAttention(block.attn)
        self.mlp_norm = block.norm2.requires_grad_(False)
        self.mlp = nn.Sequential(
            PackedLinear(cast(nn.Linear, mlp.fc1), gelu), nn.Identity() if gelu else act,
            PackedLinear(cast(nn.Linear, mlp.fc2)))
        self.cooling = block.cooling.requires_grad_(False)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """Transform tokens [B, H, W, C].

        Raises:
            ValueError: The block is in training mode.
        """
        if self.training:
            raise ValueError(
                'The inference form does not train, and is in training mode. Call `eval()`, or train the model that it '
                'was made from.')
        if not torch.jit.is_scripting() and self._goes_in_parts(x):
            x = self._in_parts(x)
        else:
            x = x + self.attn(self.attn_norm(x))
            x = x + self.mlp(self.mlp_norm(x))
        return self.cooling(x)

    @torch.jit.unused
    def _goes_in_parts(self, x: Tensor) -> bool:
        # Two parts are not worth their overhead.
        return not is_symbol(x) and x.device.type == 'cpu' and is_eager_inference(x) and (
            x.numel() > 2 * _PART and self.is_as_made()
            and not (torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())))

    @torch.jit.unused
    def is_as_made(self) -> bool:
        """Return whether nothing of the block was replaced since, and nobody watches its layers."""
        return _is_made_of(self, _FORM_LAYERS, ('cooling.', 'attn.position.'))

    @torch.jit.unused
    def _in_parts(self, x: Tensor) -> Tensor:
        rows, cols = self.attn.layouts(x.shape[1], x.shape[2])
        table = self.attn.bias_table(rows, cols, x.device)
        out = torch.empty_like(x)
        for place, part_rows, part_cols in parts(x, rows, cols):
            part = x[place]
            part = part + self.attn.attend(self.attn_norm(part), table, part_rows, part_cols)
            # A group larger than a part is whole for attention only.
            few = max(1, _PART // part[:, 0].numel())
            for tokens, into in zip(part.split(few, 1), out[place].split(few, 1), strict=True):
                torch.add(tokens, self.mlp(self.mlp_norm(tokens)), out=into)
        return out

    def _load_from_state_dict(self, state_dict: Dict[str, Any], prefix: str, *args: Any) -> None:
        if f'{prefix}norm1.weight' in state_dict:
            raise ValueError(
                'The model is reparameterized for inference, and the weights are those of a model that trains. Load '
                'them into a model as `timm.create_model` returns it, then reparameterize that.')
        table = state_dict.get(f'{prefix}attn.table')
        if table is not None and table.ndim == 3 and len(table) == len(self.attn.table):
            self.attn.table = self.attn.table.new_empty(table.shape)  # may serve larger groups than ours
        super()._load_from_state_dict(state_dict, prefix, *args)


# What a block of the form is made of, as long as nobody changes it.
_FORM_LAYERS: Dict[str, Tuple[Type[nn.Module], ...]] = {
    '': (InferenceBlock,),
    'attn_norm': _NORMS,
    'attn': (InferenceAttention,),
    'attn.qkv': (PackedLinear,),
    'attn.proj': (PackedLinear,),
    'mlp_norm': _NORMS,
    'mlp': (nn.Sequential,),
    'mlp.0': (PackedLinear,),
    'mlp.1': _LAYERS['mlp.act'] + (nn.Identity,),
    'mlp.2': (PackedLinear,),
}


def parts(x: Tensor, rows: Layout, cols: Layout) -> Iterator[Tuple[Tuple[slice, slice, slice], Layout, Layout]]:
    """Cut tokens x [B, H, W, C] into parts of about `_PART` numbers that hold whole groups, the larger where need be.

    Yields:
        Place of a part in x, and the layouts of its rows and columns.
    """
    B, H, W, C = x.shape
    images = max(1, _PART // (H * W * C))
    row_parts = _cut(H, rows, _PART // (W * C))
    # One part of the rows may still be too much: the first one is the longest.
    start, stop, step = row_parts[0][0].indices(H)
    col_parts = _cut(W, cols, _PART // (len(range(start, stop, step)) * C))
    for image in range(0, B, images):
        for row, row_layout in row_parts:
            for col, col_layout in col_parts:
                yield (slice(image, image + images), row, col), row_layout, col_layout


def _cut(n: int, layout: Layout, most: int) -> List[Tuple[slice, Layout]]:
    """Cut an axis of n tokens into parts of whole groups and about `most` tokens: a few regions each, or one phase."""
    regions, size, interval = layout
    if n <= most:
        return [(slice(0, n), layout)]
    if regions > 1:
        few = max(1, most // (size * interval))
        return [
            (slice(first * size * interval, min(n, (first + few) * size * interval)), (few, size, interval))
            for first in range(0, regions, few) if first * size * interval < n]
    return [(slice(phase, n, interval), (1, size, 1)) for phase in range(min(interval, n))]
