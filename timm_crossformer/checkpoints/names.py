"""Foreign names of weights, and nowhere else: of every origin the keys, and what each becomes here."""
import re
from typing import Any, Callable, Dict, List, Mapping, Optional, Tuple, Union

__all__ = ['ANCHORS', 'CONTAINERS', 'COUNTER', 'canonical', 'find_networks', 'in_pyramid', 'is_part', 'rename']

COUNTER = 'n_averaged'  # torch.optim.swa_utils.AveragedModel keeps it beside the weights

# Where containers keep weights, the preferred first. As in timm, an exponential moving average wins, a teacher's too;
# but where mmengine writes `ema_state_dict`, it has put the average into `state_dict`. Any other key may hold weights
# as well, if it is the only one.
CONTAINERS = (
    'state_dict_ema', 'model_ema', 'params_ema', 'teacher', 'state_dict', 'model_state_dict', 'model', 'model_state',
    'state', 'net', 'network', 'weights', 'params', 'module', 'ema_state_dict', 'ema')

# Rules: pattern of a key without its last part (weight, bias, ...), what it becomes; None drops the key.
Rule = Tuple[str, Union[str, Callable[[re.Match], str], None]]

_POS_PROJ = {'pos_proj': 0, 'pos1.0': 1, 'pos1.2': 3, 'pos2.0': 4, 'pos2.2': 6, 'pos3.0': 7, 'pos3.2': 9}
_POSITION_TABLES = r'attn\.(?:biases|relative_position_index)|attn_mask'


def _previous_stage(match: re.Match) -> str:
    """Official downsampling ends a stage, ours begins the next one."""
    part = {'reductions': 'convs'}.get(match[2], match[2])
    return f'stages.{int(match[1]) + 1}.downsample.{part}{match[3] or ""}'


def _from_one(match: re.Match) -> str:
    """Birder counts stages from one."""
    return f'stages.{int(match[1]) - 1}.{match[2].replace("reductions", "convs")}'


def _pair(match: re.Match) -> str:
    """vit-pytorch's layer is short attention, MLP, long attention, MLP: two blocks."""
    stage, layer, part, name = match[1], int(match[2]), int(match[3]), match[4]
    if part % 2 == 0:
        names = {'norm': 'norm1', 'to_qkv': 'attn.qkv', 'to_out': 'attn.proj'}
        name = names.get(name) or name.replace('dpb', 'attn.pos_bias.mlp')
    else:
        name = {'0': 'norm2', '1': 'mlp.fc1', '4': 'mlp.fc2'}[name]
    return f'stages.{stage}.blocks.{2 * layer + part // 2}.{name}'


_BLOCK_PARTS = r'norm1|norm2|attn\.qkv|attn\.proj|mlp\.fc1|mlp\.fc2'
RULES: Dict[str, List[Rule]] = {
    'official': [
        (r'patch_embed\.projs\.(\d+)', r'stem.convs.\1'),
        (r'patch_embed\.norm', r'stem.norm'),
        (r'layers\.(\d+)\.downsample\.(reductions|norm)(\.\d+)?', _previous_stage),
        (rf'layers\.(\d+\.blocks\.\d+\.(?:{_BLOCK_PARTS}))', r'stages.\1'),
        (
            rf'layers\.(\d+\.blocks\.\d+)\.attn\.pos\.({"|".join(map(re.escape, _POS_PROJ))})',
            lambda m: f'stages.{m[1]}.attn.pos_bias.mlp.{_POS_PROJ[m[2]]}',
        ),
        (r'layers\.(\d+\.blocks\.\d+)\.ex_conv', r'stages.\1.cooling.conv'),
        (r'layers\.(\d+\.blocks\.\d+)\.ex_ln', r'stages.\1.cooling.norm'),
        (rf'layers\.\d+\.blocks\.\d+\.(?:{_POSITION_TABLES})', None),
        (r'norm', r'norm'),
        (r'head', r'head.fc'),
    ],
    'birder': [
        (r'patch_embed\.projs\.(\d+)', r'stem.convs.\1'),
        (r'patch_embed\.norm', r'stem.norm'),
        (r'body\.stage([1-9]\d*)\.(downsample\.(?:norm|reductions\.\d+))', _from_one),
        (r'body\.stage([1-9]\d*)\.(blocks\.\d+\.(?:norm1|norm2|attn\.qkv|attn\.proj))', _from_one),
        (r'body\.stage([1-9]\d*)\.(blocks\.\d+)\.mlp\.0', lambda m: f'{_from_one(m)}.mlp.fc1'),
        (r'body\.stage([1-9]\d*)\.(blocks\.\d+)\.mlp\.3', lambda m: f'{_from_one(m)}.mlp.fc2'),
        (
            r'body\.stage([1-9]\d*)\.(blocks\.\d+)\.attn\.pos\.pos\.(\d+)',
            lambda m: f'{_from_one(m)}.attn.pos_bias.mlp.{m[3]}',
        ),
        (rf'body\.stage[1-9]\d*\.blocks\.\d+\.(?:{_POSITION_TABLES})', None),
        (r'features\.0', r'norm'),
        (r'classifier', r'head.fc'),
    ],
    'vit-pytorch': [
        (r'layers\.0\.0\.convs\.(\d+)', r'stem.convs.\1'),
        (r'layers\.([1-9]\d*)\.0\.convs\.(\d+)', r'stages.\1.downsample.convs.\2'),
        (r'layers\.(\d+)\.1\.layers\.(\d+)\.([02])\.(norm|to_qkv|to_out|dpb\.\d+)', _pair),
        (r'layers\.(\d+)\.1\.layers\.(\d+)\.([13])\.([014])', _pair),
        (r'layers\.\d+\.1\.layers\.\d+\.[02]\.rel_pos_indices', None),
        (r'to_logits\.1', r'head.fc'),
    ],
}
_LAST_PARTS = {'weight': 'weight', 'bias': 'bias', 'g': 'weight', 'b': 'bias'}
ANCHORS = {  # one key of each origin that nothing else has
    'native': 'stem.convs.0.weight',
    'official': 'layers.0.blocks.0.norm1.weight',
    'birder': 'body.stage1.blocks.0.norm1.weight',
    'vit-pytorch': 'layers.0.0.convs.0.weight',
}


# Prefixes beside which other parts may stand, left out then: backbones of detectors and segmenters, and of
# segmentation-models-pytorch and transformers. Beside anything else, they are keys without a place.
_IN_OTHERS = re.compile(r'(?:.*[._])?(?:backbone|encoder)\.(?:model\.|_backbone\.)*')


def is_part(prefix: str) -> bool:
    """Tell a prefix under which a CrossFormer is part of another model."""
    return _IN_OTHERS.fullmatch(prefix) is not None


def find_networks(state_dict: Mapping[Any, Any]) -> List[Tuple[str, str]]:
    """Return origin and prefix of every CrossFormer among the keys of a state dict."""
    return [
        (origin, key[:-len(anchor)]) for origin, anchor in ANCHORS.items() for key in state_dict
        if isinstance(key, str) and f'.{key}'.endswith(f'.{anchor}')]


def rename(key: str, origin: str) -> Optional[str]:
    """Return our name of a key, '' if it is to be dropped, None if no rule knows it."""
    if origin == 'native':  # names stay, but for those of a pyramid; the model knows which it has
        return canonical(key)
    stem, _, last = key.rpartition('.')
    for pattern, target in RULES[origin]:
        match = re.fullmatch(pattern, key if target is None else stem)
        if match:
            if target is None:
                return ''
            if last not in _LAST_PARTS:
                return None
            return f'{target(match) if callable(target) else match.expand(target)}.{_LAST_PARTS[last]}'
    return None


def canonical(key: str) -> str:
    """Return our name of a weight in a pyramid: timm flattens `stages.0` to `stages_0` there."""
    return re.sub(r'^stages_(?=\d)', 'stages.', key)


def in_pyramid(key: str) -> str:
    """Return a pyramid's name of a weight."""
    return re.sub(r'^stages\.(?=\d)', 'stages_', key)
