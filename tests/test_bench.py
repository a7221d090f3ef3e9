"""benchmarks/bench.py: what it measures, counts, checks and writes."""
import csv
import itertools
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / 'benchmarks'))

import bench
from bench import Case, Results, WrongResult

TINY = Case('test_crossformer', size='64')
# The network is the same whatever groups the constructor's arguments make; at 224 px `region` makes other groups.
SAME, OTHER = 'test_crossformer group_size=4', 'test_crossformer lda_grouping=region'


@pytest.fixture(autouse=True)
def _tidy():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    bench.build.cache_clear()


@pytest.fixture
def small_gemm(monkeypatch):
    monkeypatch.setitem(bench.GEMM_SIDE, 'cpu', 64)


def row_of(case, times='1 2 3', **values):
    fields = dict(gmacs=1., gemm_share=.5, rounds=3, median_ms=2., min_ms=1., times_ms=times, torch='9.9', timm='1')
    return {**vars(case), **fields, **values}


# ---- measuring


def test_contestants_take_turns_after_a_product_and_the_first_call_is_dropped(monkeypatch, small_gemm):
    calls = []
    monkeypatch.setattr(bench, 'prepare', lambda case: lambda: calls.append(case.size) or torch.zeros(1))
    monkeypatch.setattr(bench, 'prepare_gemm', lambda case: (lambda: calls.append('gemm'), 1.))
    monkeypatch.setattr(bench, 'count_macs', lambda case: len(bench.prepare(case)()))
    rows = bench.measure([TINY, replace(TINY, size='96')], seconds=0, min_rounds=2)
    assert calls == ['64', '96', 'gemm', *['gemm', '64', '96'] * 2]
    assert [row['rounds'] for row in rows] == [2, 2]


def test_a_row_says_what_was_measured(small_gemm):
    row, = bench.measure([replace(TINY, batch=2)], seconds=0, min_rounds=3)
    times = bench.times_of(row)
    assert len(times) == 3
    assert row['median_ms'] == sorted(times)[1]
    assert row['min_ms'] == min(times)
    parameters = sum(p.numel() for p in timm.create_model('test_crossformer').parameters())
    assert row['params_m'] == pytest.approx(parameters / 1e6, abs=1e-4)
    assert row['gflops'] == pytest.approx(2e3 * row['gmacs'] * 2 / 1e3 / (row['median_ms'] / 1e3), rel=.02)
    assert row['gemm_share'] > 0
    assert row['hardware'] and row['torch'] in torch.__version__


@pytest.mark.parametrize('change', [{'threads': 2}, {'dtype': 'bf16'}], ids=['threads', 'dtype'])
def test_cases_that_take_turns_share_threads_and_dtype(change):
    with pytest.raises(ValueError, match='need one device, dtype and number of threads'):
        bench.measure([TINY, replace(TINY, **change)])


@pytest.mark.parametrize('case', [
    replace(TINY, task='features'),
    replace(TINY, task='train'),
    replace(TINY, size='64x96', batch=2),
    replace(TINY, dtype='bf16'),
    replace(TINY, dtype='amp-bf16', task='train'),
], ids=['features', 'train', 'rectangle', 'bf16', 'autocast'])
def test_kinds_of_cases_run(case, small_gemm):
    row, = bench.measure([case], seconds=0, min_rounds=1)
    assert row['median_ms'] > 0


def test_a_training_step_changes_weights():
    case = replace(TINY, task='train')
    model, _ = bench.build_case(case)
    before = model.stem.convs[0].weight.detach().clone()
    bench.prepare(case)()
    assert not torch.equal(before, model.stem.convs[0].weight)


def test_unknown_features_say_what_to_do():
    with pytest.raises(ValueError, match='Leave it out'):
        bench.prepare(replace(TINY, contestant=bench.VIT_PYTORCH, task='features'))


# ---- results are checked


def test_equal_networks_with_equal_weights_pass(monkeypatch, small_gemm):
    monkeypatch.setattr(bench, 'PEER_OF_SAME_NETWORK', {SAME: 'test_crossformer'})
    cases = [Case('test_crossformer'), Case(SAME)]
    assert list(bench.same_networks(cases)) == [(cases[1], cases[0])]
    bench.measure(cases, seconds=0, min_rounds=1)


def test_a_compiled_model_is_the_eager_one():
    eager, compiled = cases = [TINY, replace(TINY, mode='compile')]
    assert list(bench.same_networks(cases)) == [(eager, compiled)]
    assert bench.build_case(compiled)[0] is bench.build_case(eager)[0]


def test_networks_that_should_be_equal_and_are_not_fail(monkeypatch, small_gemm):
    monkeypatch.setattr(bench, 'PEER_OF_SAME_NETWORK', {OTHER: 'test_crossformer'})
    with pytest.raises(WrongResult, match='same network'):
        bench.measure([Case('test_crossformer'), Case(OTHER)], seconds=0, min_rounds=1)


def test_numbers_that_are_not_finite_fail():
    with pytest.raises(WrongResult, match='infinity or NaN'):
        bench.check_outputs([TINY], [[torch.zeros(1), torch.tensor([float('nan')])]])


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore')  # birder's imports
@pytest.mark.parametrize('peer', [bench.BIRDER, bench.VIT_PYTORCH])
def test_peers_are_the_same_networks(peer, small_gemm):
    pytest.importorskip(peer.partition('/')[0])
    ours = bench.PEER_OF_SAME_NETWORK[peer]
    rows = bench.measure([Case(peer), Case(ours)], seconds=0, min_rounds=1)
    assert rows[0]['params_m'] == rows[1]['params_m']
    assert rows[0]['gmacs'] == pytest.approx(rows[1]['gmacs'], rel=.01)


# ---- counting


@pytest.mark.parametrize('name, gmacs', [
    ('crossformer_tiny', 2.858),
    pytest.param('crossformer_pp_small', 4.389, marks=pytest.mark.slow),
])
def test_macs_are_those_of_the_official_counter(name, gmacs):
    assert bench.count_macs(Case(name)) / 1e9 == pytest.approx(gmacs, rel=.03)


@pytest.mark.parametrize('fused', [True, False], ids=['fused', 'explicit'])
def test_macs_hold_attention_whichever_way_it_runs(fused):
    from timm.layers import set_fused_attn, use_fused_attn
    was_fused = use_fused_attn()
    set_fused_attn(fused)
    try:
        bench.prepare(TINY)()
        macs = bench.count_macs(TINY)
    finally:
        set_fused_attn(bool(was_fused))
    dims, tokens, depths = (32, 48, 64, 96), (256, 64, 16, 4), (2, 2, 4, 2)
    attention = sum(2 * n * min(n, 16) * dim * depth for dim, n, depth in zip(dims, tokens, depths, strict=True))
    linear = sum(12 * n * dim ** 2 * depth for dim, n, depth in zip(dims, tokens, depths, strict=True))
    stem = 3 * 256 * (16 * 16 + 8 * 64 + 4 * 256 + 4 * 1024)
    merging = sum(n * a * (b // 2) * (4 + 16) for n, a, b in zip(tokens[1:], dims, dims[1:], strict=False))
    assert macs == pytest.approx(stem + merging + linear + attention + 96 * 10, rel=.001)  # and the head


def test_a_training_step_takes_about_three_forward_passes():
    assert 2.5 < bench.count_macs(replace(TINY, task='train')) / bench.count_macs(TINY) < 3.1


def test_a_model_that_pads_is_counted_on_real_tokens(monkeypatch):
    monkeypatch.setattr(bench, 'PADS_WINDOWS', {'test_crossformer'})
    bench.prepare(Case('test_crossformer'))()
    assert bench.count_macs(Case('test_crossformer', size='56x448')) == bench.count_macs(Case('test_crossformer')) / 2


# ---- files and ratios


def test_runs_are_appended_and_numbered(tmp_path):
    for _ in range(2):
        path = bench.write_rows(tmp_path, 'infer', [row_of(TINY), row_of(replace(TINY, size='96'))])
    assert path.name == 'infer-fp32-9.9-cpu.csv'
    assert [row['run'] for row in bench.read_rows(path)] == ['1', '1', '2', '2']


def test_files_with_other_columns_are_refused(tmp_path):
    path = bench.write_rows(tmp_path, 'infer', [row_of(TINY)])
    path.write_text(path.read_text().replace('gmacs', 'macs', 1))
    with pytest.raises(ValueError, match='other columns'):
        bench.write_rows(tmp_path, 'infer', [row_of(TINY)])


def test_a_ratio_is_the_median_over_rounds_of_the_last_run(tmp_path):
    other = replace(TINY, size='128')
    bench.write_rows(tmp_path, 'infer', [row_of(TINY, '1 1 1'), row_of(other, '9 9 9')])
    bench.write_rows(tmp_path, 'infer', [
        row_of(TINY, '10 30 1', gmacs=2., peak_mib=4.), row_of(other, '20 90 2.5', gmacs=8., peak_mib=12., batch=1)])
    bench.write_rows(tmp_path, 'infer', [row_of(TINY, '5 5 5')])  # no pair, no ratio
    results = Results(tmp_path)
    top, bottom = {'size': '128'}, {'size': '64'}
    assert results.ratio('infer', top, bottom) == 2.5
    assert results.ratio('infer', top, bottom, 'mac') == 2.5 / 4
    assert results.ratio('infer', top, bottom, 'pixel') == 2.5 / 4
    assert results.ratio('infer', top, bottom, 'peak') == 3
    assert results.ratio('infer', top, bottom, 'peak pixel') == 3 / 4
    assert results.ratio('infer', top, bottom, 'gemm') == .5
    assert results.ratio('infer', top, {'size': '32'}) is None
    assert results.ratio('train', top, bottom) is None
    assert [row['run'] for row in results.select('infer')] == ['3', '2']


@pytest.mark.parametrize('share, peak, words', [
    (.5, 10., []),
    (.46, 10.9, []),
    (.4, 10., ['25% slower']),
    (.5, 12., ['20% more memory']),
], ids=['same', 'tolerated', 'slower', 'larger'])
def test_comparison_names_slow_downs_beyond_the_tolerance(tmp_path, share, peak, words):
    path = bench.write_rows(tmp_path, 'infer', [row_of(TINY, peak_mib=10.), row_of(replace(TINY, size='96'))])
    complaints = bench.compare([row_of(TINY, gemm_share=share, peak_mib=peak)], bench.read_rows(path), .1)
    assert len(complaints) == len(words)
    assert all(word in complaint for word, complaint in zip(words, complaints, strict=True))


def test_targets_are_met_or_not_by_their_worst_case(tmp_path):
    cases = [Case(name, size='224', batch=8) for name in ('crossformer_small', bench.BIRDER)]
    target = bench.TARGETS[0]
    for peer_time, met in (('130', True), ('110', False)):
        bench.write_rows(tmp_path, 'infer', [row_of(cases[0], '100'), row_of(cases[1], peer_time)])
        value, words = target.worst(Results(tmp_path), threads=1)
        assert value == float(peer_time) / 100
        assert target.met(value) is met
        assert words == 'crossformer_small'
        assert bench.targets_table(tmp_path)[1][0][2:] == [f'{value:.2f}', '', '', 'yes' if met else 'no']
    assert target.worst(Results(tmp_path), threads=2) is None


@pytest.mark.parametrize('plans', [bench.PLANS, bench.QUICK_PLANS], ids=['full', 'quick'])
def test_plans_measure_all_that_the_targets_compare(plans):
    def has(cases, wanted):
        return any(all(getattr(case, name) == value for name, value in wanted.items()) for case in cases)

    for target in bench.TARGETS:
        if dict(target.where).get('device') == 'cuda':
            continue
        covered = 0
        for _, what, top, bottom, _ in target.ratios:
            covered += any(has(cases, top) and has(cases, bottom) for cases in bench.sets_of(what, plans[what]))
        assert covered == len(target.ratios) or (plans is bench.QUICK_PLANS and covered), target.name


# ---- commands


def test_a_command_prints_writes_and_compares(tmp_path, capsys, small_gemm):
    command = ['--results', str(tmp_path), 'infer', '--models', 'test_crossformer', '--sizes', '32', '--batch', '1',
               '--threads', '1', '--seconds', '0', '--rounds', '2']
    assert bench.main(command) == 0
    assert 'test_crossformer logits 32 px, batch 1, 1 thread' in capsys.readouterr().out
    path, = tmp_path.glob('infer-fp32-*-cpu.csv')
    assert bench.main([*command, '--compare', str(path), '--tolerance', '1000']) == 0
    with path.open() as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        row['gemm_share'] = 1e3
    with path.open('w', newline='') as file:
        writer = csv.DictWriter(file, bench.COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    assert bench.main([*command, '--compare', str(path)]) == 1
    assert 'slower than before' in capsys.readouterr().err
    assert len(bench.read_rows(path)) == 3


@pytest.mark.slow
def test_sizes_have_time_and_peak_memory(tmp_path, small_gemm, capsys):
    command = ['--results', str(tmp_path), 'sizes', '--models', 'test_crossformer', '--sizes', '224', '448',
               '--threads', '1', '--seconds', '0', '--rounds', '1']
    assert bench.main(command) == 0
    small, large = Results(tmp_path).select('sizes')
    assert 1 < float(small['peak_mib']) < float(large['peak_mib']) < 500
    assert float(small['median_ms']) < float(large['median_ms'])
    assert f'{float(large["peak_mib"]) / bench.megapixels(large):.0f}' in capsys.readouterr().out.split()


def test_the_matrix_rate_is_that_of_the_fastest_product(monkeypatch):
    seconds = itertools.chain([2., 2., 2., 1., 3., 3.], itertools.repeat(1.))
    monkeypatch.setattr(bench, 'timed', lambda run, device: (next(seconds), None))
    gemm, macs = bench.prepare_gemm(TINY)
    assert gemm.func is torch.ops.mkldnn._linear_pointwise and macs == bench.GEMM_SIDE['cpu'] ** 3
    gemm, _ = bench.prepare_gemm(replace(TINY, dtype='bf16'))
    assert gemm.func is torch.mm


@pytest.mark.slow
def test_memory_is_measured_in_a_process_of_its_own(tmp_path):
    command = ['--results', str(tmp_path), 'memory', '--models', 'test_crossformer', '--sizes', '224', '448',
               '--threads', '1']
    assert bench.main(command) == 0
    small, large = Results(tmp_path).select('memory')
    assert 1 < float(small['peak_mib']) < float(large['peak_mib']) < 500
    assert Results(tmp_path).ratio('memory', {'size': '448'}, {'size': '224'}, 'peak') > 1


def test_a_process_that_fails_is_an_error(monkeypatch):
    monkeypatch.setattr(bench.sys, 'executable', shutil.which('false'))
    with pytest.raises(WrongResult, match='ended with code'):
        bench.measure_memory([TINY])
