"The README as a new user types it: every block, in order, in one empty folder."

import json, os, re, shlex, subprocess, sys, weakref
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r'(?:<!-- needs: (?P<needs>.*?) -->\n)?```(?P<kind>\w+)\n(?P<text>.*?)```', re.S)
NEEDS = ('make', 'network', 'GPUs', 'browser')


def blocks():
    "Kind, mark and text of every block of code"
    text = (ROOT / 'README.md').read_text(encoding='utf-8')
    return [
        (m['kind'], m['needs'], m['text']) for m in BLOCK.finditer(text) if m['kind'] != 'bibtex'
    ]


def commands(text):
    "The commands of a shell block, each as a list of words"
    lines = text.replace('\\\n', ' ').splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def marked(needs):
    "The one block that bears a mark"
    found = [text for _, mark, text in blocks() if mark == needs]
    assert len(found) == 1, f'{len(found)} blocks are marked as needing {needs}'
    return found[0]


@pytest.fixture
def shell_env(tmp_path):
    "The environment of a shell in which the package is installed and nothing is downloaded"
    bin_ = tmp_path / 'bin'
    bin_.mkdir()
    launcher = f'#!/bin/sh\nexec {sys.executable} -m mobileclip_nb "$@"\n'
    for name, text in (
        ('mobileclip', launcher),
        ('python', f'#!/bin/sh\nexec {sys.executable} "$@"\n'),
    ):
        (bin_ / name).write_text(text)
        (bin_ / name).chmod(0o755)
    path = os.pathsep.join([str(bin_), os.environ['PATH']])
    return os.environ | dict(
        PATH=path, PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1', HF_HUB_OFFLINE='1'
    )


def test_marks():
    "At most five blocks are not run as they stand, and shell lines are readable without scrolling"
    marks = Counter(needs for _, needs, _ in blocks() if needs)
    assert set(marks) <= set(NEEDS)
    assert sum(marks.values()) <= 5
    shell = [line for kind, _, text in blocks() if kind == 'sh' for line in text.splitlines()]
    assert max(map(len, shell)) <= 90


@pytest.mark.timeout(1800)
def test_blocks_run_in_order(tmp_path, shell_env):
    "Every unmarked block succeeds as typed, in one folder that was empty before the first"
    folder = tmp_path / 'empty'
    folder.mkdir()
    for kind, needs, text in blocks():
        if needs:
            continue
        words = ['bash', '-euo', 'pipefail', '-c', text] if kind == 'sh' else ['python', '-c', text]
        done = subprocess.run(words, cwd=folder, env=shell_env, capture_output=True, text=True)
        assert done.returncode == 0, f'{text}\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}'
        assert 'Traceback' not in done.stderr, done.stderr[-3000:]
    made = {str(p.relative_to(folder)) for p in folder.rglob('*')}
    wanted = {
        'picture.png',
        'embeddings.npz',
        'pictures.index/index.json',
        'found.html',
        'sample.png',
        'reinforced.safetensors',
        'runs/mine/model.safetensors',
        'runs/reinforced/state.pt',
        'runs/both/state.pt',
        'exported/onnx/image.onnx',
        'exported/coreml/text.mlpackage',
        'exported/js/config.json',
    }
    assert wanted <= made
    for words in commands(marked('browser')):
        serve(words, folder, shell_env)
    about = json.loads(
        subprocess.run(
            ['mobileclip', 'eval', 'runs/mine/model.safetensors', '--on', 'pictures', '--json'],
            cwd=folder,
            env=shell_env,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    )
    learned, held_out = about['pictures, trained on'], about['pictures, held out']
    assert learned['i2t_r5'] > 3 * learned['chance_i2t_r5'], learned
    assert held_out['i2t_r5'] > held_out['chance_i2t_r5'], held_out


def serve(words, folder, env):
    "A command that serves a page says its address, and ends by a signal"
    how = dict(cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    with subprocess.Popen(words, **how) as server:
        said = []
        for line in server.stdout:
            said.append(line)
            if 'http://127.0.0.1:' in line:
                server.terminate()
                break
        assert server.wait(60) is not None
        assert 'http://127.0.0.1:' in said[-1], ''.join(said)


def test_make_block():
    "The targets of `make` exist, and each would run the package's own command"
    for words in commands(marked('make')):
        assert words[0] == 'make'
        done = subprocess.run([*words, '-n'], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert '.venv/bin/' in done.stdout


def test_network_block(tmp_path, shell_env):
    "The published name is resolved to its repository, and the weights found there are used"
    from mobileclip_nb.models.weights import save_weights
    from mobileclip_nb.models.factory import create_model
    from mobileclip_nb.datasets.emoji import draw_emoji

    (words,) = commands(marked('network'))
    name = words[words.index('--model') + 1]
    model = create_model(name, None)
    (repo,) = (place.removeprefix('hf-hub:') for place in model.record.weights.values())
    folder = tmp_path / 'hub' / 'hub' / ('models--' + repo.replace('/', '--'))
    (folder / 'refs').mkdir(parents=True)
    (folder / 'refs' / 'main').write_text('0' * 40)
    at = folder / 'snapshots' / ('0' * 40)
    at.mkdir(parents=True)
    save_weights(model, at / 'open_clip_model.safetensors', 'open_clip', torch.float16)
    picture, labels = words[2], words[words.index('--labels') + 1].split(',')
    Image.fromarray(draw_emoji('🚞', side=128)).save(tmp_path / picture)
    env = shell_env | dict(HF_HOME=str(tmp_path / 'hub'))
    done = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert all(label in done.stdout for label in labels)
    absent = subprocess.run(
        words,
        cwd=tmp_path,
        env=shell_env | dict(HF_HOME=str(tmp_path / 'none')),
        capture_output=True,
        text=True,
    )
    assert absent.returncode == 2
    assert repo in absent.stderr


def torchrun_words():
    "What stands before the module in the line for several GPUs, and what stands after it"
    (words,) = commands(marked('GPUs'))
    at = words.index('mobileclip_nb.train')
    assert words[0] == 'torchrun'
    return words[1:at], words[at + 1 :]


def published_run(more=()):
    "The recipe of the line for several GPUs, and the number of these"
    from mobileclip_nb.train.__main__ import words
    from mobileclip_nb.train.options import recipe_of

    start, rest = torchrun_words()
    return recipe_of(words().parse_args([*rest, *more])), int(
        start[start.index('--nproc_per_node') + 1]
    )


def test_gpu_block_runs_small(tmp_path):
    "The line for several GPUs on two processes, with published shards made here and a short run"
    from test_recipes import write_published

    shards = write_published(tmp_path / 'DFNDR-2B')
    start, rest = torchrun_words()
    at = start.index('--nproc_per_node')
    start[at + 1] = '2'
    small = [
        '--scale',
        'smoke',
        '--steps',
        '1',
        '--set',
        'stream.batch=8',
        '--set',
        'train.accumulate=2',
    ]
    line = [
        sys.executable,
        '-m',
        'torch.distributed.run',
        '--standalone',
        *start,
        'mobileclip_nb.train',
        *rest,
        *small,
        '--data',
        str(shards),
        '--device',
        'cpu',
        '--quiet',
    ]
    env = os.environ | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1')
    done = subprocess.run(line, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert 'ranks 2' in done.stdout
    assert (tmp_path / 'runs' / 's0' / 'state.pt').exists()


class LiveBytes(TorchDispatchMode):
    "Counts the bytes of the tensors that are alive"

    def __init__(self):
        super().__init__()
        self.held, self.now, self.peak = {}, 0, 0

    def drop(self, key, size):
        "Forget a storage that is gone"
        if self.held.pop(key, None) is not None:
            self.now -= size

    def add(self, tensor):
        "Count a storage once"
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self.held:
            return
        self.held[key] = size
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self.drop, key, size)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor):
                self.add(t)
        return out


def step_bytes(r, pairs, parts, world):
    "Peak bytes of one step of one rank, with `pairs` pairs in `parts` parts, by fake tensors"
    from mobileclip_nb.loaders.batches import Batch
    from mobileclip_nb.train.optim import make_optimizer
    from mobileclip_nb.train import step
    from mobileclip_nb.train.recipe import record_of
    from mobileclip_nb.models.zoo import build
    from torch.testing._internal.distributed.fake_pg import FakeStore

    rec, spec = record_of(r), r.train.but(accumulate=parts)
    width = sum(spec.loss.widths)
    dist.init_process_group('fake', rank=0, world_size=world, store=FakeStore())
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), LiveBytes() as live:
            model = build(rec).train()
            opt = make_optimizer(model, spec)
            empty = Batch(*[None] * len(Batch._fields))
            teachers = {k: torch.zeros(pairs, width) for k in ('image_emb', 'text_emb', 'syn_emb')}
            tokens = {
                k: torch.zeros(pairs, rec.context_length, dtype=torch.int64)
                for k in ('text', 'syn')
            }
            image = torch.zeros(pairs, 3, rec.pixels.side, rec.pixels.side)
            batch = empty._replace(image=image, **tokens, **teachers)
            sizes = [t.nbytes for t in batch if t is not None]
            step.step(model, batch, opt, spec)
    finally:
        dist.destroy_process_group()
    return live.peak, sum(sizes)


def test_gpu_block_fits(monkeypatch):
    "What the README says of memory: computed, and below what such a GPU has"
    from mobileclip_nb.train import step

    monkeypatch.setattr(torch.nn.init, 'trunc_normal_', lambda x, *a, **k: x)  # fake
    monkeypatch.setattr(step, 'clamp_scale', lambda *a: None)
    r, world = published_run()
    pairs, parts = r.stream.batch // world, r.train.accumulate
    part = pairs // parts
    assert (pairs, part) == (8192, 256)
    one_part, _ = step_bytes(r, pairs, 1, world)
    two_parts, batch = step_bytes(r, 2 * part, 2, r.stream.batch // (2 * part))
    waiting = batch // (2 * part) * (pairs - 2 * part)  # the rest of the batch
    fits = (two_parts + waiting) / 1e9
    text = (ROOT / 'README.md').read_text(encoding='utf-8')
    assert f'about {fits:.0f} GB on each GPU' in text
    assert f'about {one_part / 1e9:,.0f} GB' in text
    assert fits < 80
