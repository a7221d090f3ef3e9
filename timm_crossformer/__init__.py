"""CrossFormer and CrossFormer++ for timm. Importing the package registers the models."""
from ._version import __version__ as __version__
from .crossformer import CrossFormer as CrossFormer
from .inference import reparameterize as reparameterize
