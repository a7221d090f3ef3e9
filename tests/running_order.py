"""In which order tests run, so that no worker is left with a long one at the end.

`pytest --dist worksteal` cuts the list of tests into one piece per worker; a worker that is through takes from the end
of another's piece. So every piece starts with its share of the long tests, and short ones are left to steal.
"""
import json
from pathlib import Path
from typing import Dict, List, Sequence

RECORD = Path(__file__).with_name('durations.json')  # written by `make durations`: tests of more than LONG seconds
LONG = 2.
UNKNOWN = {True: 10., False: 0.}  # of a test that is not recorded, if it is marked `slow`, and if not


def recorded() -> Dict[str, float]:
    """Return the seconds of long tests by node id."""
    return json.loads(RECORD.read_text()) if RECORD.exists() else {}


def record(seconds: Dict[str, float]) -> None:
    """Write the seconds of tests that ran; those of others stay."""
    known = {**recorded(), **seconds}
    known = {name: round(value, 1) for name, value in sorted(known.items()) if value >= LONG}
    RECORD.write_text(json.dumps(known, indent=0) + '\n')


def order(seconds: Sequence[float], workers: int) -> List[int]:
    """Return the order in which to run tests.

    Args:
        seconds: How long each test takes, in the order of the files.
        workers: Number of workers.

    Returns:
        Indices: one piece per worker, of the sizes worksteal cuts. In each the long tests come first, the longest
        before the others; short tests keep their order, and so the fixtures they share.
    """
    sizes, left = [], len(seconds)
    for remaining in range(workers, 0, -1):
        sizes.append(left // remaining)
        left -= sizes[-1]
    pieces: List[List[int]] = [[] for _ in sizes]
    loads = [0.] * workers
    long = sorted((i for i, value in enumerate(seconds) if value >= LONG), key=lambda i: -seconds[i])
    for i in long:
        worker = min((w for w in range(workers) if len(pieces[w]) < sizes[w]), key=lambda w: loads[w])
        pieces[worker].append(i)
        loads[worker] += seconds[i]
    short = iter(sorted(set(range(len(seconds))) - set(long)))
    for piece, size in zip(pieces, sizes, strict=True):
        piece.extend(next(short) for _ in range(size - len(piece)))
    return [i for piece in pieces for i in piece]
