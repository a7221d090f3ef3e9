"""In which order tests run, so that no worker is left with a long one at the end.

`pytest --dist worksteal` cuts the list of tests into one piece per worker; a worker that is through takes from the end
of another's piece. So every piece starts with its share of the long tests, and short ones are left to steal.
"""
from typing import List, Sequence

# Those marked `slow` and others, the longest first. Not here: cases that share a long fixture; spread, they would run
# it in every worker.
LONG = (
    'test_export.py::test_the_command_exports_a_pyramid_for_all_sizes_without_a_warning',
    'test_export.py::test_ways_of_compiling',
    'test_export.py::test_inductor',
    'test_bench.py::test_peers_are_the_same_networks',
    'test_warnings.py::test_no_warning',
    'test_train.py::test_killed_run_ends_like_an_uninterrupted_one',
    'test_export.py::test_compiled_for_inference_one_graph_serves_all_sizes',
    'test_export.py::test_an_exported_program_takes_sizes_it_has_not_seen',
    'test_model.py::test_tracing_needs_no_special_mode',
    'test_model.py::test_gradients_are_those_of_finite_differences',
    'test_timm_contract.py::test_forward_and_heads',
    'test_golden.py::test_outputs_of_the_official_code',
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
