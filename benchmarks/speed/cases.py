"""Cases as data: contestants, what is run of them, and which cases the READMEs quote."""
import functools
import itertools
from ast import literal_eval
from dataclasses import dataclass, replace
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple

import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import timm_crossformer  # noqa: F401  registers the models

SWIN, CONVNEXT = 'swin_tiny_patch4_window7_224', 'convnext_tiny'
BIRDER, VIT_PYTORCH = 'birder/crossformer_s', 'vit_pytorch/CrossFormer'
TINY, SMALL, PP_SMALL, LUCIDRAINS = OURS = [
    'crossformer_tiny', 'crossformer_small', 'crossformer_pp_small', 'crossformer_lucidrains']
PEERS = [BIRDER, VIT_PYTORCH, SWIN, CONVNEXT, 'hiera_tiny_224', 'twins_svt_small']
SMALL_TRAINED = f'{SMALL} drop_path_rate=0.2'  # birder's rate
FORM = ' reparam=True'  # the inference form
LINEAR = [f'{SMALL} lda_grouping={grouping}' for grouping in ('region', 'grid')]  # their cost grows with the area
FORMS = [name + FORM for name in (SMALL, PP_SMALL, LUCIDRAINS)]
PEER_OF_SAME_NETWORK = {BIRDER: SMALL, VIT_PYTORCH: LUCIDRAINS}  # at 224 px
TAKES_IMG_SIZE = {SWIN, 'hiera_tiny_224', 'twins_svt_small'}  # the others run at any size, or not at all
PADS_WINDOWS = {SWIN}

SIZES = ['224', '256', '288', '320', '384', '512', '640', '800x1344', '1024', '2048']
DTYPES = {
    'fp32': torch.float32,
    'bf16': torch.bfloat16,
    'fp16': torch.float16,
    'amp-bf16': torch.bfloat16,  # fp32 weights under autocast
    'amp-fp16': torch.float16,
}
RUNTIMES = ('onnxruntime', 'openvino', 'onnxruntime-int8', 'openvino-int8')  # run exported files
MODES = ('eager', 'compile', 'compile-frozen', *RUNTIMES)
CALIBRATION = 8  # images


def size_contestants(fit: bool) -> List[str]:
    """List the variants with every grouping, or each as it is, with groups that fit."""
    if fit:
        return [f'{name} fit_groups=True' for name in OURS[:3]]
    default = {TINY: 'map', SMALL: 'map', PP_SMALL: 'region'}
    return [name + (f' lda_grouping={grouping}' if grouping != default[name] else '')
            for name in default for grouping in ('map', 'region', 'grid')]


@dataclass(frozen=True)
class Case:
    """What to measure.

    contestant: A timm model, `birder/NAME` or `vit_pytorch/CrossFormer`, then constructor arguments of timm models:
        'crossformer_small lda_grouping=region fit_groups=True'; 'reparam=True' is the inference form, made by timm.
    task: 'logits', 'features' (the pyramid, without a head) or 'train' (forward, backward and AdamW step).
    mode: One of `MODES`.
    size: Pixels, '224' or '800x1344'.
    threads: Of the CPU, also with device 'cuda'.
    """

    contestant: str
    task: str = 'logits'
    mode: str = 'eager'
    size: str = '224'
    batch: int = 1
    dtype: str = 'fp32'
    device: str = 'cpu'
    threads: int = 1

    @property
    def pixels(self) -> Tuple[int, int]:
        """Height and width."""
        return pixels_of(self.size)


def pixels_of(size: str) -> Tuple[int, int]:
    """Read '224' or '800x1344' as height and width."""
    height, _, width = size.partition('x')
    return int(height), int(width or height)


@functools.lru_cache(maxsize=32)
def build(
        contestant: str, task: str, mode: str, pixels: Optional[Tuple[int, int]], dtype: str, device: str,
) -> Tuple[nn.Module, Callable]:
    """Create a model and what is to be called of it.

    Args:
        pixels: Image size, for models that are built for one.
        (others): As in `Case`.
    """
    if mode.startswith('compile'):  # of the same weights in the same memory: copies differ by 3% in time
        model, forward = build(contestant, task, 'eager', pixels, dtype, device)
        return model, torch.compile(forward) if mode == 'compile' else _compile_frozen(forward)
    torch.manual_seed(0)
    name, *options = contestant.split()
    if name == VIT_PYTORCH:
        if task == 'features':
            raise ValueError(f'{VIT_PYTORCH} returns logits only, got the task `features`. Leave it out of `--models`.')
        from vit_pytorch.crossformer import CrossFormer
        model = CrossFormer()
    elif name.startswith('birder/'):
        from birder.model_registry import registry
        model = registry.net_factory(name.partition('/')[2], 1000, size=pixels)
    else:
        if contestant.endswith(FORM):  # of the same weights
            model, _ = build(contestant.removesuffix(FORM), task, mode, pixels, dtype, device)
            model = timm.utils.reparameterize_model(model.eval())
            return model, model
        args = {key: _value(text) for key, _, text in (option.partition('=') for option in options)}
        if pixels is not None:
            args['img_size'] = pixels
        if task == 'features':
            args['features_only'] = True
        model = timm.create_model(name, **args)
    if not dtype.startswith('amp'):
        model = model.to(DTYPES[dtype])
    model = model.to(device).train(task == 'train')
    return model, model.detection_features if task == 'features' and name.startswith('birder/') else model


def _compile_frozen(forward: Callable) -> Callable:
    """Compile with weights as constants that Inductor packs, as TORCHINDUCTOR_FREEZING=1 does."""
    compiled = torch.compile(forward, options={'freezing': True})  # another entry of Dynamo's cache

    def run(x: torch.Tensor) -> Any:
        with torch._inductor.config.patch(freezing=True):  # asked by Dynamo, too
            return compiled(x)

    return run


def _value(text: str) -> Any:
    try:
        return literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def build_case(case: Case) -> Tuple[nn.Module, Callable]:
    """Create the model of a case; cases that differ in image size, batch or threads alone share it if they can."""
    mode = 'eager' if case.mode in RUNTIMES else case.mode
    return build(case.contestant, case.task, mode, _built_for(case), case.dtype, case.device)


def _built_for(case: Case) -> Optional[Tuple[int, int]]:
    name = case.contestant.split()[0]
    return case.pixels if name in TAKES_IMG_SIZE or name.startswith('birder/') else None


def prepare(case: Case) -> Callable[[], Any]:
    """Return a function that runs a case once and returns its output."""
    model, forward = build_case(case)
    if case.mode in RUNTIMES:
        from runtimes import load
        forward = load(case, _built_for(case))
    amp = case.dtype.startswith('amp')
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(case.batch, 3, *case.pixels, generator=generator)
    x = x.to(case.device, torch.float32 if amp else DTYPES[case.dtype])
    target = torch.randint(10, (case.batch,), generator=generator).to(case.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5) if case.task == 'train' else None

    def infer() -> Any:
        with torch.inference_mode(), torch.autocast(case.device, DTYPES[case.dtype], enabled=amp):
            return forward(x)

    def train() -> Any:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(case.device, DTYPES[case.dtype], enabled=amp):
            loss = F.cross_entropy(forward(x).float(), target)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return infer if optimizer is None else train


def count_macs(case: Case) -> float:
    """Run a case and count its multiply-adds, by torch's counter of operations, on tokens that exist.

    Swin pads its map to whole windows: its count at 224, where it does not, is scaled by the area.
    """
    if case.contestant in PADS_WINDOWS and case.size != '224':
        height, width = case.pixels
        return count_macs(replace(case, size='224')) * height * width / 224 ** 2
    run = prepare(replace(case, mode='eager'))
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() / 2


def same_networks(cases: Sequence[Case]) -> Iterator[Tuple[Case, Case]]:
    """List pairs of cases (peer, ours) whose outputs have to be equal once they have equal weights."""
    for case in cases:
        other = replace(case, contestant=PEER_OF_SAME_NETWORK.get(case.contestant, ''))
        if other in cases and case.size == '224' and case.task == 'logits':
            yield case, other
        plain = replace(case, contestant=case.contestant.replace(FORM, ''))
        if plain != case and plain in cases and case.task == 'logits':
            yield plain, case
        eager = replace(case, mode='eager')
        if case.mode != 'eager' and eager in cases and case.task == 'logits':
            yield eager, case


@dataclass(frozen=True)
class Plan:
    """Cases of one part.

    turns: 'models', all models and modes take turns; 'sizes', all sizes of one model; 'none', all cases are one run.
    form_modes: Those of the inference form. Files are made of it as it is.
    """

    models: Sequence[str]
    sizes: Sequence[str] = ('224',)
    batch: Sequence[int] = (1,)
    task: str = 'logits'
    modes: Sequence[str] = ('eager',)
    threads: Sequence[int] = (1, 2)
    turns: str = 'models'
    form_modes: Sequence[str] = ('eager', 'compile', 'compile-frozen')

    def sets(self, dtype: str = 'fp32', device: str = 'cpu') -> List[List[Case]]:
        """Return the cases, in sets that take turns."""
        sets: Dict[Tuple, List[Case]] = {}
        for threads, size, batch, model, mode in itertools.product(
                self.threads, self.sizes, self.batch, self.models, self.modes):
            if FORM in model and mode not in self.form_modes:
                continue
            case = Case(model, self.task, mode, size, batch, dtype, device, threads)
            keys = {'models': (threads, size, batch), 'sizes': (threads, model, mode, batch), 'none': ()}
            sets.setdefault(keys[self.turns], []).append(case)
        return list(sets.values())


_TO_DETECTION = SIZES[:SIZES.index('800x1344') + 1]
PLANS = {
    'infer': [
        Plan([*OURS, *FORMS, *PEERS], batch=(1, 8)),
        Plan([*OURS[:3], *FORMS[:2], SWIN, CONVNEXT], ['800x1344'], task='features'),
    ],
    'train': [Plan([SMALL_TRAINED, BIRDER, LUCIDRAINS, VIT_PYTORCH], batch=(8,), task='train')],
    'sizes': [
        Plan([*size_contestants(False), *size_contestants(True), SWIN], _TO_DETECTION, threads=(2,), turns='sizes'),
        Plan([*OURS[:3], LINEAR[0]], _TO_DETECTION, threads=(1,), turns='sizes'),
        Plan(LINEAR, ['512', '2048'], threads=(2,), turns='sizes'),
    ],
    'memory': [Plan([*OURS[:3], *LINEAR, SWIN, CONVNEXT], ['512', '800x1344', '1024', '2048'], task='features',
                    threads=(2,), turns='none')],
    'compile': [Plan([SMALL, SMALL + FORM, SWIN], batch=(1, 8), threads=(2,),
                     modes=('eager', 'compile', 'compile-frozen'))],
    'deploy': [
        Plan([TINY, SMALL, PP_SMALL, TINY + FORM, *FORMS[:2], SWIN, CONVNEXT], batch=(1, 8), threads=(2,),
             modes=('eager', 'compile-frozen', *RUNTIMES), form_modes=('eager',)),
        Plan([SMALL, PP_SMALL, *FORMS[:2], SWIN, CONVNEXT], ['800x1344'], task='features', threads=(2,),
             modes=('eager', 'onnxruntime', 'openvino'), form_modes=('eager',)),
    ],
}
