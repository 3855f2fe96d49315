"Fine-tuning with adapters: beside peft's own merge, resumed from a checkpoint, and by the command."

import copy, json, os, subprocess, sys
from pathlib import Path

import pytest, torch

from mobileclip_nb.datasets.emoji import write_folder
from mobileclip_nb.models.factory import create_model
from mobileclip_nb.train.finetune import choose_method, finetune
from mobileclip_nb.train.lora import add_lora, find_adaptable, merge_lora
from mobileclip_nb.train.recipe import recipe
from mobileclip_nb.train.run import RunConfig

ROOT = Path(__file__).resolve().parents[1]
RUN = [sys.executable, '-m', 'mobileclip_nb']


@pytest.fixture(scope='module')
def nano():
    return create_model('mobileclip_nano', 'emoji').eval()


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    at = tmp_path_factory.mktemp('finetune')
    write_folder(at / 'pics', 'train', 'openmoji', limit=20)
    return at


def test_merge_equals_that_of_peft(nano):
    "The merged weights are those that peft's own merge makes of the same adapters"
    peft = pytest.importorskip('peft')
    adapted = add_lora(nano, 4)
    for name, p in adapted.named_parameters():
        if 'lora_B' in name:
            torch.nn.init.normal_(p, std=0.02)
    config = peft.LoraConfig(r=4, lora_alpha=4, target_modules=find_adaptable(nano))
    theirs = peft.LoraModel(copy.deepcopy(nano), config, 'default')
    theirs.model.load_state_dict(adapted.state_dict())
    merged, expected = merge_lora(adapted).state_dict(), theirs.merge_and_unload().state_dict()
    assert list(merged) == list(expected)
    moved = 0
    for name, x in merged.items():
        assert torch.allclose(x.float(), expected[name].float(), atol=1e-6), name
        moved += not torch.equal(x, nano.state_dict()[name])
    assert moved == len(find_adaptable(nano))


def test_adapters_resume(nano, tmp_path):
    "A run with adapters that goes on from a checkpoint ends at the same weights, to the bit"
    pytest.importorskip('peft')
    r = recipe('finetune').at('smoke')
    r = r.but(train=r.train.but(steps=4), stream=r.stream.but(batch=16))
    r = choose_method(r, 'lora', 2)
    config = RunConfig(scale='smoke', progress=False, watch=(), save_every=2)
    whole = finetune(nano, 'emoji-openmoji', tmp_path / 'run', r, config=config)
    (tmp_path / 'run' / 'state.pt').unlink()
    for newest in (tmp_path / 'run').glob('*-00000004.pt'):
        newest.unlink()
    again = finetune(nano, 'emoji-openmoji', tmp_path / 'run', r, config=config, resume=True)
    assert again.fit.run.new == 2
    for name, x in whole.model.state_dict().items():
        assert torch.equal(x, again.model.state_dict()[name]), name
    assert not torch.equal(whole.model.image.head.weight, whole.start.image.head.weight)


def test_method_by_the_command(folder):
    "`--method lora` writes weights without adapters, at `--alpha` of the line; release adds them up"
    pytest.importorskip('peft')
    words = ['finetune', 'mobileclip_nano', 'pics', '--out', 'tuned', '--scale', 'smoke']
    words += ['--method', 'lora', '--rank', '2', '--alpha', '1', '--rate', '100', '--json']
    env = os.environ | dict(
        OMP_NUM_THREADS='1', PYTHONPATH=f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"
    )
    how = dict(cwd=folder, env=env, capture_output=True, text=True, timeout=300)
    done = subprocess.run([*RUN, *words], **how)
    assert done.returncode == 0, done.stderr[-1500:]
    written = create_model(folder / json.loads(done.stdout)['weights'])
    freed = subprocess.run([*RUN, 'release', 'tuned', '--out', 'free.safetensors'], **how)
    assert freed.returncode == 0, freed.stderr[-1500:]
    released = create_model(folder / 'free.safetensors')
    for name, x in written.state_dict().items():
        assert torch.allclose(x.float(), released.state_dict()[name].float(), atol=1e-6), name
    wrong = subprocess.run([*RUN, *words, '--freeze', 'image', '--out', 'other'], **how)
    assert wrong.returncode == 2
    assert '--method and --freeze' in wrong.stderr
