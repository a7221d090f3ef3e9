"""Long tests are spread over the workers and come first."""
import pytest
import running_order


@pytest.mark.parametrize('workers', [1, 2, 3, 4])
@pytest.mark.parametrize('seconds', [[], [1.], [9.], [0.] * 7, [3., 0., 9., 0., 5., 0., 0., 4., 0., 0.], [5.] * 5],
                         ids=['none', 'short', 'long', 'all short', 'mixed', 'all long'])
def test_every_test_runs_once_and_long_ones_first(seconds, workers):
    order = running_order.order(seconds, workers)
    assert sorted(order) == list(range(len(seconds)))
    start, left = 0, len(seconds)
    for remaining in range(workers, 0, -1):  # as worksteal cuts the list
        size = left // remaining
        piece = order[start:start + size]
        start, left = start + size, left - size
        long = [seconds[i] for i in piece if seconds[i] >= running_order.LONG]
        assert [seconds[i] for i in piece[:len(long)]] == sorted(long, reverse=True)
        assert piece[len(long):] == sorted(piece[len(long):])


def test_long_tests_are_shared_evenly():
    order = running_order.order([9., 5., 4., *[0.] * 97], 2)
    assert order[0] == 0 and order[50:52] == [1, 2]


def test_only_long_tests_are_recorded_and_those_that_did_not_run_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(running_order, 'RECORD', tmp_path / 'durations.json')
    assert running_order.recorded() == {}
    running_order.record({'a': 30.04, 'b': 1., 'c': 7.})
    running_order.record({'a': 1., 'd': 2.})
    assert running_order.recorded() == {'c': 7., 'd': 2.}


def test_what_is_recorded_exists():
    root = running_order.RECORD.parents[1]
    assert {name for name in running_order.recorded() if not (root / name.partition('::')[0]).exists()} == set()
