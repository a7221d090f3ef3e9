"""benchmarks/speed/gpu.py: its whole course on a CPU, its limits of time, and targets."""
import csv
import time

import gpu
import pytest
import torch


def rows_of(path):
    with path.open(newline='') as file:
        return list(csv.DictReader(file))


def test_the_whole_course_runs_dry(tmp_path, capsys):
    assert gpu.main(['--dry', '--out', str(tmp_path)]) == 0
    rows = rows_of(tmp_path / 'gpu.csv')
    assert {row['part'] for row in rows} == {'operator', 'models'}
    assert all(row['value'] and not row['note'] and row['card'] == 'dry' for row in rows)
    errors = [row for row in rows if row['item'].startswith('error')]
    assert len(errors) == 2 * 4 * 2 * 3 and all(row['met'] == 'True' for row in errors)
    assert all(row['measured_to_estimate'] for row in rows if row['item'].startswith('forward crossformer'))
    assert 'Targets met' in capsys.readouterr().out


def test_a_row_is_written_at_once_whatever_happens(tmp_path):
    verdict = gpu.Verdict(tmp_path / 'gpu.csv', torch.device('cpu'), minutes=1)

    def fail():
        raise RuntimeError('no\nluck')

    verdict.measure('operator', 'fast', lambda: (2., 'ms'), 1, estimate=4., target='<= 3')
    verdict.measure('operator', 'slow', lambda: (4., 'ms'), 1, target='<= 3')
    verdict.measure('operator', 'few', lambda: (0.4, 'share'), 1, target='>= 0.5')
    verdict.measure('operator', 'nan', lambda: (float('nan'), 'of norm'), 1, target='<= 3')
    verdict.measure('operator', 'fails', fail, 1, target='<= 3')
    verdict.measure('operator', 'hangs', lambda: time.sleep(30), 0.1)
    rows = rows_of(tmp_path / 'gpu.csv')
    assert [row['met'] for row in rows] == ['True', 'False', 'False', 'False', 'False', '']
    assert rows[0]['measured_to_estimate'] == '0.5' and rows[4]['note'] == 'RuntimeError: no'
    assert rows[5]['note'].startswith('OutOfTime: stopped after') and float(rows[5]['seconds']) < 5
    verdict.end = time.monotonic()
    verdict.measure('operator', 'late', lambda: (2., 'ms'), 1)
    assert rows_of(tmp_path / 'gpu.csv')[-1]['note'] == 'OutOfTime: no time was left'


@pytest.mark.skipif(torch.cuda.is_available(), reason='needs a machine without a GPU')
def test_without_a_gpu_it_says_so(capsys):
    with pytest.raises(SystemExit):
        gpu.main(['operator'])
    assert 'PyTorch sees no GPU. Try --dry' in capsys.readouterr().err
