"""Files as data: every ordinary checkpoint is read, no hostile one runs anything."""
import argparse
import builtins
import collections
import copyreg
import datetime
import functools
import io
import os
import pathlib
import pickle
import pickletools
import struct
import sys
import tarfile
import types
import uuid
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import nn

from timm_crossformer.checkpoints.errors import CheckpointError
from timm_crossformer.checkpoints.reading import Foreign, read_checkpoint

WEIGHTS = {
    'a.weight': torch.arange(6.).view(2, 3), 'a.bias': torch.tensor([1., -2.], dtype=torch.float16),
    'b.weight': torch.arange(4.).bfloat16(), 'c.steps': torch.tensor(7), 'd.empty': torch.zeros(0, 3),
    'e.mask': torch.tensor([True, False]), 'f.double': torch.rand(3, dtype=torch.float64),
}


def save(value, path, legacy=False, protocol=2):
    torch.save(value, path, _use_new_zipfile_serialization=not legacy, pickle_protocol=protocol)
    return path


@pytest.fixture(params=['zip', 'legacy'])
def legacy(request):
    return request.param == 'legacy'


# ---- what is read


@pytest.mark.parametrize('protocol', [2, 3, 4, 5])
def test_tensors_arrive_as_they_were(tmp_path, legacy, protocol):
    shared = torch.arange(10.)
    state = collections.OrderedDict(WEIGHTS, view=shared[2:8:2], same=shared, t=shared.view(2, 5).t())
    state._metadata = {'': {'version': 1}}
    state['p'] = nn.Parameter(torch.ones(2))
    read = read_checkpoint(save({'model': state}, tmp_path / 'x.pth', legacy, protocol))['model']
    assert list(read) == list(state)
    for key, tensor in state.items():
        assert read[key].dtype == tensor.dtype and torch.equal(read[key], tensor), key
        assert read[key].stride() == tensor.stride()


def test_agrees_with_pytorchs_own_reader(tmp_path, legacy):
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.rand(2, 3)).sum().backward()
    optimizer.step()
    checkpoint = {'model': model.state_dict(), 'optimizer': optimizer.state_dict(), 'epoch': 3, 'best': 0.5, 'x': None,
                  'rng': torch.get_rng_state(), 'raw': b'\x00\xff', 'names': ['a', ('b', 3 + 1j)], 'set': {1, 2}}
    path = save(checkpoint, tmp_path / 'x.pth', legacy)
    theirs, ours = torch.load(path, weights_only=True), read_checkpoint(path)
    assert ours.keys() == theirs.keys()
    assert ours['raw'] == b'\x00\xff' and ours['epoch'] == 3 and ours['set'] == {1, 2} and ours['names'][0] == 'a'
    assert torch.equal(ours['rng'], theirs['rng'])
    assert ours['optimizer']['param_groups'] == theirs['optimizer']['param_groups']
    for index, state in theirs['optimizer']['state'].items():
        assert all(torch.equal(ours['optimizer']['state'][index][key], value) for key, value in state.items())


def test_reading_copies_nothing_and_writes_nothing_back(tmp_path):
    path = save(WEIGHTS, tmp_path / 'x.pth')
    before = path.read_bytes()
    read_checkpoint(path)['a.weight'].fill_(5)
    assert path.read_bytes() == before


LAZY = {
    'negated': lambda x: torch._neg_view(x.real.clone()),
    'imaginary of conjugate': lambda x: x.conj().imag,
    'conjugated': lambda x: x.conj(),
    'both': lambda x: torch._neg_view(x.conj()),
    'real part': lambda x: x.real,
    'transposed slice': lambda x: x.real.t()[1:, ::2],
    'empty slice': lambda x: x.real[3:],
    'scalar inside': lambda x: x.real[2, 3],
    'broadcast': lambda x: x.real[:1].expand(5, 4),
}


@pytest.mark.parametrize('view', list(LAZY))
def test_views_have_the_numbers_that_pytorch_reads(view, tmp_path, legacy):
    tensor = LAZY[view](torch.randn(3, 4, dtype=torch.complex64))
    beside = {} if legacy else {'storage': torch.arange(3).untyped_storage()}  # which torch.load cannot read there
    path = save({'x': tensor, **beside}, tmp_path / 'x.pth', legacy)
    theirs, ours = torch.load(path, weights_only=True)['x'], read_checkpoint(path)['x']
    assert torch.equal(ours, tensor) and torch.equal(ours, theirs)
    assert (ours.is_neg(), ours.is_conj(), ours.stride()) == (theirs.is_neg(), theirs.is_conj(), theirs.stride())


DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool,
          torch.complex64, torch.float8_e4m3fn]


@st.composite
def checkpoints(draw):
    """Draw a nested dict of views of a few storages."""
    bases = []
    for dtype in draw(st.lists(st.sampled_from(DTYPES), min_size=1, max_size=3)):
        numbers = torch.arange(draw(st.integers(0, 40)), dtype=torch.float32) % 2 - .5
        bases.append(numbers.to(dtype))

    def view():
        base = draw(st.sampled_from(bases))
        start, step = draw(st.integers(0, 5)), draw(st.integers(1, 3))
        part = base[start::step]
        if part.numel() % 2 == 0 and draw(st.booleans()):
            part = part.reshape(2, -1).t() if step == 1 else part
        if part.is_complex() and draw(st.booleans()):
            part = part.conj()
        return nn.Parameter(part) if part.is_floating_point() and draw(st.booleans()) else part

    return {'model': {f'w{i}': view() for i in range(draw(st.integers(1, 5)))}, 'epoch': draw(st.integers())}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(checkpoint=checkpoints(), protocol=st.sampled_from([2, 4]))
def test_random_checkpoints_are_read_as_pytorch_reads_them(tmp_path, legacy, checkpoint, protocol):
    eight_bits = any(t.dtype == torch.float8_e4m3fn for t in checkpoint['model'].values())
    assume(not (legacy and eight_bits))  # torch.load cannot read them there
    path = save(checkpoint, tmp_path / 'x.pth', legacy, protocol)
    theirs, ours = torch.load(path, weights_only=False), read_checkpoint(path)
    assert ours['epoch'] == theirs['epoch'] and list(ours['model']) == list(theirs['model'])
    for key, tensor in theirs['model'].items():
        got = ours['model'][key]
        assert (got.dtype, got.shape, got.stride()) == (tensor.dtype, tensor.shape, tensor.stride())
        assert torch.equal(got.to(torch.complex128), tensor.to(torch.complex128))


def test_tensors_of_one_storage_share_it(tmp_path, legacy):
    shared = torch.arange(6.)
    read = read_checkpoint(save({'a': shared[:3], 'b': shared[1:]}, tmp_path / 'x.pth', legacy))
    read['a'][1] = 7
    assert read['b'][0] == 7


OTHERS = {
    'page': (b'\n<!DOCTYPE html><html><head><title>Drive - Sign in</title>', "a web page, 'Drive - Sign in'.*browser"),
    'pointer': (b'version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n', 'Git LFS.*git lfs pull'),
    'gzip': (b'\x1f\x8b\x08' + bytes(30), 'packed with gzip. Unpack it'),
    '7z': (b"7z\xbc\xaf'\x1c" + bytes(30), 'packed with 7-Zip'),
    'empty': (b'', 'is empty'),
}


@pytest.mark.parametrize('suffix', ['.pth', '.safetensors', '.zip'])
@pytest.mark.parametrize('kind', list(OTHERS))
def test_what_is_saved_in_a_checkpoints_place_is_named(kind, suffix, tmp_path):
    body, message = OTHERS[kind]
    (tmp_path / f'x{suffix}').write_bytes(body)
    with pytest.raises(CheckpointError, match=f'is no checkpoint: .*{message}'):
        read_checkpoint(tmp_path / f'x{suffix}')


@pytest.mark.parametrize('compression', [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED], ids=['stored', 'deflated'])
def test_an_archive_around_a_checkpoint_is_named(compression, tmp_path):
    save(WEIGHTS, tmp_path / 'inside.pth')
    with zipfile.ZipFile(tmp_path / 'x.pth', 'w', compression) as archive:
        archive.write(tmp_path / 'inside.pth', 'folder/inside.pth')
        archive.writestr('__MACOSX/folder/inside.pth', 'x')
    with pytest.raises(CheckpointError, match=r'a zip archive of folder/inside\.pth\. Unpack it'):
        read_checkpoint(tmp_path / 'x.pth')
    with tarfile.open(tmp_path / 'x.pth', 'w') as archive:
        archive.add(tmp_path / 'inside.pth', 'inside.pth')
    with pytest.raises(CheckpointError, match='a tar archive'):
        read_checkpoint(tmp_path / 'x.pth')


class History:
    """As mmengine's HistoryBuffer: arrays, and a table of functions."""

    def __init__(self):
        self.values = np.arange(5, dtype=np.float32)
        self.scalar = np.float64(0.5)
        self.methods = {'mean': History.mean}

    def mean(self):
        raise AssertionError('run')


class AttributeDict(dict):
    """As Lightning's and addict's: a dict with attributes and a hook for its state."""

    def __setstate__(self, state):
        raise AssertionError('run')

    def __reduce_ex__(self, protocol):
        return (copyreg.__newobj__, (AttributeDict,), {'frozen': True}, None, iter(self.items()))


class Names(list):
    def __reduce_ex__(self, protocol):
        return (copyreg.__newobj__, (Names,), None, iter(self), None)


class Hooked:
    def __reduce__(self):
        return (functools.partial(Hooked), (), {'x': 1})

    def __setstate__(self, state):
        raise AssertionError('run')


BESIDE = {
    'namespace': lambda: argparse.Namespace(lr=0.1, path=pathlib.Path('/data'), betas=(0.9, 0.999)),
    'path': lambda: pathlib.PurePosixPath('/data/x'),
    'counter': lambda: collections.Counter(a=3),
    'defaultdict': lambda: collections.defaultdict(list, a=[1]),
    'deque': lambda: collections.deque([1, 2], maxlen=5),
    'history': History,
    'attribute-dict': lambda: AttributeDict(a=1, b=AttributeDict()),
    'names': lambda: Names(['a', 'b']),
    'dates': lambda: [datetime.datetime(2026, 1, 1), datetime.timedelta(3), datetime.UTC],
    'numpy': lambda: [np.float32(1), np.arange(3), np.dtype('f4'), np.random.RandomState(0), np.random.default_rng(0)],
    'plain': lambda: [uuid.uuid4(), range(3), slice(1), frozenset([1]), bytearray(b'x'), Ellipsis, type(None), int],
    'simple': lambda: types.SimpleNamespace(a=1),
    'module': lambda: nn.Sequential(nn.Linear(2, 2), nn.GELU()),
    'optimizer': lambda: torch.optim.SGD([torch.zeros(1, requires_grad=True)], 0.1),
    'torch': lambda: [torch.device('cpu'), torch.float16, torch.Size([1])],
    'sparse': lambda: torch.eye(2).to_sparse(),
    'quantized': lambda: torch.quantize_per_tensor(torch.rand(2), 0.1, 0, torch.qint8),
    'hooked': Hooked,
    'recursive': lambda: (lambda x: x.append(x) or x)([]),
}


@pytest.mark.parametrize('what', list(BESIDE))
@pytest.mark.filterwarnings('ignore')
def test_whatever_lies_beside_the_weights_is_left_alone(what, tmp_path, legacy, monkeypatch):
    beside = BESIDE[what]()
    path = save({'args': beside, 'state_dict': WEIGHTS, 'list': [beside, {'x': beside}]}, tmp_path / 'x.pth', legacy)

    def no_import(name, *args, **kwargs):
        assert not name.startswith(('argparse', 'numpy.random', 'mmengine'))
        return original(name, *args, **kwargs)

    original = builtins.__import__
    monkeypatch.setattr(builtins, '__import__', no_import)
    read = read_checkpoint(path)
    monkeypatch.undo()
    assert all(torch.equal(read['state_dict'][key], tensor) for key, tensor in WEIGHTS.items())


def test_classes_that_are_not_installed_are_no_matter(tmp_path, monkeypatch):
    module = types.ModuleType('mmengine.logging')
    module.HistoryBuffer = type('HistoryBuffer', (), {'__module__': 'mmengine.logging'})
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, 'mmengine', types.ModuleType('mmengine'))
        patch.setitem(sys.modules, 'mmengine.logging', module)
        buffer = module.HistoryBuffer()
        buffer.history = np.arange(3)
        path = save({'message_hub': {'log_scalars': {'lr': buffer}}, 'state_dict': WEIGHTS}, tmp_path / 'x.pth')
    read = read_checkpoint(path)
    assert isinstance(read['message_hub']['log_scalars']['lr'], Foreign)
    assert not hasattr(read['message_hub']['log_scalars']['lr'], 'history')
    assert 'mmengine' not in sys.modules


@pytest.mark.parametrize('value', [nn.Linear(2, 2), argparse.Namespace(), [WEIGHTS], 3], ids=lambda x: type(x).__name__)
def test_a_file_that_is_no_dict_says_so(value, tmp_path):
    with pytest.raises(CheckpointError, match=r'needs to be a dict of tensors.*Save the state dict'):
        read_checkpoint(save(value, tmp_path / 'x.pth'))


# ---- what is refused


def touch(path):
    return f"open({str(path)!r}, 'w')"


def reduce_to(function, *args, state=None):
    class Attack:
        def __reduce__(self):
            return (function, args) if state is None else (function, args, state)
    return Attack()


ATTACKS = {
    'os.system': lambda p: reduce_to(os.system, f'touch {p}'),
    'eval': lambda p: reduce_to(eval, touch(p)),
    'exec': lambda p: reduce_to(exec, touch(p)),
    'open': lambda p: reduce_to(open, str(p), 'w'),
    'import': lambda p: reduce_to(__import__, 'this'),
    'getattr': lambda p: reduce_to(getattr, reduce_to(__import__, 'os'), 'system'),
    'getattr-globals': lambda p: reduce_to(getattr, reduce_to(getattr, History, 'mean'), '__globals__'),
    'nested': lambda p: {'a': [({'b': reduce_to(eval, touch(p))},)]},
    'key': lambda p: {reduce_to(eval, touch(p)): 1},
    'partial': lambda p: reduce_to(functools.partial, os.system, f'touch {p}'),
    'popen': lambda p: reduce_to(__import__('subprocess').Popen, ['touch', str(p)]),
    'rmtree': lambda p: reduce_to(__import__('shutil').rmtree, str(p.parent)),
    'runpy': lambda p: reduce_to(__import__('runpy').run_path, str(p)),
    'pickle': lambda p: reduce_to(pickle.loads, pickle.dumps(reduce_to(eval, touch(p)))),
    'torch.load': lambda p: reduce_to(torch.load, str(p)),
    'torch.hub': lambda p: reduce_to(torch.hub.load, str(p), 'x'),
    'map': lambda p: reduce_to(map, eval, [touch(p)]),
    'methodcaller': lambda p: reduce_to(__import__('operator').methodcaller, 'system'),
    'setattr': lambda p: reduce_to(setattr, reduce_to(__import__, 'os'), 'x', 1),
    'layout': lambda p: reduce_to(torch.serialization.get_unsafe_globals_in_checkpoint, str(p)),
    'numpy': lambda p: reduce_to(np.load, str(p), None, True),
    'state': lambda p: reduce_to(collections.OrderedDict, state=reduce_to(eval, touch(p))),
}


@pytest.mark.parametrize('attack', list(ATTACKS))
@pytest.mark.parametrize('protocol', [2, 4])
def test_hostile_pickles_are_refused_before_anything_runs(attack, protocol, tmp_path, legacy):
    flag = tmp_path / 'pwned'
    checkpoint = {'args': ATTACKS[attack](flag), 'model': WEIGHTS}
    path = save(checkpoint, tmp_path / 'x.pth', legacy, protocol)
    with pytest.raises(CheckpointError, match=r'was refused.*asks to import \S+\. Nothing in it was run'):
        read_checkpoint(path)
    assert not flag.exists() and path.exists()


# Pickles that no pickler writes, by instruction; `{}` is a command that would leave a file.
RAW = {
    'global': b'cos\nsystem\n(V{}\ntR.',
    'stack-global': b'\x80\x04\x8c\x02os\x8c\x06system\x93(V{}\ntR.',
    'inst': b'(V{}\nios\nsystem\n.',
    'obj': b'(cos\nsystem\nV{}\no.',
    'python-2': b'c__builtin__\neval\n(V1\ntR.',
    'commands': b'ccommands\ngetoutput\n(V{}\ntR.',
    'dotted': b'\x80\x04\x8c\x05torch\x8c\x09os.system\x93(V{}\ntR.',
    'dotted-globals': b'\x80\x04\x8c\x05torch\x8c\x14load.__globals__.get\x93(V{}\ntR.',
    'through-a-package': b'cnumpy.os\nsystem\n(V{}\ntR.',
    'newobj': b'\x80\x02cos\nsystem\n(V{}\nt\x81.',
    'setstate': b'\x80\x04\x8c\x0fcollections.abc\x8c\x07Mapping\x93)\x81}V__setstate__\ncos\nsystem\nsbV{}\nb.',
}
BROKEN = {
    'extension': b'\x80\x02\x82\x01(V{}\ntR.',
    'persistent-text': b'Pstorage\n.',
    'persistent-odd': b'\x80\x02(X\x06\x00\x00\x00moduleK\x01tQ.',
    'persistent-short': b'\x80\x02(X\x07\x00\x00\x00storageK\x01tQ.',
    'call-a-string': b'\x80\x02X\x01\x00\x00\x00a)R.',
    'call-a-tensor': b'\x80\x02K\x01)\x81.',
    'add-to-a-tensor': b'\x80\x04ctorch._utils\n_rebuild_tensor\n((X\x07\x00\x00\x00storagectorch\nFloatStorage\n'
                       b'X\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x00tQK\x00K\x00\x85K\x01\x85tR(K\x01\x90.',
    'append-to-a-dict': b'\x80\x02}K\x01a.',
    'set-in-a-list': b'\x80\x02]K\x01K\x02s.',
    'endless-set': b'\x80\x02c__builtin__\nset\nctorch\nSize\n]\x85R\x85RK\x01a.',
    'no-end': b'\x80\x02}',
    'empty-stack': b'\x80\x02R.',
    'memo': b'\x80\x02h\x09.',
    'long': b'\x80\x02\x8b\xff\xff\xff\x7f.',
    'bytes': b'\x80\x04\x8e' + b'\xff' * 8 + b'.',
    'frame': b'\x80\x04\x95' + b'\xff' * 8 + b'.',
    'buffer': b'\x80\x05\x97.',
}


def raw_file(kind, body, path):
    """Write a pickle as a file of torch.save of either format, or as the first pickle of the older one."""
    if kind == 'zip':
        with zipfile.ZipFile(path, 'w') as archive:
            archive.writestr('archive/data.pkl', body)
            archive.writestr('archive/version', '3\n')
    elif kind == 'legacy':
        head = [pickle.dumps(value, 2) for value in (
            0x1950a86a20f9469cfc6c, 1001, {'protocol_version': 1001, 'little_endian': True, 'type_sizes': {}})]
        path.write_bytes(b''.join(head) + body + pickle.dumps([], 2))
    elif kind == 'first':
        path.write_bytes(body)
    else:
        with tarfile.open(path, 'w', format=tarfile.USTAR_FORMAT) as archive:
            info = tarfile.TarInfo('pickle')
            info.size = len(body)
            archive.addfile(info, io.BytesIO(body))
    return path


@pytest.mark.parametrize('kind', ['zip', 'legacy', 'first', 'tar'])
@pytest.mark.parametrize('attack', [*RAW, *BROKEN])
def test_pickles_by_instruction(attack, kind, tmp_path, monkeypatch):
    flag = tmp_path / 'pwned'
    monkeypatch.setitem(copyreg._inverted_registry, 1, ('posix', 'system'))  # as if this process knew it by number
    monkeypatch.setitem(copyreg._extension_cache, 1, os.system)
    body = {**RAW, **BROKEN}[attack].replace(b'{}', f'touch {flag}'.encode())
    with pytest.raises(CheckpointError) as e:
        read_checkpoint(raw_file(kind, body, tmp_path / 'x.pth'))
    assert not flag.exists()
    if kind != 'tar' and attack in RAW:
        assert 'Nothing in it was run' in str(e.value)


def test_build_runs_nothing_on_any_object(tmp_path):
    """BUILD with a state that would replace methods, on a dict, on a stand-in, and on a tensor."""
    body = (
        b'\x80\x02}(X\x05\x00\x00\x00modelccollections\nOrderedDict\n)R}(X\x05\x00\x00\x00items'
        b'c__main__\nThing\nX\x0c\x00\x00\x00__setstate__c__main__\nThing\nub'
        b'X\x01\x00\x00\x00xc__main__\nThing\n)\x81}X\x09\x00\x00\x00__class__c__main__\nOther\nsbu.')
    pickletools.dis(body, io.StringIO())
    read = read_checkpoint(raw_file('zip', body, tmp_path / 'x.pth'))
    assert type(read['x']) is Foreign and not read['model'].__dict__
    assert list(read['model'].items()) == []


def test_memory_is_bounded_by_the_file(tmp_path):
    far = b'\x80\x02}r' + struct.pack('<I', 2 ** 32 - 1) + b'.'  # remember under a number that would need 32 GiB
    assert read_checkpoint(raw_file('zip', far, tmp_path / 'x.pth')) == {}
    storage = b'\x80\x02(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu' \
              b'\x8a\x05\xff\xff\xff\xff\x0ftQ.'
    for kind in ('zip', 'legacy'):
        with pytest.raises(CheckpointError, match='cannot be read'):
            read_checkpoint(raw_file(kind, storage, tmp_path / 'y.pth'))


@pytest.mark.filterwarnings('ignore:TypedStorage')
@pytest.mark.parametrize('size, stride, offset', [
    ((7,), (1,), 0), ((2, 3), (4, 1), 0), ((1,), (1,), 6), ((-1,), (1,), 0), ((2,), (-1,), 3), ((1,), (1,), -1),
    ((2.,), (1,), 0), ((2, 2), (1,), 0), ([2], [1], 0),
], ids=str)
def test_a_tensor_stays_inside_its_storage(size, stride, offset, tmp_path):
    class Tensor:
        def __reduce__(self):
            return (torch._utils._rebuild_tensor_v2, (storage, offset, size, stride, False, collections.OrderedDict()))

    storage = torch.arange(6.).storage()
    path = save({'x': Tensor(), 'y': torch.ones(100)}, tmp_path / 'x.pth')
    with pytest.raises(CheckpointError, match='cannot be read'):
        read_checkpoint(path)


@pytest.mark.parametrize('cut', [1, 9, 60, 500])
def test_truncated_legacy_files(cut, tmp_path):
    path = save({'model': {'x': torch.rand(100)}}, tmp_path / 'x.pth', legacy=True)
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(CheckpointError, match='Fetch it again'):
        read_checkpoint(path)


def test_big_endian_files_are_named(tmp_path):
    path = save(WEIGHTS, tmp_path / 'x.pth')
    with zipfile.ZipFile(path) as source:
        records = {info.filename: source.read(info) for info in source.infolist()}
    with zipfile.ZipFile(path, 'w') as target:
        for name, record in records.items():
            target.writestr(name, b'big' if name.endswith('byteorder') else record)
    with pytest.raises(CheckpointError, match='big-endian'):
        read_checkpoint(path)


# ---- OneFlow


ONEFLOW = {
    'patch.weight': np.arange(12, dtype='<f4').reshape(3, 4), 'half': np.arange(3, dtype='<f2'),
    'index': np.arange(4, dtype='<i8').reshape(2, 2), 'scalar': np.array(2., '<f4'),
}
KINDS = {'<f4': 'kFloat', '<f2': 'kFloat16', '<i8': 'kInt64'}


def write_oneflow(path, arrays, form, root='model', compression=zipfile.ZIP_DEFLATED, **records):
    """Write a zip as OneFlow's directories are, in the form with or without a pickle."""
    prefix = f'{root}/' if root else ''
    with zipfile.ZipFile(path, 'w', compression) as archive:
        folders = {key: key if form == 'legacy' else f'tensor_{i}' for i, key in enumerate(arrays)}
        for key, array in arrays.items():
            dims = ''.join(f'  dim: {n}\n' for n in array.shape)
            archive.writestr(f'{prefix}{folders[key]}/out', array.tobytes())
            archive.writestr(
                f'{prefix}{folders[key]}/meta', f'shape {{\n{dims}}}\ndata_type: {KINDS[array.dtype.str]}\n')
        if form == 'legacy':
            archive.writestr(f'{prefix}snapshot_done', '')
        else:
            module = types.ModuleType('oneflow')
            module.Tensor = type('Tensor', (), {'__module__': 'oneflow'})
            data = collections.OrderedDict()
            for key, folder in folders.items():
                data[key] = module.Tensor()
                data[key].__dict__['path'] = folder
            sys.modules['oneflow'] = module
            try:
                pickled = pickle.dumps({'protocol_version': 1, 'data': data}, 4)
            finally:
                del sys.modules['oneflow']
            archive.writestr(f'{prefix}pickled_data', pickled)
        for name, record in records.items():
            archive.writestr(f'{prefix}{name}', record)
    return path


@pytest.mark.parametrize('compression', [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED], ids=['stored', 'deflated'])
@pytest.mark.parametrize('root', ['', 'model', 'a/b'])
@pytest.mark.parametrize('form', ['legacy', 'pickled'])
def test_oneflow_archives(form, root, compression, tmp_path):
    read = read_checkpoint(write_oneflow(tmp_path / 'x.zip', ONEFLOW, form, root, compression))
    assert set(read) == set(ONEFLOW)
    for key, array in ONEFLOW.items():
        assert torch.equal(read[key], torch.from_numpy(array)), key
    assert 'oneflow' not in sys.modules


@pytest.mark.parametrize('meta, message', [
    ('shape { dim: 3 dim: 5 } data_type: kFloat', 'has 48 bytes for'),
    ('shape { dim: 3 dim: 4 } data_type: kOFRecord', 'no shape and type'),
    ('data_type: kFloat', 'no shape and type'),
    ('shape { dim: 999999999 dim: 999999999 dim: 999999999 } data_type: kFloat', 'has 48 bytes for'),
    ('x' * 100_000, 'too long'),
], ids=['short', 'type', 'shape', 'huge', 'long'])
def test_damaged_oneflow_archives(meta, message, tmp_path):
    path = tmp_path / 'x.zip'
    with zipfile.ZipFile(path, 'w') as archive:
        archive.writestr('m/k/out', ONEFLOW['patch.weight'].tobytes())
        archive.writestr('m/k/meta', meta)
        archive.writestr('m/snapshot_done', '')
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(path)


def test_hostile_oneflow_pickle_is_refused_and_paths_stay_inside(tmp_path):
    flag = tmp_path / 'pwned'
    path = tmp_path / 'x.zip'
    with zipfile.ZipFile(path, 'w') as archive:
        archive.writestr('m/pickled_data', pickle.dumps({'data': reduce_to(os.system, f'touch {flag}')}))
    with pytest.raises(CheckpointError, match='Nothing in it was run'):
        read_checkpoint(path)
    assert not flag.exists()
    (tmp_path / 'secret').mkdir()
    for name in ('meta', 'out'):
        (tmp_path / 'secret' / name).write_text('shape { } data_type: kFloat')
    module = types.ModuleType('oneflow')
    module.Tensor = type('Tensor', (), {'__module__': 'oneflow'})
    tensor = module.Tensor()
    tensor.__dict__['path'] = str(tmp_path / 'secret')
    sys.modules['oneflow'] = module
    with zipfile.ZipFile(path, 'w') as archive:
        archive.writestr('m/pickled_data', pickle.dumps({'data': {'x': tensor}}))
    del sys.modules['oneflow']
    with pytest.raises(CheckpointError, match='cannot be read'):
        read_checkpoint(path)
