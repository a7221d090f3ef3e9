"""CrossFormer and CrossFormer++ as one configurable network.

Papers: CrossFormer (ICLR 2022, arXiv 2108.00154), CrossFormer++ (TPAMI 2023, arXiv 2303.06908).
Differences from the official code are listed in docs/differences.md.
"""
import contextlib
from numbers import Integral, Real
from typing import Any, Callable, Dict, Iterator, List, Mapping, Optional, Sequence, Set, Tuple, Type, Union, cast

import torch
from timm.layers import (
    ClassifierHead,
    calculate_drop_path_rates,
    get_act_layer,
    get_norm_layer,
    trunc_normal_,
)
from timm.models import FeatureListNet
from torch import Tensor, nn

from ._timm import checkpoint_seq, device_and_dtype, feature_take_indices, update_model_input_size
from .checkpoints.fitting import check_head, check_variant, convert_state_dict, is_foreign
from .config import GroupSize, check_whole, per_stage, plain_group_size, resolve_group_size, resolve_img_size
from .inference import check_form, inference_form, pack_convolutions
from .layers import CrossFormerBlock, CrossScaleEmbed, Permute
from .ops.grouping import LDA_GROUPINGS


class CrossFormerStage(nn.Module):
    """Downsampling (but in the first stage) and blocks that alternate between SDA and LDA."""

    def __init__(
            self,
            in_dim: int,
            dim: int,
            depth: int,
            downsample: bool,
            cooling: bool,
            stage_norm: bool,
            drop_path: List[float],
            norm_layer: Callable[..., nn.Module],
            device=None,
            dtype=None,
            **block_args: Any,
    ):
        """
        Args:
            in_dim: Channels of the input.
            dim: Channels of the output.
            depth: Blocks.
            downsample: Start with cross-scale embedding of stride 2.
            cooling: Amplitude cooling in every third block but the last of the stage.
            stage_norm: LayerNorm before the downsampling.
            drop_path: Rate of stochastic depth of every block.
            block_args: Passed to every block.
        """
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.grad_checkpointing = False
        self.downsample = CrossScaleEmbed(
            in_dim,
            dim,
            kernel_sizes=(2, 4),
            stride=2,
            norm_layer=norm_layer if stage_norm else None,
            norm_first=True,
            **dd,
        ) if downsample else nn.Identity()
        self.blocks = nn.Sequential(*[
            CrossFormerBlock(
                dim,
                cooling=cooling and (i + 1) % 3 == 0 and i < depth - 1,
                drop_path=drop_path[i],
                norm_layer=norm_layer,
                **block_args,
                **dd,
            )
            for i in range(depth)
        ])

    def forward(self, x: Tensor) -> Tensor:
        """Transform a map [B, C, H, W]; between blocks it is a view with channels last."""
        x = self.downsample(x).permute(0, 2, 3, 1)
        if not torch.jit.is_scripting() and self.grad_checkpointing:
            x = checkpoint_seq(self.blocks, x)
        else:
            x = self.blocks(x)
        return x.permute(0, 3, 1, 2)

    @torch.jit.ignore
    def reparameterize(self) -> None:
        """Put the inference form of every block in its place; `timm.models.reparameterize_model` calls this."""
        pack_convolutions(self.downsample)
        for name, block in self.blocks.named_children():
            setattr(self.blocks, name, inference_form(block))


class CrossFormer(nn.Module):
    """CrossFormer, CrossFormer++ and vit-pytorch's CrossFormer, for images of any size.

    Whatever leaves the model is NCHW. The result for an image depends on that image and the weights alone.
    """

    # timm keeps constructor arguments here for export; see the setter.
    __jit_unused_properties__ = ['_model_args']
    __jit_ignored_attributes__ = ['_recorded_args']

    def __init__(
            self,
            img_size: Optional[Union[int, Tuple[int, int]]] = None,
            in_chans: int = 3,
            num_classes: int = 1000,
            global_pool: str = 'avg',
            embed_dim: Union[int, Sequence[int]] = 96,
            depths: Sequence[int] = (2, 2, 6, 2),
            num_heads: Union[int, Sequence[int]] = (3, 6, 12, 24),
            head_dim: Optional[int] = None,
            group_size: GroupSize = 7,
            lda_group_size: Optional[GroupSize] = None,
            interval: Union[int, Sequence[int]] = (8, 4, 2, 1),
            lda_grouping: str = 'map',
            fit_groups: bool = False,
            cooling: bool = False,
            pos_bias: str = 'paper',
            stage_norm: bool = True,
            mlp_ratio: Union[float, Sequence[float]] = 4.,
            qkv_bias: bool = True,
            drop_rate: float = 0.,
            proj_drop_rate: float = 0.,
            attn_drop_rate: float = 0.,
            drop_path_rate: float = 0.,
            norm_layer: Union[str, Callable[..., nn.Module]] = nn.LayerNorm,
            act_layer: Union[str, Callable[..., nn.Module]] = nn.GELU,
            device=None,
            dtype=None,
    ):
        """
        Args:
            img_size: Image size the model is meant for. A hint to others only: every size works.
            in_chans: Channels of the image.
            num_classes: Outputs of the classifier, 0 for none.
            global_pool: Pooling before the classifier: 'avg', 'max', 'avgmax', 'catavgmax' or '' for none.
            embed_dim: Channels of the first stage, doubled in each further one; or of every stage.
            depths: Blocks per stage. A block is one attention and one MLP.
            num_heads: Heads per stage.
            head_dim: Channels per head; None: channels / heads.
            group_size: Tokens per side of a group, G: one number, or per stage a number, a tuple (height, width), or
                a list with one G per block (progressive group size of CrossFormer++).
            lda_group_size: G of long-distance attention where it differs from `group_size`.
            interval: Distance of neighbours in a long-distance group, I, per stage. `grid` chooses its own.
            lda_grouping: What long-distance attention groups; all are the same in maps of G * I tokens. 'map'
                spreads I * I groups over the whole map, 'region' spreads them over squares of G * I tokens, 'grid'
                spreads G tokens per axis over the map.
            fit_groups: Choose groups that divide the map where a divisor lies between G / 2 and 2 G. Not what the
                published weights were trained with.
            cooling: Amplitude cooling layers (CrossFormer++).
            pos_bias: 'paper': an MLP of width channels / 16, one bias per head. 'lucidrains': width channels / 4,
                one bias for all heads, looked up as vit-pytorch does.
            stage_norm: LayerNorm after the stem, before every downsampling and before the head.
            mlp_ratio: Width of the MLP over channels, per stage if a sequence.
            qkv_bias: Bias of the query, key and value projection.
            drop_rate: Dropout before the classifier.
            proj_drop_rate: Dropout after the attention's projection and in the MLP.
            attn_drop_rate: Dropout of attention weights.
            drop_path_rate: Stochastic depth, linear from 0 in the first block to this rate in the last.
            norm_layer: Norm over the last dimension, class or timm name.
            act_layer: Activation of the MLP, class or timm name.
            device: Where to create parameters.
            dtype: Of the parameters.

        Raises:
            ValueError: An argument has the wrong length, or a value out of range.
        """
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        if not isinstance(depths, (list, tuple)) or len(depths) == 0:
            raise ValueError(f'`depths` needs a sequence with at least one block per stage, got {depths}.')
        check_whole('depths', depths, 1)
        depths = tuple(depths)
        stages = len(depths)
        if isinstance(embed_dim, Integral):
            embed_dim = [embed_dim * 2 ** i for i in range(stages)]
        dims: List[int] = per_stage('embed_dim', embed_dim, stages)
        heads = per_stage('num_heads', num_heads, stages)
        check_whole('embed_dim', dims, 16)
        check_whole('num_heads', heads, 1)
        check_whole('head_dim', [] if head_dim is None else [head_dim], 1)
        for i, (dim, head) in enumerate(zip(dims, heads, strict=True)):
            if head_dim is None and dim % head:
                raise ValueError(
                    f'`num_heads` must divide the channels of each stage, got {head} heads for {dim} channels in '
                    f'stage {i}. Change `num_heads` or `embed_dim`, or set `head_dim`.')
        if not 0 <= drop_path_rate < 1:
            raise ValueError(f'`drop_path_rate` needs to be at least 0 and below 1, got {drop_path_rate}.')
        if pos_bias not in ('paper', 'lucidrains'):
            raise ValueError(f"`pos_bias` is 'paper' or 'lucidrains', got {pos_bias!r}.")
        mlp_ratios = per_stage('mlp_ratio', mlp_ratio, stages)
        if not all(isinstance(ratio, Real) and float(ratio) > 0 for ratio in mlp_ratios):
            raise ValueError(f'`mlp_ratio` needs to be above 0, got {mlp_ratio!r}.')
        check_whole('in_chans', [in_chans], 1)
        check_whole('num_classes', [num_classes], 0)
        resolve_img_size(img_size)
        _check_pool(global_pool)
        norm = cast(Callable[..., nn.Module], _named_layer('norm_layer', norm_layer, get_norm_layer))
        act = cast(Type[nn.Module], _named_layer('act_layer', act_layer, get_act_layer))

        self.num_classes = num_classes
        self.in_chans = in_chans
        self.depths = depths
        self.num_features = dims[-1]
        self.feature_info = [
            dict(num_chs=dim, reduction=4 * 2 ** i, module=f'stages.{i}') for i, dim in enumerate(dims)
        ]

        self.stem = CrossScaleEmbed(
            in_chans,
            dims[0],
            kernel_sizes=(4, 8, 16, 32),
            stride=4,
            norm_layer=norm if stage_norm else None,
            **dd,
        )
        drop_paths = cast(
            List[List[float]], calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True))
        self.stages = nn.Sequential(*[
            CrossFormerStage(
                dims[max(i - 1, 0)],
                dims[i],
                depth=depths[i],
                downsample=i > 0,
                cooling=cooling,
                stage_norm=stage_norm,
                drop_path=drop_paths[i],
                num_heads=heads[i],
                head_dim=head_dim,
                pos_bias=pos_bias,
                mlp_ratio=mlp_ratios[i],
                qkv_bias=qkv_bias,
                proj_drop=proj_drop_rate,
                attn_drop=attn_drop_rate,
                norm_layer=norm,
                act_layer=act,
                **dd,
            )
            for i in range(stages)
        ])
        self._set_groups(group_size, lda_group_size, interval, lda_grouping, fit_groups)
        self.to_tokens = Permute(0, 2, 3, 1)
        self.norm = norm(self.num_features, **dd) if stage_norm else nn.Identity()
        self.to_map = Permute(0, 3, 1, 2)
        self.head = ClassifierHead(self.num_features, num_classes, pool_type=global_pool, drop_rate=drop_rate, **dd)
        self.head_hidden_size = self.num_features * self.head.global_pool.feat_mult()
        self.apply(_init_weights)

    def _set_groups(
            self,
            group_size: GroupSize,
            lda_group_size: Optional[GroupSize],
            interval: Union[int, Sequence[int]],
            lda_grouping: str,
            fit_groups: bool,
    ) -> None:
        """Check and choose the groups of every block: SDA in even ones, LDA in odd ones."""
        if lda_grouping not in LDA_GROUPINGS:
            raise ValueError(f'`lda_grouping` is one of {", ".join(LDA_GROUPINGS)}, got {lda_grouping!r}.')
        intervals = per_stage('interval', interval, len(self.depths))
        check_whole('interval', intervals, 1)
        sda_sizes = resolve_group_size('group_size', group_size, self.depths)
        lda_sizes = sda_sizes
        if lda_group_size is not None:
            lda_sizes = resolve_group_size('lda_group_size', lda_group_size, self.depths)
        held = tuple(len(cast(nn.ModuleList, stage.blocks)) for stage in self.stages)
        if held != tuple(self.depths[:len(held)]):  # levels that nobody asked for are cut off
            raise ValueError(
                f'`depths` is {tuple(self.depths)}, and the stages hold {held} blocks: some were added or taken away. '
                'Call `attn.set_groups` of each block.')
        for i, stage in enumerate(self.stages):
            for j, block in enumerate(cast(List[CrossFormerBlock], stage.blocks)):
                size, grouping = (lda_sizes[i][j], lda_grouping) if j % 2 else (sda_sizes[i][j], 'sda')
                block.attn.set_groups(size, intervals[i], grouping, fit_groups)
        self.group_size = group_size
        self.lda_group_size = lda_group_size
        self.interval = interval
        self.lda_grouping = lda_grouping
        self.fit_groups = fit_groups

    @property
    def _model_args(self) -> Dict[str, Any]:
        return self.__dict__.get('_recorded_args', {})

    @_model_args.setter
    def _model_args(self, args: Dict[str, Any]) -> None:
        # JSON turns a tuple (height, width) into a list, which would read as one group size per block.
        for name in ('group_size', 'lda_group_size'):
            if args.get(name) is not None:
                args = dict(args, **{name: plain_group_size(name, args[name], self.depths)})
        self.__dict__['_recorded_args'] = args

    @torch.jit.ignore
    def set_input_size(
            self,
            img_size: Optional[Union[int, Tuple[int, int]]] = None,
            group_size: Optional[GroupSize] = None,
            lda_group_size: Optional[GroupSize] = None,
            interval: Optional[Union[int, Sequence[int]]] = None,
            lda_grouping: Optional[str] = None,
            fit_groups: Optional[bool] = None,
    ) -> None:
        """Choose groups anew, and record them with the image size they are meant for. None keeps what is set.

        Every image size works without this: position biases come from an MLP, so nothing depends on the size.

        Args:
            img_size: Image size the model is meant for, a hint to others.
            (others): As in the constructor.

        Raises:
            ValueError: An argument is out of range; then nothing has changed.
        """
        resolve_img_size(img_size)
        self._set_groups(
            self.group_size if group_size is None else group_size,
            self.lda_group_size if lda_group_size is None else lda_group_size,
            self.interval if interval is None else interval,
            self.lda_grouping if lda_grouping is None else lda_grouping,
            self.fit_groups if fit_groups is None else fit_groups,
        )
        update_model_input_size(
            self,
            img_size,
            group_size=group_size,
            lda_group_size=lda_group_size,
            interval=interval,
            lda_grouping=lda_grouping,
            fit_groups=fit_groups,
        )

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load weights of any origin: official, vit-pytorch, birder or own, plain or inside a training checkpoint.

        Args:
            state_dict: Own state dicts are loaded as they are, others through `convert_state_dict`.
            strict: Require a source for every weight; False is needed for a backbone without norm and classifier.
            assign: As in PyTorch.

        Raises:
            ValueError: The checkpoint does not fit.
        """
        with _any_origin(state_dict, self, strict) as own:
            if strict:
                check_head(own, self)
            return super().load_state_dict(own, strict, assign)

    def _load_from_state_dict(self, state_dict: Dict[str, Any], prefix: str, *args: Any) -> None:
        _check_part(state_dict, prefix, self)
        super()._load_from_state_dict(state_dict, prefix, *args)

    @torch.jit.ignore
    def no_weight_decay(self) -> Set[str]:
        """Name no parameter: as in the official recipe, all but biases and norms decay, position MLPs included."""
        return set()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> Dict[str, Any]:
        """Group parameters by depth, for layer-wise learning rates."""
        return dict(
            stem=r'^stem',
            blocks=r'^stages\.(\d+)' if coarse else [
                (r'^stages\.(\d+)\.downsample', (0,)),
                (r'^stages\.(\d+)\.blocks\.(\d+)', None),
                (r'^norm', (99999,)),
            ],
        )

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute blocks in the backward pass, for less memory."""
        for stage in cast(List[CrossFormerStage], self.stages):
            stage.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """Return the classifier."""
        return self.head.fc

    @torch.jit.ignore
    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
        """Replace the classifier; 0 classes remove it, global_pool '' leaves the map."""
        check_whole('num_classes', [num_classes], 0)
        _check_pool(global_pool)
        self.num_classes = num_classes
        dd = device_and_dtype(self)
        self.head.in_features = self.num_features  # smaller after pruning
        self.head.reset(num_classes, pool_type=global_pool, **dd)
        self.head_hidden_size = self.num_features * self.head.global_pool.feat_mult()

    def forward_intermediates(
            self,
            x: Tensor,
            indices: Optional[Union[int, List[int]]] = None,
            norm: bool = False,
            stop_early: bool = False,
            output_fmt: str = 'NCHW',
            intermediates_only: bool = False,
    ) -> Union[List[Tensor], Tuple[Tensor, List[Tensor]]]:
        """Return the maps at the ends of stages.

        Args:
            x: Image [B, C, H, W].
            indices: Stages to return: the last n if an integer, all if None.
            norm: Apply the final norm to the last stage's map.
            stop_early: Skip the stages after the last one wanted.
            output_fmt: 'NCHW' or 'NHWC'.
            intermediates_only: Return the maps alone.

        Returns:
            The final features, in NCHW, and a list of maps; or the list.
        """
        if output_fmt not in ('NCHW', 'NHWC'):
            raise ValueError(f"`output_fmt` is 'NCHW' or 'NHWC', got '{output_fmt}'.")
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        last = len(self.depths) - 1
        intermediates: List[Tensor] = []

        x = self.stem(x)
        for i, stage in enumerate(self.stages):
            if not stop_early or i <= max_index:
                x = stage(x)
                if i in take_indices:
                    out = self._normalize(x) if norm and i == last else x
                    intermediates.append(out if output_fmt == 'NCHW' else out.permute(0, 2, 3, 1))
        if intermediates_only:
            return intermediates
        if len(self.stages) - 1 == last and (not stop_early or max_index == last):
            x = self._normalize(x)
        return x, intermediates

    @torch.jit.ignore
    def prune_intermediate_layers(
            self,
            indices: Union[int, List[int]] = 1,
            prune_norm: bool = False,
            prune_head: bool = True,
    ) -> List[int]:
        """Remove the stages after the last one wanted, and what depends on them; return the indices kept."""
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        prune_end = max_index < len(self.stages) - 1
        if prune_norm or prune_end:
            self.norm = nn.Identity()
        self.stages = self.stages[:max_index + 1]
        if prune_end:
            self.num_features = self.feature_info[max_index]['num_chs']
        if prune_head or prune_end:
            self.reset_classifier(0, '')
        return take_indices

    def _normalize(self, x: Tensor) -> Tensor:
        """Apply the final norm to a map [B, C, H, W]."""
        return self.to_map(self.norm(self.to_tokens(x)))

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the last map, normed: [B, C, ceil(H / 32), ceil(W / 32)] from an image [B, in_chans, H, W]."""
        return self._normalize(self.stages(self.stem(x)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool a map [B, C, H, W] and classify it; `pre_logits` leaves the classifier out."""
        return self.head(x, pre_logits=True) if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Classify images [B, in_chans, H, W] of any size: logits [B, num_classes]."""
        return self.forward_head(self.forward_features(x))


class CrossFormerFeatures(FeatureListNet):
    """The pyramid of `features_only=True`.

    timm keeps stages under the names `stages_0`, ... here; `return_layers` takes the names of `feature_info`, too
    (`stages.0`, ...), by which transformers asks for hidden states.
    """

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load weights of any origin, as `CrossFormer` does; the final norm and the classifier are left out."""
        with _any_origin(state_dict, self, strict) as own:
            return super().load_state_dict(own, strict, assign)

    def _load_from_state_dict(self, state_dict: Dict[str, Any], prefix: str, *args: Any) -> None:
        _check_part(state_dict, prefix, self)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == 'return_layers':
            value = {layer.replace('.', '_'): index for layer, index in value.items()}
        super().__setattr__(name, value)


@contextlib.contextmanager
def _any_origin(state_dict: Mapping[str, Any], model: nn.Module, strict: bool) -> Iterator[Mapping[str, Any]]:
    """Yield weights of any origin under the names of the model; if they do not fit, name the variant that they do."""
    check_form(state_dict, model)
    own = convert_state_dict(state_dict, model, partial=not strict) if is_foreign(state_dict, model) else state_dict
    try:
        yield own
    except RuntimeError as e:
        if not isinstance(e, ValueError):  # of PyTorch, not ours
            check_variant(own, model)
        raise


def _check_part(state_dict: Mapping[str, Any], prefix: str, model: nn.Module) -> None:
    """Where the model is part of another module, name the variant that weights of other shapes belong to."""
    if prefix:
        expected = model.state_dict(keep_vars=True)
        own = {key[len(prefix):]: tensor for key, tensor in state_dict.items() if key.startswith(prefix)}
        if any(key in expected and tensor.shape != expected[key].shape for key, tensor in own.items()):
            check_variant(own, model)


_POOLS = ('avg', 'max', 'avgmax', 'catavgmax', 'fast', 'fastavg', 'fastmax', 'fastavgmax', 'fastcatavgmax', '')


def _check_pool(global_pool: Any) -> None:
    if str(global_pool or '').lower() not in _POOLS:
        raise ValueError(f'`global_pool` is one of {", ".join(map(repr, _POOLS))}, got {global_pool!r}.')


def _named_layer(argument: str, layer: Any, get_layer: Callable[[Any], Any]) -> Any:
    try:
        return get_layer(layer)
    except KeyError as e:
        raise ValueError(f'`{argument}` is a class or a name that timm knows, got {layer!r}.') from e


def _init_weights(module: nn.Module) -> None:
    """Initialise as the official code does; convolutions keep PyTorch's default."""
    if isinstance(module, nn.Linear) and not module.weight.is_meta:
        trunc_normal_(module.weight, std=.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
