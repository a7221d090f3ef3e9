"""Functions of tensors: attention inside the groups of a map, and its backends. No module, no parameter."""
from .operator import BACKENDS as BACKENDS
from .operator import choose_backend as choose_backend
from .operator import grouped_attention as grouped_attention
