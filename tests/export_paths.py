"The ways in which a tower leaves Python, each with the largest difference from the eager tower."

import numpy as np
import torch

from mobileclip_nb.blocks.reparam import fold, randomize_

BATCH = torch.export.Dim('batch', min=1, max=64)
OPSET = 20


def gap(found, expected):
    "Largest difference over the largest output; the outputs depend on the inputs"
    assert expected.isfinite().all()
    assert (expected[0] - expected[1]).abs().max() > 1e-3 * expected.abs().max()
    return ((found - expected).abs().max() / expected.abs().max()).item()


def traced(tower, x, more):
    t = torch.jit.trace(tower, x)
    return gap(t(more), tower(more))


def exported(tower, x, more):
    program = torch.export.export(tower, (x,))
    return gap(program.module()(x), tower(x))


def exported_dynamic(tower, x, more):
    program = torch.export.export(tower, (x,), dynamic_shapes=({0: BATCH},))
    return gap(program.module()(more), tower(more))


def run_onnx(tower, x, given, dynamic_shapes=None):
    import onnx, onnxruntime

    program = torch.onnx.export(
        tower, (x,), dynamo=True, verbose=False, opset_version=OPSET, dynamic_shapes=dynamic_shapes
    )
    data = program.model_proto.SerializeToString()
    del program
    assert onnx.load_from_string(data).opset_import[0].version == OPSET
    session = onnxruntime.InferenceSession(data, providers=['CPUExecutionProvider'])
    (found,) = session.run(None, {session.get_inputs()[0].name: given.numpy()})
    return gap(torch.from_numpy(np.asarray(found)), tower(given))


def onnx_static(tower, x, more):
    return run_onnx(tower, x, x)


def onnx_dynamic(tower, x, more):
    return run_onnx(tower, x, more, ({0: BATCH},))


PATHS = [traced, exported, exported_dynamic, onnx_static, onnx_dynamic]


def folded(tower, seed=0):
    "A folded copy in which every weight, statistic and layer scale counts"
    tower = randomize_(tower.eval(), seed)
    if hasattr(tower, 'token'):
        with torch.no_grad():
            tower.token.weight.mul_(tower.spec.width**0.5)  # token embeddings outweigh positions
    return fold(tower)


def inputs(tower, batch=2):
    "A batch for a tower: random pixels, or token sequences of several lengths"
    spec, g = tower.spec, torch.Generator().manual_seed(1)
    if not hasattr(tower, 'token'):
        side = spec.side if hasattr(spec, 'side') else 2 * spec.stride
        return torch.rand(batch, 3, side, side, generator=g)
    from mobileclip_nb.preprocessing.tokenizer import tokenize

    texts = ['a photo of a cat', '', 'two dogs on a beach ' * 20, 'a red heart']
    return tokenize(texts[:batch], spec.context)
