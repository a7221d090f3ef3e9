"""Long tests are spread over the workers and come first."""
from pathlib import Path

import pytest
import running_order


@pytest.mark.parametrize('workers', [1, 2, 3, 4])
@pytest.mark.parametrize('names', ['', 'a', 'A', 'aaaaaaa', 'aBaAaabBaab', 'ABBBA', 'aaaaaaaaaaaaaaaaaB'])
def test_every_test_runs_once(names, workers):
    assert sorted(running_order.order(names, workers, 'AB')) == list(range(len(names)))


@pytest.mark.parametrize('names, pieces', [
    ('abcde', ['abcde']), ('aBcAd', ['ABacd']), ('abcde', ['ab', 'cde']), ('abAcdBefC', ['ACab', 'Bcdef']),
    ('Aabcdefg', ['Aa', 'bcd', 'efg']), ('aaaABCDa', ['AD', 'Baa', 'Caa']),
])
def test_each_worker_starts_with_its_share_of_the_long_ones(names, pieces):
    order = running_order.order(names, len(pieces), 'ABCD')
    for remaining, piece in zip(range(len(pieces), 0, -1), pieces, strict=True):  # as worksteal cuts the list
        size = len(order) // remaining
        assert ''.join(names[i] for i in order[:size]) == piece
        order = order[size:]


def test_long_tests_exist():
    for name in running_order.LONG:
        file, _, test = name.partition('::')
        path, = Path(__file__).parents[1].rglob(file)
        assert f'def {test}(' in path.read_text(), name
