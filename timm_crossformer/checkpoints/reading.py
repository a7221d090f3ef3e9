"""Read checkpoint files as data: nothing that a file names is imported, nothing that it asks for is called.

Three formats: safetensors, what torch.save writes (zip, and the one before PyTorch 1.6), and the zipped directories of
OneFlow. A pickle is run by an interpreter of its own that knows tensors and plain data. Whatever else it describes
(configs, arguments, paths, histories, optimizers) becomes a `Foreign`, which keeps nothing; a name through which code
could be run ends the reading.
"""
import io
import pickle
import posixpath
import re
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any, BinaryIO, Callable, Dict, Mapping, NoReturn, Optional, Sequence, Tuple, cast

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

__all__ = ['CheckpointError', 'Foreign', 'is_packed', 'read_file']

_MAX_PICKLE = 64 * 2 ** 20  # bytes of a .pth's structure, without its tensors; real ones have less than one MiB
_MAX_ONEFLOW = 2 * 2 ** 30  # bytes of an unpacked OneFlow archive
_LEGACY_MAGIC, _LEGACY_PROTOCOL = 0x1950a86a20f9469cfc6c, 1001  # begin a file of torch.save before PyTorch 1.6


class CheckpointError(ValueError, RuntimeError):
    """A checkpoint that cannot be used as it is. A RuntimeError too, since that is what `load_state_dict` raises."""


class Foreign:
    """Stands in for an object that is neither tensor nor plain data. It keeps nothing and runs nothing."""

    __slots__ = ()


class _Storage:
    """Bytes of tensors: where they are, or what has been read of them."""

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


def _plain_dict(*args: Any) -> Dict[Any, Any]:
    return OrderedDict(args[0]) if args and isinstance(args[0], dict) else OrderedDict()


def _plain_set(*args: Any) -> Any:
    return set(args[0]) if args and isinstance(args[0], (list, tuple)) else set()


def _plain_tuple(*args: Any) -> Any:
    return tuple(args[0]) if args and isinstance(args[0], (list, tuple)) else ()


def _bytes_of(*args: Any) -> Any:
    """Undo how protocol 2 writes bytes."""
    return args[0].encode('latin1') if args[1:] == ('latin1',) and isinstance(args[0], str) else Foreign()


def _tensor_v2(*args: Any) -> Any:
    storage, offset, size, stride = args[:4]
    return _strided(storage.data, offset, size, stride) if isinstance(storage, _Storage) else Foreign()


def _tensor_v3(*args: Any) -> Any:
    storage, offset, size, stride, _, _, dtype = args[:7]
    if not isinstance(storage, _Storage) or not isinstance(dtype, torch.dtype):
        return Foreign()
    return _strided(storage.data.view(torch.uint8).view(dtype), offset, size, stride)


def _strided(data: Tensor, offset: Any, size: Any, stride: Any) -> Tensor:
    for numbers in (size, stride):
        if not isinstance(numbers, tuple) or not all(type(n) is int and n >= 0 for n in numbers):
            raise pickle.UnpicklingError('sizes and strides are whole numbers')
    if type(offset) is not int or offset < 0 or len(size) != len(stride):
        raise pickle.UnpicklingError('a tensor needs an offset, and a stride for each size')
    return data.as_strided(size, stride, offset)  # raises beyond the storage's end


def _parameter(*args: Any) -> Any:
    return args[0] if args and isinstance(args[0], Tensor) else Foreign()


def _of_type(*args: Any) -> Any:
    """Make a tensor of a subclass, a plain tensor here."""
    return _call(args[0], args[2]) if len(args) > 2 else Foreign()


def _attribute(*args: Any) -> Any:
    """Stand in for a method, which protocol 2 writes as an attribute of its class."""
    if len(args) < 2 or not isinstance(args[1], str) or _ATTACKS.fullmatch(f'.{args[1]}'):
        raise _Refused('builtins.getattr')
    return Foreign


_MAKERS: Dict[str, Callable[..., Any]] = {
    'builtins.getattr': _attribute,
    'builtins.set': _plain_set,
    'builtins.frozenset': _plain_set,
    'collections.Counter': _plain_dict,
    'collections.OrderedDict': _plain_dict,
    'collections.defaultdict': _plain_dict,
    'yacs.config.CfgNode': _plain_dict,  # the config in official checkpoints
    '_codecs.encode': _bytes_of,
    'torch.Size': _plain_tuple,
    'torch.serialization._get_layout': lambda *args: Foreign(),
    'torch._utils._rebuild_tensor': _tensor_v2,
    'torch._utils._rebuild_tensor_v2': _tensor_v2,
    'torch._utils._rebuild_tensor_v3': _tensor_v3,
    'torch._utils._rebuild_parameter': _parameter,
    'torch._utils._rebuild_parameter_with_state': _parameter,
    'torch._tensor._rebuild_from_type_v2': _of_type,
}
_CALLABLE = frozenset(map(id, _MAKERS.values()))


def _call(made_by: Any, args: Any) -> Any:
    """Make what a pickle describes by a name and arguments."""
    if made_by is Foreign or isinstance(made_by, Foreign):
        return Foreign()
    if id(made_by) not in _CALLABLE or not isinstance(args, tuple):
        raise pickle.UnpicklingError(f'a {type(made_by).__name__} makes nothing')
    return made_by(*args)


# The unpickler in Python: the one in C can be made to reserve memory without bound, and has no table to change.
_Unpickler: Any = pickle._Unpickler


class _Reader(_Unpickler):
    """Interpreter of pickles in which names are looked up in the tables above and nowhere else."""

    dispatch: Dict[int, Any] = dict(_Unpickler.dispatch)

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
            raise _Refused(f'{module}.{name}')
        return Foreign

    def persistent_load(self, pid: Any) -> Any:
        if isinstance(pid, tuple) and pid[:1] == ('module',):
            return Foreign  # a class, with its source text
        if self._storages is None or not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != 'storage':
            raise pickle.UnpicklingError('only storages stand outside the pickle')
        dtype, key, numel = pid[1], pid[2], pid[4]
        if not isinstance(dtype, torch.dtype):
            return Foreign()
        if type(numel) is not int or numel < 0 or pid[5:] not in ((), (None,)):
            raise pickle.UnpicklingError('a storage has a number of elements')
        return self._storages(dtype, str(key), numel)

    def get_extension(self, code: int) -> NoReturn:
        raise pickle.UnpicklingError('names by number are those of another process')

    def _reduce(self) -> None:
        args = self.stack.pop()
        self.stack[-1] = _call(self.stack[-1], args)

    def _newobj_ex(self) -> None:
        self.stack.pop()  # names and values: no maker takes any
        self._reduce()

    def _obj(self) -> None:
        made_by, *args = self.pop_mark()
        self.append(_call(made_by, tuple(args)))

    def _inst(self) -> None:
        module, name = (self.readline()[:-1].decode('ascii') for _ in range(2))
        self.append(_call(self.find_class(module, name), tuple(self.pop_mark())))

    def _build(self) -> None:
        self.stack.pop()  # the state of an object: attributes of a dict, or anything of a stand-in

    def _setitem(self) -> None:
        value = self.stack.pop()
        self._update([self.stack.pop(), value])

    def _update(self, items: Sequence[Any]) -> None:
        self._fill(dict, lambda target: target.update(zip(items[::2], items[1::2], strict=True)))

    def _append(self) -> None:
        value = self.stack.pop()
        self._fill(list, lambda target: target.append(value))

    def _extend(self) -> None:
        items = self.pop_mark()
        self._fill(list, lambda target: target.extend(items))

    def _add(self) -> None:
        items = self.pop_mark()
        self._fill(set, lambda target: target.update(items))

    def _fill(self, kind: type, fill: Callable[[Any], None]) -> None:
        target = self.stack[-1]
        if isinstance(target, kind):
            fill(target)
        elif not isinstance(target, Foreign):
            raise pickle.UnpicklingError(f'a {type(target).__name__} takes no items')

    dispatch.update({
        pickle.REDUCE[0]: _reduce,
        pickle.NEWOBJ[0]: _reduce,
        pickle.NEWOBJ_EX[0]: _newobj_ex,
        pickle.OBJ[0]: _obj,
        pickle.INST[0]: _inst,
        pickle.BUILD[0]: _build,
        pickle.SETITEM[0]: _setitem,
        pickle.SETITEMS[0]: lambda self: self._update(self.pop_mark()),
        pickle.APPEND[0]: _append,
        pickle.APPENDS[0]: _extend,
        pickle.ADDITEMS[0]: _add,
    })


# ---- files


def read_file(path: Path) -> Any:
    """Read a checkpoint file, whatever its suffix.

    Raises:
        CheckpointError: The file is damaged, or asks for code to be run.
    """
    if not path.is_file():
        raise CheckpointError(f'A checkpoint needs to be a file, got {path}. Check the path.')
    size = path.stat().st_size
    try:
        if _is_safetensors(path, size):
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


def _is_safetensors(path: Path, size: int) -> bool:
    """Tell safetensors by suffix, or by content: the length of a header, and the header, in JSON."""
    with open(path, 'rb') as file:
        start = file.read(9)
    return path.suffix == '.safetensors' or (start[8:] == b'{' and int.from_bytes(start[:8], 'little') < size)


def is_packed(path: Path) -> bool:
    """Tell an archive that may unpack to more than it is: OneFlow's, within the bound above."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return _oneflow_root(archive) is not None


def _read_zip(path: Path, archive: zipfile.ZipFile, size: int) -> Any:
    """Read what torch.save writes. Tensors stay in the file until they are used."""
    infos = {info.filename: info for info in archive.infolist()}
    if any(info.compress_type != zipfile.ZIP_STORED for info in infos.values()) or (
            sum(info.file_size for info in infos.values()) > size):
        raise CheckpointError(
            f'A checkpoint of torch.save is not compressed, {path} is. Fetch it again from its origin.')
    structures = [name for name in infos if posixpath.basename(name) == 'data.pkl']
    if len(structures) != 1:
        raise CheckpointError(f'{path} is no checkpoint: it is an archive of something else. Check the file.')
    if infos[structures[0]].file_size > _MAX_PICKLE:
        raise CheckpointError(f'The structure of a checkpoint has at most {_MAX_PICKLE} bytes, {path} has more.')
    damaged = archive.testzip()
    if damaged:
        raise CheckpointError(f'{path} is damaged: record {damaged} fails its checksum. Fetch it again.')
    root = posixpath.dirname(structures[0])
    order = posixpath.join(root, 'byteorder')
    if order in infos and archive.read(order) != b'little':
        raise CheckpointError(f'{path} was written on a big-endian machine. Save it again on another one.')
    memory = np.memmap(path, np.uint8, 'c')  # private: writes stay in memory

    def storage(dtype: torch.dtype, key: str, numel: int) -> _Storage:
        info = infos[posixpath.join(root, 'data', key)]
        start = _data_offset(memory, info)
        nbytes = numel * dtype.itemsize
        if nbytes > info.file_size or start + nbytes > size:
            raise pickle.UnpicklingError('a storage is larger than its record')
        data = memory[start:start + nbytes]
        return _Storage(torch.from_numpy(data if start % dtype.itemsize == 0 else data.copy()).view(dtype))

    return _Reader(io.BytesIO(archive.read(structures[0])), storage).load()


def _data_offset(memory: np.ndarray, info: zipfile.ZipInfo) -> int:
    """Return where the bytes of a stored record begin: after its local header, a name and an extra field."""
    header = memory[info.header_offset:info.header_offset + 30].tobytes()
    if header[:4] != b'PK\3\4':
        raise zipfile.BadZipFile('no local header')
    return info.header_offset + 30 + int.from_bytes(header[26:28], 'little') + int.from_bytes(header[28:30], 'little')


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
        if file.read(262)[257:] == b'ustar':
            raise CheckpointError(
                f'{path} has the format of PyTorch before 0.2. Load and save it again with PyTorch 1.')
        file.seek(0)
        head = _Bounded(file)
        if _Reader(head).load() != _LEGACY_MAGIC or _Reader(head).load() != _LEGACY_PROTOCOL:
            raise pickle.UnpicklingError('no magic number')
        system = _Reader(head).load()
        if not isinstance(system, dict) or system.get('little_endian') is not True:
            raise CheckpointError(f'{path} was written on a big-endian machine. Save it again on another one.')
        checkpoint = _Reader(head, storage).load()
        for key in _Reader(head).load():
            data = storages[str(key)][1].data
            if int.from_bytes(file.read(8), 'little') != data.numel():
                raise pickle.UnpicklingError('a storage has another length')
            raw = data.view(torch.uint8).numpy() if data.numel() else np.empty(0, np.uint8)
            if file.readinto(cast(Any, raw)) != raw.nbytes:
                raise EOFError
            del storages[str(key)]
        if storages:
            raise EOFError
    return checkpoint


# ---- OneFlow

_ONEFLOW_DTYPES = {
    'kFloat': '<f4', 'kDouble': '<f8', 'kFloat16': '<f2', 'kInt8': 'i1', 'kInt32': '<i4', 'kInt64': '<i8',
    'kUInt8': 'u1', 'kChar': 'i1', 'kBool': '?',
}


def _oneflow_root(archive: zipfile.ZipFile) -> Optional[str]:
    """Return the directory of a OneFlow model in an archive, None if it has none."""
    for name in archive.namelist():
        if posixpath.basename(name) in ('snapshot_done', 'pickled_data') and not name.startswith('__MACOSX/'):
            return posixpath.dirname(name)
    metas = [name for name in archive.namelist() if posixpath.basename(name) == 'meta']
    return posixpath.commonpath([posixpath.dirname(posixpath.dirname(name)) for name in metas]) if metas else None


def _read_oneflow(path: Path, archive: zipfile.ZipFile, root: str) -> Mapping[str, Any]:
    """Read a OneFlow model: a directory per tensor with its shape and its bytes, and in the later form a pickle.

    Nothing is unpacked to the disk, so the paths in the archive do not matter.
    """
    infos = {posixpath.normpath(info.filename): info for info in archive.infolist()}
    if sum(info.file_size for info in infos.values()) > _MAX_ONEFLOW:
        raise CheckpointError(f'{path} unpacks to more than {_MAX_ONEFLOW} bytes. Check the file.')

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
    dispatch: Dict[int, Any] = dict(_Reader.dispatch)

    def _build(self) -> None:
        state = self.stack.pop()
        folder = state.get('path') if isinstance(state, dict) else None
        if isinstance(folder, str) and type(self.stack[-1]) is Foreign:
            pointer = _Pointer()
            pointer.folder = folder
            for key, value in self.memo.items():
                if value is self.stack[-1]:
                    self.memo[key] = pointer
            self.stack[-1] = pointer

    dispatch[pickle.BUILD[0]] = _build


def _with_tensors(data: Mapping[str, Any], read: Callable[[str], Tensor], depth: int = 3) -> 'OrderedDict[str, Any]':
    return OrderedDict(
        (key, read(value.folder) if isinstance(value, _Pointer)
         else _with_tensors(value, read, depth - 1) if isinstance(value, dict) and depth else value)
        for key, value in data.items())


def _oneflow_tensor(path: Path, meta: str, out: bytes, folder: str) -> Tensor:
    shape = re.search(r'shape\s*\{([^{}]*)\}', meta)
    kind = re.search(r'data_type:\s*(\w+)', meta)
    dims = [int(n) for n in re.findall(r'dim:\s*(\d{1,10})\b', shape[1])] if shape else []
    dtype = np.dtype(_ONEFLOW_DTYPES.get(kind[1] if kind else '', 'V'))
    if not shape or not kind or dtype.kind == 'V':
        raise CheckpointError(f'{path}: {folder}/meta gives no shape and type that can be read. Fetch it again.')
    if len(out) != int(np.prod(dims, dtype=object)) * dtype.itemsize:
        raise CheckpointError(
            f'{path} is damaged: {folder} has {len(out)} bytes for {dims} of {kind[1]}. Fetch it again.')
    return torch.from_numpy(np.frombuffer(bytearray(out), dtype).reshape(dims))
