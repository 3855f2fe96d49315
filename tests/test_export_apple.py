"""Core ML and Core AI: what a phone gets, computed on Linux.

The trained nano model and S0's image tower; `tests/export/test_apple.py` has the other models of both papers.
"""

import io, platform, runpy, subprocess, sys, types
from contextlib import redirect_stdout

import numpy as np
import pytest, torch

pytest.importorskip('coremltools')
from mobileclip_nb.blocks.reparam import randomize_
from mobileclip_nb.cli.main import main
from mobileclip_nb.export import coreml_interpreter as interpreter
from mobileclip_nb.export.contract import ExportSpec
from mobileclip_nb.export.coreml_interpreter import describe_package, load_program, run_program
from mobileclip_nb.export.write import check_export, export_model, read_export
from mobileclip_nb.models.factory import create_model
from mobileclip_nb.models.text_transformer import TextSpec
from mobileclip_nb.models.zoo import NANO, build, find_record

TEXT = TextSpec(width=64, heads=2, layers=1, causal=True, context=20)
APP = ('export', 'mobileclip_nano', '--to', 'ios-app', '--precision', 'fp16')


@pytest.fixture(scope='module')
def app(tmp_path_factory):
    "The nano model in the camera app's form, written by the command line"
    out, said = tmp_path_factory.mktemp('app') / 'out', io.StringIO()
    with redirect_stdout(said):
        assert main([*APP, str(out)]) == 0
    assert 'mobileclip_nano_image.mlpackage' in said.getvalue()
    return out


def test_camera_app(app):
    "Names, types and shapes of the app; gaps in the manifest; nothing else in the folder"
    manifest = read_export(app)
    image, text = (describe_package(app / p.files[0]) for p in manifest.parts[:2])
    assert image.inputs == {'image': ('image', [1, 3, 64, 64])}
    assert text.inputs == {'text': ('int32', [1, 77])}
    assert image.outputs == text.outputs == {'final_emb_1': ('float32', [1, 128])}
    assert [p.gap.cosine >= 0.999 for p in manifest.parts[:2]] == [True, True]
    assert not any(p.gap.is_blind for p in manifest.parts[:2])
    assert check_export(app) == []


class StandIn:
    "What the script uses of `coremltools.models.MLModel`, computed by the interpreter"

    def __init__(self, path, compute_units):
        self.program = load_program(path)

    def get_spec(self):
        return self.program.spec

    def predict(self, given):
        arrays = {}
        for name, value in given.items():
            x = np.asarray(value)
            arrays[name] = x if name == 'text' else x.transpose(2, 0, 1)[None]
        return run_program(self.program, arrays, half=True)


def call_script(folder, monkeypatch, *options):
    "Run `check_on_mac.py` as on a Mac, with a stand-in for coremltools"
    stand_in = types.ModuleType('coremltools')
    stand_in.models = types.SimpleNamespace(MLModel=StandIn)
    stand_in.ComputeUnit = types.SimpleNamespace(CPU_ONLY=0, ALL=1)
    monkeypatch.setattr(platform, 'system', lambda: 'Darwin')
    monkeypatch.setattr(sys, 'argv', ['check_on_mac.py', *options])
    script = runpy.run_path(str(folder / 'check_on_mac.py'))
    import coremltools

    with monkeypatch.context() as patch:
        patch.setattr(interpreter, 'import_coremltools', lambda: coremltools)
        patch.setitem(sys.modules, 'coremltools', stand_in)
        script['main']()


def test_script_for_a_mac(app, monkeypatch, capsys):
    "The script compares what the packages give with the stored outputs, and fails beyond a limit"
    options = ('--units', 'CPU_ONLY', '--rounds', '1')
    call_script(app, monkeypatch, *options)
    lines = [
        s.split() for s in capsys.readouterr().out.splitlines() if '_image' in s or '_text' in s
    ]
    assert [s[0] for s in lines] == ['mobileclip_nano_image', 'mobileclip_nano_text']
    assert all(float(s[3]) >= 0.999 for s in lines)
    with pytest.raises(SystemExit, match='2 of 2 failed'):
        call_script(app, monkeypatch, *options, '--least', '1.1')


def test_script_elsewhere(app):
    "Off macOS the script says so"
    command = [sys.executable, str(app / 'check_on_mac.py')]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, '')
    assert 'Core ML runs on macOS only' in done.stderr


def test_s0_image(tmp_path):
    "A tower of the papers, with random weights in which every branch counts"
    model = randomize_(build(find_record('mobileclip_s0'), empty=True).eval())
    spec = ExportSpec(tower='image', precision='fp16')
    (part, *_) = export_model(model, 'ios-app', tmp_path / 'x', spec).parts
    print(part.gap)
    assert part.gap.cosine >= 0.999
    assert not part.gap.is_blind
    info = describe_package(tmp_path / 'x' / 'mobileclip_s0_image.mlpackage')
    assert info.inputs == {'image': ('image', [1, 3, 256, 256])}
    assert info.not_finite == ()


def test_causal_tower(tmp_path):
    "int32 ids, open rows, finite constants, float32 outputs: half precision with a causal mask"
    model = randomize_(build(NANO.but(text=TEXT), empty=True).eval())
    spec = ExportSpec(tower='text', precision='fp16')
    (part, *_) = export_model(model, 'coreml', tmp_path / 'x', spec).parts
    info = describe_package(tmp_path / 'x' / 'text.mlpackage')
    assert info.inputs == {'text': ('int32', ['1|8|32', 20])}
    assert info.outputs['text_embedding'][0] == 'float32'
    assert info.not_finite == ()
    assert part.gap.cosine >= 0.999
    with pytest.raises(ValueError, match=r"shape \[3, 20\]; the program takes \['1|8|32', 20\]"):
        program = load_program(tmp_path / 'x' / 'text.mlpackage')
        run_program(program, {'text': np.zeros((3, 20), np.int32)})


@pytest.mark.parametrize('home', ['coreml', 'ios-app', 'coreai'])
def test_overflow(home, tmp_path):
    "Numbers beyond half precision: an error that names the layer, and nothing is written"
    if home == 'coreai':
        pytest.importorskip('coreai_torch')
    model = create_model('mobileclip_nano', 'emoji')
    with torch.no_grad():
        model.text.blocks[1].mlp.fc2.weight.mul_(1e6)
    with pytest.raises(ArithmeticError, match='blocks.1.mlp.fc2 reaches'):
        export_model(model, home, tmp_path / 'x', ExportSpec(tower='text', precision='fp16'))
    assert list(tmp_path.iterdir()) == []


def test_coreai(tmp_path):
    "An asset in Core AI's own runtime: float32, open rows and length"
    pytest.importorskip('coreai_torch')
    model = create_model('mobileclip_nano', 'emoji')
    (part,) = export_model(model, 'coreai', tmp_path / 'x', ExportSpec(tower='text')).parts
    assert part.gap.max_abs <= 1e-5
    assert not part.gap.is_blind
    assert (part.inputs[0].dtype, part.inputs[0].shape) == ('int32', ('batch', 'length'))
