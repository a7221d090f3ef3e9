"""Weights, on one straight way: read a file, parse it, plan a network, fit, write. Hosts and the Hub are at its ends.

`errors`, `files` and `records` know nothing of the rest. `reading` makes data of files; `names` has the foreign names,
`architecture` what shapes tell; `parsing` finds the network in a checkpoint, `planning` decides what shapes do not
tell, `fitting` checks weights against a model, `writing` makes directories, `verifying` checks and loads them;
`transfer` fetches a file, `hub` asks the Hugging Face Hub, and `store` keeps published weights by name.
"""
from .errors import CheckpointError as CheckpointError
from .errors import FetchError as FetchError
from .errors import OtherWeightsError as OtherWeightsError
from .errors import UnknownWeightsError as UnknownWeightsError
from .errors import WeightsError as WeightsError
from .hub import push_directory as push_directory
from .reading import read_checkpoint as read_checkpoint
from .store import cross_check as cross_check
from .store import fetch as fetch
from .verifying import load_model as load_model
from .verifying import verify_directory as verify_directory
from .writing import convert_file as convert_file
