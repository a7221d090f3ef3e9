"""Settings for all tests, before anything imports timm or huggingface_hub."""
import os

os.environ.setdefault('HF_HUB_DISABLE_TELEMETRY', '1')

import pytest
import running_order
import torch


@pytest.fixture(autouse=True)
def _reproducible():
    """Give every test the same random numbers, and one thread: models are small, and CI has few cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.hookimpl(trylast=True)  # after -m and -k
def pytest_collection_modifyitems(config, items):
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason='needs CUDA')
        for item in items:
            if 'gpu' in item.keywords:
                item.add_marker(skip)
    workers = getattr(config, 'workerinput', {}).get('workercount', 1)
    if workers > 1:
        names = [f'{item.path.name}::{item.name.partition("[")[0]}' for item in items]
        items[:] = [items[i] for i in running_order.order(names, workers)]
