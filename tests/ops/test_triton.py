"""Triton kernels: values in Triton's interpreter, registers in machine code, both without a GPU; the rest with one."""
import json
import os
import re
import subprocess
import sys
import warnings
from importlib.metadata import version
from pathlib import Path

import pytest
import timm
import torch
from triton_cases import CASES, RANDOM, check_attention, random_case

from timm_crossformer.ops import cpu, kernels, operator, reference
from timm_crossformer.ops import triton as ops

needs_triton = pytest.mark.skipif(not ops.is_installed(), reason='needs Triton')
compiles = pytest.mark.skipif(
    not ops.is_installed() or os.environ.get('TRITON_INTERPRET') == '1', reason='needs Triton without its interpreter')

interprets = pytest.mark.skipif(
    not ops.is_installed() or tuple(map(int, version('triton').split('.')[:2])) < (3, 7),
    reason='needs Triton 3.7: interpreters of older ones take the bounds of loops from arrays of one element by int(), '
           'which NumPy 1.25 deprecates and NumPy 2.4 refuses')

# ---- values


@pytest.fixture(scope='module')
def failed_cases():
    """Run all cases in one interpreter: Triton decides at its import whether it is one."""
    script = Path(__file__).with_name('triton_cases.py')
    env = {**os.environ, 'TRITON_INTERPRET': '1'}
    run = subprocess.run([sys.executable, '-W', 'error', str(script)], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


@interprets
@pytest.mark.slow
@pytest.mark.parametrize('name', [*CASES, *(f'random-{seed}' for seed in range(RANDOM)), 'find-fault'])
def test_interpreted(failed_cases, name):
    assert name not in failed_cases, failed_cases[name]


@needs_triton
@pytest.mark.gpu
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize('name', CASES)
def test_launched(name, dtype):
    check_attention(CASES[name]._replace(dtype=dtype), 'cuda')


@needs_triton
@pytest.mark.gpu
@pytest.mark.parametrize('seed', range(200, 260))
def test_launched_random(seed):
    check_attention(random_case(seed), 'cuda')


@needs_triton
@pytest.mark.gpu
@pytest.mark.parametrize('backward', [False, True])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize('members', [16, 49, 196, 1050])
def test_works_on_this_gpu(members, dtype, backward):
    variant = ops.variant(dtype, 32, members, backward, False, torch.version.hip is not None)
    assert ops.find_fault(torch.device('cuda'), dtype, 32, variant, backward) is None


def given(batch, height, width, dtype=torch.bfloat16):
    """Return arguments on a GPU: one head of 32 channels, SDA of 7 x 7."""
    qkv = torch.randn(batch, height, width, 96, device='cuda', dtype=dtype, requires_grad=True)
    table = torch.randn(1, 13, 13, device='cuda', requires_grad=True)
    return qkv, table, 1, (-(-height // 7), 7, 1), (-(-width // 7), 7, 1)


@needs_triton
@pytest.mark.gpu
def test_more_numbers_than_32_bits_count():
    qkv, table, *layout = given(1, 56, 56)
    many = qkv.detach().expand(7200, -1, -1, -1).contiguous()  # 2.17e9 numbers
    assert many.numel() > 2 ** 31
    with torch.no_grad():
        out, expected = (operator.grouped_attention(x, table, *layout, backend='triton') for x in (many, qkv))
    assert torch.equal(out[-1], expected[0])
    logsumexp = ops.forward(qkv.detach(), table.detach(), *layout, save=True)[1].expand(7200, -1, -1, -1).contiguous()
    grad = torch.ones_like(out)
    found = ops.backward(grad, many, table.detach(), out, logsumexp, *layout)
    one = ops.backward(grad[:1], qkv.detach(), table.detach(), out[:1], logsumexp[:1], *layout)
    assert torch.equal(found[0][-1], one[0][0])
    torch.testing.assert_close(found[1], 7200 * one[1], rtol=1e-3, atol=1e-3)


@needs_triton
@pytest.mark.gpu
def test_every_run_has_the_same_bits():
    args = given(8, 56, 56)
    runs = [torch.autograd.grad(operator.grouped_attention(*args).float().square().sum(), args[:2]) for _ in range(3)]
    assert all(torch.equal(a, b) for run in runs for a, b in zip(run, runs[0], strict=True))


@needs_triton
@pytest.mark.gpu
@pytest.mark.parametrize('mode', [None, 'reduce-overhead'])
@pytest.mark.parametrize('train', [False, True])
def test_compiled(train, mode):
    model = timm.create_model('test_crossformer', num_classes=5).cuda().train(train)
    x = torch.randn(4, 3, 64, 64, device='cuda')
    with torch.set_grad_enabled(train):
        expected = model(x)
        compiled = torch.compile(model, mode=mode)
        for _ in range(3):
            found = compiled(x)
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
            if train:
                found.sum().backward()


@needs_triton
@pytest.mark.gpu
def test_amp_training_another_stream_and_a_captured_graph():
    model = timm.create_model('test_crossformer', num_classes=5).cuda()
    x = torch.randn(4, 3, 64, 64, device='cuda')
    with torch.autocast('cuda', dtype=torch.bfloat16):
        loss = model(x).float().square().mean()
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    model.eval()
    with torch.no_grad():
        expected = model(x)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.testing.assert_close(model(x), expected)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = model(x)
        graph.replay()
        torch.testing.assert_close(out, expected)
        if torch.cuda.device_count() > 1:
            torch.testing.assert_close(torch.nn.DataParallel(model)(x), expected)


# ---- machine code

COUNTS = [  # dtype, channels per head, members, backward; by kernel and capability
    (torch.bfloat16, 32, 49, False, [{80: 536, 90: 501, 120: 510}]),
    (torch.bfloat16, 32, 49, True, [{80: 854, 90: 751, 120: 799}]),
    (torch.bfloat16, 32, 16, False, [{90: 284}]),
    (torch.bfloat16, 32, 16, True, [{90: 439}]),
    (torch.bfloat16, 32, 196, False, [{90: 799, 120: 827}]),
    (torch.bfloat16, 32, 196, True, [{80: 836, 90: 813}, {80: 945, 90: 936}, {90: 336}]),
    (torch.float32, 32, 49, True, [{80: 3727, 90: 3847}]),
    (torch.bfloat16, 32, 1050, False, [{80: 858, 90: 840}]),
    (torch.bfloat16, 32, 1050, True, [{80: 879, 90: 830}, {80: 946, 90: 901}, {90: 468}]),
]
# Bytes, outside the loops or once in them. No other kernel spills.
SPILLS = {
    ('backward_kernel', torch.bfloat16, 120): 16,
    ('backward_kernel', torch.float32, 90): 256,
    ('backward_kernel', torch.float32, 100): 272,
    ('backward_kernel', torch.float32, 120): 272,
    ('backward_queries_kernel', torch.bfloat16, 80): 8,
    ('backward_queries_kernel', torch.bfloat16, 120): 8,
    ('backward_pairs_kernel', torch.bfloat16, 120): 56,
}


def built(dtype, head_dim, members, backward):
    """List (kernel, dtypes of its pointers, constants, options) of a pass."""
    variant = ops.variant(dtype, head_dim, members, backward, ops._allows_tf32())
    short = {torch.float32: '*fp32', torch.bfloat16: '*bf16'}[dtype]
    types = dict.fromkeys(['qkv', 'out', 'grad', 'grad_qkv'], short)
    types.update(dict.fromkeys(['table', 'grad_table', 'logsumexp', 'delta', 'pairs'], '*fp32'))
    constants, options = dict(variant.constants), dict(variant.options)
    if not backward:
        names = ['forward_kernel' if variant.one_tile else 'forward_tiles_kernel']
        constants['logsumexp'] = None
    elif variant.one_tile:
        names = ['backward_kernel']
    else:
        names = ['backward_queries_kernel', 'backward_keys_kernel', 'backward_pairs_kernel']
    kinds = [(getattr(kernels, name), types, constants, options) for name in names]
    if len(kinds) == 3:
        pairs = ops.pairs_options(variant)
        kinds[2] = (*kinds[2][:2], {**constants, **pairs}, {**options, 'num_warps': pairs['num_warps']})
    return kinds


def assemble(kernel, types, constants, options, target, monkeypatch, folder):
    """Compile as a launch would with aligned tensors."""
    import triton
    from triton.compiler import ASTSource

    monkeypatch.setenv('TRITON_CACHE_DIR', str(folder))
    names = kernel.arg_names
    constants = {name: value for name, value in constants.items() if name in names}
    types = {name: type for name, type in types.items() if name in names and name not in constants}
    signature = {name: 'i64' if name.startswith('by_') else 'i32' for name in names}
    signature.update(types)
    signature.update(dict.fromkeys(constants, 'constexpr'))
    aligned = {(names.index(name),): [['tt.divisibility', 16]] for name in types}
    return triton.compile(ASTSource(kernel, signature, constants, aligned), target=target, options=options)


def machine_code(compiled, folder):
    """Return what a cubin needs, by name, and the instructions of its longest loop (0 if nothing can take it apart)."""
    import triton

    tools = Path(triton.__file__).parent / 'backends' / 'nvidia' / 'bin'
    if not (tools / 'cuobjdump').exists() or not (tools / 'nvdisasm').exists():
        pytest.skip('this Triton does not bring the tools that read machine code')
    cubin = folder / 'kernel.cubin'
    cubin.write_bytes(compiled.asm['cubin'])

    def read(*command):
        return subprocess.run([*command, cubin], check=True, capture_output=True, text=True).stdout

    text = read(tools / 'cuobjdump', '--dump-resource-usage')
    usage = {name: int(number) for name, number in re.findall(r'\b(REG|STACK|LOCAL):(\d+)', text)}
    usage['SHARED'] = compiled.metadata.shared
    labels, count, longest = {}, 0, 0
    for line in read(tools / 'nvdisasm', '-c').splitlines():
        label = re.match(r'\s*(\.L_x_\d+):', line)
        if label:
            labels[label[1]] = count
        elif re.search(r'/\*[0-9a-f]{4,}\*/\s+\S', line):
            count += 1
            back = re.search(r'\bBRA(?:\.\w+)*\s.*?`\((\.L_x_\d+)\)', line)
            if back and back[1] in labels:
                longest = max(longest, count - labels[back[1]])
    return usage, longest


@compiles
@pytest.mark.slow
@pytest.mark.parametrize('capability', [80, 90, 100, 120])
@pytest.mark.parametrize('dtype,head_dim,members,backward,most', COUNTS, ids=str)
def test_counts_of_machine_code(capability, dtype, head_dim, members, backward, most, tmp_path, monkeypatch):
    """Instructions that a thread takes per group, or per pair of tiles: what they were at most when written, and 5%."""
    from triton.backends.compiler import GPUTarget

    for (kernel, *compiled_for), limits in zip(built(dtype, head_dim, members, backward), most, strict=True):
        compiled = assemble(kernel, *compiled_for, GPUTarget('cuda', capability, 32), monkeypatch, tmp_path)
        usage, loop = machine_code(compiled, tmp_path)
        spills = SPILLS.get((kernel.__name__, dtype, capability), 0)
        assert usage['STACK'] <= spills, f'{kernel.__name__} spills: {usage}'
        assert usage['LOCAL'] == 0 and usage['SHARED'] <= 99 * 1024, usage  # what GPUs for the desk have
        assert 'div.s' not in compiled.asm['ptx'].partition('$L__BB0_2:')[2], 'a division in a loop'
        if capability in limits:
            assert limits[capability] / 2 < loop <= 1.05 * limits[capability], f'{kernel.__name__}: {loop}, {usage}'


@compiles
@pytest.mark.slow
@pytest.mark.parametrize('head_dim,members', [(64, 49), (128, 49), (128, 1050), (8, 49)])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
def test_other_heads_hardly_spill(dtype, head_dim, members, tmp_path, monkeypatch):
    from triton.backends.compiler import GPUTarget

    for backward in (False, True):
        for kernel, *compiled_for in built(dtype, head_dim, members, backward):
            compiled = assemble(kernel, *compiled_for, GPUTarget('cuda', 80, 32), monkeypatch, tmp_path)
            usage, _ = machine_code(compiled, tmp_path)
            assert usage['STACK'] <= (32 if dtype == torch.float32 else 0), f'{kernel.__name__} spills: {usage}'
            assert usage['LOCAL'] == 0 and usage['SHARED'] <= 99 * 1024, usage


@compiles
@pytest.mark.slow
@pytest.mark.parametrize('members', [49, 196])
def test_amd_compiles_without_options_of_nvidia(members, tmp_path, monkeypatch):
    from triton.backends.compiler import GPUTarget

    monkeypatch.setattr(torch.version, 'hip', '7.0')
    for backward in (False, True):
        variant = ops.variant(torch.bfloat16, 32, members, backward, True, hip=True)
        assert 'maxnreg' not in dict(variant.options)
        assert dict(ops.variant(torch.float32, 32, members, backward, True, hip=True).constants)['PRECISION'] == 'ieee'
        for kernel, types, constants, _ in built(torch.bfloat16, 32, members, backward):
            compiled = assemble(
                kernel, types, constants, dict(variant.options), GPUTarget('hip', 'gfx942', 64), monkeypatch, tmp_path)
            assert compiled.asm['hsaco']


# ---- what can run where


def test_imports_without_triton():
    code = (
        'import sys; sys.modules["triton"] = None; import torch; from timm_crossformer.ops import triton as ops; '
        'assert not ops.is_installed() and not ops.is_interpreted()')
    subprocess.run([sys.executable, '-W', 'error', '-c', code], check=True)


def test_import_leaves_cuda_alone():
    code = 'import torch; from timm_crossformer.ops import triton; assert not torch.cuda.is_initialized()'
    subprocess.run([sys.executable, '-W', 'error', '-c', code], check=True)


def test_supports():
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert all(ops.supports(dtype, head_dim) for head_dim in (8, 16, 24, 32, 64, 128))
        assert not ops.supports(dtype, 129)
    assert not ops.supports(torch.float64, 32)


@pytest.mark.parametrize('head_dim', [8, 32, 64, 128])
@pytest.mark.parametrize('members', [1, 16, 17, 49, 64, 196, 1050])
def test_tiles_are_what_tensor_cores_take(head_dim, members):
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for backward in (False, True):
            variant = ops.variant(dtype, head_dim, members, backward, False)
            assert variant.block in (16, 32, 64) and variant.one_tile == (members <= variant.block)
            options = dict(variant.options)
            assert options['num_warps'] >= 1
            assert variant.resident * options['num_warps'] * options['maxnreg'] <= 65536 / 32


def test_tiles_of_groups_as_large_as_they_come():
    assert ops.variant(torch.float32, 32, 49, True, False).one_tile
    step = dict(ops.variant(torch.bfloat16, 32, 196, True, False).constants)['STEP']
    assert 256 * -(-196 // step) * step < 1.5 * 196 ** 2  # pairs of 14 x 14 that are computed


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize('members', [15, 30, 49, 81, 196])
def test_rounding_is_no_fault(members, dtype, monkeypatch):
    """What kernels take of a result is rounded: gradients in fp32, but for that, pass the check, in every variant."""
    def forward(qkv, *given, save, processors):
        out, logsumexp = reference.attention_and_logsumexp(qkv.float(), *given)
        return out.to(dtype), logsumexp

    @torch.enable_grad()
    def backward(grad, qkv, table, out, logsumexp, num_heads, *given, processors):
        qkv, table = (x.float().requires_grad_() for x in (qkv, table))
        exact, logsumexp = reference.attention_and_logsumexp(qkv, table, num_heads, *given)
        off = ((out - exact.detach()) * grad.float()).unflatten(-1, (num_heads, -1)).sum(-1)  # of delta
        assert off.shape == logsumexp.shape
        return torch.autograd.grad((exact * grad).sum() - (off * logsumexp).sum(), (qkv, table))

    monkeypatch.setattr(ops, '_unsuited', lambda device: None)
    monkeypatch.setattr(ops, 'forward', forward)
    monkeypatch.setattr(ops, 'backward', backward)
    variant = ops.variant(dtype, 32, members, True, ops._allows_tf32())
    assert ops.find_fault(torch.device('cpu'), dtype, 32, variant, True) is None


@pytest.mark.parametrize('n', range(1, 12))
def test_groups_of_an_axis_are_those_with_a_token(n):
    for interval in range(1, 7):
        for size in range(1, 6):
            regions = -(-n // (size * interval)) + 1
            tokens = {(token // (size * interval), token % interval) for token in range(n)}
            assert ops._axis(n, (regions, size, interval))[2] == len(tokens)


@pytest.mark.parametrize('number', [1, 2, 3, 7, 8, 9, 49, 2 ** 16 + 1, 2 ** 30, 2 ** 31 - 1])
def test_dividers_are_exact(number):
    divider = kernels.divider_of(number)
    for n in {0, 1, number - 1, number, 2 ** 31 - 1, (2 ** 31 - 1) // number * number, *range(0, 2 ** 31, 10 ** 6 + 3)}:
        assert (2 * n * (divider & 0xffffffff) >> 32) >> (divider >> 32) - 1 == n // number
    assert 2 ** 32 <= divider < 2 ** 63


@pytest.mark.filterwarnings('ignore:Please use the new API settings to control TF32')  # torch 2.9
@pytest.mark.parametrize('precision,allowed', [('highest', False), ('high', True), ('medium', True)])
def test_tf32_follows_pytorch(precision, allowed):
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        assert ops._allows_tf32() is allowed
    finally:
        torch.set_float32_matmul_precision(before)


# ---- the verdict


class Card:
    """Stands for a GPU: tensors of the CPU say that they are on it, and the CPU backend is what runs there."""

    def __init__(self, monkeypatch):
        self.tried, self.capturing, self.fault = [], False, None
        self.forward, self.backward = 0, 0
        monkeypatch.setattr(ops, '_verdicts', {})
        monkeypatch.setattr(ops, '_told', set())
        monkeypatch.setattr(ops, 'is_installed', lambda: True)
        monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
        monkeypatch.setattr(torch.cuda, 'is_current_stream_capturing', lambda: self.capturing)
        monkeypatch.setattr(ops, '_unsuited', lambda device: None)
        monkeypatch.setattr(ops, '_DEVICE_TYPE', 'cpu')
        monkeypatch.setattr(ops, 'forward', self.run)
        monkeypatch.setattr(ops, 'backward', self.run_back)
        monkeypatch.setattr(operator, 'choose_backend', lambda qkv, num_heads: 'triton')
        find_fault = ops.find_fault

        def count(device, dtype, *rest):
            self.tried.append(dtype)
            return find_fault(device, dtype, *rest) if self.fault is None else self.fault

        monkeypatch.setattr(ops, 'find_fault', count)

    def run(self, qkv, table, num_heads, rows, cols, save=False, processors=None):
        self.forward += processors is None
        if save:
            return reference.attention_and_logsumexp(qkv, table, num_heads, rows, cols)
        return cpu.forward(qkv, table, num_heads, rows, cols), qkv.new_empty(0, dtype=torch.float32)

    def run_back(self, grad, qkv, table, out, logsumexp, num_heads, rows, cols, processors=None):
        self.backward += processors is None
        return cpu.backward(grad, qkv, table, num_heads, rows, cols)


@pytest.fixture
def card(monkeypatch):
    return Card(monkeypatch)


BLOCKS = 10  # of test_crossformer


def step(enable=False):
    """Take a training step, with checkpointing or not; return its loss and gradients."""
    torch.manual_seed(0)
    model = timm.create_model('test_crossformer', num_classes=5).train()
    model.set_grad_checkpointing(enable)
    loss = model(torch.randn(2, 3, 64, 64)).square().mean()
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters())]


def test_first_use_inside_checkpointing(card):
    for a, b in zip(step(enable=True), step(enable=False), strict=True):
        torch.testing.assert_close(a, b)
    assert card.tried and all(ops._verdicts.values()) and card.forward > card.backward > 0


def test_first_use_in_inference_mode(card):
    model = timm.create_model('test_crossformer', num_classes=5).eval()
    with torch.inference_mode():
        model(torch.randn(2, 3, 64, 64))
    assert card.forward == BLOCKS and all(ops._verdicts.values())
    assert not any(backward for *_, backward in ops._verdicts)  # nothing is compiled that inference does not need
    tried = len(card.tried)
    step()
    assert len(card.tried) > tried


def test_verdicts_are_by_dtype_head_size_and_tile(card):
    def ask(dtype, channels, size, backward=False):
        return ops.works_on(torch.zeros(1, 20, 20, 3 * channels, dtype=dtype), 2, (3, size, 1), (3, size, 1), backward)

    for case in ((torch.float32, 16, 7), (torch.bfloat16, 16, 7), (torch.bfloat16, 64, 7), (torch.bfloat16, 64, 4),
                 (torch.bfloat16, 64, 14), (torch.bfloat16, 64, 7, True)):
        tried = len(card.tried)
        assert ask(*case) and ask(*case)
        assert len(card.tried) == tried + 1


def test_deterministic_algorithms_keep_the_kernels(card):
    torch.use_deterministic_algorithms(True)
    try:
        step()
    finally:
        torch.use_deterministic_algorithms(False)
    assert card.forward == card.backward == BLOCKS


def test_a_fault_is_told_once_and_the_reference_serves(card):
    expected = step()
    ops._verdicts.clear()
    card.forward, card.fault = 0, 'no compiler'
    with pytest.warns(UserWarning, match='do not work on cpu in torch.float32, PyTorch serves instead: no compiler'):
        found = step()
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        step()
    assert card.forward == 0


def test_what_is_wrong_with_a_kernel_is_found(card, monkeypatch):
    right = reference.attention_and_logsumexp
    monkeypatch.setattr(reference, 'attention_and_logsumexp', lambda *args: [1.1 * x for x in right(*args)])
    variant = ops.variant(torch.float32, 32, 49, True, False)
    fault = ops.find_fault(torch.device('cpu'), torch.float32, 32, variant, True)
    assert fault.startswith('result is off by 0.1 of')


def test_a_captured_graph_without_a_verdict_is_told_once(card):
    card.capturing = True
    with pytest.warns(UserWarning, match=r'PyTorch serves in this graph.*Run the model once before') as told:
        step()
    assert len(told) == 1 and not card.tried and card.forward == 0
    card.capturing = False
    step()
    assert card.forward == BLOCKS


def test_backward_pass_of_a_kernel_after_the_reference(card):
    """What the reference saves is what the kernels save: a verdict may come in between."""
    qkv, table = torch.randn(1, 9, 8, 48), torch.randn(1, 7, 7)
    out, logsumexp = reference.attention_and_logsumexp(qkv, table, 1, (3, 4, 1), (2, 4, 1))
    torch.testing.assert_close(out, reference.grouped_attention(qkv, table, 1, (3, 4, 1), (2, 4, 1)))
    q, k, _, bias, mask, place = reference.open_groups(qkv, table, 1, (3, 4, 1), (2, 4, 1))
    total = ((q * q.shape[-1] ** -0.5) @ k.mT + bias + mask).exp().sum(-1, keepdim=True)
    torch.testing.assert_close(logsumexp.exp2(), reference.close_groups(total, place))


@needs_triton
@pytest.mark.parametrize('version,capability,reason', [
    ('3.4.0', (9, 0), 'they need Triton 3.5 or newer, and this is 3.4.0'),
    ('3.5.0', (7, 5), 'they need compute capability 8.0 or newer, and this is 7.5'),
    ('3.10.1', (8, 0), None),
])
def test_what_is_too_old_is_not_tried(version, capability, reason, monkeypatch):
    monkeypatch.setattr(kernels.triton, '__version__', version)
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: capability)
    assert ops._unsuited(torch.device('cuda', 0)) == reason


def test_works_on_no_cpu():
    assert not ops.works_on(torch.zeros(1, 7, 7, 96), 1, (1, 7, 1), (1, 7, 1), backward=False)


@needs_triton
def test_find_fault_never_raises():
    def broken(*args):
        raise RuntimeError('broken')

    variant = ops.variant(torch.float32, 8, 9, False, False)
    fault = ops.find_fault(torch.device('cpu'), torch.float32, 8, variant, False, broken)
    assert fault is not None and ': ' in fault
