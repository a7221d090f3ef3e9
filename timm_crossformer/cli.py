"""The command `timm-crossformer`: list, fetch, convert, verify, push, classify, features, attention, export, exec.

Data goes to stdout, notes and progress to stderr. Exit codes: 0 done; 1 a checkpoint was refused or a check failed;
2 wrong usage; 3 weights could not be fetched or pushed.
"""
import argparse
import json
import os
import runpy
import sys
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence

OK, REFUSED, USAGE, NETWORK = 0, 1, 2, 3


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the command line and return the exit code."""
    parser = build_parser()
    args = parser.parse_args(argv)
    from .checkpoints.errors import UnknownWeightsError, WeightsError  # late, so that --help needs no PyTorch

    try:
        return args.run(args)
    except UnknownWeightsError as e:
        return _fail(f'{e} `timm-crossformer list` shows the names that have weights.', e.exit_code)
    except WeightsError as e:
        return _fail(str(e), e.exit_code)
    except BrokenPipeError:  # the reader, `head` for one, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except (ValueError, OSError, ImportError) as e:
        return _fail(str(e), REFUSED)
    except KeyboardInterrupt:
        return _fail('interrupted', 130)


def build_parser() -> argparse.ArgumentParser:
    """Build the parser. A subcommand is a function that adds itself to `COMMANDS`."""
    parser = argparse.ArgumentParser(prog='timm-crossformer', description='CrossFormer for timm: weights and tools.')
    from ._version import __version__

    parser.add_argument('--version', action='version', version=f'%(prog)s {__version__}')
    subparsers = parser.add_subparsers(title='commands', metavar='COMMAND', required=True)
    for add in COMMANDS:
        add(subparsers)
    return parser


def _command(subparsers: Any, name: str, run: Callable[[argparse.Namespace], int], help: str) -> Any:
    """Add a subcommand with the options all of them share."""
    parser = subparsers.add_parser(name, help=help, description=help)
    parser.add_argument('--json', action='store_true', help='write JSON to stdout')
    parser.set_defaults(run=run)
    return parser


def _write(text: str, stream: Any) -> None:
    """Write a line, if there is a stream; what its encoding has not, file names that are no UTF-8 too, as numbers."""
    if stream is not None:
        encoding = getattr(stream, 'encoding', None) or 'utf-8'
        stream.write(text.encode(encoding, 'backslashreplace').decode(encoding) + '\n')
        stream.flush()


def _fail(message: str, code: int) -> int:
    _note(f'timm-crossformer: {message}')
    return code


def _note(message: str) -> None:
    _write(message, sys.stderr)


def _emit(data: Any, args: argparse.Namespace, text: str) -> None:
    _write(json.dumps(data, indent=2, default=str) if args.json else text, sys.stdout)


def _table(rows: List[List[str]]) -> str:
    """Align columns; numbers to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    numeric = [all(row[i][:1].isdigit() or row[i] in ('', '-') for row in rows[1:]) for i in range(len(rows[0]))]
    return '\n'.join(
        '  '.join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, numeric, strict=True)
        ).rstrip() for row in rows)


def _size(value: int) -> str:
    return f'{value / 1e6:.1f} MB'


def _group_size(text: str) -> Any:
    """Parse 7, or 4,4,14,7 per stage, or 8x11 (height x width), or 8x11,8x11,8x11,8x11."""
    try:
        sizes = [tuple(map(int, part.split('x'))) for part in text.split(',')]
        if any(len(size) > 2 or min(size) < 1 for size in sizes):
            raise ValueError
    except ValueError:
        raise argparse.ArgumentTypeError(
            f'a group size is like 7, or 4,4,14,7 per stage, or 8x11 for height x width; got {text}') from None
    stages = [size[0] if len(size) == 1 else size for size in sizes]
    if len(stages) > 1:
        return tuple(stages)
    return stages[0] if isinstance(stages[0], int) else (stages[0],) * 4


def _numbers(text: str) -> Any:
    """Parse 8 or 8,4,2,1."""
    try:
        numbers = tuple(map(int, text.split(',')))
    except ValueError:
        raise argparse.ArgumentTypeError(f'expected whole numbers like 8,4,2,1; got {text}') from None
    return numbers if len(numbers) > 1 else numbers[0]


def _height_width(text: str) -> Any:
    """Parse 224, or 200,264: height and width, from 1 up."""
    sides = _numbers(text)
    pair = (sides, sides) if isinstance(sides, int) else sides
    if len(pair) != 2 or min(pair) < 1:
        raise argparse.ArgumentTypeError(f'a size is one number, or height and width, from 1 up; got {text}')
    return pair


def _add_list(subparsers: Any) -> None:
    parser = _command(subparsers, 'list', _list, 'List variants and published weights.')
    parser.add_argument('pattern', nargs='?', default='*', help='wildcard, as in timm.list_models')


def _list(args: argparse.Namespace) -> int:
    import fnmatch

    from .checkpoints.records import manifest
    from .checkpoints.store import places

    records = [record for record in manifest() if fnmatch.fnmatch(record.tag, f'{args.pattern}*')]
    if not records:
        return _fail(f'no weights match {args.pattern!r}. Try `timm-crossformer list`.', USAGE)
    words = {'package': 'in this package', 'store': 'in the store', 'browser': 'browser only'}
    rows = [['weights', 'params', 'GMACs', 'metric', 'value', 'source', 'where they are']]
    data = []
    for record in records:
        metric = next(iter(record.metrics), None)
        here = places(record)
        rows.append([
            record.tag,
            f'{record.params / 1e6:.1f}M',
            f'{record.gmacs:.1f}',
            metric['name'] if metric else '-',
            f'{metric["value"]:.1f}' if metric else '-',
            metric['source'] if metric else '-',
            ', '.join(words.get(place, place) for place in here),
        ])
        data.append({**record.to_json(), 'weights': here})
    _emit(data, args, _table(rows))
    return OK


def _add_fetch(subparsers: Any) -> None:
    parser = _command(subparsers, 'fetch', _fetch, 'Bring published weights into the local store.')
    parser.add_argument('tags', nargs='+', metavar='TAG', help='as `list` shows them')
    parser.add_argument('--from', dest='file', metavar='FILE', help='a checkpoint that is here already')
    parser.add_argument('--source', metavar='NAME', choices=('hub', 'drive', 'flowvision'), help='ask this host alone')
    parser.add_argument('--cross-check', action='store_true', help='fetch from all hosts, compare, and store nothing')
    parser.add_argument('--force', action='store_true', help='fetch again what is there')


def _fetch(args: argparse.Namespace) -> int:
    from .checkpoints.store import cross_check, fetch

    if args.file and (len(args.tags) > 1 or args.source or args.cross_check):
        return _fail('--from is for one tag, without --source and --cross-check.', USAGE)
    if args.cross_check and args.source:
        return _fail('--cross-check asks all hosts: leave --source out.', USAGE)
    results: List[Dict[str, Any]] = []
    lines: List[str] = []
    for tag in args.tags:
        if args.cross_check:
            checked = cross_check(tag)
            lines_of_manifest = {
                'digest': checked.digest, 'sources': [source.to_json() for source in checked.sources]}
            lines.append(f'{checked.tag}: {checked.tensors} tensors are the same. For the manifest:\n'
                         f'{json.dumps(lines_of_manifest, indent=2)}')
            results.append({'tag': checked.tag, 'tensors': checked.tensors, **lines_of_manifest})
        else:
            fetched = fetch(tag, args.source, args.file, args.force)
            known = fetched.conversion
            place = (known and known.directory) or fetched.weights or 'comes with the package'
            lines.append(f'{fetched.tag}: {place}' + (
                f'\n  from {fetched.fetched_from} on {known.date}, {_size(known.source_size or 0)}, '
                f'sha256 {known.source_sha256}\n  digest of the weights {known.digest}' if known else ''))
            results.append(fetched.to_json())
    _emit(results, args, '\n'.join(lines))
    return OK


def _add_convert(subparsers: Any) -> None:
    parser = _command(subparsers, 'convert', _convert, 'Convert a checkpoint into a directory for timm and the Hub.')
    parser.add_argument('source', metavar='SRC', help='checkpoint: official, mmdet, mmseg, vit-pytorch, birder or own')
    parser.add_argument('directory', metavar='DIR', help='directory to write')
    parser.add_argument('--model', metavar='NAME', help='variant (default: inferred from the shapes)')
    parser.add_argument('--group-size', type=_group_size, metavar='G', help='7, or 4,4,14,7, or 8x11')
    parser.add_argument('--lda-group-size', type=_group_size, metavar='G', help='of long-distance attention alone')
    parser.add_argument('--interval', type=_numbers, metavar='I', help='8,4,2,1')
    parser.add_argument('--lda-grouping', choices=('map', 'region', 'grid'), help='groups of long-distance attention')
    parser.add_argument('--num-classes', type=int, metavar='N', help='0 leaves the classifier out')
    parser.add_argument('--dtype', choices=('fp32', 'fp16', 'bf16'), help='of the weights written (default: as it is)')
    parser.add_argument('--key', metavar='KEY', help='key or prefix of the network in the checkpoint (default: found, '
                        'EMA first)')
    parser.add_argument('--sha256', metavar='HASH', help='hash, or its beginning, that SRC must have')
    parser.add_argument('--license', metavar='ID', help='licence of the weights, for the model card')
    parser.add_argument('--overwrite', action='store_true', help='replace files of DIR')


def _convert(args: argparse.Namespace) -> int:
    import torch

    from .checkpoints.planning import GROUPS
    from .checkpoints.writing import convert_file

    dtype = {'fp32': torch.float32, 'fp16': torch.float16, 'bf16': torch.bfloat16, None: None}[args.dtype]
    source = Path(args.source)
    with _progress(f'convert {source.name}', 2 * source.stat().st_size if source.is_file() else 0) as progress:
        written = convert_file(
            source,
            args.directory,
            model=args.model,
            groups={name: getattr(args, name) for name in GROUPS},
            num_classes=args.num_classes,
            dtype=dtype,
            key=args.key,
            expected_sha256=args.sha256,
            license=args.license,
            overwrite=args.overwrite,
            progress=progress.update,
        )
    if written.left_out:
        _note(f'{written.left_out} weights of other parts of the detector or segmenter were left out.')
    if written.dense:
        _note('A backbone without final norm and classifier: use it with features_only=True.')
    _note({
        'option': 'Groups as the options say.',
        'checkpoint': 'Groups as the checkpoint itself says.',
        'default': "The checkpoint does not name its groups: they are the default of its origin.",
    }[written.groups_from])
    arguments = ', '.join(f'{key}={value}' for key, value in written.args.items())
    _emit(written.to_json(), args, '\n'.join([
        f'{written.directory}: {written.model}({arguments}) from {written.origin} weights'
        + (f' under {written.container}' if written.container else ''),
        f'  {written.params / 1e6:.1f}M parameters, {written.num_classes} classes, {written.dtype}, '
        f'{_size(written.size)}',
        f'  sha256 {written.sha256}',
        f'  timm.create_model("local-dir:{written.directory}", pretrained=True)',
    ]))
    return OK


def _add_verify(subparsers: Any) -> None:
    parser = _command(subparsers, 'verify', _verify, 'Check a directory; with 1000 classes, on a photo as well.')
    parser.add_argument('directory', metavar='DIR')
    parser.add_argument('--against', metavar='SRC', help='checkpoint whose weights and outputs it must reproduce')


def _verify(args: argparse.Namespace) -> int:
    from dataclasses import asdict

    from .checkpoints.verifying import verify_directory

    checks = verify_directory(args.directory, args.against)
    ok = all(check.ok for check in checks)
    text = '\n'.join(f'{"ok  " if check.ok else "FAIL"}  {check.check}: {check.detail}' for check in checks)
    _emit({'directory': args.directory, 'ok': ok, 'checks': list(map(asdict, checks))}, args, text)
    return OK if ok else REFUSED


def _add_push(subparsers: Any) -> None:
    parser = _command(subparsers, 'push', _push, 'Upload a converted directory to the Hugging Face Hub.')
    parser.add_argument('directory', metavar='DIR')
    parser.add_argument('repo_id', metavar='REPO_ID', help='OWNER/NAME')
    parser.add_argument('--private', action='store_true', help='create the repository for its owner only')
    parser.add_argument('--dry-run', action='store_true', help='check and list the files, upload nothing')


def _push(args: argparse.Namespace) -> int:
    from .checkpoints.hub import push_directory

    result = push_directory(args.directory, args.repo_id, args.private, args.dry_run)
    rows = [[name, _size(size)] for name, size in result['files'].items()]
    done = 'would be uploaded to' if args.dry_run else 'uploaded to'
    end = '' if args.dry_run else f'\n{result["commit"]}'
    _emit(result, args, f'{done} {result["repo_id"]}:\n{_table([["file", "size"], *rows])}{end}')
    return OK


def _point(text: str) -> Any:
    """Parse 0.4,0.6: x and y, from 0 to 1."""
    try:
        x, y = map(float, text.split(','))
        if not (0 <= x <= 1 and 0 <= y <= 1):
            raise ValueError
    except ValueError:
        raise argparse.ArgumentTypeError(f'a point is x,y from 0 to 1, like 0.4,0.6; got {text}') from None
    return x, y


def _add_images(parser: Any) -> None:
    parser.add_argument('images', nargs='+', metavar='IMAGE')


def _add_weights(parser: Any) -> None:
    parser.add_argument('--model', metavar='NAME', help='as for timm.create_model; with a checkpoint file, the variant')
    parser.add_argument('--weights', metavar='PATH', help='checkpoint file or converted directory')


def _load(args: argparse.Namespace, **kwargs: Any) -> Any:
    from .checkpoints.records import bundled_weights
    from .checkpoints.verifying import load_model

    if args.model is None and args.weights is None:
        args.model = next((tag for tag, _, _ in bundled_weights()), 'crossformer_tiny')
        _note(f'{args.model}; choose others with --model or --weights.')
    return load_model(args.model, args.weights, **kwargs)


def _fast(model: Any) -> Any:
    """Return the inference form of a model."""
    from timm.utils import reparameterize_model

    return reparameterize_model(model, inplace=True)


def _reader(model: Any, whole: bool = False, size: Optional[Sequence[int]] = None) -> Any:
    """Return a function that reads an image as the model wants it, and mean and std to undo its normalisation.

    Args:
        model: Has the preprocessing in its config.
        whole: Keep the image in its own size, instead of the resized centre.
        size: Stretch the image to this height and width instead.
    """
    import torch
    from PIL import Image, UnidentifiedImageError
    from timm.data import create_transform, resolve_data_config

    config = resolve_data_config({}, model=model)
    channels = model.in_chans
    if channels not in (1, 3):
        raise ValueError(f'Images have 1 or 3 channels, the model takes {channels}. Use it from Python.')
    for key in ('mean', 'std'):
        if len(config[key]) != channels:  # a grey value is an average, and so are its statistics
            config[key] = (sum(config[key]) / len(config[key]),) * channels
    if size:
        config.update(input_size=(channels, *size), crop_pct=1.0, crop_mode='squash')
    transform = create_transform(**config)
    if whole:
        transform.transforms = [t for t in transform.transforms if type(t).__name__ not in ('Resize', 'CenterCrop')]

    def read(path: str) -> torch.Tensor:
        try:
            with Image.open(path) as image:
                return transform(image.convert('L' if channels == 1 else 'RGB'))
        except UnidentifiedImageError:
            raise ValueError(f'{path} is no image. Pass a JPEG, PNG or any other format Pillow reads.') from None
        except Exception as e:  # not there, a folder, truncated, too large; damaged bytes can fail in any way
            words = getattr(e, 'strerror', None) or e
            raise ValueError(f'{path} cannot be read: {words}. Pass intact image files.') from None

    return read, *(torch.tensor(config[key])[:, None, None] for key in ('mean', 'std'))


def _each(paths: Sequence[str], read: Callable[[str], Any], title: str, failed: List[str]) -> Iterator[Any]:
    """Yield path and pixels of every image; one that cannot be read is reported, and added to `failed`."""
    with _progress(title, len(paths), unit='image') as progress:
        for path in paths:
            try:
                pixels = read(path)
            except ValueError as e:
                _fail(str(e), REFUSED)
                failed.append(path)
            else:
                yield path, pixels
            progress.update(1)


def _add_classify(subparsers: Any) -> None:
    parser = _command(subparsers, 'classify', _classify, 'Classify images.')
    _add_images(parser)
    _add_weights(parser)
    parser.add_argument('--topk', type=int, default=5, metavar='K', help='classes to show (default: 5)')


def _classify(args: argparse.Namespace) -> int:
    import torch

    if args.topk < 1:
        return _fail(f'--topk needs at least 1, got {args.topk}.', USAGE)
    model = _fast(_load(args))
    if model.num_classes == 0:
        return _fail('these weights have no classifier. Use `features`, or weights of a classifier.', REFUSED)
    read, _, _ = _reader(model)
    names = _class_names(model)
    results: List[Dict[str, Any]] = []
    failed: List[str] = []
    with torch.inference_mode():
        for path, image in _each(args.images, read, 'classify', failed):
            scores = model(image[None])[0].softmax(dim=0)
            top = scores.topk(min(args.topk, len(scores)))
            results.append({'image': path, 'classes': [
                {'index': int(i), 'name': names(int(i)), 'probability': round(float(p), 6)}
                for p, i in zip(top.values, top.indices, strict=True)
            ]})
    _emit(results, args, '\n'.join(
        f'{result["image"]}\n' + '\n'.join(f'  {c["probability"]:6.1%}  {c["name"]}' for c in result['classes'])
        for result in results))
    return REFUSED if failed else OK


def _class_names(model: Any) -> Callable[[int], str]:
    names = model.pretrained_cfg.get('label_names')
    if names and len(names) == model.num_classes:
        return lambda i: str(names[i])
    if model.num_classes == 1000:
        from timm.data import ImageNetInfo

        return ImageNetInfo().index_to_description
    return lambda i: f'class {i}'


def _add_features(subparsers: Any) -> None:
    parser = _command(subparsers, 'features', _features, 'Extract the feature pyramid, and draw it.')
    _add_images(parser)
    _add_weights(parser)
    parser.add_argument('--whole', action='store_true', help='in its own size, not the resized centre')
    parser.add_argument('--out', metavar='PNG', help='picture to write: every image beside its four levels')


def _features(args: argparse.Namespace) -> int:
    import torch

    model = _fast(_load(args, features_only=True))
    read, mean, std = _reader(model, args.whole)
    pictures, pyramids, results = [], [], []
    failed: List[str] = []
    with torch.inference_mode():
        for path, image in _each(args.images, read, 'features', failed):
            levels = [level[0] for level in model(image[None])]
            pictures.append(image * std + mean)
            pyramids.append(levels)
            results.append({'image': path, 'levels': [
                {'shape': list(level.shape), 'mean': float(level.mean()), 'std': float(level.std())} for level in levels
            ]})
    if args.out and results:
        from .checkpoints.files import printable
        from .viz import draw_pyramids

        draw_pyramids(pictures, pyramids, args.out, [printable(Path(result['image']).name) for result in results])
        _note(f'wrote {args.out}')
    _emit(results, args, '\n'.join(
        f'{result["image"]}  ' + '  '.join('×'.join(map(str, level['shape'])) for level in result['levels'])
        for result in results))
    return REFUSED if failed else OK


def _add_attention(subparsers: Any) -> None:
    parser = _command(subparsers, 'attention', _attention, 'Say where one token of an image attends, and draw it.')
    parser.add_argument('image', metavar='IMAGE')
    parser.add_argument('--at', type=_point, required=True, metavar='X,Y', help='point of the token, like 0.4,0.6: '
                        'fractions of width and height of the image as the model gets it')
    _add_weights(parser)
    size = parser.add_mutually_exclusive_group()
    size.add_argument('--whole', action='store_true', help='in its own size, not the resized centre')
    size.add_argument('--size', type=_height_width, metavar='H,W', help='stretched to this height and width')
    parser.add_argument('--out', metavar='PNG', help='picture to write: stages side by side, long distance below short')


def _attention(args: argparse.Namespace) -> int:
    from .explain import attention_from, token_at

    model = _load(args)
    read, mean, std = _reader(model, args.whole, args.size)
    image = read(args.image)
    maps = attention_from(model, image[None], args.at)
    height, width = image.shape[1:]
    blocks: List[Dict[str, Any]] = []
    for stage, weights in enumerate(maps):
        for block, heads in enumerate(weights):
            weight = heads.mean(dim=0)
            blocks.append({
                'stage': stage,
                'block': block,
                'kind': ('SDA', 'LDA')[block % 2],
                'map': list(weight.shape),
                'token': list(token_at(args.at, height, width, stage)),
                'attends_to': int((weight > 0).sum()),
                'most_to': list(divmod(int(weight.argmax()), weight.shape[1])),
                'weight': round(float(weight.max()), 6),
            })
    if args.out:
        from .viz import draw_attention

        draw_attention(image * std + mean, maps, args.at, args.out)
        _note(f'wrote {args.out}')
    rows = [['block', 'kind', 'map', 'token', 'attends to', 'most to', 'weight']]
    for b in blocks:
        rows.append([
            f'{b["stage"]}.{b["block"]}',
            b['kind'],
            '{} × {}'.format(*b['map']),
            '{}, {}'.format(*b['token']),
            str(b['attends_to']),
            '{}, {}'.format(*b['most_to']),
            f'{b["weight"]:.3f}',
        ])
    _emit({'image': args.image, 'at': args.at, 'size': [height, width], 'blocks': blocks}, args, _table(rows))
    return OK


def _add_export(subparsers: Any) -> None:
    parser = _command(subparsers, 'export', _export, 'Export a model to ONNX, torch.export or OpenVINO.')
    parser.add_argument('path', metavar='PATH', help='file to write: .onnx, .pt2 or .xml')
    parser.add_argument('--model', metavar='NAME', required=True, help='as for timm.create_model; local-dir:DIR, too')
    parser.add_argument('--pretrained', action='store_true', help='with the weights timm has for the name')
    parser.add_argument('--format', choices=('onnx', 'torch', 'openvino'), default='onnx', help='(default: onnx)')
    parser.add_argument('--features', action='store_true', help='export the pyramid instead of the classifier')
    parser.add_argument(
        '--dynamic', nargs='?', choices=('all', 'batch'), const='all',
        help='leave batch, height and width open, from 33 px up; or the batch alone')
    parser.add_argument('--size', type=_height_width, default=(224, 224), metavar='H,W', help='if not open')
    parser.add_argument('--batch', type=int, default=1, metavar='N', help='images at a time, if not open')
    parser.add_argument('--dtype', choices=('fp32', 'fp16'), default='fp32', help='fp16: ONNX for GPUs (default: fp32)')
    parser.add_argument('--int8', action='store_true', help='ONNX with layers in int8; needs --calibrate')
    parser.add_argument('--calibrate', metavar='FOLDER', help='some hundred images like those to come')
    parser.add_argument('--verify', action='store_true', help='run the file against the model')


def _export(args: argparse.Namespace) -> int:
    import timm

    from .checkpoints.verifying import check_name
    from .export import PROBES, calibration, export_model, verify_exported

    if args.int8 != bool(args.calibrate) or (args.int8 and args.dtype != 'fp32'):
        return _fail('--int8 and --calibrate FOLDER go together, and without --dtype.', USAGE)
    pretrained = args.pretrained or args.model.startswith(('local-dir:', 'hf-hub:'))
    check_name(args.model, pretrained)
    model = timm.create_model(args.model, pretrained=pretrained, features_only=args.features).eval()
    dynamic = args.dynamic == 'all' or args.dynamic or False
    size = (230, 310) if dynamic is True else args.size  # of unlike sides, or they would be taken for one
    batches = calibration(model, args.calibrate, size, args.batch) if args.int8 else None
    dtype = 'int8' if args.int8 else args.dtype
    _note(f'Exporting {args.model} to {args.path}; large networks and open sizes take a minute or more.')
    path = export_model(model, args.path, args.format, size, dynamic, args.batch, dtype, batches)
    if args.verify:
        _note(f'Comparing {args.path} with the model.')
    probes = PROBES if dynamic is True else [(batch, *args.size) for batch in ((1, 2) if dynamic else (args.batch,))]
    differences = verify_exported(model, path, probes) if args.verify else {}
    result = {
        'path': str(path), 'format': args.format, 'dynamic': dynamic, 'dtype': dtype, 'size': path.stat().st_size,
        'verified': [{'batch': b, 'height': h, 'width': w, 'difference': d} for (b, h, w), d in differences.items()]}
    lines = [f'{path}: {args.format}, {_size(path.stat().st_size)}'] + [
        f'  {b} image{"s" * (b > 1)} of {h} x {w}: differs by {d:.1e} of the root mean square'
        for (b, h, w), d in differences.items()]
    _emit(result, args, '\n'.join(lines))
    allowed = {'fp32': 1e-3, 'fp16': 3e-2, 'int8': .5}[dtype]  # how well int8 serves, only its accuracy tells
    if any(not d < allowed for d in differences.values()):
        return _fail(f'{path} does not reproduce the model.', REFUSED)
    return OK


def _add_exec(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        'exec', help="Run a Python script, timm's train.py for one, with the variants registered.")
    parser.add_argument('script', metavar='SCRIPT')
    parser.add_argument('arguments', nargs=argparse.REMAINDER, metavar='ARGS', help='passed to the script')
    parser.set_defaults(run=_exec)


def _exec(args: argparse.Namespace) -> int:
    script = Path(args.script)
    if not script.is_file():
        return _fail(f'{script} is no file. Pass the path of a Python script.', USAGE)
    sys.argv = [str(script), *args.arguments]
    sys.path.insert(0, str(script.resolve().parent))
    os.environ['TIMM_CROSSFORMER_SCRIPT'] = str(script.resolve())  # for the processes it starts, too
    try:
        runpy.run_module('timm_crossformer._script', run_name='__main__', alter_sys=True)
    except SystemExit:
        raise
    except BaseException:  # the script's own failure, shown as Python shows it
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]  # never None in an except clause
        return REFUSED
    return OK


def _progress(title: str, total: int, unit: str = 'B') -> Any:
    """Show a bar on stderr if it is a terminal, for work that takes a while."""
    from .checkpoints.files import bar

    return bar(title, total, unit, delay=0.5)


COMMANDS: List[Callable[[Any], None]] = [
    _add_list, _add_fetch, _add_convert, _add_verify, _add_push, _add_classify, _add_features, _add_attention,
    _add_export, _add_exec,
]
