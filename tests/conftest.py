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


def pytest_addoption(parser):
    parser.addoption('--record-durations', action='store_true', help='write tests/durations.json, see running_order.py')


@pytest.hookimpl(trylast=True)  # after -m and -k
def pytest_collection_modifyitems(config, items):
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason='needs CUDA')
        for item in items:
            if 'gpu' in item.keywords:
                item.add_marker(skip)
    workers = getattr(config, 'workerinput', {}).get('workercount', 1)
    if workers > 1:
        known = running_order.recorded()
        seconds = [known.get(item.nodeid, running_order.UNKNOWN['slow' in item.keywords]) for item in items]
        items[:] = [items[i] for i in running_order.order(seconds, workers)]


def pytest_terminal_summary(terminalreporter, config):
    if config.getoption('record_durations'):
        seconds = {}
        for report in terminalreporter.getreports('passed') + terminalreporter.getreports(''):
            seconds[report.nodeid] = seconds.get(report.nodeid, 0) + report.duration
        running_order.record(seconds)
