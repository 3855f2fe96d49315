"""Every kind of tower leaves Python: trace, torch.export, and ONNX with a dynamic batch.

Narrow towers, because the graph and not the width decides; `tests/export` does all towers of the zoo at their own width,
and by ONNX with a fixed batch, too.
"""

import gc, json, os, resource, signal, subprocess, sys, time
from pathlib import Path

import pytest, torch

pytest.importorskip('onnxruntime')
import export_paths
from mobileclip_nb.cli.main import main
from mobileclip_nb.export.write import export_model
from mobileclip_nb.models.factory import create_model
from mobileclip_nb.models.mci import MCI, MCi
from mobileclip_nb.models.text_repmixer import text_tower
from mobileclip_nb.models.text_transformer import TextSpec
from mobileclip_nb.models.vit import VIT, ViT
from mobileclip_nb.models.zoo import NANO, build

NARROW = dict(dim=64, depth=2, heads=2)
TEXT = TextSpec(width=64, heads=2, layers=2)
PATHS = [p for p in export_paths.PATHS if p is not export_paths.onnx_static]
TOWERS = {
    'nano image': lambda: build(NANO).image,
    'nano text': lambda: build(NANO).text,
    'mci3': lambda: MCi(MCI['mci3'].but(depths=(1,) * 5, dims=(48, 48, 48, 96, 96)), 32),
    'vit_b16': lambda: ViT(VIT['vit_b16'].but(**NARROW), 32),
    'vit_l14': lambda: ViT(VIT['vit_l14'].but(**NARROW), 32),
    'text': lambda: text_tower(TEXT, 32),
    'causal text': lambda: text_tower(TEXT.but(causal=True), 32),
}


@pytest.mark.parametrize('name', TOWERS)
def test_tower(name):
    "The exported tower agrees with the eager one, on another batch where the batch is dynamic"
    tower = export_paths.folded(TOWERS[name]())
    x, more = export_paths.inputs(tower), export_paths.inputs(tower, 3)
    with torch.no_grad():
        gaps = {path.__name__: path(tower, x, more) for path in PATHS}
    print(name, {k: f'{v:.1e}' for k, v in gaps.items()})
    assert max(gaps.values()) <= 1e-5
    gc.collect()


EXPORT = ('-m', 'mobileclip_nb', 'export', 'mobileclip_nano', '--to', 'torchscript', 'out')


def start(folder, **how):
    "Begin an export of the nano model in a folder"
    root = str(Path(__file__).parents[1])
    env = os.environ | dict(PYTHONPATH=root, OMP_NUM_THREADS='1')
    return subprocess.Popen([sys.executable, *EXPORT], cwd=folder, env=env, text=True, **how)


def test_no_room(tmp_path):
    "A file that may not grow: one line, status 2, and nothing is left"

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))

    process = start(tmp_path, stderr=subprocess.PIPE, preexec_fn=limit)
    _, err = process.communicate(timeout=200)
    assert process.returncode == 2, err[-2000:]
    assert 'no room to write' in err.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def test_killed(tmp_path):
    "A killed export leaves no folder of its name, and the next one writes it"
    process = start(tmp_path, stderr=subprocess.DEVNULL)
    while process.poll() is None and not list(tmp_path.glob('.out.*.part/*')):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    left = [p.name for p in tmp_path.iterdir()]
    assert left and all(name.startswith('.out.') for name in left)  # unfinished, and its lock
    process = start(tmp_path, stdout=subprocess.PIPE)
    out, _ = process.communicate(timeout=200)
    assert process.returncode == 0
    assert 'text.ts' in out
    assert [p.name for p in tmp_path.iterdir()] == ['out']


NANO_EXPORT = ('export', 'mobileclip_nano')


@pytest.mark.parametrize('home', ['onnx', 'torchscript', 'torch.export', 'tokenizer'])
@pytest.mark.parametrize(
    'option, remedy',
    [
        (('--side', '65'), '--side 65 is not divisible by 32; choose 64 or 96'),
        (('--length', '1'), 'reads 2 to 20 tokens'),
        (('--length', '200'), 'reads 2 to 20 tokens'),
    ],
)
def test_sizes_before_the_conversion(tmp_path, home, option, remedy, capsys):
    "A side or length that the model does not read: one line, status 2, for each destination"
    status = main([*NANO_EXPORT, '--to', home, str(tmp_path / 'out'), *option])
    out, err = capsys.readouterr()
    assert (status, out) == (2, '')
    assert remedy in err.splitlines()[-1]
    assert len(err.splitlines()) == 2  # the other line says what is written
    assert list(tmp_path.iterdir()) == []


def test_manifest_of_what_was_written(tmp_path, capsys):
    "Fields that a destination fixes, logit scale and tokenizer are those of the files"
    model = create_model('mobileclip_nano', 'emoji')
    found = {}
    for home in ('immich', 'hub', 'tokenizer'):
        found[home] = export_model(model, home, tmp_path / home)
        text = json.loads((tmp_path / home / 'manifest.json').read_text())
        assert abs(text['logit_scale'] - model.logit_scale.exp().item()) < 1e-3
    inputs = {port.name: port for part in found['immich'].parts for port in part.inputs}
    spec = found['immich'].spec
    assert (spec['batch'], spec['length']) == inputs['text'].shape
    assert spec['ids'] == inputs['text'].dtype
    assert spec['pixels'] == 'normalized'
    for part in ("CLIP's byte-pair encoding", '49406', '49407', 'context 20', '--to tokenizer OUT'):
        assert part in found['immich'].tokenizer
    assert found['hub'].spec == dict(precision='fp32')
    assert found['tokenizer'].spec == {}


def test_wrong_requests_before_work(tmp_path, capsys, monkeypatch):
    "A precision or a model that a destination does not take: before weights, pictures, packages"
    import mobileclip_nb.export.write as write
    from mobileclip_nb.evaluate import exported

    monkeypatch.setattr(exported, 'emoji_benchmark', lambda *a, **k: pytest.fail('drawn'))
    monkeypatch.setattr(write, 'import_optional', lambda *a: pytest.fail('imported'))
    out = str(tmp_path / 'out')
    assert main([*NANO_EXPORT, '--to', 'openvino', out, '--precision', 'int8']) == 2
    (line,) = capsys.readouterr().err.splitlines()  # no line that says what is written
    assert "Did you mean 'int8-weights'?" in line
    assert main([*NANO_EXPORT, '--to', 'fastvlm-app', out]) == 2
    assert 'export mobileclip2_s3' in capsys.readouterr().err.splitlines()[-1]


def test_what_an_export_prints(tmp_path, capsys):
    "Parts with notes within 100 columns; an earlier export is named; accuracy is a sentence"
    out = str(tmp_path / 'out')
    assert main([*NANO_EXPORT, '--to', 'immich', out]) == 0
    text, err = capsys.readouterr()
    assert 'dimension 128' in text  # a note: what to tell immich's server
    assert 'replaces' not in err
    few = ('--precision', 'int8-static', '--pictures', '20')
    assert main([*NANO_EXPORT, '--to', 'onnx', out, *few]) == 0
    text, err = capsys.readouterr()
    assert 'replaces the immich fp32 export of mobileclip_nano' in err
    assert 'points' in text and 'on 20 pictures' in text
    assert '{' not in text and '\u2192' not in text
    assert main(['formats']) == 0
    listed = capsys.readouterr().out
    for word in ('int8-weights', 'image.mlpackage', 'OpenVINO on the CPU'):
        assert word in listed
    assert max(map(len, (text + listed).replace(out, 'out').splitlines())) <= 100


@pytest.mark.parametrize('home, package', [('coreml', 'coremltools'), ('ultralytics', 'torch')])
def test_no_foreign_lines(tmp_path, home, package):
    "Standard error of an export that succeeds is one line"
    pytest.importorskip(package)
    root = str(Path(__file__).parents[1])
    env = os.environ | dict(PYTHONPATH=root, OMP_NUM_THREADS='1')
    words = [*EXPORT[:-2], home, 'out']
    if home == 'ultralytics':
        words[3:4] = ['mobileclip_nano', '--tower', 'text']
    done = subprocess.run(
        [sys.executable, *words], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == f'Writing mobileclip_nano (emoji weights) for {home}\n'


def test_card_of_open_clip(tmp_path, capsys):
    "The card of a folder for open_clip loads it with open_clip, and says that weights are random"
    pytest.importorskip('open_clip')
    first, second = tmp_path / 'random', tmp_path / 'given'
    words = ('export', 'mobileclip2_s0', '--to', 'open_clip')
    assert main([*words, str(first), '--random']) == 0
    (weights,) = first.glob('*.safetensors')
    assert main([*words, str(second), '--weights', str(weights)]) == 0
    for folder in (first, second):
        card = (folder / 'README.md').read_text()
        assert "open_clip.create_model_and_transforms('local-dir:FOLDER')" in card
        assert 'from_pretrained' not in card
        assert ('The weights are random' in card) == (folder == first)
