"""In which order tests run, so that no worker is left with a long one at the end.

`pytest --dist worksteal` cuts the list of tests into one piece per worker; a worker that is through takes from the end
of another's piece. So every piece starts with its share of the long tests, and short ones are left to steal.
"""
from typing import List, Sequence

LONG = (  # the longest first, those marked `slow` and others
    'test_distributed.py::test_ranks_give_the_gradients_of_one_process',
    'test_export.py::test_files_run_at_sizes_not_seen_at_export',
)


def order(names: Sequence[str], workers: int, long: Sequence[str] = LONG) -> List[int]:
    """Return the order in which to run tests, as indices.

    Args:
        names: FILE.py::TEST of each test, in the order of the files.
        workers: Number of workers.
        long: Names of long tests, the longest first.

    Returns:
        One piece per worker, of the sizes worksteal cuts: its share of the long tests, then short ones. These keep
        their order, and so the fixtures they share.
    """
    first = sorted((i for i, name in enumerate(names) if name in long), key=lambda i: long.index(names[i]))
    rest = [i for i, name in enumerate(names) if name not in long]
    result: List[int] = []
    for worker in range(workers):
        share = first[worker::workers]
        size = (len(names) - len(result)) // (workers - worker)
        short = max(0, size - len(share))
        result += share + rest[:short]
        rest = rest[short:]
    return result + rest
