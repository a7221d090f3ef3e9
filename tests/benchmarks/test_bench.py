"""benchmarks/: what is measured, counted, checked, written, and estimated."""
import itertools
import shutil
from dataclasses import replace

import bench
import cases
import measuring
import operators
import pandas as pd
import pytest
import roofline
import rows
import targets
import timm
import torch
from cases import Case
from common import fakes_cuda
from measuring import WrongResult

TINY = Case('test_crossformer', size='64')
# The network is the same whatever groups the constructor's arguments make; at 224 px `region` makes other groups.
SAME, OTHER = 'test_crossformer group_size=4', 'test_crossformer lda_grouping=region'


@pytest.fixture(autouse=True)
def _tidy():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    cases.build.cache_clear()


@pytest.fixture
def small_gemm(monkeypatch):
    monkeypatch.setitem(measuring.GEMM_SIDE, 'cpu', 64)


def row_of(case, times='1 2 3', **values):
    fields = dict(gmacs=1., gemm_share=.5, rounds=3, median_ms=2., min_ms=1., times_ms=times, torch='9.9', timm='1')
    return {**vars(case), **fields, **values}


# ---- measuring


def test_contestants_take_turns_after_a_product_and_the_first_call_is_dropped(monkeypatch, small_gemm):
    calls = []
    monkeypatch.setattr(measuring, 'prepare', lambda case: lambda: calls.append(case.size) or torch.zeros(1))
    monkeypatch.setattr(measuring, 'prepare_gemm', lambda case: (lambda: calls.append('gemm'), 1.))
    monkeypatch.setattr(measuring, 'count_macs', lambda case: len(measuring.prepare(case)()))
    found = measuring.measure([TINY, replace(TINY, size='96')], seconds=0, min_rounds=2)
    assert calls == ['64', '96', 'gemm', *['gemm', '64', '96'] * 2]
    assert [row['rounds'] for row in found] == [2, 2]


def test_a_row_says_what_was_measured(small_gemm):
    row, = measuring.measure([replace(TINY, batch=2)], seconds=0, min_rounds=3)
    times = [float(t) for t in row['times_ms'].split()]
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
        measuring.measure([TINY, replace(TINY, **change)])


@pytest.mark.parametrize('case', [
    replace(TINY, task='features'),
    replace(TINY, task='train'),
    replace(TINY, size='64x96', batch=2),
    replace(TINY, dtype='bf16'),
    replace(TINY, dtype='amp-bf16', task='train'),
], ids=['features', 'train', 'rectangle', 'bf16', 'autocast'])
def test_kinds_of_cases_run(case, small_gemm):
    row, = measuring.measure([case], seconds=0, min_rounds=1)
    assert row['median_ms'] > 0


def test_a_training_step_changes_weights():
    case = replace(TINY, task='train')
    model, _ = cases.build_case(case)
    before = model.stem.convs[0].weight.detach().clone()
    cases.prepare(case)()
    assert not torch.equal(before, model.stem.convs[0].weight)


def test_unknown_features_say_what_to_do():
    with pytest.raises(ValueError, match='Leave it out'):
        cases.prepare(replace(TINY, contestant=cases.VIT_PYTORCH, task='features'))


# ---- results are checked


def test_equal_networks_with_equal_weights_pass(monkeypatch, small_gemm):
    monkeypatch.setattr(cases, 'PEER_OF_SAME_NETWORK', {SAME: 'test_crossformer'})
    ours, same = pair = [Case('test_crossformer'), Case(SAME)]
    assert list(cases.same_networks(pair)) == [(same, ours)]
    measuring.measure(pair, seconds=0, min_rounds=1)


def test_a_compiled_model_is_the_eager_one():
    eager, compiled = pair = [TINY, replace(TINY, mode='compile')]
    assert list(cases.same_networks(pair)) == [(eager, compiled)]
    assert cases.build_case(compiled)[0] is cases.build_case(eager)[0]


@pytest.mark.filterwarnings('ignore')  # what exporters and runtimes say
def test_exported_models_are_the_eager_one(small_gemm):
    pytest.importorskip('onnxruntime')
    some = [replace(TINY, mode=mode, size='64') for mode in ('eager', *cases.RUNTIMES)]
    assert [ours.mode for _, ours in cases.same_networks(some)] == list(cases.RUNTIMES)
    found = measuring.measure(some, seconds=0, min_rounds=1)
    assert len({row['median_ms'] for row in found}) == len(some)
    assert len({row['gmacs'] for row in found}) == 1


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore')
def test_exported_peers_are_the_eager_ones(small_gemm):
    pytest.importorskip('onnxruntime')
    case = Case('test_convnext', size='64', threads=1)
    measuring.measure([case, replace(case, mode='onnxruntime')], seconds=0, min_rounds=1)


def test_the_inference_form_has_the_weights_of_the_plain_network(monkeypatch, small_gemm):
    monkeypatch.setattr(cases, 'PEER_OF_SAME_NETWORK', {SAME: 'test_crossformer'})
    some = [Case('test_crossformer'), Case('test_crossformer' + cases.FORM), Case(SAME)]
    assert len(list(cases.same_networks(some))) == 2
    with torch.no_grad():
        cases.build_case(some[2])[0].head.fc.bias.add_(1.)
    measuring.measure(some, seconds=0, min_rounds=1)


def test_networks_that_should_be_equal_and_are_not_fail(monkeypatch, small_gemm):
    monkeypatch.setattr(cases, 'PEER_OF_SAME_NETWORK', {OTHER: 'test_crossformer'})
    with pytest.raises(WrongResult, match='same network'):
        measuring.measure([Case('test_crossformer'), Case(OTHER)], seconds=0, min_rounds=1)


def test_numbers_that_are_not_finite_fail():
    with pytest.raises(WrongResult, match='infinity or NaN'):
        measuring.check_outputs([TINY], [[torch.zeros(1), torch.tensor([float('nan')])]])


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore')  # birder's imports
@pytest.mark.parametrize('peer', [cases.BIRDER, cases.VIT_PYTORCH])
def test_peers_are_the_same_networks(peer, small_gemm):
    pytest.importorskip(peer.partition('/')[0])
    ours = cases.PEER_OF_SAME_NETWORK[peer]
    theirs, mine = measuring.measure([Case(peer), Case(ours)], seconds=0, min_rounds=1)
    assert theirs['params_m'] == mine['params_m']
    assert theirs['gmacs'] == pytest.approx(mine['gmacs'], rel=.01)


# ---- counting


@pytest.mark.parametrize('fused', [True, False], ids=['fused', 'explicit'])
def test_macs_hold_attention_whichever_way_it_runs(fused):
    from timm.layers import set_fused_attn, use_fused_attn
    was_fused = use_fused_attn()
    set_fused_attn(fused)
    try:
        macs = cases.count_macs(TINY)
    finally:
        set_fused_attn(bool(was_fused))
    dims, tokens, depths = (32, 48, 64, 96), (256, 64, 16, 4), (2, 2, 4, 2)
    attention = sum(2 * n * min(n, 16) * dim * depth for dim, n, depth in zip(dims, tokens, depths, strict=True))
    linear = sum(12 * n * dim ** 2 * depth for dim, n, depth in zip(dims, tokens, depths, strict=True))
    stem = 3 * 256 * (16 * 16 + 8 * 64 + 4 * 256 + 4 * 1024)
    merging = sum(n * a * (b // 2) * (4 + 16) for n, a, b in zip(tokens[1:], dims, dims[1:], strict=False))
    assert macs == pytest.approx(stem + merging + linear + attention + 96 * 10, rel=.001)  # and the head


def test_a_training_step_takes_about_three_forward_passes():
    assert 2.5 < cases.count_macs(replace(TINY, task='train')) / cases.count_macs(TINY) < 3.1


def test_a_model_that_pads_is_counted_on_real_tokens(monkeypatch):
    monkeypatch.setattr(cases, 'PADS_WINDOWS', {'test_crossformer'})
    cases.prepare(Case('test_crossformer'))()
    assert cases.count_macs(Case('test_crossformer', size='56x448')) == cases.count_macs(Case('test_crossformer')) / 2


# ---- files and ratios


def test_runs_are_appended_and_numbered(tmp_path):
    for _ in range(2):
        path = rows.write(tmp_path, 'infer', [row_of(TINY), row_of(replace(TINY, size='96'))])
    assert path.name == 'infer-fp32-9.9-cpu.csv'
    assert list(rows.read_file(path)['run']) == [1, 1, 2, 2]
    assert list(rows.read(tmp_path, 'infer')['times'][3]) == [1, 2, 3]


def test_files_with_other_columns_are_refused(tmp_path):
    path = rows.write(tmp_path, 'infer', [row_of(TINY)])
    path.write_text(path.read_text().replace('gmacs', 'macs', 1))
    with pytest.raises(ValueError, match='Move it away'):
        rows.write(tmp_path, 'infer', [row_of(TINY)])


def test_ratios_are_of_the_last_run_that_has_both(tmp_path):
    other = replace(TINY, size='96', batch=2)
    rows.write(tmp_path, 'infer', [row_of(TINY, '1 1 1'), row_of(other, '1 1 1')])
    rows.write(tmp_path, 'infer', [row_of(TINY, '2 4 9'), row_of(other, '1 1 3', gmacs=3., peak_mib=8.)])
    rows.write(tmp_path, 'infer', [row_of(TINY, '7 7 7', gemm_share=.4)])
    measured = rows.read(tmp_path, 'infer')
    top, bottom = {'size': '64'}, {'size': '96'}
    assert rows.ratio(measured, top, bottom) == 3  # the median of 2, 4 and 3
    assert rows.ratio(measured, top, bottom, per='macs') == 3 * 6 / 1
    assert rows.ratio(measured, top, bottom, per='megapixels') == pytest.approx(3 * 2 * 96 ** 2 / 64 ** 2)
    assert rows.ratio(measured, top, bottom, 'rounds') == 1
    assert rows.ratio(measured, top, {'size': '32'}) is None
    assert rows.ratio(rows.read(tmp_path, 'train'), top, bottom) is None
    assert list(rows.latest(measured)['run']) == [2, 3]


def test_targets_are_met_or_not_by_their_worst_case(tmp_path):
    pair = [Case(name) for name in (cases.SMALL + cases.FORM, cases.BIRDER)]
    target = targets.TARGETS[0]
    for peer_time, met in (('130', True), ('110', False)):
        rows.write(tmp_path, 'infer', [row_of(pair[0], '100'), row_of(pair[1], peer_time)])
        value, words = target.worst(rows.read(tmp_path, 'infer'), threads=1)
        assert value == float(peer_time) / 100
        assert target.met(value) is met
        assert words == cases.SMALL + cases.FORM
        line = targets.table(tmp_path).iloc[0]
        assert list(line[2:]) == [f'{value:.2f}', '', '', 'yes' if met else 'no']
    assert target.worst(rows.read(tmp_path, 'infer'), threads=2) is None


def test_plans_measure_all_that_the_targets_compare():
    def has(some, wanted):
        return any(all(getattr(case, name) == value for name, value in wanted.items()) for case in some)

    for target in targets.TARGETS:
        sets = [some for plan in cases.PLANS[target.what] for some in plan.sets()]
        for words, top, bottom in target.ratios if target.device == 'cpu' else ():
            assert any(has(some, top) and has(some, bottom or top) for some in sets), (target.name, words)


# ---- commands


@pytest.fixture
def small_plans(monkeypatch, small_gemm):
    plan = cases.Plan(['test_crossformer'], ['32'], threads=(1,))
    monkeypatch.setattr(bench, 'PLANS', {what: [plan] for what in bench.PARTS})


def test_a_command_prints_and_writes(tmp_path, capsys, small_gemm):
    command = ['--results', str(tmp_path), 'infer', '--models', 'test_crossformer', '--sizes', '32', '--batch', '1',
               '--threads', '1', '--seconds', '0', '--rounds', '2']
    assert bench.main(command) == 0
    assert 'test_crossformer logits eager   32' in capsys.readouterr().out
    row, = rows.read(tmp_path, 'infer').itertuples()
    assert (row.contestant, row.size, row.rounds, len(row.times)) == ('test_crossformer', '32', 2, 2)


@fakes_cuda
def test_all_runs_every_part_and_says_what_it_cost(tmp_path, monkeypatch, small_plans, capsys):
    monkeypatch.setattr(bench, 'measure_memory', lambda case: row_of(case, '', peak_mib=7., hardware='an abacus'))
    monkeypatch.setattr(bench.timm, 'list_models', lambda module: ['test_crossformer'])
    monkeypatch.setattr(operators, 'SETS', [[TINY]])
    monkeypatch.setattr(roofline, 'MODELS', ['test_crossformer'])
    assert bench.main(['--results', str(tmp_path), 'all', '--quick', '--seconds', '0', '--rounds', '1']) == 0
    cost = pd.read_csv(tmp_path / 'cost.csv')
    assert list(cost['part']) == [*bench.PARTS, 'operators', 'variants', 'roofline']
    assert set(cost['command']) == {'all --quick'}
    written = {path.name.partition('-')[0].partition('.')[0] for path in tmp_path.glob('*.csv')}
    assert written == {*cost['part'], 'cost'}


def test_the_matrix_rate_is_that_of_the_fastest_product(monkeypatch):
    seconds = itertools.chain([2., 2., 2., 1., 3., 3.], itertools.repeat(1.))
    monkeypatch.setattr(measuring, 'timed', lambda run, device: (next(seconds), None))
    gemm, macs = measuring.prepare_gemm(TINY)
    assert gemm.func is torch.ops.mkldnn._linear_pointwise and macs == measuring.GEMM_SIDE['cpu'] ** 3
    gemm, _ = measuring.prepare_gemm(replace(TINY, dtype='bf16'))
    assert gemm.func is torch.mm


@pytest.mark.slow
def test_memory_is_measured_in_a_process_of_its_own(tmp_path):
    command = ['--results', str(tmp_path), 'memory', '--models', 'test_crossformer', '--sizes', '224', '448',
               '--threads', '1']
    assert bench.main(command) == 0
    measured = rows.read(tmp_path, 'memory')
    assert 1 < measured['peak_mib'][0] < measured['peak_mib'][1] < 500
    assert rows.ratio(measured, {'size': '448'}, {'size': '224'}, 'peak_mib') > 1


def test_a_process_that_fails_is_an_error(monkeypatch):
    monkeypatch.setattr(measuring.sys, 'executable', shutil.which('false'))
    with pytest.raises(WrongResult, match='ended with code'):
        measuring.measure_memory(TINY)


# ---- where time goes


def test_products_inside_the_operator_are_attention():
    inside = ['timm_crossformer::grouped_attention']
    assert operators.kind_of('aten::mm') == 'linear layers'
    assert operators.kind_of('aten::mm', inside) == operators.kind_of('aten::flip', inside) == 'attention'
    assert operators.kind_of('aten::copy_', inside) == 'copies'
    assert operators.kind_of('timm_crossformer::grouped_attention') == 'attention'
    line, = operators.measure([TINY], rounds=1)
    assert line['contestant'] == 'test_crossformer'
    assert 0 < line['attention'] + line['linear layers'] <= line['total']


@fakes_cuda
def test_the_roofline_counts_what_a_card_would_run():
    found = roofline.count('crossformer_small' + cases.FORM, '224', 1, 'bf16')
    assert found['flops'].sum() / 2e9 == pytest.approx(4.91, rel=.03)
    kinds = found.groupby('kind').sum()
    assert kinds['launches']['attention'] == 12  # blocks
    assert kinds['launches']['linear layers'] == 48 + 1  # head
    assert kinds['launches']['norms'] == 24 + 1 + 3 + 2  # blocks, stem, between stages, norm and mean before the head
    assert 120 < found['launches'].sum() < 165
    plain = roofline.count('crossformer_small', '224', 1, 'bf16')['launches'].sum()
    assert plain > found['launches'].sum() + 12 * 10  # the MLPs of position biases
    weights = 2 * 30.66e6
    assert weights < found['bytes'].sum() < 4 * weights
    swin = roofline.count(cases.SWIN, '224', 1, 'bf16').groupby('kind').sum()
    assert swin['launches']['attention'] == 12 * 3  # timm's Swin: two products and a softmax in each block


def test_an_estimate_is_by_the_slowest_of_three(tmp_path, monkeypatch):
    operators = pd.DataFrame({
        'kind': 'GELU', 'flops': [312e9, 0, 0], 'bytes': [1024, 2039e6, 0], 'launches': [1, 1, 1]})
    assert list(roofline.estimate(operators, 'A100', 'bf16').idxmax(axis=1)) == ['computing', 'moving', 'launching']
    monkeypatch.setattr(roofline, 'count', lambda *case: operators)
    roofline.write(tmp_path, ['crossformer_small'], ['bf16'])
    first = pd.read_csv(tmp_path / 'roofline.csv').iloc[0]
    assert first['A100_ms_estimate'] == pytest.approx(1 + 1 + 1e3 * roofline.LAUNCH)
    assert (first['kind'], first['launches'], first['gflops']) == ('GELU', 3, 312)
