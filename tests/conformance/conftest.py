"""Marks of timm's tests, and its attitude to warnings."""
import pytest

MARKS = ('base', 'forward', 'backward', 'cfg', 'cfg_nonstd', 'torchscript', 'features', 'fxforward', 'fxbackward')


def pytest_configure(config):
    for mark in (*MARKS, 'timeout'):
        config.addinivalue_line('markers', f'{mark}: of timm')


def pytest_collection_modifyitems(items):
    for item in items:
        item.add_marker(pytest.mark.filterwarnings('default'))
