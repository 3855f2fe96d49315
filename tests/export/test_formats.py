"Whole exports of models of the papers at their own width, with random weights in which every branch counts."

import gc, shutil

import pytest, torch

from mobileclip_nb.blocks.reparam import randomize_
from mobileclip_nb.export.contract import ExportSpec
from mobileclip_nb.export.write import check_export, export_model
from mobileclip_nb.models.factory import create_model
from mobileclip_nb.models.zoo import build, find_record

MODELS = [
    ('mobileclip_s0', 'both'),
    ('mobileclip_s2', 'both'),
    ('mobileclip_b', 'both'),
    ('mobileclip_s3', 'image'),
]
HOMES = ('torchscript', 'torch.export', 'onnx')


@pytest.fixture(scope='module', params=MODELS, ids=[name for name, _ in MODELS])
def model(request):
    name, tower = request.param
    model = randomize_(build(find_record(name), empty=True).eval())
    with torch.no_grad():
        model.text.token.weight.mul_(model.record.text.width**0.5)  # tokens outweigh positions
    yield model, tower
    gc.collect()


@pytest.mark.parametrize('home', HOMES)
def test_parity(model, home, tmp_path):
    model, tower = model
    manifest = export_model(model, home, tmp_path / 'x', ExportSpec(tower=tower))
    for part in manifest.parts:
        print(home, part.name, part.gap)
        assert part.gap.max_abs <= 1e-4
        assert not part.gap.is_blind
    assert check_export(tmp_path / 'x') == []


def test_half_precision(model, tmp_path):
    model, tower = model
    spec = ExportSpec(tower=tower, precision='fp16')
    for part in export_model(model, 'onnx', tmp_path / 'x', spec).parts:
        print('onnx fp16', part.name, part.gap)
        assert part.gap.cosine >= 0.999
        assert not part.gap.is_blind


@pytest.mark.skipif(not (shutil.which('g++') or shutil.which('clang++')), reason='needs a compiler')
def test_aotinductor(tmp_path):
    nano = create_model('mobileclip_nano', 'emoji')
    for part in export_model(nano, 'aotinductor', tmp_path / 'x').parts:
        print('aotinductor', part.name, part.gap)
        assert part.gap.max_abs <= 1e-4
