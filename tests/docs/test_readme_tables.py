"""benchmarks/docs/readme.py and plot.py: the READMEs say what the committed result files hold."""
import itertools
import json
import re

import cases
import pytest
import readme
import rows
import targets


@pytest.fixture(scope='module')
def made_up(tmp_path_factory):
    """Results of every case the bench would run, with times that follow from their place."""
    folder = tmp_path_factory.mktemp('results')
    pace = itertools.cycle((1., 1.1, .9, 1.3))
    for what, plans in cases.PLANS.items():
        for some in [some for plan in plans for some in plan.sets()]:
            lines = []
            for case in some:
                height, width = case.pixels
                gmacs = height * width / 1e4
                times = [case.batch * gmacs * next(pace) for _ in range(3)]
                lines.append({
                    **vars(case), 'params_m': 30.6574, 'gmacs': gmacs, 'rounds': 3, 'median_ms': sorted(times)[1],
                    'min_ms': min(times), 'gflops': 50., 'gemm_gflops': 80., 'gemm_share': .625,
                    'peak_mib': height * width / 1e3, 'times_ms': ' '.join(map(str, times)),
                    'hardware': 'an abacus', 'torch': '9.9', 'timm': '1',
                })
            rows.write(folder, what, lines)
    (folder / 'roofline.csv').write_text(
        'model,size,batch,dtype,kind,launches,gflops,mib,A100_ms_estimate\n'
        'crossformer_small,224,1,bf16,GELU,12,1.5,20,0.5\ncrossformer_small,224,1,bf16,norms,8,1,20,0.25\n'
        'crossformer_small,224,1,fp32,norms,8,1,20,0.25\n')
    (folder / 'cost.csv').write_text('part,seconds,command,hardware\ninfer,90,all,an abacus\ntrain,30,all,an abacus\n')
    (folder / 'train').mkdir()
    (folder / 'train' / 'peers.csv').write_text(
        'model,parameters,mmacs,data,train_images,epochs,img_size,seed,accuracy,cpu_seconds_per_epoch\n'
        'Swin,600000,6.4,dots,9,4,32,0,42,7\nSwin,600000,6.4,dots,9,4,32,1,40,8\nViT,620000,44.7,dots,9,4,32,0,39,41\n')
    (folder / 'operators.csv').write_text(
        'contestant,task,size,batch,threads,linear layers,total,hardware,torch,timm\n'
        'vit_pytorch/CrossFormer,logits,224,8,2,70,80,an abacus,9.9,1\n')
    (folder / 'variants.csv').write_text('variant,size,params_m,gmacs\ncrossformer_tiny,224,27.7768,2.8574\n')
    return folder


def test_committed_tables_are_those_of_the_committed_results():
    assert readme.main(['--check']) == 0, 'Run `python benchmarks/docs/readme.py`.'


def test_scripts_that_are_named_are_there():
    files = [
        *readme.FILES, *readme.ROOT.glob('benchmarks/*/*.py'), *readme.ROOT.glob('benchmarks/results/train/*/*.txt'),
        *(readme.ROOT / name for name in ('Makefile', 'pyproject.toml', 'weights/manifest.json'))]
    named = {name for path in files for name in re.findall(r'benchmarks/[\w/]+\.py', path.read_text(encoding='utf-8'))}
    assert len(named) >= 9
    assert [name for name in sorted(named) if not (readme.ROOT / name).is_file()] == []


@pytest.mark.parametrize('name', sorted(
    set(readme.TABLES) - {'cost', 'csv_file', 'needs', 'versions', 'weight_families', 'weights'}))
def test_tables_without_results_name_the_command(tmp_path, name):
    text = readme.TABLES[name](tmp_path)
    script = {'operators': 'speed/operators', 'peers': 'training/peers', 'roofline': 'speed/roofline'}.get(
        name, 'speed/bench')
    assert ('not measured' if name == 'targets' else f'Not measured yet: `python benchmarks/{script}.py') in text


@pytest.mark.parametrize('name, holds', [
    ('variants', '| `crossformer_tiny` | 27.8 | 2.86 | 224 |'),
    ('speed', '| fp32, 224 px (an abacus, torch 9.9) | params (M) | GMACs | img/s, 1 thread, batch 1 |'),
    ('choice', '| `crossformer_tiny` | 27.8 | 2.9 | 81.5 |'),
    ('ratios', '| crossformer_lucidrains | vit-pytorch CrossFormer | inference, batch 8 |'),
    ('sizes', '| crossformer_small region |'),
    ('memory', '| crossformer_small map | 262 | 1075 | 1049 | 4194 |'),
    ('compiled', '| crossformer_small | 224 | 1 | 2 |'),
    ('deployed', '| crossformer_small, 224 px, batch 8 |'),
    ('targets', '| yes |'),
    ('operators', '| vit-pytorch CrossFormer | inference, 224 px, batch 8 | 2 | 70 | 80 |'),
    ('roofline', '| crossformer_small | 224 | 1 | 20 | 2 | 40 | 0.75 |'),
    ('peers', '| Swin | 600000 | 6.4 | 2 | 41.0 | 40.0 to 42.0 | 7.5 |'),
])
def test_tables_hold_the_results(made_up, name, holds):
    text = readme.TABLES[name](made_up)
    assert holds in text
    lines = text.splitlines()
    assert len({line.count('|') for line in lines}) == 1


def test_five_networks_stand_in_lines(made_up):
    rates, forms, exported, times, peaks, same, last = readme.speed_lines(made_up).splitlines()
    names = ['crossformer_tiny', 'crossformer_small', 'crossformer_pp_small', 'swin_tiny', 'convnext_tiny']
    for line in (rates, exported, times, peaks):
        assert re.findall(r'[a-z]\w+(?= [\d.]+[,;.])', line.partition(': ')[2]) == names
    assert rates.startswith('- Images per second at 224 px, batch 8: crossformer_tiny ')
    assert re.findall(r'[a-z]\w+(?= [\d.]+[,;.])', forms.partition(': ')[2]) == names[1:3]
    assert peaks.endswith(': ' + ', '.join(f'{name} 1075' for name in names).replace(', swin', '; swin') + '.')
    assert re.search(r'batch 8: crossformer_small against birder crossformer_s \d\.\d\d×, crossformer_lucidrains', same)
    assert last == '- All in fp32, by 2 threads, on an abacus, torch 9.9.'


def test_lines_are_those_of_the_last_machine_alone(tmp_path):
    for hardware, ms in (('an abacus', 2.), ('a slide rule', 4.)):
        rows.write(tmp_path, 'infer', [
            {**vars(cases.Case('crossformer_small', batch=8)), 'hardware': hardware, 'times_ms': str(ms),
             'median_ms': ms, 'torch': '9.9', 'gmacs': 1}])
    assert readme.speed_lines(tmp_path).splitlines() == [
        '- Images per second at 224 px, batch 8: crossformer_small 2000.0.',
        '- All in fp32, by 1 thread, on a slide rule, torch 9.9.']


def test_sizes_of_a_network_share_a_row(tmp_path):
    records = [
        {'tag': f'a_{size}.in1k', 'sources': [{'kind': kind}], 'metrics': [
            {'name': 'top-1', 'value': value, 'dataset': 'ImageNet', 'source': 'log'} for value in values]}
        for size, kind, values in (('tiny', 'drive', [81.5]), ('large', 'drive', [84.0]), ('huge', 'hub', []))]
    (tmp_path / 'weights').mkdir()
    (tmp_path / 'weights' / 'manifest.json').write_text(json.dumps({'weights': records}))
    assert readme.weight_families(tmp_path, tmp_path).splitlines()[2:] == [
        '| `a_{tiny,large}.in1k` | ImageNet | 81.5, 84.0 top-1 | Google Drive |',
        '| `a_huge.in1k` |  |  | Hugging Face Hub |']


def test_each_processor_has_its_ratios(tmp_path):
    for hardware, seconds in (('an abacus', '3'), ('a slide rule', '2')):
        rows.write(tmp_path, 'infer', [
            {**vars(cases.Case(name, batch=8)), 'hardware': hardware, 'times_ms': times, 'torch': '9.9', 'gmacs': 1}
            for name, times in (('crossformer_small', '1'), (cases.BIRDER, seconds))])
    body = readme.ratios(tmp_path).splitlines()[2:]
    assert [line.split(' | ')[3:] for line in body] == [['2.00×', 'a slide rule |'], ['3.00×', 'an abacus |']]


def test_a_run_says_what_it_cost(made_up):
    assert readme.cost(made_up) == 'The last run of `all` took 2 minutes on an abacus: infer 1.5, train 0.5.\n'


def test_fit_groups_have_a_table_of_their_own(made_up):
    assert '| crossformer_pp_small region fit_groups |' in readme.TABLES['sizes'](made_up, 'fit')
    assert 'fit_groups' not in readme.TABLES['sizes'](made_up)


def test_every_target_of_the_cpu_is_measured_by_the_bench(made_up):
    table = targets.table(made_up)
    assert list(table['target'][table['met'] == 'not measured']) == [n for n in table['target'] if 'CUDA' in n]


def test_accuracy_comes_from_the_manifest(made_up, tmp_path):
    (tmp_path / 'weights').mkdir()
    (tmp_path / 'weights' / 'manifest.json').write_text(
        '{"weights": [{"tag": "crossformer_tiny.in1k", "license": "MIT", "metrics": ['
        '{"name": "top-1", "value": 81.5, "dataset": "ImageNet-1k validation", "source": "paper"}, '
        '{"name": "top-5", "value": 99, "dataset": "CIFAR-10", "source": "log"}]}]}')
    assert '| 81.5 (paper); 99 top-5 on CIFAR-10 (log) | MIT |' in readme.variants(made_up, tmp_path)


def test_weights_come_from_the_manifest(tmp_path):
    (tmp_path / 'weights').mkdir()
    (tmp_path / 'weights' / 'manifest.json').write_text(
        '{"weights": [{"tag": "a.b", "license": "MIT", "sources": [{"kind": "drive"}, {"kind": "browser"}], '
        '"metrics": ['
        '{"name": "box AP", "value": 45.4, "dataset": "COCO", "source": "log"}, '
        '{"name": "mask AP", "value": 41.4, "dataset": "COCO", "source": "log"}]}]}')
    row = readme.weights(tmp_path, tmp_path).splitlines()[2]
    assert row == '| `a.b` | 45.4 box AP, 41.4 mask AP (log) | COCO | Google Drive, Baidu by hand | MIT |'


def test_backbones_are_no_classifiers_in_the_table_of_variants(made_up, tmp_path):
    (tmp_path / 'weights').mkdir()
    (tmp_path / 'weights' / 'manifest.json').write_text(
        '{"weights": [{"tag": "crossformer_tiny.x", "license": "MIT", "dense": true, "metrics": ['
        '{"name": "mIoU", "value": 46.4, "dataset": "ADE20K", "source": "log"}]}]}')
    assert 'mIoU' not in readme.variants(made_up, tmp_path)


def test_a_csv_file_is_shown_whole_or_by_column(tmp_path):
    (tmp_path / 'train').mkdir()
    (tmp_path / 'train' / 'a.csv').write_text('model,accuracy\nx,90.5\n')
    whole, column = (f'<!-- table: csv_file train/a.csv{name} -->\n<!-- /table -->\n' for name in ('', ' accuracy'))
    filled = readme.fill(whole + column, tmp_path)
    assert '| model | accuracy |\n| --- | ---: |\n| x | 90.5 |\n' in filled
    assert '\n| accuracy |\n| ---: |\n| 90.5 |\n' in filled


def test_a_stale_file_is_found_left_alone_and_then_written(tmp_path, made_up, capsys):
    path = tmp_path / 'README.md'
    path.write_text('before\n<!-- table: variants -->\nold\n<!-- /table -->\nafter\n')
    command = ['--results', str(made_up), str(path)]
    assert readme.main([*command, '--check']) == 1
    assert 'old' in path.read_text()
    assert readme.main(command) == 0
    text = path.read_text()
    assert text.startswith('before\n<!-- table: variants -->\n| variant |')
    assert text.endswith('<!-- /table -->\nafter\n')
    assert readme.main([*command, '--check']) == 0


@pytest.mark.parametrize('text, words', [
    ('<!-- table: spede -->\n<!-- /table -->', 'A table is one of'),
    ('<!-- table: speed -->\n', 'needs a `<!-- /table -->`'),
], ids=['unknown', 'open'])
def test_mistakes_in_a_readme_are_named(tmp_path, text, words):
    with pytest.raises(ValueError, match=words):
        readme.fill(text, tmp_path)


def test_plots_are_the_same_for_the_same_results(made_up, tmp_path):
    pytest.importorskip('matplotlib')
    import plot
    for folder in ('a', 'b'):
        assert plot.main(['--results', str(made_up), '--plots', str(tmp_path / folder)]) == 0
    for name in plot.PLOTTERS:
        first, second = ((tmp_path / folder / f'{name}.svg').read_text() for folder in ('a', 'b'))
        assert first == second
        assert 'crossformer_small' in first and ('stimate' if name == 'roofline' else 'an abacus') in first


def test_plots_without_results_say_what_to_run(tmp_path, capsys):
    pytest.importorskip('matplotlib')
    import plot
    assert plot.main(['--results', str(tmp_path), '--plots', str(tmp_path)]) == 1
    assert 'bench.py all' in capsys.readouterr().err
