"The first hour of a new user: errors at once, help with comments, a run as a model, shells and the log."

import contextlib, inspect, io, json, os, pydoc, shutil, subprocess, sys, time, warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import mobileclip_nb
from mobileclip_nb.cli.main import main

URL = 'https://huggingface.co/apple/MobileCLIP-S1-OpenCLIP/resolve/main/open_clip_model.safetensors'


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    "A folder of twelve pictures with captions, which is the working directory"
    monkeypatch.chdir(tmp_path)
    colors = dict(red=(220, 30, 30), green=(20, 180, 40), blue=(30, 60, 220))
    (tmp_path / 'pictures').mkdir()
    for name, rgb in colors.items():
        for i in range(4):
            Image.new('RGB', (48 + i, 48), rgb).save(tmp_path / 'pictures' / f'{name}{i}.png')
    rows = [f'{name}{i}.png,a {name} square' for name in colors for i in range(4)]
    (tmp_path / 'pictures' / 'captions.csv').write_text('\n'.join(['image,caption', *rows]))
    return tmp_path / 'pictures'


def run_command(*words):
    "Exit status, standard output and standard error of a command in this process"
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main(words)
        except SystemExit as e:
            status = e.code
    return status, out.getvalue(), err.getvalue()


@pytest.mark.parametrize('offline', [True, False])
def test_offline_error_names_file_and_url(tmp_path, monkeypatch, offline):
    "No retries: what was looked for, where to fetch it, and how to pass it"
    import huggingface_hub.constants as hub
    import huggingface_hub.utils

    class NoNetwork:
        asked = 0

        def head(self, url, timeout):
            self.asked += 1
            raise OSError('Name or service not known')

    session = NoNetwork()
    monkeypatch.setattr(hub, 'HF_HUB_OFFLINE', offline)
    monkeypatch.setattr(hub, 'HF_HUB_CACHE', str(tmp_path))
    monkeypatch.setattr(huggingface_hub.utils, 'get_session', lambda: session)
    monkeypatch.setattr(huggingface_hub, 'hf_hub_download', lambda *a, **k: pytest.fail('asked'))
    with pytest.raises(OSError) as error:
        mobileclip_nb.create_model('mobileclip_s1', 'datacompdr')
    for part in ('Looked for open_clip_model.safetensors', f'Fetch {URL}', 'pass its path'):
        assert part in str(error.value)
    assert session.asked == (0 if offline else 1)
    status, out, err = run_command('predict', 'a.png', '--labels', 'a', '--model', 'mobileclip_s1')
    assert (status, out) == (2, '')
    assert URL in err
    assert 'pass its path: --weights PATH' in err
    assert len(err.strip().splitlines()) == 1


def test_apple_file_that_is_not_there():
    "The error of a missing file of Apple's says where it is published"
    with pytest.raises(FileNotFoundError, match='MobileCLIP-S0/resolve/main/mobileclip_s0.pt'):
        mobileclip_nb.create_model('checkpoints/mobileclip_s0.pt')


def test_a_run_is_a_model(pictures):
    "A checkpoint alone is enough: everything that takes a model takes the run's folder"
    words = ('train', str(pictures), '--out', 'run', '--steps', '2', '--scale', 'smoke')
    status, _, err = run_command(*words)
    assert status == 0, err
    run = Path('run')
    assert (run / 'state.safetensors').is_file()
    (run / 'model.safetensors').unlink(missing_ok=True)  # as if the run had been stopped
    model = mobileclip_nb.create_model('run')
    assert model.record.name == mobileclip_nb.from_pretrained(run).record.name
    rows = mobileclip_nb.embed(pictures, model='run')
    assert np.abs(rows - mobileclip_nb.embed(pictures, model=model)).max() < 1e-5
    assert mobileclip_nb.preprocess('run') == model.preprocess
    assert len(mobileclip_nb.predict(pictures, ['red', 'blue'], run)) == 12
    red = str(pictures / 'red0.png')
    status, out, err = run_command('predict', red, '--labels', 'red,blue', '--model', 'run')
    assert (status, red in out) == (0, True), err
    status, _, err = run_command('index', str(pictures), '--out', 'index', '--model', 'run')
    assert status == 0, err
    os.chdir(pictures)  # the index names its model by the whole path
    assert len(mobileclip_nb.open_index('../index').search(image=red)) == 12


def test_heic_without_and_with_the_package(pictures, monkeypatch):
    "Left out and counted without `pillow-heif`, read with it"
    pillow_heif = pytest.importorskip('pillow_heif')
    pillow_heif.from_pillow(Image.new('RGB', (48, 48), 'red')).save(pictures / 'phone.heic')
    monkeypatch.setitem(Image.registered_extensions(), '.heic', 'HEIF')
    openers = {k: v for k, v in Image.OPEN.items() if k != 'HEIF'}
    monkeypatch.setattr(Image, 'OPEN', openers)
    monkeypatch.setattr(Image, 'ID', [name for name in Image.ID if name != 'HEIF'])
    with monkeypatch.context() as without:
        without.setitem(sys.modules, 'pillow_heif', None)
        table = mobileclip_nb.embed(pictures, 'without.npz')
        assert len(table.paths) == 12
        assert "pip install 'mobileclip_nb[heic]'" in table.skipped['phone.heic']
        found = mobileclip_nb.predict(pictures, ['a', 'b'], on_error='skip')
        assert [Path(name).name for name, _ in found.skipped] == ['phone.heic']
    table = mobileclip_nb.embed(pictures, 'with.npz')
    assert len(table.paths) == 13
    assert table.skipped == {}


def test_labels_keep_their_texts_and_warn_once(pictures):
    "A dictionary is labels and what they are embedded as; many unknown labels give one short line"
    red = pictures / 'red0.png'
    described = mobileclip_nb.predict(red, {'A': 'red heart', 'B': ['train', 'blue train']})
    assert sorted(described[0].labels) == ['A', 'B']
    bare = mobileclip_nb.predict(red, ['A', 'B'])
    assert described[0].probs != bare[0].probs
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        mobileclip_nb.predict(red, [f'quux{i}' for i in range(900)])
    (message,) = [str(w.message) for w in caught if 'token embeddings' in str(w.message)]
    assert len(message.split()) < 30


def test_help_shows_the_comments_of_parameters():
    "By inspect, pydoc and IPython, for functions, methods, classes and what a decorator wraps"
    from mobileclip_nb.inference.predict import embed_labels
    from mobileclip_nb.models.clip import CLIP

    assert '    top: labels kept an image; None keeps all' in inspect.getdoc(mobileclip_nb.predict)
    assert '    normalize: scale embeddings to length 1' in inspect.getdoc(CLIP.encode_image)
    assert '    texts: sentences of each label' in inspect.getdoc(embed_labels)
    assert '    probs: in that order, 0–1' in inspect.getdoc(mobileclip_nb.Prediction)
    assert 'Returns: `(B, D)`' in pydoc.render_doc(CLIP, renderer=pydoc.plaintext)
    shell = pytest.importorskip('IPython.core.interactiveshell').InteractiveShell.instance()
    shown = shell.inspector.info(mobileclip_nb.create_model)['docstring']
    assert '    folded: without branches and batch normalization' in shown
    assert '\n' not in mobileclip_nb.core.errors.Faulty.__doc__  # nothing to add


def test_every_public_name_shows_its_parameters():
    "What a user can reach by `mobileclip_nb.` has a comment for each parameter, but `self`"
    for name in mobileclip_nb.__all__:
        thing = getattr(mobileclip_nb, name)
        if not inspect.isfunction(inspect.unwrap(thing)):
            continue
        doc = inspect.getdoc(thing)
        silent = [p for p in inspect.signature(thing).parameters if f'\n    {p}: ' not in doc]
        assert silent in ([], ['private']), name


def test_version():
    "The version of settings.ini, without loading torch"
    code = (
        'import sys; from mobileclip_nb.cli.main import main\n'
        'try: main(["--version"])\n'
        'except SystemExit as e: print(e.code, "torch" in sys.modules)'
    )
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.stdout.split() == ['mobileclip', mobileclip_nb.__version__, '0', 'False']


@pytest.mark.parametrize('shell', ['bash', 'zsh', 'fish'])
def test_completion_script(tmp_path, shell):
    "The script of each shell names verbs and options; where the shell is there, it reads it"
    status, script, _ = run_command('completion', shell)
    assert status == 0
    for word in ('predict', 'shards', 'labels'):
        assert word in script
    if shutil.which(shell):
        (tmp_path / 'script').write_text(script)
        subprocess.run([shell, '-n', str(tmp_path / 'script')], check=True)


@pytest.mark.skipif(not shutil.which('bash'), reason='no bash here')
def test_tab_in_bash(tmp_path):
    "What Tab offers after a beginning"
    script = tmp_path / 'mobileclip.sh'
    script.write_text(run_command('completion', 'bash')[1])
    asked = f"""source {script}
complete_with=$(complete -p mobileclip | sed 's/.*-F \\([^ ]*\\).*/\\1/')
COMP_WORDS=(mobileclip pre); COMP_CWORD=1; $complete_with mobileclip pre mobileclip
echo "${{COMPREPLY[@]}}"
COMP_WORDS=(mobileclip predict --la); COMP_CWORD=2; $complete_with mobileclip --la predict
echo "${{COMPREPLY[@]}}" """
    done = subprocess.run(['bash', '-c', asked], capture_output=True, text=True)
    assert done.stdout.split() == ['predict', '--labels']


TABS = [
    ('pre', ['predict']),
    ('predict --la', ['--labels']),
    ('predict pict', ['picture.png', 'pictures']),
    ('predict picture.png --labels lab', ['labels.txt']),
    ('predict picture.png --model mobileclip2_s3', ['mobileclip2_s3']),
    ('predict picture.png --model pict', ['picture.png', 'pictures']),
    ('embed pict', ['pictures']),
    ('export mobileclip_nano --to executor', ['executorch']),
    ('export mobileclip_nano --to onnx --precision q', ['q4', 'q8']),
]


@pytest.fixture
def tabs(tmp_path, monkeypatch):
    "A folder with a picture, a folder of pictures, a file of labels, and the script of each shell"
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'pictures').mkdir()
    for name in ('picture.png', 'labels.txt'):
        (tmp_path / name).touch()
    for shell in ('bash', 'zsh', 'fish'):
        (tmp_path / f'_{shell}').write_text(run_command('completion', shell)[1])


@pytest.mark.skipif(not shutil.which('bash'), reason='no bash here')
def test_paths_and_names_in_bash(tabs):
    "Tab completes paths, and names of models, destinations and precisions"
    for words, expected in TABS:
        given = words.split()
        asked = (
            f'source _bash; COMP_WORDS=(mobileclip {words}); COMP_CWORD={len(given)}; '
            f'_shtab_mobileclip mobileclip {given[-1]} x; printf "%s\\n" "${{COMPREPLY[@]}}"'
        )
        done = subprocess.run(['bash', '-c', asked], capture_output=True, text=True)
        assert sorted(set(done.stdout.split())) == expected, (words, done.stdout)


@pytest.mark.skipif(not shutil.which('fish'), reason='no fish here')
def test_paths_and_names_in_fish(tabs):
    for words, expected in TABS:
        asked = f'source _fish; complete -C "mobileclip {words}"'
        done = subprocess.run(['fish', '-c', asked], capture_output=True, text=True)
        offered = {line.split('\t')[0].rstrip('/') for line in done.stdout.splitlines()}
        assert sorted(offered) == expected, (words, done.stdout)


def test_completion_leaves_errors():
    "Names are choices for Tab alone: a wrong one still has its suggestion"
    status, out, err = run_command('export', 'mobileclip_nano', '--to', 'onxx', 'out')
    assert (status, out) == (2, '')
    assert "Did you mean 'onnx'?" in err


@pytest.mark.parametrize('labels', ['lables.txt', '/nope/labels.txt', 'pictures', 'labels.png'])
def test_labels_that_are_no_file(pictures, labels):
    "A misspelled file, a folder and a picture are no labels; one line says how to give one"
    Path('labels.png').write_bytes((pictures / 'red0.png').read_bytes())
    status, out, err = run_command('predict', 'pictures/red0.png', '--labels', labels)
    assert (status, out) == (2, '')
    assert labels in err
    assert 'label a line' in err or 'text a line' in err
    assert len(err.strip().splitlines()) == 1
    status, out, err = run_command('predict', 'pictures/red0.png', '--labels', 'lables.txt,')
    assert (status, 'lables.txt 100.0%' in out) == (0, True)


def test_repeated_labels(pictures):
    "A label given twice counts once, with one warning"
    words = ('predict', 'pictures/red0.png', '--labels', 'heart,train,heart', '--json')
    status, out, err = run_command(*words)
    assert status == 0
    assert sorted(p['label'] for p in json.loads(out)['labels']) == ['heart', 'train']
    assert err.splitlines() == ['warning: Given more than once, counted once: heart']


def test_permission_denied(pictures, monkeypatch):
    "Files and folders that may not be read are reported as such"
    real, denied = os.scandir, str(pictures)

    def scandir(path):
        if str(path) == denied:
            raise PermissionError(13, 'Permission denied', denied)
        return real(path)

    with monkeypatch.context() as closed:
        closed.setattr(os, 'scandir', scandir)
        for words in (('embed', denied, '--out', 'e.npz'), ('predict', denied, '--labels', 'a,b')):
            status, _, err = run_command(*words)
            assert (status, 'cannot be read: permission denied' in err) == (2, True), err
            assert 'holds no images' not in err
    monkeypatch.setattr(Image, 'open', lambda *a: (_ for _ in ()).throw(PermissionError(13, 'x')))
    status, _, err = run_command('predict', 'pictures/red0.png', '--labels', 'a,b')
    assert status == 2
    assert 'permission denied' in err
    assert 'damaged' not in err


def test_log_of_the_command(pictures):
    "Messages are records of `logging`; --quiet leaves errors and warnings, --verbose names loggers"
    import logging

    (pictures / 'cut.png').write_bytes(b'cut')
    words = ('predict', str(pictures), '--labels', 'heart,xyzzy')
    status, _, plain = run_command(*words)
    assert status == 1
    assert 'cut.png' in plain
    (warned,) = [line for line in plain.splitlines() if line.startswith('warning: ')]
    assert 'xyzzy' in warned
    assert '.py' not in warned
    status, _, quiet = run_command('--quiet', *words)
    assert (status, 'cut.png' in quiet, 'xyzzy' in quiet) == (1, False, True)
    _, _, verbose = run_command('--verbose', *words)
    assert 'mobileclip_nb.cli: ' in verbose
    assert 'mobileclip_nb.models.weights: ' in verbose
    records = []
    handler = logging.Handler()
    handler.emit = records.append
    logging.getLogger('mobileclip_nb').addHandler(handler)
    try:
        run_command(*words)
    finally:
        logging.getLogger('mobileclip_nb').removeHandler(handler)
    assert any(r.name == 'mobileclip_nb.cli' and 'cut.png' in r.getMessage() for r in records)


def test_labels_from_a_file_in_the_shell(pictures):
    "One label a line, and a template"
    Path('labels.txt').write_text('heart\nred circle\n')
    red = str(pictures / 'red0.png')
    words = ('predict', red, '--labels', 'labels.txt', '--template', 'a {}', '--json')
    status, out, err = run_command(*words)
    assert status == 0, err
    assert sorted(p['label'] for p in json.loads(out)['labels']) == ['heart', 'red circle']


def test_what_embed_reports(pictures):
    "A second run has nothing to do; new, changed and removed pictures are counted"
    words = ('embed', 'pictures', '--out', 'e.npz')
    assert 'e.npz: 12 pictures (12 embedded)' in run_command(*words)[1]
    assert 'e.npz: 12 pictures (nothing to do)' in run_command(*words)[1]
    (pictures / 'red0.png').unlink()
    Image.new('RGB', (70, 48), 'white').save(pictures / 'red1.png')
    Image.new('RGB', (70, 48), 'black').save(pictures / 'new.png')
    found = json.loads(run_command(*words, '--json')[1])
    counts = {k: found[k] for k in ('images', 'embedded', 'changed', 'removed', 'unchanged')}
    assert counts == dict(images=12, embedded=2, changed=1, removed=1, unchanged=10)
    status, out, err = run_command('index', '--from', 'e.npz', '--out', 'index')
    assert (status, out.strip()) == (0, 'index: 12 pictures (from e.npz)'), err


def test_search_with_another_model(pictures, monkeypatch):
    "The model of the index is named before weights of the other one are fetched"
    from mobileclip_nb.inference import search

    assert run_command('index', 'pictures', '--out', 'index')[0] == 0
    monkeypatch.setattr(search, 'load_folded', lambda *a, **k: pytest.fail('loaded'))
    status, out, err = run_command('search', 'index', 'heart', '--model', 'mobileclip_s1')
    assert (status, out) == (2, '')
    assert 'built with mobileclip_nano' in err
    assert 'leave out --model' in err


def test_misspelled_command():
    "The nearest command is suggested, in a group as well"
    assert "Did you mean 'predict'?" in run_command('predikt', 'a.png')[2]
    assert "Did you mean 'build'?" in run_command('shards', 'biuld')[2]
