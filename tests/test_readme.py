"The README as a new user types it: every block, in order, in one empty folder."

import json, os, re, shlex, subprocess, sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode

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


def fitted_run(limit=80.0):
    "The recipe of the line for several GPUs, its ranks, and how each carries out a step"
    from mobileclip_nb.models.zoo import build
    from mobileclip_nb.train.fit import fit_model
    from mobileclip_nb.train.recipe import record_of

    r, world = published_run()
    model, synthetic = build(record_of(r), empty=True), bool(r.reader.synthetic)
    return (
        r,
        world,
        model,
        fit_model(model, r.train, r.stream.batch // world, world, synthetic, limit),
    )


def test_gpu_block_fits():
    "What the README says of memory: computed, and a real step of eight simulated ranks holds it"
    from mobileclip_nb.train import step
    from mobileclip_nb.train.fit import with_fit
    from mobileclip_nb.train.memory import checkpoint_activations
    from mobileclip_nb.train.optim import make_optimizer
    from mobileclip_nb.train.step_memory import (
        LiveBytes,
        empty_batch,
        hollow_copy,
        measure_state,
        simulate_ranks,
    )

    r, world, model, fitted = fitted_run()
    spec, pairs = with_fit(r.train, fitted.fit), r.stream.batch // world
    assert (pairs, world) == (8192, 8)
    assert fitted.memory.total < 0.9 * 80e9
    live, mode = LiveBytes(), FakeTensorMode()
    with mode, simulate_ranks(world), torch.random.fork_rng():
        twin = hollow_copy(model, spec)
        opt = make_optimizer(twin, spec)
        batch = empty_batch(model.record, pairs, spec.loss.widths, True)
        with checkpoint_activations(twin, spec.checkpointing), live:
            for t in [*twin.parameters(), *twin.buffers(), *(t for t in batch if t is not None)]:
                live.add(t)
            step.step(twin, batch, opt, spec)
    one, held = measure_state(model, spec), fitted.memory
    extra = held.parameters + held.buffers + held.gradients - one.parameters - one.buffers
    waiting = held.batches - sum(t.nbytes for t in batch if t is not None)
    estimate = held.total - (extra - one.gradients) - waiting  # one rank, without DDP's copies
    later = one.gradients + one.optimizer  # counted at every moment, made in the first step
    assert -0.01 * estimate < estimate - sum(live.peak) < later + 0.01 * estimate
    text = (ROOT / 'README.md').read_text(encoding='utf-8')
    assert f'about {held.total / 1e9:.0f} GB' in text
    assert f'{fitted.fit.parts} parts' in text


def test_gpu_block_on_eight_ranks(tmp_path):
    "The line for several GPUs on eight processes with the smallest towers, and little memory"
    from test_recipes import write_published

    shards = write_published(tmp_path / 'DFNDR-2B')
    start, rest = torchrun_words()
    small = '--scale smoke --steps 1 --memory 0.06 --set model=mobileclip_nano'
    small += ' --set stream.batch=64 --device cpu --quiet --workers 0'
    line = [sys.executable, '-m', 'torch.distributed.run', '--standalone', *start]
    line += ['mobileclip_nb.train', *rest, *small.split(), '--data', str(shards)]
    env = os.environ | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1')
    done = subprocess.run(line, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert 'ranks 8' in done.stdout
    assert 'memory of a step on each of 8 ranks' in done.stderr
    chosen = json.loads((tmp_path / 'runs' / 's0' / 'memory.json').read_text())
    assert chosen['limit'] == 0.06
    assert chosen['fit']['checkpointing']
    assert sum(chosen['memory'].values()) < 0.9 * 0.06e9
