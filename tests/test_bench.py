"""Costs against stored numbers, the structure of a measurement, and errors of the commands. No test depends on a clock.

Each number of `FACTS` was counted on the original implementations (apple/ml-mobileclip, open_clip) with PyTorch's counter and
plain attention: millions of parameters and 10⁹ multiply-accumulates of the image encoder in training form, 10⁹ MACs folded, then both of
the text encoder.
"""

import json, sys

import pytest

from mobileclip_nb.bench.cost import count_cost, count_towers, group_layers, meta_input, meta_tower
from mobileclip_nb.cli.main import main
from mobileclip_nb.models.zoo import find_record

FACTS = {
    'mobileclip_s0': (11.407, 2.393, 2.385, 42.441, 1.318),
    'mobileclip_s2': (35.815, 7.846, 7.834, 63.428, 2.980),
    'mobileclip_b': (86.349, 17.708, 17.708, 63.428, 2.980),
    'mobileclip2_s3': (125.236, 14.821, 14.812, 123.650, 6.650),
}


@pytest.mark.parametrize('name', FACTS)
def test_cost(name):
    "Parameters and MACs are those counted on the original implementations, in every stored digit"
    record = find_record(name)
    image, macs, folded, text, text_macs = FACTS[name]
    training = count_cost(meta_tower(record, 'image', False), meta_input(record, 'image'))
    assert training.params / 1e6 == pytest.approx(image, abs=0.00051)
    assert training.macs / 1e9 == pytest.approx(macs, abs=0.00051)
    words = count_cost(meta_tower(record, 'text', False), meta_input(record, 'text'))
    assert words.params / 1e6 == pytest.approx(text, abs=0.00051)
    assert words.macs / 1e9 == pytest.approx(text_macs, abs=0.00051)
    after = count_cost(meta_tower(record, 'image'), meta_input(record, 'image'))
    assert after.macs / 1e9 == pytest.approx(folded, abs=0.00051)
    assert sum(g.macs for g in group_layers(after, 2)) == after.macs


def test_attention_is_counted():
    "A transformer has more MACs than its weights have numbers times tokens"
    record = find_record('mobileclip2_s0')
    tower = meta_tower(record, 'text')
    cost = count_cost(tower, meta_input(record, 'text'))
    width, tokens, layers = record.text.width, record.context_length, record.text.layers
    products = 2 * tokens * tokens * width * layers
    matrices = 12 * width * width * tokens * layers
    assert cost.macs == products + matrices + width * record.embed_dim


def test_cost_grows_with_the_batch():
    "MACs are proportional to rows; parameters are not"
    one, four = (count_towers(find_record('mobileclip_nano'), batch=n) for n in (1, 4))
    for tower in one:
        assert four[tower].macs == 4 * one[tower].macs
        assert four[tower].params == one[tower].params


def test_measured_record(tmp_path, capsys):
    "One run writes a whole record: every variant in every round, with machine and versions"
    out = tmp_path / 'record.json'
    words = ['mobileclip_nano', '--tower', 'text', '--runtime', 'eager,folded', '--rounds', '2']
    assert main(['bench', 'latency', *words, '--out', str(out), '--json']) == 0
    printed = capsys.readouterr()
    record = json.loads(out.read_text())
    (group,) = record['groups']
    assert [row['runtime'] for row in group['rows']] == ['eager', 'folded']
    for row in group['rows']:
        assert len(row['samples']) == 2
        assert row['cosine'] > 0.9999
        assert row['ms_min'] <= row['ms_p50']
        assert row['threads'] == 1
    assert record['host']['cores'] >= 1 and 'torch' in record['packages']
    assert record['timing']['rounds'] == 2
    assert [m['threads'] for m in record['rooflines']] == [1]
    assert json.loads(printed.out)['timing'] == record['timing']
    assert 'round' in printed.err or 'opening' in printed.err
    assert [p.name for p in tmp_path.iterdir()] == ['record.json']


LATENCY = ('bench', 'latency', 'mobileclip_nano')
ERRORS = {
    'runtime': ((*LATENCY, '--runtime', 'onxx'), "Did you mean 'onnx'? Known: eager, folded"),
    'peer': ((*LATENCY, '--against', 'tim'), "Did you mean 'timm'? Known: open_clip, timm"),
    'model': (('bench', 'latency', 'mobileclip_nanno'), "Did you mean 'mobileclip_nano'?"),
    'tower': ((*LATENCY, '--tower', 'sound'), 'Known: image, text'),
    'side': (('bench', 'latency', 'mobileclip_b', '--side', '256'), 'reads one size only'),
    'score': (('bench', 'frontier', '--accuracy', 'imagnet'), "Did you mean 'imagenet'?"),
    'record': (('bench', 'frontier', '--record', 'absent.json'), 'absent.json'),
    'ledger': (('bench', 'frontier', '--ledger', 'l.jsonl'), 'give --record'),
}


@pytest.mark.parametrize('name', ERRORS)
def test_error(name, capsys):
    "A wrong word: status 2 and one line that names it and the known ones"
    words, message = ERRORS[name]
    assert main(list(words)) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and message in lines[0], lines


def test_missing_package(monkeypatch, capsys):
    "A runtime whose package is absent names the extra, before anything is measured"
    monkeypatch.setitem(sys.modules, 'onnxruntime', None)
    assert main([*LATENCY, '--runtime', 'folded,onnx']) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert 'onnxruntime' in line and "pip install 'mobileclip_nb[export]'" in line


def test_frontier(tmp_path, capsys):
    "Published points: one device, one score; the plot is a PNG"
    assert main(['bench', 'frontier', '--accuracy', 'imagenet', '--json']) == 0
    points = json.loads(capsys.readouterr().out)
    assert len({p['device'] for p in points}) == len({p['measure'] for p in points}) == 1
    assert {'MobileCLIP2-S0', 'MobileCLIP2-S4', 'OpenAI-B/16'} <= {p['name'] for p in points}
    assert (
        main(['bench', 'frontier', '--paper', 'MobileCLIP', '--png', str(tmp_path / 'f.png')]) == 0
    )
    assert (tmp_path / 'f.png').read_bytes().startswith(b'\x89PNG')


def test_a_failing_variant_leaves_no_process():
    "An error in a process arrives with the variant's name, and all processes are gone"
    import multiprocessing

    from mobileclip_nb.bench.protocol import TimingSpec, time_variants
    from mobileclip_nb.bench.runtimes import BenchVariant

    nano = BenchVariant('mobileclip_nano')
    with pytest.raises(RuntimeError, match='timm, folded: ValueError: timm has no image encoder'):
        time_variants([nano, nano.but(source='timm')], TimingSpec(rounds=1, warmup=0))
    assert multiprocessing.active_children() == []
