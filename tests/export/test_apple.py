"""Core ML and Core AI packages of all models of the papers at their own width, with random weights in which every branch counts.

Each different tower once: several models share one, such as the text tower of S1 and S2.
"""

import gc, os

import pytest, torch

pytest.importorskip('coremltools')
from mobileclip_nb.blocks.reparam import randomize_
from mobileclip_nb.export.contract import ExportSpec
from mobileclip_nb.export.coreml_interpreter import describe_package
from mobileclip_nb.export.write import check_export, export_model
from mobileclip_nb.models.zoo import ZOO, build, find_record, image_spec

PUBLISHED = [r for r in ZOO.values() if r.published and r.name != 'mobileclip_nano']
IMAGES = {(image_spec(r), r.embed_dim, r.pixels): r.name for r in reversed(PUBLISHED)}
TEXTS = {(r.text, r.embed_dim): r.name for r in reversed(PUBLISHED)}
TOWERS = [(n, 'image') for n in IMAGES.values()] + [(n, 'text') for n in TEXTS.values()]
SCHEMES = ('int8', 'palettized8', 'palettized6', 'palettized4')


def make(name, tower):
    "A model of which one tower is at its own width; the other is as small as nano's"
    r, nano = find_record(name), find_record('mobileclip_nano')
    r = r.but(text=nano.text) if tower == 'image' else r.but(image=nano.image)
    model = randomize_(build(r, empty=True).eval())
    with torch.no_grad():
        model.text.token.weight.mul_(r.text.width**0.5)  # tokens outweigh positions
    return model


@pytest.mark.parametrize('name,tower', TOWERS)
def test_camera_app(name, tower, tmp_path):
    "The app's contract and cosine for every tower of both papers, in half precision"
    model = make(name, tower)
    spec = ExportSpec(tower=tower, precision='fp16')
    (part, *_) = export_model(model, 'ios-app', tmp_path / 'x', spec).parts
    print(name, tower, part.gap)
    assert part.gap.cosine >= 0.999
    assert not part.gap.is_blind
    info = describe_package(tmp_path / 'x' / part.files[0])
    kind = dict(image='image', text='int32')[tower]
    side = model.record.pixels.side
    shape = dict(image=[1, 3, side, side], text=[1, 77])[tower]
    assert info.inputs == {tower: (kind, shape)}
    assert info.outputs == {'final_emb_1': ('float32', [1, model.record.embed_dim])}
    assert info.not_finite == ()
    assert check_export(tmp_path / 'x') == []
    gc.collect()


COMPRESSED = [('mobileclip_s0', 'image', s) for s in SCHEMES] + [('mobileclip_s0', 'text', 'int8')]
COMPRESSED += [(f'mobileclip_{k}', 'image', 'int8') for k in ('s2', 'b', 's3')]


@pytest.mark.parametrize('name,tower,scheme', COMPRESSED)
def test_compressed(name, tower, scheme, tmp_path):
    "Weights of 8 bits keep the cosine above .998 on random weights; the others are printed"
    model = make(name, tower)
    spec = ExportSpec(tower=tower, precision=scheme, batch=1)
    (part, *_) = export_model(model, 'coreml', tmp_path / 'x', spec).parts
    print(name, tower, scheme, part.gap)
    assert not part.gap.is_blind
    if scheme == 'int8':
        assert part.gap.cosine >= 0.998
    gc.collect()


WIDE = [(f'mobileclip_{k}', 'image') for k in ('s0', 's2', 'b', 's3')]
WIDE += [(f'mobileclip_{k}', 'text') for k in ('s0', 's2')]  # the text tower of B is that of S2


@pytest.mark.parametrize('name,tower', WIDE)
def test_full_precision(name, tower, tmp_path):
    "float32, an open batch of pictures"
    model = make(name, tower)
    (part, *_) = export_model(model, 'coreml', tmp_path / 'x', ExportSpec(tower=tower)).parts
    print(name, tower, part.gap)
    assert part.gap.max_abs <= 1e-4
    assert not part.gap.is_blind
    side, info = model.record.pixels.side, describe_package(tmp_path / 'x' / f'{tower}.mlpackage')
    if tower == 'image':
        assert info.inputs == {'image': ('float32', ['1..32', 3, side, side])}
    gc.collect()


def test_another_side(tmp_path):
    "One package for each resolution"
    model = make('mobileclip_s0', 'image')
    spec = ExportSpec(tower='image', precision='fp16', side=512, pixels='bytes')
    (part, *_) = export_model(model, 'coreml', tmp_path / 'x', spec).parts
    print(part.gap)
    assert part.gap.cosine >= 0.999
    info = describe_package(tmp_path / 'x' / 'image.mlpackage')
    assert info.inputs == {'image': ('image', [1, 3, 512, 512])}


def test_fastvlm(tmp_path):
    "FastVLM's features from MCi3, at 1024 pixels"
    model = make('mobileclip2_s3', 'image')
    (part, *_) = export_model(model, 'fastvlm-app', tmp_path / 'x').parts
    print(part.gap)
    assert part.gap.max_abs <= 1e-4
    assert not part.gap.is_blind
    info = describe_package(tmp_path / 'x' / 'fastvithd.mlpackage')
    assert info.inputs == {'images': ('float32', [1, 3, 1024, 1024])}
    assert info.outputs == {'image_features': ('float32', [1, 256, 3072])}


AI = [(name, tower, precision) for name, tower in WIDE for precision in ('fp32', 'fp16')]
if not os.environ.get('EXPORT_ALL'):  # half-precision attention: many minutes in Core AI on a CPU
    ATTENTION = [(f'mobileclip_{k}', 'image', 'fp16') for k in ('b', 's3')]
    AI = [case for case in AI if case[1:] != ('text', 'fp16') and case not in ATTENTION]


@pytest.mark.parametrize('name,tower,precision', AI)
def test_coreai(name, tower, precision, tmp_path):
    "In Core AI's own runtime"
    pytest.importorskip('coreai_torch')
    model = make(name, tower)
    sizes = dict(batch=1, length=77) if tower == 'text' else dict(batch=1)
    spec = ExportSpec(tower=tower, precision=precision, **sizes)
    (part,) = export_model(model, 'coreai', tmp_path / 'x', spec).parts
    print(name, tower, precision, part.gap)
    assert part.gap.cosine >= 0.999
    assert precision == 'fp16' or part.gap.max_abs <= 1e-4
    assert not part.gap.is_blind
    gc.collect()
