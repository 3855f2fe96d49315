"Search as a shell meets it: killed runs, odd names, and what a terminal or a page gets to see of them."

import json, os, signal, subprocess, sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
ODD = [
    'plain.png',
    'with space é 🏖.png',
    'a\x1b]0;owned\x07.png',
    '<img src=x onerror=alert(1)>.png',
]

# Runs `build_index` in children that kill themselves with SIGKILL at their n-th write.
KILLED = """
import os, signal, sys
from mobileclip_nb.inference.index import build_index

real, folder, out = os.replace, sys.argv[1], sys.argv[2]


def killed_at(n):
    left = [n]

    def replace(*paths):
        left[0] -= 1
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*paths)

    os.replace = replace
    build_index(folder, out, batch=16, device='cpu')
    os._exit(0)


for n in map(int, sys.argv[3:]):
    child = os.fork()
    if not child:
        killed_at(n)
    _, status = os.waitpid(child, 0)
    print(-os.waitstatus_to_exitcode(status), flush=True)
"""


def draw(path, seed):
    "A picture of random pixels"
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def folder(tmp_path):
    "Two hundred pictures in a folder with a space, an accent and an emoji in its name"
    place = tmp_path / 'été à la mer 🏖'
    for i in range(200):
        draw(place / ('sub' if i % 2 else '') / f'{i:03d}.png', i)
    return place


def kill_at(folder, out, *writes):
    "The signals that ended the children"
    words = [sys.executable, '-c', KILLED, str(folder), str(out), *map(str, writes)]
    env = os.environ | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1')
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return [int(line) for line in done.stdout.split()]


def rows_by_name(index):
    "Embeddings of an index, each name once"
    rows = dict(zip((index.line(i).name for i in range(len(index))), np.concatenate(index.parts)))
    assert len(rows) == len(index)
    return rows


@pytest.mark.skipif(sys.platform == 'win32', reason='no fork and no SIGKILL on Windows')
def test_killed_and_resumed(folder, tmp_path):
    "After kill -9 the index holds whole parts of right rows; the next run embeds only the rest"
    from mobileclip_nb.inference.index import build_index
    from mobileclip_nb.inference.search import open_index

    whole = rows_by_name(build_index(folder, tmp_path / 'whole', device='cpu'))
    out = tmp_path / 'index'
    # writes: index.json, then vectors, lines and index.json of each commit
    assert kill_at(folder, out, 0, 2, 5) == [signal.SIGKILL] * 3
    half = open_index(out, device='cpu')
    assert not half.contents.complete
    found = rows_by_name(half)
    assert 0 < len(found) < 200
    assert all(np.allclose(found[name], whole[name], atol=2e-3) for name in found)
    index = build_index(folder, out, device='cpu')
    assert (index.report.unchanged, index.report.embedded) == (len(found), 200 - len(found))
    assert index.contents.complete
    assert rows_by_name(index).keys() == whole.keys()
    assert not [p.name for p in out.iterdir() if '.part' in p.name]


@pytest.mark.skipif(sys.platform == 'win32', reason='no fork and no SIGKILL on Windows')
def test_changes_survive_kills(folder, tmp_path):
    "A changed, a new and a deleted picture are taken in, whichever write a run is killed at"
    from mobileclip_nb.inference.index import build_index
    from mobileclip_nb.inference.search import open_index

    out = tmp_path / 'index'
    old = rows_by_name(build_index(folder, out, device='cpu'))
    draw(folder / '000.png', 900)
    draw(folder / 'new.png', 901)
    (folder / '002.png').unlink()
    assert kill_at(folder, out, 0, 1, 2, 3) == [signal.SIGKILL] * 4
    names = rows_by_name(open_index(out, device='cpu')).keys()
    assert names - {'000.png', '002.png', 'new.png'} == old.keys() - {'000.png', '002.png'}
    index = build_index(folder, out, device='cpu')
    rows = rows_by_name(index)
    assert rows.keys() == old.keys() - {'002.png'} | {'new.png'}
    assert not np.array_equal(rows['000.png'], old['000.png'])
    for seed, name in ((900, '000.png'), (901, 'new.png')):
        draw(tmp_path / 'query.png', seed)
        (hit,) = index.search(image=tmp_path / 'query.png', top=1)
        assert hit.name == name and hit.score > 0.999


@pytest.fixture
def here(tmp_path, monkeypatch, capsys):
    "Commands in this process: status, standard output, standard error"
    from mobileclip_nb.cli.main import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('OMP_WAIT_POLICY', 'PASSIVE')
    before = torch.get_num_threads()

    def call(*words):
        try:
            status = main(words)
        except SystemExit as e:
            status = e.code
        return status, *capsys.readouterr()

    yield call
    torch.set_num_threads(before)


@pytest.mark.skipif(sys.platform == 'win32', reason='names that Windows does not allow')
def test_odd_names(tmp_path, here):
    "Names reach JSON as they are; a terminal gets no control character, a page no element"
    odd = [*ODD, os.fsdecode(b'latin-\xe9.png')]
    for i, name in enumerate(odd):
        draw(tmp_path / 'pics' / name, i)
    status, out, err = here('index', 'pics', '--out', 'idx')
    assert status == 0, err
    assert out.startswith('idx: 5 pictures (5 embedded)')
    assert 'images/s: decode' in err
    status, out, err = here('search', 'idx', '--image', 'pics/plain.png', '--json')
    hits = [json.loads(line) for line in out.splitlines()]
    assert status == 0 and sorted(h['name'] for h in hits) == sorted(odd)
    assert hits[0]['name'] == 'plain.png' and hits[0]['score'] > 0.999
    assert all(Path(h['path']).exists() for h in hits)
    status, out, err = here('search', 'idx', 'a ship', '--sheet', 'out.html')
    assert status == 0 and len(out.splitlines()) == 5
    assert '\x1b' not in out + err and '\x07' not in out + err
    page = (tmp_path / 'out.html').read_text(encoding='utf-8')
    assert page.count('<img') == 5 and '<img src=x' not in page and 'onerror=alert(1)>' not in page
    status, out, _ = here(
        'search', 'idx', 'a ship', '--image', 'pics/plain.png', '--sheet', 'o.png'
    )
    assert status == 0 and Image.open(tmp_path / 'o.png').width > 400


def test_errors_of_search(tmp_path, here):
    "Each is one line with the remedy in the words of a shell, and status 2"
    draw(tmp_path / 'pics' / '0.png', 0)
    assert here('index', 'pics', '--out', 'idx')[0] == 0
    cases = {
        ('search', 'nowhere', 'x'): '`mobileclip index FOLDER --out INDEX`',
        ('search', 'idx'): 'Nothing to search for',
        ('search', 'idx', 'x', '--model', 'teacher_nano_a'): 'built with mobileclip_nano (emoji)',
        ('search', 'idx', 'x', '--sheet', 'pics/0.png'): 'was not made by this command',
        ('search', 'idx', 'x', '--top', '0'): "'0' is not a whole number from 1",
        ('search', 'idx', 'x', '--device', 'cuda:7'): "'cuda:7' is not available here",
        ('index', '--out', 'idx'): 'give a folder or shards',
        ('index', 'pics', '--out', 'pics'): 'which is not of an index',
        ('index', 'gone', '--out', 'i'): "No folder or file 'gone'",
        ('index', 'pics', '--out', 'idx', '--model', 'teacher_nano_a'): 'was built with',
        ('index', 'pics', '--out', 'i', '--device', 'cuda:7'): "'cuda:7' is not available here",
    }
    for words, message in cases.items():
        status, out, err = here(*words)
        assert (status, out) == (2, ''), (words, err)
        assert message in err and 'Traceback' not in err, (words, err)


def test_table_and_shards(folder, tmp_path, here):
    "An index from a table of `embed` equals one from the folder; shards are searched by their keys"
    for place in folder.rglob('*.png'):
        if int(place.stem) >= 20:
            place.unlink()
    (folder / 'captions.csv').write_text(
        'image,caption\n'
        + ''.join(f'{"sub/" if i % 2 else ""}{i:03d}.png,picture {i}\n' for i in range(20)),
        encoding='utf-8',
    )
    place = str(folder)
    assert here('embed', place, '--out', 'e.npz')[0] == 0
    status, out, err = here('index', '--from', 'e.npz', '--out', 'a', '--json')
    assert status == 0 and json.loads(out)['embedded'] == 0, err
    assert here('index', place, '--out', 'b')[0] == 0
    answers = [here('search', name, 'a ship', '--json')[1] for name in 'ab']
    names = [[json.loads(line)['name'] for line in out.splitlines()] for out in answers]
    assert names[0] == names[1] and len(names[0]) == 12
    status, out, err = here('index', place, '--out', 'a', '--json')
    assert status == 0 and json.loads(out)['unchanged'] == 20, err
    assert here('shards', 'build', place, 'plain')[0] == 0
    status, out, err = here('index', 'plain', '--out', 'c', '--json')
    assert status == 0 and json.loads(out)['images'] == 20, err
    hit = json.loads(here('search', 'c', '--image', f'{place}/004.png', '--json')[1].split('\n')[0])
    assert hit['score'] > 0.99 and '.tar/' in hit['name'] and hit['path'] == ''
