"""Read checkpoint files as data: nothing that a file names is imported, nothing that it asks for is called.

Three formats: safetensors, what torch.save writes (zip, and the one before PyTorch 1.6), and the zipped directories of
OneFlow. A pickle is run by an interpreter that knows tensors and plain data. Whatever else it describes (configs,
arguments, paths, histories, optimizers) becomes a `Foreign`, which keeps nothing; a name through which code could be
run ends the reading.
"""
import io
import mmap
import pickle
import posixpath
import re
import sys
import zipfile
from collections import OrderedDict
from functools import cache
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, Callable, Dict, List, Mapping, NoReturn, Optional, Tuple, Type, Union

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from .errors import CheckpointError
from .transfer import page_title

__all__ = ['Foreign', 'read_checkpoint']

_MAX_PICKLE = 64 * 2 ** 20  # bytes of a .pth's structure, without its tensors; real ones have less than one MiB
_MAX_ONEFLOW = 2 * 2 ** 30  # bytes of an unpacked OneFlow archive
_MAX_KEYS = 100_000  # of a checkpoint; the largest CrossFormer in a detector with optimizer has a few thousand
_LEGACY_MAGIC, _LEGACY_PROTOCOL = 0x1950a86a20f9469cfc6c, 1001  # begin a file of torch.save before PyTorch 1.6


class Foreign:
    """Stands in for an object that is neither tensor nor plain data. It keeps nothing and runs nothing."""

    __slots__ = ()

    def __new__(cls, *args: Any, **kwargs: Any) -> 'Foreign':
        """Make one of whatever is given, by an instance as well as by the class."""
        return object.__new__(cls if isinstance(cls, type) else Foreign)

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __call__(self, *args: Any) -> 'Foreign':
        """Stand in for what a function of the file's own would return."""
        return Foreign()

    def __setitem__(self, key: Any, value: Any) -> None:
        return

    def extend(self, items: Any) -> None:
        """Take what a list of the file's own class would hold."""

    append = add = extend


class _Storage(Foreign):
    """Bytes of tensors, as a tensor of one dimension: where they are, or what has been read of them."""

    __slots__ = ('data',)

    def __init__(self, data: Tensor):
        self.data = data


class _Refused(Exception):
    """The name a pickle asked for and does not get."""


# ---- names

# Python's own names that describe data; whatever else of the standard library a file asks for is refused.
_HARMLESS = {
    'argparse': {'Namespace'},
    'array': {'array', '_array_reconstructor'},
    'builtins': {
        'Ellipsis', 'NotImplemented', 'bool', 'bytearray', 'bytes', 'complex', 'dict', 'float', 'frozenset', 'int',
        'list', 'long', 'object', 'range', 'set', 'slice', 'str', 'tuple', 'type', 'unicode', 'xrange'},
    'collections': {'ChainMap', 'Counter', 'OrderedDict', 'UserDict', 'UserList', 'defaultdict', 'deque'},
    'copyreg': {'_reconstructor', '__newobj__', '__newobj_ex__'},
    'datetime': {'date', 'datetime', 'time', 'timedelta', 'timezone'},
    'decimal': {'Decimal'},
    'fractions': {'Fraction'},
    'functools': {'partial'},
    'itertools': {'chain', 'count', 'cycle', 'repeat'},
    'logging': {'Logger', 'getLogger'},
    'pathlib': {'Path', 'PosixPath', 'PurePath', 'PurePosixPath', 'PureWindowsPath', 'WindowsPath'},
    'pathlib._local': {'Path', 'PosixPath', 'PurePath', 'PurePosixPath', 'PureWindowsPath', 'WindowsPath'},
    'random': {'Random'},
    're': {'_compile'},
    'time': {'struct_time'},
    'types': {'MappingProxyType', 'SimpleNamespace'},
    'uuid': {'SafeUUID', 'UUID'},
    '_codecs': {'encode'},
}
_RENAMED = {'__builtin__': 'builtins', 'copy_reg': 'copyreg', 'UserDict': 'collections', 'UserList': 'collections'}
_OLD_STANDARD = {'cPickle', 'cStringIO', 'commands', 'popen2', 'urllib2', 'httplib', '__builtin__', 'imp', 'distutils'}
# Other packages' names have no harm in a name alone, since none is looked up, but these are asked for by attacks only.
_ATTACKS = re.compile(
    r'(?:pip|setuptools|pkg_resources|IPython|cloudpickle|dill|joblib)(?:\..*)?|'
    r'torch\.(?:load|save|serialization|hub|jit|ops|package|compile|utils\.cpp_extension|multiprocessing)(?:\..*)?|'
    r'numpy\.(?:load|fromfile|memmap|testing|f2py|distutils)(?:\..*)?|'
    r'.*\.(?:os|sys|posix|nt|subprocess|builtins|importlib|ctypes|shutil|socket|runpy|pickle|eval|exec|system|popen'
    r'|__\w+__)(?:\..*)?', re.DOTALL)


def _is_refused(module: str, name: str) -> bool:
    """Tell a name that stands for code to be run from one that stands for data."""
    root = module.partition('.')[0]
    if module in _HARMLESS:
        return name not in _HARMLESS[module]
    if root in sys.stdlib_module_names or root in _OLD_STANDARD:
        return True
    return _ATTACKS.fullmatch(f'{module}.{name}') is not None


_DTYPES = {
    f'{name}Storage': dtype for name, dtype in dict(
        Float=torch.float32, Double=torch.float64, Half=torch.float16, BFloat16=torch.bfloat16, Long=torch.int64,
        Int=torch.int32, Short=torch.int16, Char=torch.int8, Byte=torch.uint8, Bool=torch.bool, Untyped=torch.uint8,
        ComplexFloat=torch.complex64, ComplexDouble=torch.complex128, QInt8=torch.int8, QUInt8=torch.uint8,
        QInt32=torch.int32).items()
}
_DTYPE_NAMES = {
    str(dtype).partition('.')[2]: dtype
    for dtype in (*_DTYPES.values(), torch.float8_e4m3fn, torch.float8_e5m2)
}


# ---- what a pickle may make: each takes what the file says, and checks it


class _Dict(OrderedDict):
    """A dict of any class: yacs' config in official checkpoints, for one."""

    def __init__(self, *args: Any):
        super().__init__(args[0] if args and isinstance(args[0], (dict, list)) else ())


def _plain_set(*args: Any) -> Any:
    return set(args[0]) if args and isinstance(args[0], (list, tuple)) else set()


def _plain_tuple(*args: Any) -> Any:
    return tuple(args[0]) if args and isinstance(args[0], (list, tuple)) else ()


def _bytes_of(*args: Any) -> Any:
    """Undo how protocol 2 writes bytes."""
    return args[0].encode('latin1') if args[1:] == ('latin1',) and isinstance(args[0], str) else Foreign()


def _tensor(*args: Any) -> Any:
    """Make a tensor of storage, offset, size, stride; at the seventh place, how its numbers are to be read."""
    storage, offset, size, stride = args[:4]
    return _strided(storage.data, offset, size, stride, args[6:]) if isinstance(storage, _Storage) else Foreign()


def _tensor_v3(*args: Any) -> Any:
    """Make a tensor of a type without a storage of its own: as above, with the dtype before the metadata."""
    storage, offset, size, stride, _, _, dtype = args[:7]
    if not isinstance(storage, _Storage) or not isinstance(dtype, torch.dtype):
        return Foreign()
    return _strided(storage.data.view(torch.uint8).view(dtype), offset, size, stride, args[7:])


def _strided(data: Tensor, offset: Any, size: Any, stride: Any, metadata: Tuple[Any, ...]) -> Tensor:
    for numbers in (size, stride):
        if not isinstance(numbers, tuple) or not all(type(n) is int and n >= 0 for n in numbers):
            raise pickle.UnpicklingError('sizes and strides are whole numbers')
    if type(offset) is not int or offset < 0 or len(size) != len(stride):
        raise pickle.UnpicklingError('a tensor needs an offset, and a stride for each size')
    if 0 in size:  # whose offset and strides need not lie inside
        return torch.empty_strided(size, stride, dtype=data.dtype)
    tensor = data.as_strided(size, stride, offset)  # raises beyond the storage's end
    lazy = metadata[0] if metadata and isinstance(metadata[0], dict) else {}
    tensor = tensor.conj() if lazy.get('conj') else tensor
    return torch._neg_view(tensor) if lazy.get('neg') else tensor  # both lazy: nothing is read or copied


def _parameter(*args: Any) -> Any:
    return args[0] if args and isinstance(args[0], Tensor) else Foreign()


def _of_type(*args: Any) -> Any:
    """Make a tensor of a subclass, a plain tensor here."""
    return args[0](*args[2]) if len(args) > 2 and args[0] in _TENSORS and isinstance(args[2], tuple) else Foreign()


def _attribute(*args: Any) -> Any:
    """Stand in for a method, which protocol 2 writes as an attribute of its class."""
    if len(args) < 2 or not isinstance(args[1], str) or _ATTACKS.fullmatch(f'.{args[1]}'):
        raise _Refused('builtins.getattr')
    return Foreign


_TENSORS = (_tensor, _tensor_v3, _parameter)
_MAKERS: Dict[str, Any] = {
    'builtins.getattr': _attribute,
    'builtins.set': _plain_set,
    'builtins.frozenset': _plain_set,
    'collections.Counter': _Dict,
    'collections.OrderedDict': _Dict,
    'collections.defaultdict': _Dict,
    'yacs.config.CfgNode': _Dict,
    '_codecs.encode': _bytes_of,
    'torch.Size': _plain_tuple,
    'torch.serialization._get_layout': Foreign,
    'torch._utils._rebuild_tensor': _tensor,
    'torch._utils._rebuild_tensor_v2': _tensor,
    'torch._utils._rebuild_tensor_v3': _tensor_v3,
    'torch._utils._rebuild_parameter': _parameter,
    'torch._utils._rebuild_parameter_with_state': _parameter,
    'torch._tensor._rebuild_from_type_v2': _of_type,
}

# The unpickler in Python: the one in C can be made to reserve memory without bound, and has no table to change.
_Unpickler: Any = pickle._Unpickler


def _filling(code: int, kind: type, depth: int) -> Callable[[Any], None]:
    """Make an instruction fill containers of its kind alone: a tensor, too, can add and has items."""
    fill = _Unpickler.dispatch[code]

    def check_and_fill(reader: Any) -> None:
        target = reader.stack[-depth] if depth else reader.metastack[-1][-1]
        if not isinstance(target, (kind, Foreign)):
            raise pickle.UnpicklingError(f'a {type(target).__name__} takes no items')
        fill(reader)

    return check_and_fill


class _Reader(_Unpickler):
    """Interpreter of pickles in which names are looked up in the tables above and nowhere else.

    So what a file can call is a maker of these tables or a `Foreign`; what it can fill, a container or a `Foreign`.
    """

    dispatch: Dict[int, Any] = dict(_Unpickler.dispatch)
    stand_in: Type[Foreign] = Foreign

    def __init__(self, file: Any, storages: Optional[Callable[[torch.dtype, str, int], _Storage]] = None):
        super().__init__(file, encoding='latin1')
        self._storages = storages

    def find_class(self, module: str, name: str) -> Any:
        module = _RENAMED.get(module, module)
        maker = _MAKERS.get(f'{module}.{name}')
        if maker is not None:
            return maker
        if module in ('torch', 'torch.cuda', 'torch.storage') and name in _DTYPES:
            return _DTYPES[name]
        if module == 'torch' and name in _DTYPE_NAMES:
            return _DTYPE_NAMES[name]
        if _is_refused(module, name):
            raise _Refused(f'{module}.{name}'[:200])
        return self.stand_in

    def persistent_load(self, pid: Any) -> Any:
        if self._storages is None or not isinstance(pid, tuple) or len(pid) < 2:
            raise pickle.UnpicklingError('no storages here')
        if pid[0] == 'module':  # a class with its source
            return pid[1]
        if pid[0] != 'storage' or len(pid) < 5:
            raise pickle.UnpicklingError('a storage has five properties')
        dtype, key, numel = pid[1], pid[2], pid[4]
        if not isinstance(dtype, torch.dtype):
            return Foreign()
        if type(numel) is not int or numel < 0 or pid[5:] not in ((), (None,)):
            raise pickle.UnpicklingError('a storage has a number of elements')
        return self._storages(dtype, str(key), numel)

    def get_extension(self, code: int) -> NoReturn:
        raise pickle.UnpicklingError('names by number are those of another process')

    def _build(self) -> None:
        self.take_state(self.stack.pop())

    def take_state(self, state: Any) -> None:
        """Leave alone what would become attributes of an object, or be given to its own code."""

    dispatch[pickle.BUILD[0]] = _build
    dispatch.update({code[0]: _filling(code[0], kind, depth) for code, kind, depth in (
        (pickle.APPEND, list, 2), (pickle.APPENDS, list, 0), (pickle.SETITEM, dict, 3), (pickle.SETITEMS, dict, 0),
        (pickle.ADDITEMS, set, 0))})


# ---- files


def read_checkpoint(path: Union[str, Path]) -> Mapping[str, Any]:
    """Read a checkpoint file without running anything in it.

    Args:
        path: A safetensors file, a file of `torch.save`, or OneFlow's in a zip, whatever its suffix.

    Raises:
        CheckpointError: The file is damaged, holds more than data, or is no checkpoint.
    """
    path = Path(path)
    checkpoint = _read_file(path)
    if not isinstance(checkpoint, Mapping):
        kind = 'an object' if isinstance(checkpoint, Foreign) else f'a {type(checkpoint).__name__}'
        raise CheckpointError(
            f'A checkpoint needs to be a dict of tensors, {path} holds {kind}. Save the state dict, not the model.')
    if len(checkpoint) > _MAX_KEYS:
        raise CheckpointError(f'A checkpoint has at most {_MAX_KEYS} keys, {path} has {len(checkpoint)}.')
    return checkpoint


def _read_file(path: Path) -> Any:
    if not path.is_file():
        raise CheckpointError(f'A checkpoint needs to be a file, got {path}. Check the path.')
    with open(path, 'rb') as file:
        start = file.read(1024)
    size = path.stat().st_size
    other = _other_kind(start)
    if other:
        raise CheckpointError(f'{path} is no checkpoint: {other}')
    try:
        if path.suffix == '.safetensors' or (start[8:9] == b'{' and int.from_bytes(start[:8], 'little') < size):
            return load_file(path)
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                root = _oneflow_root(archive)
                return _read_zip(path, archive, size) if root is None else _read_oneflow(path, archive, root)
        return _read_legacy(path, size)
    except SafetensorError as e:
        raise CheckpointError(f'{path} is no intact safetensors file: {e}. Fetch it again.') from e
    except (CheckpointError, MemoryError):
        raise
    except _Refused as e:
        raise CheckpointError(
            f'{path} was refused: a checkpoint may hold tensors and plain data only, and this one asks to import {e}. '
            'Nothing in it was run. Get a safetensors file, or one with the state dict alone.') from None
    except Exception as e:  # damaged bytes can fail in any way
        raise CheckpointError(f'{path} is no intact checkpoint: it cannot be read. Fetch it again.') from e


_PACKED = {
    b'\x1f\x8b': 'gzip', b'\xfd7zXZ\0': 'xz', b'BZh': 'bzip2', b"7z\xbc\xaf'\x1c": '7-Zip', b'Rar!\x1a\x07': 'RAR',
    b'\x28\xb5\x2f\xfd': 'Zstandard',
}


def _other_kind(start: bytes) -> str:
    """Say what a file is, by its beginning, and what to do, if it is a usual thing in a checkpoint's place."""
    text = start.lstrip(b'\xef\xbb\xbf \t\r\n').lower()
    if text.startswith((b'<!doctype', b'<html', b'<?xml', b'<head')):
        title = page_title(start.decode('utf-8', 'replace'))
        return (f'it is a web page, {title!r}, which a host shows in the place of the file. Open the address in a '
                'browser, confirm or log in, and save the file itself.')
    if text.startswith(b'version https://git-lfs.github.com/'):
        return ('it is a pointer of Git LFS, which stands for the file in a clone. Run `git lfs pull` there, or '
                'download the file from the page of the repository.')
    packer = next((name for magic, name in _PACKED.items() if start.startswith(magic)), None)
    if packer:
        return f'it is packed with {packer}. Unpack it, and pass the file inside.'
    if start[257:262] == b'ustar':
        return ('it is a tar archive. Unpack it, and pass the file inside; if torch.save wrote it before PyTorch 0.2, '
                'load and save it again with PyTorch 1.')
    return '' if start else 'it is empty. Fetch it again.'


def _read_zip(path: Path, archive: zipfile.ZipFile, size: int) -> Any:
    """Read what torch.save writes. Tensors stay in the file until they are used."""
    infos = {info.filename: info for info in archive.infolist()}
    structures = [name for name in infos if posixpath.basename(name) == 'data.pkl']
    if len(structures) != 1:
        files = [name for name in infos if not name.endswith('/') and not name.startswith('__MACOSX/')]
        raise CheckpointError(
            f'{path} is no checkpoint: it is a zip archive of {", ".join(sorted(files)[:5]) or "nothing"}. Unpack it, '
            'and pass the checkpoint inside.')
    if any(info.compress_type != zipfile.ZIP_STORED for info in infos.values()) or (
            sum(info.file_size for info in infos.values()) > size):
        raise CheckpointError(
            f'A checkpoint of torch.save is not compressed, {path} is. Fetch it again from its origin.')
    if infos[structures[0]].file_size > _MAX_PICKLE:
        raise CheckpointError(f'The structure of a checkpoint has at most {_MAX_PICKLE} bytes, {path} has more.')
    damaged = archive.testzip()
    if damaged:
        raise CheckpointError(f'{path} is damaged: record {damaged} fails its checksum. Fetch it again.')
    root = posixpath.dirname(structures[0])
    order = posixpath.join(root, 'byteorder')
    if order in infos and archive.read(order) != b'little':
        raise CheckpointError(f'{path} was written on a big-endian machine. Save it again on another one.')
    with open(path, 'rb') as file:  # a private view: writes stay in memory
        memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)

    @cache  # tensors of one storage share it
    def storage(dtype: torch.dtype, key: str, numel: int) -> _Storage:
        info = infos[posixpath.join(root, 'data', key)]
        header = memory[info.header_offset:info.header_offset + 30]  # then a name and an extra field, then the bytes
        if header[:4] != b'PK\3\4':
            raise zipfile.BadZipFile('no local header')
        lengths = header[26:28], header[28:30]
        start = info.header_offset + 30 + sum(int.from_bytes(length, 'little') for length in lengths)
        nbytes = numel * dtype.itemsize
        if nbytes > info.file_size or start + nbytes > size:
            raise pickle.UnpicklingError('a storage is larger than its record')
        if not numel:
            return _Storage(torch.empty(0, dtype=dtype))
        if start % dtype.itemsize:
            return _Storage(torch.frombuffer(bytearray(memory[start:start + nbytes]), dtype=dtype))
        return _Storage(torch.frombuffer(memory, dtype=dtype, count=numel, offset=start))

    return _Reader(io.BytesIO(archive.read(structures[0])), storage).load()


class _Bounded:
    """The part of a file that may be read as a pickle."""

    def __init__(self, file: BinaryIO):
        self._file, self._left = file, _MAX_PICKLE

    def read(self, n: int) -> bytes:
        self._take(n)
        return self._file.read(n)

    def readline(self) -> bytes:
        line = self._file.readline(self._left)
        self._take(len(line))
        return line

    def _take(self, n: int) -> None:
        if not 0 <= n <= self._left:
            raise pickle.UnpicklingError('the structure is too large')
        self._left -= n


def _read_legacy(path: Path, size: int) -> Any:
    """Read what torch.save wrote before PyTorch 1.6: five pickles, then the bytes of every storage."""
    storages: Dict[str, Tuple[torch.dtype, _Storage]] = {}
    room = size

    def storage(dtype: torch.dtype, key: str, numel: int) -> _Storage:
        nonlocal room
        known = storages.get(key)
        if known is None:
            room -= numel * dtype.itemsize
            if room < 0:
                raise pickle.UnpicklingError('storages are larger than the file')
            known = storages[key] = dtype, _Storage(torch.empty(numel, dtype=dtype))
        if known[0] != dtype or known[1].data.numel() != numel:
            raise pickle.UnpicklingError('a storage is described in two ways')
        return known[1]

    with open(path, 'rb') as file:
        head = _Bounded(file)
        if _Reader(head).load() != _LEGACY_MAGIC or _Reader(head).load() != _LEGACY_PROTOCOL:
            raise pickle.UnpicklingError('no magic number')
        system = _Reader(head).load()
        if not isinstance(system, dict) or system.get('little_endian') is not True:
            raise CheckpointError(f'{path} was written on a big-endian machine. Save it again on another one.')
        checkpoint = _Reader(head, storage).load()
        for key in _Reader(head).load():
            data = storages.pop(str(key))[1].data
            if int.from_bytes(file.read(8), 'little') != data.numel():
                raise pickle.UnpicklingError('a storage has another length')
            raw = bytearray(file.read(data.nbytes))
            if len(raw) != data.nbytes:
                raise EOFError
            if raw:
                data.copy_(torch.frombuffer(raw, dtype=data.dtype))
        if storages:
            raise EOFError
    return checkpoint


# ---- OneFlow

_ONEFLOW_DTYPES = {
    'kFloat': torch.float32, 'kDouble': torch.float64, 'kFloat16': torch.float16, 'kInt8': torch.int8,
    'kInt32': torch.int32, 'kInt64': torch.int64, 'kUInt8': torch.uint8, 'kChar': torch.int8, 'kBool': torch.bool,
}


def _oneflow_root(archive: zipfile.ZipFile) -> Optional[str]:
    """Return the directory of a OneFlow model in an archive, None if it has none."""
    names = archive.namelist()
    for name in names:
        if posixpath.basename(name) in ('snapshot_done', 'pickled_data') and not name.startswith('__MACOSX/'):
            return posixpath.dirname(name)
    folders = [posixpath.dirname(name) for name in names if posixpath.basename(name) == 'meta']
    folders = [folder for folder in folders if posixpath.join(folder, 'out') in names]
    return posixpath.commonpath(list(map(posixpath.dirname, folders))) if folders else None


def _read_oneflow(path: Path, archive: zipfile.ZipFile, root: str) -> Mapping[str, Any]:
    """Read a OneFlow model: a directory per tensor with its shape and its bytes, and in the later form a pickle.

    Nothing is unpacked to the disk, so the paths in the archive do not matter.
    """
    infos = {posixpath.normpath(info.filename): info for info in archive.infolist()}
    if sum(info.file_size for info in infos.values()) > _MAX_ONEFLOW:
        raise CheckpointError(f'{path} unpacks to more than {_MAX_ONEFLOW} bytes. Check the file.')

    @cache  # a file may name one tensor many times
    def read(folder: str) -> Tensor:
        meta, out = (infos[posixpath.join(root, folder, name)] for name in ('meta', 'out'))
        if meta.file_size > 2 ** 16:
            raise CheckpointError(f'{path} is damaged: {meta.filename} is too long. Fetch it again.')
        return _oneflow_tensor(path, archive.read(meta).decode('utf-8'), archive.read(out), folder)

    index = infos.get(posixpath.join(root, 'pickled_data'))
    if index is None:
        folders = [name[len(root):].strip('/') for name in map(posixpath.dirname, infos) if (
            f'{name}/meta' in infos and f'{name}/out' in infos and name.startswith(root))]
        return OrderedDict((folder, read(folder)) for folder in sorted(set(folders)))
    if index.file_size > _MAX_PICKLE:
        raise CheckpointError(f'The structure of a checkpoint has at most {_MAX_PICKLE} bytes, {path} has more.')
    pickled = _OneFlowReader(io.BytesIO(archive.read(index))).load()
    data = pickled.get('data', pickled) if isinstance(pickled, dict) else None
    if not isinstance(data, dict):
        raise CheckpointError(f'{path} holds no state dict. Check the file.')
    return _with_tensors(data, read)


class _Pointer(Foreign):
    """A tensor of OneFlow in a pickle: the name of its folder, all the rest is dropped."""

    __slots__ = ('folder',)
    folder: str


class _OneFlowReader(_Reader):
    stand_in = _Pointer

    def take_state(self, state: Any) -> None:
        """Keep the path of a tensor."""
        folder = state.get('path') if isinstance(state, dict) else None
        if isinstance(folder, str) and isinstance(self.stack[-1], _Pointer):
            self.stack[-1].folder = folder


def _with_tensors(data: Mapping[str, Any], read: Callable[[str], Tensor], depth: int = 3) -> 'OrderedDict[str, Any]':
    return OrderedDict(
        (key, read(value.folder) if hasattr(value, 'folder')
         else _with_tensors(value, read, depth - 1) if isinstance(value, dict) and depth else value)
        for key, value in data.items())


def _oneflow_tensor(path: Path, meta: str, out: bytes, folder: str) -> Tensor:
    shape = re.search(r'shape\s*\{([^{}]*)\}', meta)
    kind = re.search(r'data_type:\s*(\w+)', meta)
    dtype = _ONEFLOW_DTYPES.get(kind[1]) if kind else None
    if not shape or not kind or dtype is None:
        raise CheckpointError(f'{path}: {folder}/meta gives no shape and type that can be read. Fetch it again.')
    dims: List[int] = [int(n) for n in re.findall(r'dim:\s*(\d{1,10})\b', shape[1])]
    if len(out) != prod(dims) * dtype.itemsize:
        raise CheckpointError(
            f'{path} is damaged: {folder} has {len(out)} bytes for {dims} of {kind[1]}. Fetch it again.')
    return torch.frombuffer(bytearray(out), dtype=dtype).reshape(dims) if out else torch.empty(dims, dtype=dtype)
