"""Dynamic position bias, DPB (paper, section 3.3): attention bias from relative offsets through a small MLP."""
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from .cpu import is_plain
from .grouping import divide

_HIDDEN = nn.LayerNorm, nn.ReLU, nn.Linear
_LAYERS = nn.Linear, *_HIDDEN, *_HIDDEN, *_HIDDEN  # of the MLP
_PARAMETERS = 14  # weights and biases of its linear layers and norms
_CACHE_SIZES = 8  # group sizes remembered per module; a fixed image size needs one or two


class DynamicPosBias(nn.Module):
    """Map relative offsets, in tokens of the group, to one attention bias per head.

    In evaluation the table is kept between calls for as long as the parameters hold the values it was computed from,
    so that it never needs to be reset.
    """

    def __init__(
            self,
            dim: int,
            num_heads: int,
            device=None,
            dtype=None,
    ):
        """
        Args:
            dim: Width of the MLP.
            num_heads: Outputs of the MLP; 1 is one bias for all heads.
        """
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.legacy_size: Optional[Tuple[int, int]] = None  # group size of vit-pytorch's lookup, see `_offsets`
        self.mlp = nn.Sequential(
            nn.Linear(2, dim, **dd),
            nn.LayerNorm(dim, **dd), nn.ReLU(), nn.Linear(dim, dim, **dd),
            nn.LayerNorm(dim, **dd), nn.ReLU(), nn.Linear(dim, dim, **dd),
            nn.LayerNorm(dim, **dd), nn.ReLU(), nn.Linear(dim, num_heads, **dd),
        )

    def forward(self, height: int, width: int) -> Tensor:
        """Compute the bias of every offset inside a group of height x width tokens.

        Returns:
            Table [heads, 2 * height - 1, 2 * width - 1]; entry (height - 1 + dy, width - 1 + dx) is the bias of a
            query dy rows below and dx columns right of its key.
        """
        if torch.jit.is_scripting():
            return self._table(height, width)
        return self._eager_table(height, width)

    def _table(self, height: int, width: int) -> Tensor:
        weight = self._weight()
        table = self.mlp(_offsets(height, width, self.legacy_size, weight.device).to(weight.dtype))
        return table.permute(2, 0, 1).contiguous()  # it is read along rows, many times

    def _weight(self) -> Tensor:
        """Return a parameter that tells device and dtype; quantisation leaves norms alone."""
        return self.mlp[1].weight

    @torch.jit.unused
    def plain_parameters(self) -> Optional[List[nn.Parameter]]:
        """Return the parameters if they alone tell the table: no layer was replaced, is observed or lacks one."""
        if len(self.mlp) != len(_LAYERS) or not all(map(is_plain, self.mlp, _LAYERS)):
            return None
        # `parameters()` takes six times as long, once per block and image.
        params = [p for layer in self.mlp for p in layer._parameters.values() if p is not None]
        return params if len(params) == _PARAMETERS else None

    @torch.jit.unused
    def eps(self) -> List[float]:
        """Return the eps of the norms of a plain MLP."""
        return [layer.eps for layer in self.mlp if isinstance(layer, nn.LayerNorm)]

    @torch.jit.unused
    def _eager_table(self, height: int, width: int) -> Tensor:
        """Look the table up in the cache, or compute it where a cache would be seen or could not be trusted."""
        if self.training or torch.jit.is_tracing() or torch.compiler.is_compiling():
            return self._exact_table(height, width)
        params = self.plain_parameters()
        if params is None or (torch.is_grad_enabled() and any(p.requires_grad for p in params)):
            return self._exact_table(height, width)
        key = (height, width, self.legacy_size, *self.eps())
        return remember(params, key, lambda: self._exact_table(height, width))

    @torch.jit.unused
    def _exact_table(self, height: int, width: int) -> Tensor:
        """Compute the table in the precision of the parameters: the same under autocast, in training and after."""
        device_type = self._weight().device.type
        if not torch.amp.is_autocast_available(device_type) or not torch.is_autocast_enabled(device_type):
            return self._table(height, width)
        with torch.autocast(device_type, enabled=False):
            return self._table(height, width)


def remembered_table(
        mlp: List[Tensor],
        eps: List[float],
        height: int,
        width: int,
        legacy_size: Optional[Sequence[int]],
) -> Tensor:
    """Look up the table of a `DynamicPosBias` by the parameters of its MLP and the eps of its norms, or compute it."""
    size = None if legacy_size is None else (legacy_size[0], legacy_size[1])
    return remember(mlp, (height, width, size, *eps), lambda: bias_table(mlp, eps, height, width, size))


def bias_table(
        mlp: List[Tensor],
        eps: List[float],
        height: int,
        width: int,
        legacy_size: Optional[Tuple[int, int]],
) -> Tensor:
    """Compute the table of a `DynamicPosBias` from the parameters of its MLP and the eps of its norms alone."""
    x = _offsets(height, width, legacy_size, mlp[0].device).to(mlp[0].dtype)
    with torch.autocast(x.device.type, enabled=False):
        x = F.linear(x, mlp[0], mlp[1])
        for i, norm_eps in zip(range(2, len(mlp), 4), eps, strict=True):
            x = F.relu(F.layer_norm(x, mlp[i].shape, mlp[i], mlp[i + 1], norm_eps))
            x = F.linear(x, mlp[i + 2], mlp[i + 3])
    return x.permute(2, 0, 1).contiguous()


def _offsets(height: int, width: int, legacy_size: Optional[Tuple[int, int]], device: torch.device) -> Tensor:
    """Return what the MLP sees of each offset, [2 * height - 1, 2 * width - 1, 2]."""
    dy = torch.arange(1 - height, height, device=device)[:, None].expand(-1, 2 * width - 1)
    dx = torch.arange(1 - width, width, device=device)[None, :].expand(2 * height - 1, -1)
    if legacy_size is not None:
        # vit-pytorch tabulates offsets -w..w, rows of 2w + 1, but indexes as if rows had 2w - 1 entries.
        # Weights trained that way need the same slip.
        rows, cols = legacy_size
        entry = (dy + rows - 1) * (2 * cols - 1) + dx + cols - 1
        row, col = divide(entry, 2 * cols + 1)
        dy, dx = row - rows, col - cols
    return torch.stack([dy, dx], dim=-1)


# First parameter of an MLP: (fingerprint of all, {group size: table}), replaced as a whole. Not in the module, where
# copies and pickles would carry it, and where the operators of compiled graphs, which take tensors only, cannot look.
_tables: Any = WeakTensorKeyDictionary()


def remember(params: Sequence[Tensor], key: Tuple[Any, ...], compute: Callable[[], Tensor]) -> Tensor:
    """Return the table of these parameters and this key, computed if it was not or their values have changed."""
    fingerprint = _fingerprint(params)
    if fingerprint is None:
        return compute()
    known: Optional[Tuple[Any, Dict[Tuple[Any, ...], Tensor]]] = _tables.get(params[0])
    if known is None or len(known[1]) >= _CACHE_SIZES or not _same(known[0], fingerprint):
        known = (fingerprint, {})
        _tables[params[0]] = known
    table = known[1].get(key)
    if table is None:
        with torch.inference_mode(False), torch.no_grad():  # a later call that records gradients may use it
            table = compute()
        setattr(table, _BIASES, {})
        known[1][key] = table
    return table


_BIASES = '_crossformer_biases'


def known_biases(table: Tensor) -> Optional[Dict[Tuple[int, int], Tensor]]:
    """Return a place for what is made of a remembered table, None for any other table."""
    return getattr(table, _BIASES, None)


def _fingerprint(params) -> Any:
    """Identify the values of the parameters; None if they cannot be told apart without cost or risk.

    On the CPU the values themselves, a few thousand numbers: no way of changing them goes unseen, not even `.data`.
    Reading values from another device would stall it, so there the addresses and version counters stand for them.
    """
    if any(type(p) is not nn.Parameter or p.is_meta for p in params):  # functional_call, fake tensors, sharded weights
        return None
    if all(p.device.type == 'cpu' for p in params):
        return torch.cat([p.flatten() for p in params])
    return _versions(params)


def _versions(params) -> Any:
    if any(p.is_inference() for p in params):  # these have no version counter
        return None
    # FSDP gathers new values into the same Parameter without counting, and often at the same address.
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return None
    return [(p.data_ptr(), p._version, p.dtype, p.device) for p in params]


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return type(a) is type(b) and a == b


def bias_windows(table: Tensor, height: int, width: int, first_row: int, last_row: int) -> Tensor:
    """View a table of offsets as biases of pairs of tokens, keys from the last to the first.

    Args:
        table: Biases [heads, 2 * TH - 1, 2 * TW - 1] for groups of at least height x width tokens.
        height: Rows of the group.
        width: Columns of the group.
        first_row: First row of queries wanted.
        last_row: Row after the last row of queries wanted.

    Returns:
        View [heads, query rows, query columns, key rows, key columns], the keys of both axes in reverse order.
    """
    top, left = (table.shape[1] + 1) // 2 - height, (table.shape[2] + 1) // 2 - width
    # Row r of queries meets key row k at table row r - k + height - 1: a window over the table, read backwards.
    table = table[:, top + first_row:top + last_row + height - 1, left:left + 2 * width - 1]
    return table.unfold(1, height, 1).unfold(2, width, 1)


def expand_bias(
        table: Tensor,
        height: int,
        width: int,
        first_row: int,
        last_row: int,
        reverse_keys: bool = False,
) -> Tensor:
    """Spread a table of offsets over pairs of tokens.

    Args:
        (first ones): See `bias_windows`.
        reverse_keys: Keys from the last to the first, which takes a third of the time.

    Returns:
        Biases [heads, queries, height * width] of queries in rows first_row..last_row - 1 to all keys of the group.
    """
    windows = bias_windows(table, height, width, first_row, last_row)
    if not reverse_keys:
        windows = windows.flip(3, 4)
    return windows.reshape(table.shape[0], (last_row - first_row) * width, height * width)
