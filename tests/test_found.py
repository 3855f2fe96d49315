"What users met when they tried the library as a stranger would: each fault as it was, and that it is gone."

import ast, json, os, re, signal, subprocess, sys, time
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from PIL import Image

import design, links, notebook_server

RUN = [sys.executable, '-c', 'from mobileclip_nb.cli.main import main; raise SystemExit(main())']
ENV = os.environ | dict(OMP_NUM_THREADS='1')
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def here(tmp_path, monkeypatch, capsys):
    "Commands in this process, in an empty folder: status, standard output, standard error"
    from mobileclip_nb.cli.main import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('OMP_WAIT_POLICY', 'PASSIVE')
    before = torch.get_num_threads()

    def call(*words):
        try:
            status = main([str(word) for word in words])
        except SystemExit as e:
            status = e.code
        return status, *capsys.readouterr()

    yield call
    torch.set_num_threads(before)


@pytest.fixture
def pics(tmp_path):
    "Twelve plain pictures with captions in a list"
    colors = dict(red=(220, 30, 30), green=(20, 180, 40), blue=(30, 60, 220))
    folder = tmp_path / 'pics'
    folder.mkdir()
    names = [f'{name}{i}' for name in colors for i in range(4)]
    for name in names:
        side = 48 + int(name[-1])
        Image.new('RGB', (side, 48), colors[name[:-1]]).save(folder / f'{name}.png')
    lines = [f'{name}.png,a {name[:-1]} square' for name in names]
    (folder / 'captions.csv').write_text('\n'.join(['image,caption', *lines]), encoding='utf-8')
    return folder


@pytest.fixture
def read_only(monkeypatch):
    "Every existing folder below `locked` cannot be written to, though this may be root"
    real = os.access

    def access(path, mode, **how):
        return 'locked' not in str(path) and real(path, mode, **how)

    monkeypatch.setattr(os, 'access', access)


@pytest.fixture
def full_disk(monkeypatch):
    "Files larger than 100 kB cannot be written, as on a full disk"
    resource = pytest.importorskip('resource')
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, before)


def is_one_line(err):
    "Whether standard error ends in one line of an error, without a traceback and `[Errno ...]`"
    return 'Traceback' not in err and '[Errno' not in err


def test_too_many_pixels(here, pics):
    "The error of a large picture recommends what every caller can do"
    Image.new('1', (20_000, 5_001)).save(pics / 'large.png')
    status, out, err = here('predict', pics / 'large.png', '--labels', 'red,blue')
    assert (status, out) == (2, '') and 'make a smaller copy' in err and 'max_pixels' not in err


def test_same_status_for_nothing(here, pics, tmp_path):
    "`predict` and `embed` end alike for an empty folder, a missing one, and one bad picture"
    (tmp_path / 'empty').mkdir()
    for place in ('empty', 'gone'):
        predicted = here('predict', place, '--labels', 'red,blue')
        embedded = here('embed', place, '--out', 'e.npz')
        assert (predicted[0], embedded[0]) == (2, 2), (predicted, embedded)
        assert place in predicted[2] and place in embedded[2]
    (pics / 'cut.png').write_bytes(b'?')
    assert here('predict', pics, '--labels', 'red,blue')[0] == 1
    assert here('embed', pics, '--out', 'e.npz')[0] == 1


def test_full_disk_in_training(here, pics, full_disk):
    "A checkpoint that does not fit is told as what it is"
    status, out, err = here('train', 'pics', '--scale', 'smoke', '--out', 'run')
    assert status == 2 and is_one_line(err), err
    assert 'no room to write' in err and 'There is none before it' in err and '--resume' in err


def test_full_disk_in_release(here, pics, tmp_path):
    "`release` says that the disk is full, and leaves nothing"
    assert here('train', 'pics', '--scale', 'smoke', '--out', 'run')[0] == 0
    resource = pytest.importorskip('resource')
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        status, out, err = here('release', 'run', '--out', 'out/w.safetensors')
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert (status, out) == (2, '') and 'no room to write' in err and is_one_line(err)
    assert not list((tmp_path / 'out').iterdir())


def test_read_only_folder_before_work(here, pics, tmp_path, read_only, monkeypatch):
    "A folder that cannot be written is an error before a picture is decoded or a model made"
    (tmp_path / 'locked').mkdir()
    monkeypatch.setattr(Image.Image, 'load', lambda *a, **k: pytest.fail('decoded'))
    cases = [
        ('train', 'pics', '--scale', 'smoke', '--out', 'locked/run'),
        ('finetune', 'mobileclip_nano', 'pics', '--scale', 'smoke', '--out', 'locked/run'),
        ('embed', 'pics', '--out', 'locked/e.npz'),
        ('index', 'pics', '--out', 'locked/index'),
    ]
    for words in cases:
        status, out, err = here(*words)
        assert (status, out) == (2, ''), (words, err)
        assert 'cannot write to' in err and 'locked' in err and is_one_line(err), (words, err)


def test_missing_device_before_work(here, pics, monkeypatch):
    "So is a device that is not there"
    monkeypatch.setattr(Image.Image, 'load', lambda *a, **k: pytest.fail('decoded'))
    for words in (
        ('train', 'pics', '--scale', 'smoke', '--out', 'run'),
        ('embed', 'pics', '--out', 'e.npz'),
        ('predict', 'pics', '--labels', 'red,blue'),
        ('index', 'pics', '--out', 'index'),
        ('eval', '--on', 'pics'),
    ):
        status, out, err = here(*words, '--device', 'cuda:7')
        assert (status, out) == (2, '') and "'cuda:7' is not available here" in err, (words, err)


def test_demo_in_a_file(here, tmp_path):
    "`demo --out` below a file is one line"
    pytest.importorskip('nbconvert')
    (tmp_path / 'file').write_text('x')
    status, out, err = here('demo', '--out', 'file/demo', '--scale', 'smoke')
    assert (status, out) == (2, '') and 'cannot write' in err and is_one_line(err), err


def test_changed_data_by_name(here, pics):
    "A run that goes on with other pictures names the file, not two hashes"
    assert here('train', 'pics', '--scale', 'smoke', '--out', 'run')[0] == 0
    (pics / 'green1.png').write_bytes((pics / 'red0.png').read_bytes())
    status, out, err = here('train', 'pics', '--scale', 'smoke', '--out', 'run', '--resume')
    assert status == 2 and 'changed: pics/green1.png' in err, err


def test_tables_in_a_terminal(here, pics):
    "Tables are aligned columns, in reports and in results"
    status, out, err = here('train', 'pics', '--scale', 'smoke', '--price', '--rate', '10')
    assert status == 0 and '| ---' not in err
    assert 'what  count  which' in err and re.search(r'^kept +12  12 images$', err, re.M), err


def test_price_without_data(here):
    "The machine is timed where neither data nor a rate are given"
    status, out, err = here('train', '--scale', 'smoke', '--price')
    assert status == 0 and re.search(r'at [\d,]+ images/s \(measured here on 8 random', out), out


def test_pixels_shows_all():
    "Mean and standard deviation are shown, also where they are the defaults"
    from mobileclip_nb.preprocessing.transform import Pixels

    assert 'mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)' in repr(Pixels())


def test_captions_of_unread_formats(tmp_path):
    "The caption of a picture in a format that is not read is no orphan"
    from mobileclip_nb.datasets.pairs import read_pairs

    Image.new('RGB', (8, 8)).save(tmp_path / 'a.png')
    for name in ('a.txt', 'photo.txt', 'alone.txt'):
        (tmp_path / name).write_text('a caption')
    (tmp_path / 'photo.svg').write_bytes(b'<svg/>')
    report = read_pairs(tmp_path).report
    assert report.left_out['orphan'] == ['alone.txt']
    assert report.left_out['unreadable'] == ['photo.svg']


def test_missing_places(here):
    "What is missing is said to be missing"
    status, _, err = here('index', 'gone', '--out', 'i')
    assert status == 2 and "No folder or file 'gone'" in err and 'folder of images' in err
    status, _, err = here('eval', 'gone.safetensors')
    assert status == 2 and 'gone.safetensors' in err and 'No model' not in err, err
    status, _, err = here('ablate', 'nosuch')
    assert status == 2 and 'finetuning' in err


def test_ledger_of_the_clone(here):
    "`ablate` finds the clone's ledger from any folder"
    if not (ROOT / 'results' / 'ledger.jsonl').exists():
        pytest.skip('no ledger beside the package')
    status, out, _ = here('ablate', 'lambda', '--list', '--json')
    row = json.loads(out)
    assert status == 0 and row['missing'] < row['runs']


def test_counts_of_an_index(here, pics):
    "A changed picture counts as changed, a renamed one as moved, a deleted one as removed"
    assert here('index', 'pics', '--out', 'i')[0] == 0
    pixels = np.random.default_rng(0).integers(0, 256, (48, 48, 3), np.uint8)
    Image.fromarray(pixels).save(pics / 'red0.png')
    Image.fromarray(pixels[::-1]).save(pics / 'new.png')
    (pics / 'red1.png').rename(pics / 'other.png')
    (pics / 'red2.png').unlink()
    status, out, err = here('index', 'pics', '--out', 'i', '--json')
    told = json.loads(out)
    counts = {k: told[k] for k in ('images', 'embedded', 'changed', 'moved', 'removed')}
    assert counts == dict(images=12, embedded=2, changed=1, moved=1, removed=1), err


@pytest.mark.skipif(sys.platform == 'win32', reason='no SIGTERM to catch on Windows')
def test_sigterm_of_export(tmp_path):
    "SIGTERM leaves no hidden folder; what kill -9 leaves, the next export of that name removes"
    pytest.importorskip('onnx')
    words = ['export', 'mobileclip_nano', '--to', 'torchscript', 'out']
    for sent in (signal.SIGTERM, signal.SIGKILL):
        child = subprocess.Popen([*RUN, *words], cwd=tmp_path, env=ENV, stderr=subprocess.PIPE)
        deadline = time.time() + 120
        while not list(tmp_path.glob('.out.*.part')) and time.time() < deadline:
            assert child.poll() is None, child.stderr.read()
            time.sleep(0.02)
        child.send_signal(sent)
        child.wait(120)
        left = [p.name for p in tmp_path.iterdir()]
        assert bool(left) == (sent == signal.SIGKILL), (sent, left)
    done = subprocess.run([*RUN, *words], cwd=tmp_path, env=ENV, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ['out']
    assert 'Warning' not in done.stderr


def test_memory_of_eval(here, pics, monkeypatch):
    "`eval` on captioned pictures decodes them batch by batch"
    from mobileclip_nb.loaders import batches

    sizes, real = [], batches.decode_images
    monkeypatch.setattr(
        batches,
        'decode_images',
        lambda paths, *a, **k: sizes.append(len(paths)) or real(paths, *a, **k),
    )
    status, out, err = here('eval', '--on', 'pics', '--batch', '5', '--json')
    assert status == 0 and json.loads(out)['pics']['n_images'] == 12, err
    assert sizes == [5, 5, 2]


def test_stored_widgets():
    "No stored output asks for the state of a widget; a picture stands in its place"
    import store

    bar = nbformat.v4.new_output('display_data', {store.WIDGET: {}, 'text/plain': '0%|'})
    box = nbformat.v4.new_output('display_data', {store.WIDGET: {}, 'image/png': 'aaaa'})
    cell = nbformat.v4.new_code_cell('x', outputs=[bar, box])
    nb = nbformat.v4.new_notebook(cells=[cell])
    store.tidy(nb)
    assert [list(o.data) for o in nb.cells[0].outputs] == [['image/png']]


def test_links():
    "Notebooks that prose names are links, and links lead somewhere; `make prepare` writes them"
    every = links.notebooks()
    broken = {path.stem: found for path in every if (found := links.broken_links(path))}
    assert broken == {}
    assert [path.stem for path in every if links.missing_links(path)] == []


def test_links_are_made_once():
    "Titles, summaries and code stay; a second run changes nothing"
    text = (
        '# `core/02_files`\n\n> `core/02_files`\n\nSee `core/02_files`.\n```\n`core/02_files`\n```'
    )
    once = links.add_links(text, links.NBS / 'shards')
    assert once.count('](../core/02_files.ipynb)') == 1
    assert links.add_links(once, links.NBS / 'shards') == once
    assert links.add_links('`core/99_nothing`', links.NBS) == '`core/99_nothing`'


TUTORIALS = sorted((ROOT / 'nbs' / 'tutorials').glob('*.ipynb'))
TUTORIALS = [path for path in TUTORIALS if path.stem != '00_course']


@pytest.mark.parametrize('path', TUTORIALS, ids=lambda p: p.stem)
def test_answers_of_tutorials(path):
    "Two exercises, each with a folded answer whose program ends in a check; `test_runs` runs it"
    text = '\n'.join(c.source for c in nbformat.read(path, 4).cells if c.cell_type == 'markdown')
    part = text.split('## Exercises')[1].split('\n## ')[0]
    asked = notebook_server.FOLDED.sub('', part)
    assert re.findall(r'^\d\. ', asked, re.M) == ['1. ', '2. ']
    assert len(notebook_server.FOLDED.findall(part)) == 2
    programs = notebook_server.answers(path)
    assert len(programs) == 2
    for program in programs:
        last = ast.parse(design.MAGIC.sub(r'\1pass', program)).body[-1]
        assert isinstance(last, ast.Assert)
        assert max(len(line) for line in program.splitlines()) <= design.LIMIT['width']
