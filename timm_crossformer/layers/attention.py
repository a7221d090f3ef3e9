"""Multi-head attention inside groups, with dynamic position bias: SDA and LDA alike."""
import contextlib
import contextvars
from typing import Any, Dict, Iterator, List, Optional, Tuple

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_module, use_fused_attn
from torch import Tensor, nn

from .cpu import is_plain_fp32, linear, product
from .grouping import (
    Layout,
    Run,
    divide,
    from_groups,
    group_index,
    list_runs,
    longest,
    map_layout,
    map_segments,
    to_groups,
)
from .operator import operator
from .position_bias import DynamicPosBias, bias_windows, expand_bias, known_biases, remembered_table


@register_notrace_module  # grouping depends on the size of the map
class GroupAttention(nn.Module):
    """Attention inside the groups of a token map; `grouping` is all that tells SDA from LDA.

    No group ever holds a token that does not exist: nothing is padded and, except in exported graphs, nothing is
    masked. The official code pads the map and masks the padding, with the same result.
    """

    fused_attn: torch.jit.Final[bool]

    def __init__(
            self,
            dim: int,
            num_heads: int,
            head_dim: Optional[int] = None,
            pos_bias: str = 'paper',
            qkv_bias: bool = True,
            attn_drop: float = 0.,
            proj_drop: float = 0.,
            device=None,
            dtype=None,
    ):
        """
        Args:
            dim: Channels of a token.
            num_heads: Heads.
            head_dim: Channels per head, dim // num_heads if None.
            pos_bias: 'paper' or 'lucidrains', the form of the position bias.
        """
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.num_heads = num_heads
        self.head_dim = head_dim or dim // num_heads
        self.scale = self.head_dim ** -0.5
        self.fused_attn = use_fused_attn()

        self.legacy_lookup = pos_bias == 'lucidrains'
        self.pos_bias = DynamicPosBias(dim // 4, 1, **dd) if self.legacy_lookup else DynamicPosBias(
            dim // 16, num_heads, **dd)
        self.qkv = nn.Linear(dim, 3 * num_heads * self.head_dim, bias=qkv_bias, **dd)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(num_heads * self.head_dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)
        self.set_groups()

    @torch.jit.ignore
    def set_groups(
            self,
            group_size: Tuple[int, int] = (7, 7),
            interval: int = 1,
            grouping: str = 'sda',
            fit_groups: bool = False,
    ) -> None:
        """Choose the groups.

        Args:
            group_size: G, rows and columns.
            interval: I, used by LDA.
            grouping: 'sda' or one of `LDA_GROUPINGS`.
            fit_groups: Prefer groups that divide the map.
        """
        self.group_size = group_size
        self.interval = interval
        self.grouping = grouping
        self.fit_groups = fit_groups
        self.pos_bias.legacy_size = group_size if self.legacy_lookup else None

    def forward(self, x: Tensor) -> Tensor:
        """Attend inside the groups of x, tokens [B, H, W, C]."""
        dropout = self.attn_drop.p if self.training else 0.
        if torch.jit.is_scripting() or not torch.compiler.is_compiling():
            x = self._attend_runs(x, dropout)
        elif torch.compiler.is_exporting() or torch.is_grad_enabled() or self.pos_bias.plain_parameters() is None:
            x = self.proj(self._attend_indexed(self.qkv(x), dropout))
        else:
            x = self.proj(_attend_opaque(self.qkv(x), *self.config()))
        return self.proj_drop(x)

    @torch.jit.unused
    def config(self) -> Tuple[List[Tensor], List[float], int, List[int], int, str, bool, bool, bool]:
        """Return what operators of compiled graphs need to know of this module."""
        return (
            list(self.pos_bias.mlp.parameters()),
            self.pos_bias.eps(),
            self.num_heads,
            list(self.group_size),
            self.interval,
            self.grouping,
            self.fit_groups,
            self.legacy_lookup,
            self.fused_attn,
        )

    def _attend_runs(self, x: Tensor, dropout: float) -> Tensor:
        """Attend run by run of equally long groups. Tokens with C channels are sorted, not queries, keys and values."""
        B, H, W, C = x.shape
        rows, cols = map_segments(H, W, self.group_size, self.interval, self.grouping, self.fit_groups)
        runs = list_runs(B, rows, cols)
        table = self.pos_bias(longest(rows), longest(cols))
        tokens = to_groups(x, rows, cols)
        if torch.jit.is_scripting():
            tokens = self.proj(attend_runs(self.qkv(tokens), runs, table, self.num_heads, dropout, self.fused_attn))
        else:
            qkv = linear(self.qkv, tokens)
            tokens = linear(self.proj, attend_runs(qkv, runs, table, self.num_heads, dropout, self.fused_attn))
        return from_groups(tokens, [B, H, W, C], rows, cols)

    @torch.jit.unused
    def _attend_indexed(self, qkv: Tensor, dropout: float) -> Tensor:
        """Attend with one gather of tokens, a mask on members that do not exist, and one gather back.

        No branch and no loop depends on the size of the map: one exported graph serves every size.
        """
        B, H, W, C = qkv.shape
        shared = _shared_indices.get()
        key = (self.group_size, self.interval, self.grouping, self.fit_groups)
        indices = None if shared is None else shared.get(key)
        if indices is None:
            indices = self._indices(H, W, qkv.device)
            if shared is not None:
                shared[key] = indices
        gh, gw, index, real, inverse, offset = indices
        groups = qkv.flatten(1, 2)[:, index.flatten()].reshape(-1, gh * gw, C)  # B * nG, N, C
        table = self.pos_bias(gh, gw).to(qkv.dtype)
        bias = table.flatten(1)[:, offset.flatten()].reshape(-1, gh * gw, gh * gw)
        x = _attend(*_split_heads(groups, self.num_heads), bias, dropout, False, real)
        return x.reshape(B, -1, x.shape[-1])[:, inverse].reshape(B, H, W, -1)

    @torch.jit.unused
    def _indices(self, H: int, W: int, device: torch.device) -> Tuple[int, int, Tensor, Tensor, Tensor, Tensor]:
        """Return rows and columns of a group, what `group_index` returns, and where a pair's bias is in the table."""
        rows, cols = map_layout(H, W, self.group_size, self.interval, self.grouping, self.fit_groups)
        if torch.compiler.is_exporting():
            rows, cols = _opaque_layout(rows), _opaque_layout(cols)
        gh, gw = rows[1], cols[1]
        index, real, inverse = group_index(H, W, rows, cols, device)
        row, col = divide(torch.arange(gh * gw, device=device), gw)
        offset = (row[:, None] - row + gh - 1) * (2 * gw - 1) + col[:, None] - col + gw - 1  # N, N
        return gh, gw, index, real, inverse, offset


@contextlib.contextmanager
def share_indices() -> Iterator[None]:
    """Let attentions over maps of one size share their indices: half of the work of an export is building them."""
    token = _shared_indices.set({})
    try:
        yield
    finally:
        _shared_indices.reset(token)


_shared_indices: contextvars.ContextVar[Optional[Dict[Any, Any]]] = contextvars.ContextVar('indices', default=None)


# Pairs of tokens, heads included, whose position biases are built at once: 16 MiB in fp32, as above 32 MiB glibc maps
# fresh pages every time. Only `map` groups of large images have more: 4,096 tokens and 24 heads, at 2048 px, 1.6 GB.
_BIAS_PAIRS = 1 << 22
# Groups of at least so many tokens are attended to in tiles on a CPU, of so many pairs: 2 MiB in fp32.
_MANY_TOKENS = 512
_TILE_PAIRS = 1 << 19
_KEPT_PAIRS = 1 << 18  # of biases that are kept for as long as their table is, 1 MiB in fp32


def chunks(
        tokens: Tensor,
        runs: List[Run],
        table: Tensor,
        num_heads: int,
        length: int,
) -> Iterator[Tuple[slice, Run, Optional[Tensor]]]:
    """Cut runs of tokens [..., C] into shorter ones of about `length`; yield their place, the run and its bias."""
    start = 0
    for groups, gh, gw in runs:
        bias = run_bias(tokens, table, num_heads, gh, gw)
        in_pieces = bias is None and not _suits_tiles(tokens, gh * gw)
        step = max(8 if in_pieces else 1, length // (gh * gw))  # to build a large bias takes long
        for first in range(0, groups, step):
            run = (min(step, groups - first), gh, gw)
            end = start + run[0] * gh * gw
            yield slice(start, end), run, bias
            start = end


def attend_runs(
        qkv: Tensor,
        runs: List[Run],
        table: Tensor,
        num_heads: int,
        dropout: float,
        fused: bool,
) -> Tensor:
    """Attend run by run of equally long groups.

    Args:
        qkv: Queries, keys and values [B * H * W, 3 * C] in the order of `to_groups`.
        runs: From `list_runs`.
        table: Position biases by offset [heads or 1, 2 * TH - 1, 2 * TW - 1] for the longest groups at least.
        num_heads: Heads.
        dropout: Rate of dropout of attention weights.
        fused: Use `scaled_dot_product_attention`.

    Returns:
        Tokens [B * H * W, C] in the same order.
    """
    done: List[Tensor] = []
    start = 0
    for groups, gh, gw in runs:
        end = start + groups * gh * gw
        part = qkv if len(runs) == 1 else qkv[start:end]
        bias = run_bias(qkv, table, num_heads, gh, gw)
        done.append(attend_run(part, (groups, gh, gw), table, bias, num_heads, dropout, fused))
        start = end
    return done[0] if len(done) == 1 else torch.cat(done)


def run_bias(
        x: Tensor,
        table: Tensor,
        num_heads: int,
        gh: int,
        gw: int,
        most: int = _BIAS_PAIRS,
) -> Optional[Tensor]:
    """Build the position bias of groups of gh x gw of the tokens x; None if it is not to be built at once."""
    if num_heads * (gh * gw) ** 2 > most:
        return None
    if torch.jit.is_scripting():
        return expand_bias(table, gh, gw, 0, gh)
    return None if _suits_tiles(x, gh * gw) else _kept_bias(table, gh, gw)


@torch.jit.unused
def _kept_bias(table: Tensor, gh: int, gw: int) -> Tensor:
    """Build a bias; a small one once for a table that is remembered itself."""
    kept = known_biases(table)
    if kept is None or len(table) * (gh * gw) ** 2 > _KEPT_PAIRS:
        return expand_bias(table, gh, gw, 0, gh)
    if (gh, gw) not in kept:
        with torch.inference_mode(False):
            kept[gh, gw] = expand_bias(table, gh, gw, 0, gh)
    return kept[gh, gw]


def attend_run(
        qkv: Tensor,
        run: Run,
        table: Tensor,
        bias: Optional[Tensor],
        num_heads: int,
        dropout: float,
        fused: bool,
        most: int = _BIAS_PAIRS,
) -> Tensor:
    """Attend within groups of one length; see `attend_runs`. A missing bias is taken from the table in pieces."""
    groups, gh, gw = run
    q, k, v = _split_heads(qkv.view(groups, gh * gw, qkv.shape[1]), num_heads)
    if bias is not None:
        return _attend(q, k, v, bias.to(qkv.dtype), dropout, fused, None).flatten(0, 1)
    if not torch.jit.is_scripting() and dropout == 0. and _suits_tiles(qkv, gh * gw):
        return _attend_in_tiles(q, k, v, table, gh, gw)
    rows = max(1, most // (num_heads * gw * gh * gw))  # of queries at a time
    k, v = k.flip([2]), v.flip([2])  # their order is free, and biases in this order are built faster
    # One result from the start: small ones, left between biases, would keep the heap from reusing the place of a bias.
    done = qkv.new_empty([groups, gh * gw, qkv.shape[1] // 3])
    for first in range(0, gh, rows):
        last = min(first + rows, gh)
        band = expand_bias(table, gh, gw, first, last, True).to(qkv.dtype)
        done[:, first * gw:last * gw] = _attend(q[:, :, first * gw:last * gw], k, v, band, dropout, fused, None)
    return done.flatten(0, 1)


def _split_heads(groups: Tensor, num_heads: int) -> Tuple[Tensor, Tensor, Tensor]:
    """Turn [nG, N, 3 * C] into three views [nG, heads, N, head_dim]."""
    q, k, v = groups.unflatten(-1, [3, num_heads, -1]).permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


def _attend(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor,
        dropout: float,
        fused: bool,
        real: Optional[Tensor],
) -> Tensor:
    """Attend within each group.

    Args:
        q: Queries [B * nG, heads, Q, head_dim].
        k: Keys [B * nG, heads, N, head_dim].
        v: Values, like k.
        bias: Position bias [heads or 1, Q, N].
        dropout: Rate of dropout.
        fused: Use `scaled_dot_product_attention`.
        real: Mask [nG, N] of keys that exist, None if all do; not for `fused`.

    Returns:
        Tokens [B * nG, Q, C].
    """
    # On a CPU there is no fused kernel for a bias with gradients, only a slow detour. Tracers trace again without.
    detour = bias.device.type == 'cpu' and bias.requires_grad and (torch.jit.is_scripting() or not _is_tracing())
    if not torch.jit.is_scripting() and fused and dropout == 0. and _suits_products(q, bias):
        x = _attend_by_products(q, k, v, bias)
    elif fused and not detour:
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.unsqueeze(0), dropout_p=dropout)
    else:
        attn = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1) + bias
        if real is not None:
            # Far below any score, yet finite in fp16: a group without a real token keeps finite gradients.
            attn = attn.unflatten(0, [-1, real.shape[0]]).masked_fill(~real[:, None, None, :], -3e4).flatten(0, 1)
        x = F.dropout(attn.softmax(dim=-1), dropout, dropout > 0.) @ v
    return x.transpose(1, 2).flatten(2)


@torch.jit.unused
def _is_tracing() -> bool:
    return torch.jit.is_tracing()


# In groups of up to so many tokens PyTorch's fused CPU kernel gains so little from further threads that plain products
# of matrices overtake it.
_FEW_TOKENS = 64


@torch.jit.unused
def _suits_products(q: Tensor, bias: Tensor) -> bool:
    return (
        is_plain_fp32(q) and not bias.requires_grad
        and bias.shape[2] <= _FEW_TOKENS and torch.get_num_threads() > 1)


@torch.jit.unused
def _attend_by_products(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    batch, heads, _, head_dim = q.shape
    attn = bias.repeat(batch * heads // bias.shape[0], 1, 1)
    q, k, v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
    attn.baddbmm_(q, k.transpose(1, 2), alpha=head_dim ** -0.5)  # out of place it would copy the biases first
    return torch.bmm(attn.softmax(dim=-1), v).unflatten(0, [batch, heads])


@torch.jit.unused
def _suits_tiles(x: Tensor, tokens: int) -> bool:
    return tokens >= _MANY_TOKENS and not torch.is_grad_enabled() and is_plain_fp32(x)


@torch.jit.unused
def _attend_in_tiles(q: Tensor, k: Tensor, v: Tensor, table: Tensor, gh: int, gw: int) -> Tensor:
    """Attend within large groups of gh x gw tokens without gradients: a few rows of queries of one head at a time.

    All pairs of a tile stay in the cache, and their biases are added as a view of the table. With 32 channels per head
    PyTorch's fused CPU kernel is bound by products that oneDNN computes in half of the time.

    Returns:
        Tokens [nG * N, C].
    """
    groups, heads, N, head_dim = q.shape
    done = q.new_empty([groups, N, heads, head_dim])
    # Keys in the order of the windows. oneDNN is slow with rows that lie apart.
    q, k, v = (q * head_dim ** -0.5).contiguous(), k.flip([2]).contiguous(), v.flip([2]).contiguous()
    biases = bias_windows(table.expand(heads, -1, -1), gh, gw, 0, gh)
    tiles = min(gh, -(-N * N // _TILE_PAIRS))
    rows = -(-gh // tiles)
    weights = q.new_empty([rows * gw, N])  # one place for all tiles: glibc would map fresh pages for every other one
    for group in range(groups):
        for head in range(heads):
            for first in range(0, gh, rows):
                tile = slice(first * gw, min(first + rows, gh) * gw)
                scores = product(q[group, head, tile], k[group, head], None)
                scores.view(-1, gw, gh, gw).add_(biases[head, first:first + rows])
                attn = torch.softmax(scores, dim=-1, out=weights[:len(scores)])
                done[group, tile, head] = product(attn, v[group, head].t(), None)
    return done.view(groups * N, heads * head_dim)


@operator('attend', lambda qkv, *_: qkv.new_empty([*qkv.shape[:3], qkv.shape[3] // 3]))
def _attend_opaque(
        qkv: Tensor,
        bias_mlp: List[Tensor],
        bias_eps: List[float],
        num_heads: int,
        group_size: List[int],
        interval: int,
        grouping: str,
        fit_groups: bool,
        legacy_lookup: bool,
        fused: bool,
) -> Tensor:
    """Attend as in eager mode, from inside a graph compiled for inference: one graph for all sizes, soon compiled.

    Args:
        qkv: Queries, keys and values [B, H, W, 3 * C].
        bias_mlp: Parameters of the position bias.
        bias_eps: Of its norms.
        (others): See `GroupAttention`.
    """
    rows, cols = map_segments(
        qkv.shape[1], qkv.shape[2], (group_size[0], group_size[1]), interval, grouping, fit_groups)
    table = remembered_table(
        bias_mlp, bias_eps, longest(rows), longest(cols), group_size if legacy_lookup else None)
    tokens = to_groups(qkv, rows, cols)
    tokens = attend_runs(tokens, list_runs(qkv.shape[0], rows, cols), table, num_heads, 0., fused)
    return from_groups(tokens, [*qkv.shape[:3], tokens.shape[1]], rows, cols)


def _opaque_layout(layout: Layout) -> Layout:
    """Hide from the tracer how a layout follows from the size of the map: it would carry the formulas everywhere."""
    if all(type(n) is int for n in layout):
        return layout  # one size is exported
    opaque: List[Any] = [torch.scalar_tensor(n, dtype=torch.long).item() for n in layout]
    for n in opaque:
        torch._check(n >= 1)
    return opaque[0], opaque[1], opaque[2]
