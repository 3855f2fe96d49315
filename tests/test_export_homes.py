"""Homes of exports at nano scale: what a notebook cannot hold.

The command line, a home whose own software fails, a page without npm, and the JavaScript of the page against Pillow and the
tokenizer. Homes with whole models of the papers are in `tests/export`.
"""

import base64, json, os, shutil, subprocess, sys
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest

from mobileclip_nb.export import mlx, ultralytics, web
from mobileclip_nb.export.contract import Gap, find_home, list_homes
from mobileclip_nb.export.destinations import Trial, has_node, run_node
from mobileclip_nb.export.open_clip_folder import ARCHITECTURES
from mobileclip_nb.export.write import export_model, read_export
from mobileclip_nb.models.factory import create_model
from mobileclip_nb.models.hub import from_pretrained
from mobileclip_nb.models.zoo import list_models
from mobileclip_nb.preprocessing.transform import Pixels

HOMES = {'transformers.js', 'web', 'immich', 'fastembed', 'ultralytics', 'open_clip', 'hub', 'mlx'}
needs_node = pytest.mark.skipif(not has_node(), reason='needs node')


@pytest.fixture(scope='module')
def nano():
    return create_model('mobileclip_nano', 'emoji')


def test_homes_are_listed():
    homes = list_homes()
    assert HOMES <= set(homes)
    for name in HOMES:
        assert homes[name].about and homes[name].verified
        assert 'both' in homes[name].towers  # the default of the command


def test_command_line(tmp_path):
    "`mobileclip export --to hub`, and the folder is a model"
    env = os.environ | dict(PYTHONPATH=str(Path(__file__).parents[1]), OMP_NUM_THREADS='1')
    command = [
        sys.executable,
        '-m',
        'mobileclip_nb',
        'export',
        'mobileclip_nano',
        '--to',
        'hub',
        'out',
    ]
    done = subprocess.run(
        command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert 'model.safetensors' in done.stdout
    manifest = read_export(tmp_path / 'out')
    assert manifest.weights['source'] == 'emoji'
    assert manifest.parts[0].gap.max_abs <= 1e-6
    assert from_pretrained(tmp_path / 'out').record.name == 'mobileclip_nano'


def test_unknown_home():
    with pytest.raises(KeyError, match="Did you mean 'fastembed'"):
        find_home('fast-embed')


def test_open_clip_architectures_are_models():
    assert set(ARCHITECTURES) <= set(list_models())


def test_a_wrong_answer_is_not_written(nano, tmp_path, monkeypatch):
    "MLX answers something else: an error, and nothing is left"
    wrong = Trial('MLX', Gap(0.5, 0.1, 1.0, 4), None)
    monkeypatch.setattr(mlx, 'try_mlx', lambda model, folder: wrong)
    with pytest.raises(ArithmeticError, match='clip_mlx.py differs from the model'):
        export_model(nano, 'mlx', tmp_path / 'x')
    assert list(tmp_path.iterdir()) == []


def test_software_that_fails_leaves_nothing(nano, tmp_path, monkeypatch):
    "A loader that raises an error"

    def fail(model, folder):
        raise RuntimeError('ultralytics cannot load the file: word')

    monkeypatch.setattr(ultralytics, 'try_ultralytics', fail)
    with pytest.raises(RuntimeError, match='cannot load the file'):
        export_model(nano, 'ultralytics', tmp_path / 'x')
    assert list(tmp_path.iterdir()) == []


def test_page_without_npm(nano, tmp_path, monkeypatch):
    "One line with the remedy, and no folder"
    monkeypatch.setenv('NODE_PATH', '')
    monkeypatch.setenv('PATH', '')
    monkeypatch.setenv('MOBILECLIP_CACHE', str(tmp_path / 'cache'))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match='npm is not installed. Install npm, or unpack'):
        export_model(nano, 'web', tmp_path / 'x')
    assert list(tmp_path.iterdir()) == []


def test_npm_that_fails(tmp_path, monkeypatch):
    "npm without a network: its own reason, and no cache that looks complete"
    script = tmp_path / 'bin' / 'npm'
    script.parent.mkdir()
    script.write_text('#!/bin/sh\necho "npm error network" >&2\nexit 1\n')
    script.chmod(0o755)
    monkeypatch.setenv('NODE_PATH', '')
    monkeypatch.setenv('PATH', f'{script.parent}:/bin:/usr/bin')
    monkeypatch.setenv('MOBILECLIP_CACHE', str(tmp_path / 'cache'))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OSError, match='npm error network'):
        web.find_runtime()
    assert list(tmp_path.rglob('ort*')) == []


@pytest.fixture(scope='module')
def modules(tmp_path_factory):
    "The page's modules without a model"
    at = tmp_path_factory.mktemp('page')
    data = files('mobileclip_nb') / 'data'
    (at / 'tokenizer').mkdir()
    shutil.copyfile(str(data / 'web_clip.mjs'), at / 'clip.mjs')
    shutil.copyfile(str(data / 'clip_tokenizer.mjs'), at / 'tokenizer' / 'clip_tokenizer.mjs')
    return at


def encoded(array):
    data = base64.b64encode(array.tobytes()).decode()
    return dict(width=array.shape[1], height=array.shape[0], data=data)


@needs_node
@pytest.mark.parametrize('side,resize', [(64, 'bilinear'), (96, 'bicubic'), (224, 'bicubic')])
def test_page_resizes_as_pillow(modules, side, resize):
    "Byte by byte, on sizes of photographs and on odd ones"
    rng = np.random.default_rng(side)
    sizes = [(w, h) for w, h in rng.integers(40, 700, size=(12, 2)).tolist()]
    sizes += [(side, side), (side + 1, side), (640, 480), (480, 640), (300, 1)]
    arrays = [rng.integers(256, size=(h, w, 3), dtype=np.uint8) for w, h in sizes]
    request = dict(side=side, filter=resize, images=[encoded(a) for a in arrays])
    squares = run_node('resize_in_node.mjs', [modules], request)
    for size, array, text in zip(sizes, arrays, squares):
        found = np.frombuffer(base64.b64decode(text), np.uint8).reshape(side, side, 3)
        right = Pixels(side=side, resize=resize).square(array)
        assert np.array_equal(found, right), size


def test_page_asks_for_nothing_outside():
    "No address of another host in the page's files"
    for stored in web.PAGE_FILES.values():
        text = (files('mobileclip_nb') / 'data' / stored).read_text(encoding='utf-8')
        text = text.replace('http://www.w3.org/2000/svg', '')  # a name, not an address
        assert '://' not in text, stored


def test_page_labels_every_input():
    "Every field of the page has a label"
    html = (files('mobileclip_nb') / 'data' / 'web_index.html').read_text(encoding='utf-8')
    for name in ('file', 'labels', 'template', 'query', 'more'):
        assert f'id="{name}"' in html
        assert f'for="{name}"' in html
