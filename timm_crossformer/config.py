"""Read constructor arguments that may be given once, per stage or per block."""
from numbers import Integral
from typing import Any, List, Optional, Sequence, Tuple, TypeGuard, Union

StageSize = Union[int, Tuple[int, int], List[int], List[Tuple[int, int]]]
GroupSize = Union[int, Sequence[StageSize]]


def per_stage(name: str, value: Any, stages: int) -> List[Any]:
    """Spread a scalar over the stages, or check that a sequence has one entry for each.

    Raises:
        ValueError: A sequence of another length.
    """
    if not isinstance(value, (list, tuple)):
        return [value] * stages
    if len(value) != stages:
        raise ValueError(
            f'`{name}` needs one entry per stage, got len(depths)={stages}, len({name})={len(value)}. '
            'Give one number for all stages, or one per stage.')
    return list(value)


def check_whole(name: str, values: Sequence[Any], least: int) -> None:
    """Raise ValueError unless all values are whole numbers from `least` up."""
    for value in values:
        if not _is_whole(value) or value < least:
            raise ValueError(f'`{name}` needs whole numbers from {least} up, got {value!r}.')


def resolve_img_size(img_size: Any) -> Optional[Tuple[int, int]]:
    """Return an image size as (height, width), None for None.

    Raises:
        ValueError: It is neither a whole number from 1 up nor a pair of them.
    """
    if img_size is None:
        return None
    pair = img_size if isinstance(img_size, (list, tuple)) else (img_size, img_size)
    if len(pair) != 2:
        raise ValueError(f'`img_size` is a number or a pair (height, width), got {img_size!r}.')
    check_whole('img_size', pair, 1)
    return int(pair[0]), int(pair[1])


def resolve_group_size(name: str, value: GroupSize, depths: Sequence[int]) -> List[List[Tuple[int, int]]]:
    """Expand a group size to (height, width) for every block of every stage.

    A stage's entry is a number, a tuple (height, width), or a list with a number or (height, width) per block. Two
    numbers in a stage of two blocks are (height, width) in a tuple and one per block in a list.

    Raises:
        ValueError: A wrong number of entries, or a size below 1.
    """
    sizes = []
    entries = per_stage(name, value, len(depths))
    listed = {
        depth for entry, depth in zip(entries, depths, strict=True) if isinstance(entry, list) and _is_pair(entry)}
    if 2 in listed and len(listed) > 1:
        raise ValueError(
            f'`{name}`: two numbers in a list are one per block in a stage of two blocks, and (height, width) in '
            f'another; got both in {value}. Write (height, width) as a tuple, or a list with one entry per block.')
    for stage, (entry, depth) in enumerate(zip(entries, depths, strict=True)):
        if not isinstance(entry, (list, tuple)):
            blocks = [entry] * depth
        elif len(entry) == 2 and (depth != 2 or isinstance(entry, tuple)) and _is_pair(entry):
            blocks = [tuple(entry)] * depth
        elif len(entry) == depth:
            blocks = list(entry)
        else:
            raise ValueError(
                f'`{name}` needs a number, a tuple (height, width) or a list with one entry per block, got {entry} '
                f'for stage {stage} with {depth} blocks.')
        pairs = [
            (int(b), int(b)) if _is_whole(b) else (int(b[0]), int(b[1])) if _is_pair(b) else (0, 0) for b in blocks]
        if min(min(pair) for pair in pairs) < 1:
            raise ValueError(f'`{name}` needs whole numbers from 1 up, got {entry} for stage {stage}.')
        sizes.append(pairs)
    return sizes


def plain_group_size(name: str, value: GroupSize, depths: Sequence[int]) -> Union[int, List]:
    """Rewrite a group size so that it survives JSON: numbers where groups are square, else per block."""
    if _is_whole(value):
        return int(value)
    plain: List = []
    for pairs in resolve_group_size(name, value, depths):
        blocks = [pair[0] if pair[0] == pair[1] else list(pair) for pair in pairs]
        plain.append(blocks[0] if isinstance(blocks[0], int) and blocks.count(blocks[0]) == len(blocks) else blocks)
    return plain


def _is_whole(value: object) -> TypeGuard[int]:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_pair(value: object) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == 2 and all(_is_whole(v) for v in value)
