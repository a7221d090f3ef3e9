"""Settings for all tests, before anything imports timm or huggingface_hub."""
import os

os.environ.setdefault('HF_HUB_DISABLE_TELEMETRY', '1')

import pytest
import torch


@pytest.fixture(autouse=True)
def _reproducible():
    """Give every test the same random numbers, and one thread: models are small, and CI has few cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason='needs CUDA')
        for item in items:
            if 'gpu' in item.keywords:
                item.add_marker(skip)
