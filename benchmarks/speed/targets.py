"""The targets, and what the rows say about them."""
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

import cases
import pandas as pd
import rows
from cases import BIRDER, FORM, FORMS, LINEAR, LUCIDRAINS, OURS, SIZES, SMALL, SWIN, VIT_PYTORCH, size_contestants

Where = Dict[str, Any]


@dataclass(frozen=True)
class Target:
    """A ratio to reach, of the part `what`.

    ratios: (contestant or case in words, what is above the line, what is below); with nothing below, the value itself.
    value, per: As `rows.ratio` takes them.
    """

    name: str
    limit: float
    at_least: bool
    what: str
    ratios: Sequence[Tuple[str, Where, Optional[Where]]]
    value: str = 'times'
    per: str = ''
    dtype: str = 'fp32'
    device: str = 'cpu'

    def met(self, value: float) -> bool:
        """Tell whether a value reaches the target."""
        return value >= self.limit if self.at_least else value <= self.limit

    def worst(self, measured: pd.DataFrame, threads: int) -> Optional[Tuple[float, str]]:
        """Return the ratio furthest from the target, and its case, None if nothing was measured."""
        measured = rows.pick(measured, threads=threads)
        found = []
        for words, top, bottom in self.ratios:
            if bottom is None:
                last = rows.pick(measured, mode='eager', **top)[self.value][-1:]
                value = None if last.empty else last.item()
            else:
                value = rows.ratio(measured, top, bottom, self.value, self.per)
            if value is not None:
                found.append((float(value), words))
        return (min if self.at_least else max)(found) if found else None


def _against(peer: str, *names: str, **case: Any) -> List[Tuple[str, Where, Where]]:
    """Put each of our models above a peer: time or memory over that of the peer."""
    return [(name, {'contestant': name, **case}, {'contestant': peer, **case}) for name in names]


def _faster(ours: str, peer: str, **case: Any) -> List[Tuple[str, Where, Where]]:
    return [(words, peers, own) for words, own, peers in _against(peer, ours, **case)]


def _growth(base: str, *names: str, sizes: Sequence[str]) -> List[Tuple[str, Where, Where]]:
    """Put each of some sizes above a base."""
    return [(name if len(sizes) == 1 else f'{name} at {large}', {'contestant': name, 'size': large},
             {'contestant': name, 'size': base}) for name in names for large in sizes]


_B1, _B8 = ({'size': '224', 'batch': batch, 'task': 'logits'} for batch in (1, 8))
_LARGE = {'size': '800x1344', 'batch': 1, 'task': 'features'}
_COMPILED = {'compile': 'torch.compile', 'compile-frozen': 'torch.compile, weights frozen'}
_LARGER = SIZES[1:SIZES.index('800x1344') + 1]

TARGETS = (
    *(Target(f'inference form, 224 B{case["batch"]}: crossformer_small faster than birder', 1.15, True, 'infer',
             _faster(SMALL + FORM, BIRDER, **case)) for case in (_B1, _B8)),
    *(Target(f'inference form, 224 B{case["batch"]}: crossformer_lucidrains faster than vit-pytorch', 1.5, True,
             'infer', _faster(LUCIDRAINS + FORM, VIT_PYTORCH, **case)) for case in (_B1, _B8)),
    *(Target(f'inference form, 224 B{case["batch"]}: time per MAC of swin_tiny over that of crossformer_small', limit,
             True, 'infer', _faster(SMALL + FORM, SWIN, **case), per='macs')
      for case, limit in ((_B1, 1.), (_B8, 1.2))),
    Target('time per MAC over that of swin_tiny, 224 B8: tiny, small, pp_small', 1.1, False, 'infer',
           _against(SWIN, *OURS[:3], **_B8), per='macs'),
    Target('time per MAC over that of swin_tiny, 224 B1: small', 1.1, False, 'infer',
           _against(SWIN, SMALL, **_B1), per='macs'),
    Target('inference form, 800x1344 (features): time per MAC over that of swin_tiny: small, pp_small', .95, False,
           'infer', _against(SWIN, *FORMS[:2], **_LARGE), per='macs'),
    Target('share of the matrix rate, crossformer_tiny 224 B8', .72, True, 'infer',
           [(cases.TINY, {'contestant': cases.TINY, **_B8}, None)], value='gemm_share'),
    Target('time per MAC at 256 to 800x1344 over that at 224', 1.2, False, 'sizes',
           _growth('224', *size_contestants(False), sizes=_LARGER), per='macs'),
    Target('the same with fit_groups', 1.08, False, 'sizes',
           _growth('224', *size_contestants(True), sizes=_LARGER), per='macs'),
    Target('training step, 224 B8: crossformer_small faster than birder', 1.15, True, 'train',
           _faster(cases.SMALL_TRAINED, BIRDER, size='224', batch=8)),
    *(Target(f'{words} faster than eager, 224 B8: small, both forms', 1., True, 'compile', [
        (name, {'contestant': name, 'batch': 8, 'mode': 'eager'}, {'contestant': name, 'batch': 8, 'mode': mode})
        for name in (SMALL, SMALL + FORM)]) for mode, words in _COMPILED.items()),
    *(Target(f'{words}, time per MAC over that of swin_tiny, 224 B1 and B8: small, both forms', 1., False, 'compile', [
        (f'{name} batch {batch}', {'contestant': name, 'batch': batch, 'mode': mode},
         {'contestant': SWIN, 'batch': batch, 'mode': mode})
        for name in (SMALL, SMALL + FORM) for batch in (1, 8)], per='macs') for mode, words in _COMPILED.items()),
    *(Target(f'exported, {name}, 224 B1 and B8: time per MAC of swin_tiny over that of crossformer_small', 1.05, True,
             'deploy', [(f'{mode} batch {case["batch"]}', {**case, 'contestant': SWIN, 'mode': mode},
                         {**case, 'contestant': SMALL, 'mode': mode})
                        for mode in ('onnxruntime' + suffix, 'openvino' + suffix) for case in (_B1, _B8)], per='macs')
      for name, suffix in (('fp32', ''), ('int8', '-int8'))),
    Target('exported, 224 B8: int8 faster than fp32 in ONNX Runtime: small', 1.6, True, 'deploy', [
        (SMALL, {**_B8, 'contestant': SMALL, 'mode': 'onnxruntime'},
         {**_B8, 'contestant': SMALL, 'mode': 'onnxruntime-int8'})]),
    Target('peak memory over that of swin_tiny, 800x1344 and 1024: small', 1., False, 'memory', [
        (f'{SMALL} at {size}', {'contestant': SMALL, 'size': size}, {'contestant': SWIN, 'size': size})
        for size in ('800x1344', '1024')], value='peak_mib'),
    Target('time per pixel at 2048 over that at 512: small, region and grid', 1.05, False, 'sizes',
           _growth('512', *LINEAR, sizes=['2048']), per='megapixels'),
    Target('peak memory per pixel at 2048 over that at 512: small, region and grid', 1.05, False, 'memory',
           _growth('512', *LINEAR, sizes=['2048']), value='peak_mib', per='megapixels'),
    Target('peak memory at 2048: map over region, small', 1.5, False, 'memory',
           _against(LINEAR[0], SMALL, size='2048'), value='peak_mib'),
    *(Target(f'CUDA bf16, {mode}: time per MAC of swin_tiny over that of crossformer_small', 1.1, True, 'infer',
             _faster(SMALL, SWIN, mode=mode), per='macs', dtype='bf16', device='cuda')
      for mode in ('eager', 'compile')),
    Target('CUDA, bf16 autocast: crossformer_lucidrains faster than vit-pytorch', 2., True, 'infer',
           _faster(LUCIDRAINS, VIT_PYTORCH), dtype='amp-bf16', device='cuda'),
)


def table(results: Path, threads: Sequence[int] = (1, 2)) -> pd.DataFrame:
    """Return the table of targets; an empty cell was not measured."""
    body = []
    for target in TARGETS:
        measured = rows.read(results, target.what, target.dtype, target.device)
        worst = [target.worst(measured, n) for n in threads]
        found = [value for value in worst if value]
        words = dict.fromkeys(words for _, words in found) if len(target.ratios) > 1 else {}
        met = ('yes' if all(target.met(value) for value, _ in found) else 'no') if found else 'not measured'
        body.append([
            target.name, f'{"≥" if target.at_least else "≤"} {target.limit:.2f}',
            *(f'{value[0]:.2f}' if value else '' for value in worst), '; '.join(words), met])
    heads = [f'{n} thread{"s" if n > 1 else ""}' for n in threads]
    return pd.DataFrame(body, columns=['target', 'limit', *heads, 'worst case', 'met'])
