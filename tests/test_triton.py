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
import torch
from triton_cases import CASES, TABLES, check_attention, check_table, oracle

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
@pytest.mark.parametrize('name', [*CASES, *(f'table-{name}' for name in TABLES), 'find-fault'])
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
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize('sizes', TABLES.values(), ids=TABLES.keys())
def test_table_launched(sizes, dtype):
    check_table(*sizes, 'cuda', dtype)


@needs_triton
@pytest.mark.gpu
def test_works_on_this_gpu():
    assert ops.find_fault(torch.device('cuda'), lambda qkv, *rest: oracle(qkv, *rest).to(qkv.dtype)) is None


# ---- registers


def attention_kernels(dtype, head_dim, members):
    """List (kernel, dtypes of its pointers, constants, launch options) of a forward and a backward pass."""
    short = {torch.float32: '*fp32', torch.bfloat16: '*bf16'}[dtype]
    types = dict.fromkeys(['qkv', 'grad', 'grad_qkv'], short)
    types.update(dict.fromkeys(['table', 'grad_table', 'logsumexp', 'delta'], '*fp32'))
    kernels = []
    for backward in (False, True):
        constants = ops.variant(dtype, head_dim, members, backward)
        options = ops.launch_options(dtype, constants['BLOCK'], backward)
        one_tile = {'ONE_TILE': members <= constants['BLOCK']}
        if not backward:
            kernels.append(
                (ops._forward_kernel, {**types, 'out': short}, {**constants, **one_tile, 'logsumexp': None}, options))
            recompute = ops._forward_kernel, {**types, 'out': '*fp32'}, {**constants, **one_tile}, options
        elif members <= constants['BLOCK']:
            kernels.append((ops._backward_kernel, types, constants, options))
        else:
            kernels.append(recompute)
            kernels.append((ops._backward_queries_kernel, {**types, 'out': '*fp32'}, constants, options))
            kernels.append((ops._backward_keys_kernel, types, constants, options))
    return kernels


def resource_usage(kernel, types, constants, options, capability, folder):
    """Compile as a launch would with aligned tensors; return what the machine code needs, by name."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    constants = {name: value for name, value in constants.items() if name in names}
    types = {name: type for name, type in types.items() if name in names and name not in constants}
    signature = {name: 'fp32' if name == 'scale' or name.startswith('eps') else 'i32' for name in names}
    signature.update(types)
    signature.update(dict.fromkeys(constants, 'constexpr'))
    aligned = {(names.index(name),): [['tt.divisibility', 16]] for name in types}
    source = ASTSource(kernel, signature, constants, aligned)
    compiled = triton.compile(source, target=GPUTarget('cuda', capability, 32), options=options)
    cubin = folder / 'kernel.cubin'
    cubin.write_bytes(compiled.asm['cubin'])
    cuobjdump = Path(triton.__file__).parent / 'backends' / 'nvidia' / 'bin' / 'cuobjdump'
    if not cuobjdump.exists():
        pytest.skip('this Triton has no cuobjdump')
    text = subprocess.run(
        [cuobjdump, '--dump-resource-usage', cubin], check=True, capture_output=True, text=True).stdout
    usage = {name: int(number) for name, number in re.findall(r'\b(REG|STACK|LOCAL):(\d+)', text)}
    return {**usage, 'SHARED': compiled.metadata.shared}


def check_usage(usage):
    assert usage['STACK'] == usage['LOCAL'] == 0, f'spills: {usage}'
    assert usage['SHARED'] <= 99 * 1024, f'more shared memory than GPUs for the desk have: {usage}'


@compiles
@pytest.mark.slow
@pytest.mark.parametrize('members', [16, 49, 100])
@pytest.mark.parametrize('capability,dtype', [
    (80, torch.float32), (90, torch.float32),
    (80, torch.bfloat16), (90, torch.bfloat16), (100, torch.bfloat16), (120, torch.bfloat16),
])
def test_attention_does_not_spill(capability, dtype, members, tmp_path, monkeypatch):
    monkeypatch.setenv('TRITON_CACHE_DIR', str(tmp_path))
    for kernel, *compiled_for in attention_kernels(dtype, 32, members):
        check_usage(resource_usage(kernel, *compiled_for, capability, tmp_path))


@compiles
@pytest.mark.slow
@pytest.mark.parametrize('capability', [80, 90])
def test_tf32_does_not_spill(capability, tmp_path, monkeypatch):
    monkeypatch.setenv('TRITON_CACHE_DIR', str(tmp_path))
    monkeypatch.setattr(ops, '_allows_tf32', lambda: True)
    for kernel, types, constants, options in attention_kernels(torch.float32, 32, 49):
        assert constants['PRECISION'] == 'tf32'
        check_usage(resource_usage(kernel, types, constants, options, capability, tmp_path))


@compiles
@pytest.mark.slow
@pytest.mark.parametrize('dim,heads', [(6, 3), (48, 24), (64, 64)])
@pytest.mark.parametrize('capability', [80, 90])
def test_table_does_not_spill(capability, dim, heads, tmp_path, monkeypatch):
    monkeypatch.setenv('TRITON_CACHE_DIR', str(tmp_path))
    assert ops.supports_table(dim, heads)
    kernel = ops._table_kernel
    types = dict.fromkeys(kernel.arg_names[:kernel.arg_names.index('eps1')], '*fp32')
    types['offsets'] = '*i64'
    check_usage(resource_usage(
        kernel, types, ops.table_variant(dim, heads), ops.table_launch_options(), capability, tmp_path))


# ---- what can run where


def test_imports_without_triton():
    code = (
        'import sys; sys.modules["triton"] = None; import torch; from timm_crossformer.ops import triton as ops; '
        'assert not ops.is_installed(); assert not ops.works_on(torch.device("cuda"))')
    subprocess.run([sys.executable, '-W', 'error', '-c', code], check=True)


def test_import_leaves_cuda_alone():
    code = 'import torch; from timm_crossformer.ops import triton; assert not torch.cuda.is_initialized()'
    subprocess.run([sys.executable, '-W', 'error', '-c', code], check=True)


def test_supports():
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert all(ops.supports(dtype, head_dim) for head_dim in (8, 16, 24, 32, 64, 128))
        assert not ops.supports(dtype, 129)
    assert not ops.supports(torch.float64, 32)
    assert ops.supports_table(48, 24)  # crossformer_large
    assert not ops.supports_table(128, 1)  # vit-pytorch's


@needs_triton
@pytest.mark.parametrize('head_dim', [8, 32, 64, 128])
@pytest.mark.parametrize('members', [1, 16, 17, 49, 64, 1050])
def test_tiles_are_what_tensor_cores_take(head_dim, members):
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for backward in (False, True):
            block = ops.variant(dtype, head_dim, members, backward)['BLOCK']
            assert block in (16, 32, 64)
            assert ops.launch_options(dtype, block, backward)['num_warps'] >= 1


@pytest.mark.filterwarnings('ignore:Please use the new API settings to control TF32')  # torch 2.9
@pytest.mark.parametrize('precision,allowed', [('highest', False), ('high', True), ('medium', True)])
def test_tf32_follows_pytorch(precision, allowed):
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        assert ops._allows_tf32() is allowed
    finally:
        torch.set_float32_matmul_precision(before)


@needs_triton
def test_a_fault_is_told_once(monkeypatch):
    device = torch.device('cuda', 0)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'is_current_stream_capturing', lambda: False)
    monkeypatch.setattr(ops, '_verdicts', {})
    monkeypatch.setattr(ops, 'find_fault', lambda device: 'no compiler')
    with pytest.warns(UserWarning, match=r'do not work on cuda:0, PyTorch serves instead: no compiler'):
        assert not ops.works_on(device)
    monkeypatch.setattr(ops, 'find_fault', None)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert not ops.works_on(device)


@needs_triton
def test_works_on_remembers_and_waits_for_captures_to_end(monkeypatch):
    device = torch.device('cuda', 0)
    capturing = [True, False]
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'is_current_stream_capturing', lambda: capturing.pop(0))
    monkeypatch.setattr(ops, '_verdicts', {})
    monkeypatch.setattr(ops, 'find_fault', lambda device: None)
    assert not ops.works_on(device)
    assert ops.works_on(device)
    assert ops.works_on(device)


def test_works_on_no_cpu():
    assert not ops.works_on(torch.device('cpu'))


@needs_triton
def test_find_fault_never_raises():
    def broken(*args):
        raise RuntimeError('broken')

    assert ops.find_fault(torch.device('cpu'), broken) == 'RuntimeError: broken'
