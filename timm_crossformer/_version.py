"""The version, where it can be read without PyTorch."""
__version__ = '0.1.0'
