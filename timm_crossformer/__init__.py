"""CrossFormer and CrossFormer++ for timm. Importing the package registers the models."""
from .crossformer import CrossFormer as CrossFormer

__version__ = '0.1.0'
