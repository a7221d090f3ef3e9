"""Plan the network for weights: variant, arguments, groups. What no shape of a weight shows is decided here alone."""
from dataclasses import dataclass
from typing import Any, Dict, Mapping, Optional, Tuple

import timm

from ..variants import VARIANTS
from .architecture import known_variants
from .errors import CheckpointError
from .parsing import Checkpoint

__all__ = ['GROUPS', 'Plan', 'choose_variant', 'plan_model']

GROUPS = ('group_size', 'lda_group_size', 'interval', 'lda_grouping')  # arguments of `CrossFormer` for groups


@dataclass(frozen=True)
class Plan:
    """The network for weights.

    Attributes:
        model: Variant.
        args: Arguments in which it differs from the variant.
        groups_from: Who said which groups: 'option', 'checkpoint', or 'default' for nobody.
    """

    model: str
    args: Dict[str, Any]
    groups_from: str


def choose_variant(parsed: Checkpoint) -> Tuple[str, Dict[str, Any]]:
    """Choose the variant that fits a checkpoint, and the arguments in which it differs.

    What shapes cannot show is read from the file where it says so, a dense checkpoint's config and birder's
    position tables, and else has a default by origin. Official: the variant's groups; a dense ++ checkpoint G = 7
    and I = 8, 4, 2, 1, as all released dense configurations have. birder: G = 7 (224 pixels). vit-pytorch: its
    default windows (7; 8, 4, 2, 1) and heads of 32 channels.
    """
    args = parsed.arguments()
    num_classes, in_chans = args.pop('num_classes'), args.pop('in_chans')
    fitting = [name for name, known in known_variants().items() if known == args]
    if fitting:
        name, differing = fitting[0], {}
    else:
        name = 'crossformer_pp_small' if args['cooling'] else 'crossformer_small'
        name = 'crossformer_lucidrains' if args['pos_bias'] == 'lucidrains' else name
        differing = {key: value for key, value in args.items() if value != known_variants()[name][key]}
    default = timm.models.resolve_pretrained_cfg(name)
    if num_classes != default.num_classes:
        differing['num_classes'] = num_classes
    if in_chans != default.input_size[0]:
        differing['in_chans'] = in_chans
    if parsed.origin == 'official' and parsed.dense and args['cooling']:
        differing.update(group_size=7, interval=(8, 4, 2, 1))
    differing.update(parsed.trained_groups(len(args['depths'])))
    for key, default_groups in (('group_size', 7), ('interval', (8, 4, 2, 1))):
        if differing.get(key) == VARIANTS[name].get(key, default_groups):
            del differing[key]
    return name, differing


def plan_model(
        parsed: Checkpoint,
        model: Optional[str] = None,
        groups: Optional[Mapping[str, Any]] = None,
        default_groups: Optional[Mapping[str, Any]] = None,
        num_classes: Optional[int] = None,
) -> Plan:
    """Plan the network for a checkpoint.

    Args:
        parsed: The checkpoint; a classifier that is left out is taken from it.
        model: Variant; None infers it from the shapes. One that is named gets no arguments that change its weights.
        groups: Arguments of `GROUPS`, over what the checkpoint says.
        default_groups: The same, for a checkpoint that does not name its groups itself.
        num_classes: 0 leaves the classifier out; another number must be that of the checkpoint.

    Raises:
        CheckpointError: There is no such variant, or its groups cannot be had.
        ValueError: An argument is none of `GROUPS`.
    """
    options = {key: value for key, value in (groups or {}).items() if value is not None}
    unknown = sorted(set(options) - set(GROUPS))
    if unknown:
        raise ValueError(f'Groups are given by {", ".join(GROUPS)}, got {", ".join(unknown)}.')
    if parsed.adaptive and not {'interval', 'lda_grouping'} & set(options):
        raise CheckpointError(
            'The checkpoint was trained with `adaptive_interval=True`: its intervals follow from the size of the map. '
            'Give `--lda-grouping grid`, which is the same for square images, or an `--interval`.')
    name, args = choose_variant(parsed)
    if model is not None:
        if model not in VARIANTS:
            raise CheckpointError(f'`model` is one of {", ".join(VARIANTS)}, got {model!r}.')
        free = ('num_classes', 'in_chans', 'group_size', 'interval')
        args = {key: value for key, value in args.items() if model == name or key in free}
    in_file = bool(parsed.trained_groups(len(parsed.arguments()['depths'])))
    args.update({**({} if in_file else default_groups or {}), **options})
    if num_classes is not None:
        have = parsed.arguments()['num_classes']
        if num_classes not in (0, have):
            raise CheckpointError(
                f'`num_classes` leaves the classifier out (0) or names the number of classes there are ({have}), got '
                f'{num_classes}. To train on other classes, convert as it is and create the model with `num_classes`.')
        if num_classes == 0:
            parsed.drop_classifier()
            args['num_classes'] = 0
    return Plan(model or name, args, 'option' if options else 'checkpoint' if in_file else 'default')
