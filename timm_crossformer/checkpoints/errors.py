"""What can go wrong with weights: one tree of errors, from which the command's exit codes follow."""
import re
from typing import ClassVar
from urllib.parse import urlsplit

import huggingface_hub

__all__ = ['CheckpointError', 'FetchError', 'OtherWeightsError', 'UnknownWeightsError', 'WeightsError', 'host_of']


class WeightsError(ValueError, RuntimeError):
    """Weights that cannot be used. A RuntimeError too, since that is what `load_state_dict` raises."""

    exit_code: ClassVar[int] = 1  # of the command


class CheckpointError(WeightsError):
    """A checkpoint that cannot be used as it is."""


class OtherWeightsError(CheckpointError):
    """Weights under a known name that are not the known ones."""


class UnknownWeightsError(WeightsError):
    """A name that stands for no weights."""

    exit_code = 2


class FetchError(WeightsError):
    """Weights that could not be fetched or sent. Its words hold no credentials."""

    exit_code = 3

    def __init__(self, message: str):
        super().__init__(redact(message))


def host_of(url: str) -> str:
    """Return scheme and host of an address: mirrors have passwords before it, and tokens behind."""
    address = urlsplit(url)
    return f'{address.scheme}://{address.netloc.rpartition("@")[2]}'


def redact(text: str) -> str:
    """Take credentials out of the addresses in a text; of the Hub's mirror leave the host alone."""
    text = re.sub(r'(?<=://)[^/\s\'"]*@', '', text)
    folder = urlsplit(huggingface_hub.constants.ENDPOINT).path.rstrip('/')
    return text.replace(folder, '') if folder else text
