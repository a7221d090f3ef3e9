"""What is known of weights: the manifest's records, what a conversion recorded, where the package keeps its files."""
import dataclasses
import json
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Dict, Iterator, List, Mapping, Optional, Tuple

from ..config import per_stage
from ..variants import VARIANTS
from .errors import UnknownWeightsError

__all__ = [
    'Conversion', 'Record', 'Source', 'bundled_weights', 'find', 'groups_of', 'manifest', 'photo_path', 'weights_dir']


@dataclass(frozen=True)
class Source:
    """Where weights are.

    Attributes:
        kind: 'drive', a file of Google Drive, which has an `id`; 'flowvision', a zip in its bucket, with a `name`;
            'hub', a `file` of a repository `id` of the Hugging Face Hub in a `revision`; 'package', a `file` that comes
            with this package; 'browser', a page (`url`) that wants a person, with its `code`.
        sha256: Hash of the file, None where nobody has stated it; likewise its size in bytes.
    """

    kind: str
    id: str = ''
    name: str = ''
    file: str = ''
    revision: Optional[str] = None
    url: str = ''
    code: str = ''
    sha256: Optional[str] = None
    size: Optional[int] = None

    def to_json(self) -> Dict[str, Any]:
        """Return the form it has in the manifest."""
        hashes = {} if self.kind == 'browser' else {'sha256': self.sha256, 'size': self.size}
        return {**{key: value for key, value in vars(self).items() if value}, **hashes}

    def page(self) -> str:
        """Return the page where a person finds the file, with its code if it has one; '' if there is none."""
        if self.kind == 'browser':
            return f'{self.url}   # code {self.code}'
        return f'https://drive.google.com/file/d/{self.id}/view' if self.kind == 'drive' else ''


@dataclass(frozen=True)
class Record:
    """One set of published weights, as weights/README.md describes it."""

    tag: str
    origin: str
    origin_url: Optional[str]
    sources: Tuple[Source, ...]
    bundled: Optional[str]
    dense: bool
    license: str
    digest: Optional[str]
    group_size: List[int]
    interval: List[int]
    lda_grouping: str
    params: int
    gmacs: float
    metrics: List[Dict[str, Any]]
    notes: str
    cfg: Optional[Dict[str, Any]] = None

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> 'Record':
        """Read a record of the manifest."""
        return cls(**{**data, 'sources': tuple(Source(**source) for source in data['sources'])})

    def to_json(self) -> Dict[str, Any]:
        """Return the form it has in the manifest."""
        data = {**vars(self), 'sources': [source.to_json() for source in self.sources]}
        return {key: value for key, value in data.items() if key != 'cfg' or value is not None}

    @property
    def variant(self) -> str:
        """The name of the model."""
        return self.tag.partition('.')[0]

    @property
    def groups(self) -> Dict[str, Any]:
        """Arguments for the groups that the weights were trained with, where they differ from the variant's."""
        known = {**dict(group_size=7, interval=(8, 4, 2, 1), lda_grouping='map'), **VARIANTS[self.variant]}
        differing: Dict[str, Any] = {}
        for name in ('group_size', 'interval'):
            value = tuple(getattr(self, name))
            if list(value) != per_stage(name, known[name], len(value)):
                differing[name] = value[0] if len(set(value)) == 1 else value
        if self.lda_grouping != known['lda_grouping']:
            differing['lda_grouping'] = self.lda_grouping
        return differing


@dataclass(frozen=True)
class Conversion:
    """What was read from a checkpoint and written to a directory; its config.json holds it, but for the directory.

    Attributes:
        model: Variant.
        args: Arguments in which the model differs from the variant.
        origin: 'native', 'official', 'birder' or 'vit-pytorch'.
        dense: A backbone without norm and classifier.
        container: Key of the weights inside the file.
        prefix: What stood before every key.
        left_out: Number of weights of other parts.
        groups_from: 'option', 'checkpoint' or 'default'.
        num_classes: Number of classes, 0 without a classifier.
        params: Number of parameters.
        dtype: Of the weights written.
        source: Name of the file that was read.
        source_sha256: Its hash.
        sha256: Hash of the weights' file.
        size: Its bytes.
        digest: Of names, dtypes, shapes and bytes of the weights as they were read.
        tag: Of published weights; likewise the rest.
        fetched_from: Kind of source, or 'file'.
        address: What was asked; of a host that stands for another, its name alone.
        source_size: Bytes of the file that was read.
        date: When, in UTC.
        directory: Where it was written to.
    """

    model: str
    args: Dict[str, Any]
    origin: str
    dense: bool
    container: str
    prefix: str
    left_out: int
    groups_from: str
    num_classes: int
    params: int
    dtype: str
    source: str
    source_sha256: str
    sha256: str
    size: int
    digest: str
    tag: Optional[str] = None
    fetched_from: Optional[str] = None
    address: Optional[str] = None
    source_size: Optional[int] = None
    date: Optional[str] = None
    directory: Optional[str] = None

    @classmethod
    def from_json(cls, data: Mapping[str, Any], **more: Any) -> 'Conversion':
        """Read what a config.json holds.

        Raises:
            TypeError: Something is missing.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        return cls(**{key: value for key, value in data.items() if key in known}, **more)

    def to_json(self) -> Dict[str, Any]:
        """Return what is known, as plain data."""
        return {key: value for key, value in vars(self).items() if value is not None}

    @property
    def weights(self) -> str:
        """Path of the weights."""
        return str(Path(self.directory or '') / 'model.safetensors')


def weights_dir() -> Path:
    """Return the directory of the manifest and the bundled weights: in the package, or beside it in a checkout."""
    inside = Path(__file__).parents[1] / 'weights'
    return inside if inside.is_dir() else Path(__file__).parents[2] / 'weights'


def photo_path() -> Path:
    """Return the photo of a cat: among the package's weights, or with the examples in a checkout."""
    inside = weights_dir() / 'photo.jpg'
    return inside if inside.is_file() else Path(__file__).parents[2] / 'examples' / 'photo.jpg'


@lru_cache(maxsize=4)
def _read_manifest(path: Path) -> Tuple[Record, ...]:
    if not path.is_file():
        raise FileNotFoundError(
            f'timm_crossformer needs its file {path}, which is not there. Install the package with its data, or keep '
            'them where it is frozen.')
    return tuple(map(Record.from_json, json.loads(path.read_text(encoding='utf-8'))['weights']))


def manifest() -> Tuple[Record, ...]:
    """Return a record of every published set of weights.

    Raises:
        FileNotFoundError: The package has been installed without its data.
    """
    return _read_manifest(weights_dir() / 'manifest.json')


def bundled_weights() -> Iterator[Tuple[str, str, Dict[str, Any]]]:
    """Yield tag, file and pretrained cfg of the weights that come with the package; none if it has lost its data."""
    records: Tuple[Record, ...] = ()
    with suppress(FileNotFoundError):
        records = manifest()
    for record in records:
        path = weights_dir() / (record.bundled or '')
        if path.is_file():
            cfg = {key: tuple(value) if isinstance(value, list) else value for key, value in (record.cfg or {}).items()}
            yield record.tag, str(path), cfg


def groups_of(tag: str) -> Dict[str, Any]:
    """Return `Record.groups` of a tag, nothing for others."""
    with suppress(FileNotFoundError):
        return next((record.groups for record in manifest() if record.tag == tag), {})
    return {}


def find(tag: str) -> Record:
    """Return the record of a tag; of a variant, that of its default.

    Raises:
        UnknownWeightsError: There is none.
    """
    variant, _, name = tag.partition('.')
    for record in manifest():
        if record.tag == tag or (not name and record.variant == variant):
            return record
    if variant not in VARIANTS:
        raise UnknownWeightsError(f'Unknown model ({variant}).')
    raise UnknownWeightsError(
        f'Invalid pretrained tag ({name}) for {variant}.' if name else f'No weights for {variant}.')
