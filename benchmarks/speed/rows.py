"""The CSV files of results as tables of pandas: one row per case and run, ratios within a run."""
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

import numpy as np
import pandas as pd
from cases import pixels_of

RESULTS = Path(__file__).parents[1] / 'results'
KEY = ['contestant', 'task', 'mode', 'size', 'batch', 'dtype', 'device', 'threads']
COLUMNS = [
    'run', *KEY, 'params_m', 'gmacs', 'rounds', 'median_ms', 'min_ms', 'gflops', 'gemm_gflops', 'gemm_share',
    'peak_mib', 'times_ms', 'hardware', 'torch', 'timm',
]
_TEXT = dict.fromkeys(['size', 'times_ms', 'torch', 'timm'], str)


def write(folder: Path, what: str, rows: Sequence[Dict[str, Any]]) -> Path:
    """Append the rows of one run to the file of their kind, dtype, torch version and device."""
    first = rows[0]
    path = folder / f'{what}-{first["dtype"]}-{first["torch"]}-{first["device"]}.csv'
    run = 1 + (read_file(path)['run'].max() if path.exists() else 0)
    folder.mkdir(parents=True, exist_ok=True)
    frame = pd.DataFrame(rows).assign(run=run).reindex(columns=COLUMNS)
    frame.to_csv(path, mode='a', header=not path.exists(), index=False)
    return path


def read_file(path: Path) -> pd.DataFrame:
    """Read a file of results.

    Raises:
        ValueError: The file has other columns.
    """
    rows = pd.read_csv(path, dtype=_TEXT)
    if list(rows.columns) != COLUMNS:
        raise ValueError(f'{path} has other columns than this version writes. Move it away and measure again.')
    return rows


def read(folder: Path, what: str, dtype: str = 'fp32', device: str = 'cpu', **where: Any) -> pd.DataFrame:
    """Read all rows of one kind as they were measured, with `times` (ms), `macs` (10**9) and `megapixels` of a batch.

    Args:
        folder: Where the files are.
        what: The part of the bench.
        dtype, device: '*' for all.
        where: Values that the rows must have.
    """
    frames = [read_file(path) for path in sorted(folder.glob(f'{what}-{dtype}-*-{device}.csv'))]
    rows = pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=COLUMNS)
    areas = {size: pixels_of(size)[0] * pixels_of(size)[1] / 1e6 for size in rows['size'].unique()}
    return pick(rows, **where).assign(
        times=lambda rows: rows['times_ms'].fillna('').map(lambda text: np.array(text.split(), float)),
        macs=lambda rows: rows['gmacs'] * rows['batch'],
        megapixels=lambda rows: rows['size'].map(areas) * rows['batch'])


def pick(rows: pd.DataFrame, **where: Any) -> pd.DataFrame:
    """Return the rows that have these values."""
    for name, value in where.items():
        rows = rows[rows[name] == value]
    return rows


def latest(rows: pd.DataFrame) -> pd.DataFrame:
    """Keep the last row of each case."""
    return rows.drop_duplicates(KEY, keep='last')


def machines(rows: pd.DataFrame) -> List[str]:
    """List the hardware of rows, that of the last one first."""
    return list(rows['hardware'][::-1].unique())


def ratio(
        rows: pd.DataFrame, top: Dict[str, Any], bottom: Dict[str, Any], value: str = 'times', per: str = '',
) -> Optional[float]:
    """Divide two cases of the last run that has both, None if there is no such run.

    Args:
        rows: What `read` returns.
        top: Values that select the case above the line.
        bottom: Values that select the case below the line; eager if it, or `top`, does not say otherwise.
        value: 'times' for the median over rounds of the ratios within a round, or a column.
        per: 'macs' or 'megapixels' to divide both by it first.
    """
    above, below = (pick(rows, **{'mode': 'eager', **where}) for where in (top, bottom))
    pairs = above.merge(below, on=['torch', 'run'])
    if pairs.empty:
        return None
    pair = pairs.iloc[-1]
    scale = pair[f'{per}_y'] / pair[f'{per}_x'] if per else 1.
    quotient = pair[f'{value}_x'] / pair[f'{value}_y']
    return float(scale * np.median(quotient))
