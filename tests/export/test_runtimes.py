"Models of the papers at their own width in OpenVINO, LiteRT, ExecuTorch and in 8 bits, with random weights."

import gc, os

import pytest, torch

from mobileclip_nb.blocks.reparam import randomize_
from mobileclip_nb.export.contract import ExportSpec
from mobileclip_nb.export.write import check_export, export_model
from mobileclip_nb.models.zoo import ZOO, build, find_record

MODELS = [
    ('mobileclip_s0', 'both'),
    ('mobileclip_s2', 'both'),
    ('mobileclip_b', 'both'),
    ('mobileclip_s3', 'image'),
]
EVERY = bool(os.environ.get('EXPORT_ALL'))  # the slow cases too: EXPORT_ALL=1 make test-export
SLOW = {('litert', 'mobileclip_s2'), ('litert', 'mobileclip_s3')}  # in half precision
SLOW |= {('executorch', 'mobileclip_s2'), ('executorch', 'mobileclip_s3')}
PACKAGES = dict(openvino='openvino', litert='litert_torch', executorch='executorch', onnx='onnx')
BOTH = [name for name, tower in MODELS if tower == 'both']
KINDS = {(r.image, r.text, r.embed_dim, r.pixels): r.name for r in reversed(ZOO.values())}
OTHERS = [name for name in KINDS.values() if name not in BOTH and name.startswith('mobileclip')]
OTHERS = sorted(name for name in OTHERS if 'nano' not in name)


def random_model(name):
    "Random weights in which every branch counts"
    model = randomize_(build(find_record(name), empty=True).eval())
    with torch.no_grad():
        model.text.token.weight.mul_(model.record.text.width**0.5)  # tokens outweigh positions
    return model


@pytest.fixture(scope='module', params=MODELS, ids=[name for name, _ in MODELS])
def model(request):
    name, tower = request.param
    yield random_model(name), tower
    gc.collect()


def export(model, home, folder, **fields):
    pytest.importorskip(PACKAGES[home])
    model, tower = model
    manifest = export_model(model, home, folder / 'x', ExportSpec(tower=tower, **fields))
    for part in manifest.parts:
        print(home, fields, part.name, part.gap)
        assert not part.gap.is_blind
    assert check_export(folder / 'x') == []
    return manifest.parts


@pytest.mark.parametrize('home', ['openvino', 'litert', 'executorch'])
def test_parity(model, home, tmp_path):
    for part in export(model, home, tmp_path):
        assert part.gap.max_abs <= 1e-4


@pytest.mark.parametrize('home', ['openvino', 'litert', 'executorch'])
def test_half_precision(model, home, tmp_path):
    if (home, model[0].record.name) in SLOW and not EVERY:
        pytest.skip('slow; EXPORT_ALL=1 make test-export runs it')
    for part in export(model, home, tmp_path, precision='fp16'):
        assert part.gap.cosine >= 0.999


@pytest.mark.parametrize('home', ['onnx', 'openvino'])
def test_weights_of_eight_bits(model, home, tmp_path):
    if home == 'openvino':
        pytest.importorskip('nncf')
    for part in export(model, home, tmp_path, precision='int8-weights'):
        assert part.gap.cosine >= 0.998
        assert part.measured['layers']['by_layer']


@pytest.mark.parametrize('name', OTHERS)
def test_other_models_convert(name, tmp_path):
    for part in export((random_model(name), 'both'), 'openvino', tmp_path):
        assert part.gap.max_abs <= 1e-4
    gc.collect()
