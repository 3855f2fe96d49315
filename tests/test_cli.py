"The command as a shell meets it: a process, its exit status, its two streams, and an interrupt."

import json, os, signal, subprocess, sys, time
from pathlib import Path

import pytest
from PIL import Image

RUN = [sys.executable, '-c', 'from mobileclip_nb.cli.main import main; raise SystemExit(main())']
ENV = os.environ | dict(OMP_NUM_THREADS='1')


def told(*words, cwd):
    return subprocess.run(
        [*RUN, *words], cwd=cwd, env=ENV, capture_output=True, text=True, timeout=300
    )


@pytest.fixture
def folder(tmp_path):
    "Twelve plain pictures with captions, and one that is cut short"
    colors = dict(red=(220, 30, 30), green=(20, 180, 40), blue=(30, 60, 220))
    for name, rgb in colors.items():
        for i in range(4):
            Image.new('RGB', (48 + i, 48), rgb).save(tmp_path / f'{name}{i}.png')
    (tmp_path / 'captions.csv').write_text(
        'image,caption\n' + '\n'.join(f'{n}{i}.png,a {n} square' for n in colors for i in range(4)),
        encoding='utf-8',
    )
    return tmp_path


def test_statuses_and_streams(folder):
    "All well is 0; one bad picture is 1 and named on standard error; nonsense is 2; standard output holds the answer alone"
    fine = told('predict', 'red0.png', 'blue0.png', '--labels', 'red,blue', '--json', cwd=folder)
    assert fine.returncode == 0, fine.stderr
    assert [sorted(json.loads(l)) for l in fine.stdout.splitlines()] == [['image', 'labels']] * 2
    (folder / 'cut.png').write_bytes((folder / 'red0.png').read_bytes()[:60])
    some = told('predict', 'red0.png', 'cut.png', '--labels', 'red,blue', '--json', cwd=folder)
    assert some.returncode == 1 and 'cut.png' in some.stderr and len(some.stdout.splitlines()) == 1
    none = told('predict', 'red0.png', '--labels', 'red', '--model', 'mobileclip_s9', cwd=folder)
    assert (
        none.returncode == 2
        and none.stdout == ''
        and 'Did you mean' in none.stderr
        and 'Traceback' not in none.stderr
    )
    assert told('labels', cwd=folder).returncode == 2


def test_embed_with_a_bad_file(folder):
    "A folder with a bad picture is embedded without it, and the status says so"
    (folder / 'cut.png').write_bytes((folder / 'red0.png').read_bytes()[:60])
    got = told('embed', '.', '--out', 'e.npz', '--json', cwd=folder)
    assert (
        got.returncode == 1 and json.loads(got.stdout)['embedded'] == 12 and 'cut.png' in got.stderr
    )


@pytest.mark.skipif(sys.platform == 'win32', reason='no SIGINT for a child on Windows')
def test_interrupt_and_resume(folder):
    "Ctrl-C ends with status 2 and keeps the state; --resume goes on from there and finishes"
    words = ['train', '.', '--out', 'run', '--steps', '40', '--scale', 'smoke']
    child = subprocess.Popen(
        [*RUN, *words],
        cwd=folder,
        env=ENV,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.time() + 120
    while (
        not (folder / 'run' / 'begun').exists() and time.time() < deadline and child.poll() is None
    ):
        time.sleep(0.05)
    time.sleep(1)
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=120)
    assert (
        child.returncode == 2
        and 'stopped after step' in err
        and (folder / 'run' / 'state.pt').exists()
    ), (child.returncode, err[-800:])
    refused = told(*words, cwd=folder)
    assert refused.returncode == 2 and 'resume' in refused.stderr
    done = told(*words, '--resume', '--json', cwd=folder)
    assert done.returncode == 0 and (folder / 'run' / 'model.safetensors').exists(), done.stderr[
        -800:
    ]
    asked = told('eval', 'run/model.safetensors', '--on', '.', '--json', cwd=folder)
    assert asked.returncode == 0 and list(json.loads(asked.stdout).values())[0]['n_images'] == 12, (
        asked.stderr[-800:]
    )


def test_finetune_and_release(folder):
    "A trained model learns a folder; alpha 0 writes the old weights, and what is written says which run made it"
    import torch
    from mobileclip_nb.models.weights import ABOUT, read_state
    from mobileclip_nb.models.factory import create_model

    words = [
        'finetune',
        'mobileclip_nano',
        '.',
        '--out',
        'tuned',
        '--scale',
        'smoke',
        '--alpha',
        '0',
        '--json',
    ]
    done = told(*words, cwd=folder)
    assert done.returncode == 0 and 'measured here' in done.stderr, done.stderr[-800:]
    state, meta = read_state(folder / 'tuned' / 'model.safetensors')
    start = create_model('mobileclip_nano', 'emoji').state_dict()
    assert (
        torch.equal(state['image.head.weight'], start['image.head.weight'].half())
        and json.loads(meta[ABOUT])['run']['alpha'] == 0
    )
    refused = told(*words, cwd=folder)
    assert (
        refused.returncode == 2
        and '--resume' in refused.stderr
        and 'Traceback' not in refused.stderr
    )
    freed = told('release', 'tuned', '--out', 'new.safetensors', cwd=folder)
    assert (
        freed.returncode == 0
        and 'finetune' in freed.stdout
        and not torch.equal(
            read_state(folder / 'new.safetensors')[0]['image.head.weight'],
            state['image.head.weight'],
        )
    ), freed.stderr
    assert told('release', 'tuned', '--out', 'new.pt', cwd=folder).returncode == 2


def test_one_list_of_options():
    "The console and the module of torchrun know the same options of a run, with the same defaults"
    from mobileclip_nb.cli.main import parser
    from mobileclip_nb.train.__main__ import words
    from mobileclip_nb.train.options import OPTIONS

    names = [flag.lstrip('-').replace('-', '_') for flag, _ in OPTIONS]
    assert {'scale', 'steps', 'seed', 'set', 'resume'} <= set(names)
    console, module = parser().parse_args(['train']), words().parse_args(['nano-emoji'])
    assert {n: getattr(console, n) for n in names} == {
        n: getattr(module, n) for n in names
    } and module.scale == 'nano'


def test_a_missing_picture_is_one_rule(folder):
    "What is left out is said and the status is 1, for `shards build`, `train` and `eval` alike; without, it is 0"
    words = ['train', '.', '--scale', 'smoke', '--steps', '1']
    assert told(*words, '--out', 'whole', cwd=folder).returncode == 0
    (folder / 'red0.png').unlink()
    for verb in (
        [*words, '--out', 'lacking'],
        ['eval', '--on', '.'],
        ['shards', 'build', '.', 'plain'],
    ):  # shards last: a folder that holds some is shards
        done = told(*verb, cwd=folder)
        assert done.returncode == 1 and 'missing' in done.stdout + done.stderr.replace(
            'the image file is not there', 'missing'
        ), (verb, done.returncode, done.stderr[-500:])
    assert (folder / 'lacking' / 'model.safetensors').exists()


def test_a_run_that_is_there(folder):
    "A taken folder is refused before a picture is opened, other settings as well and in words; to go on says from which step"
    words = ['train', '.', '--out', 'run', '--scale', 'smoke', '--steps', '2']
    assert told(*words, cwd=folder).returncode == 0
    again = told(*words, '--resume', cwd=folder)
    assert again.returncode == 0 and 'all 2 steps are made already' in again.stderr, again.stderr[
        -500:
    ]
    for more, said in (
        ((), 'Use --resume'),
        (('--resume', '--steps', '3'), 'train.steps=3 (was 2)'),
    ):
        done = told(*words, *more, cwd=folder)
        assert (
            done.returncode == 2
            and said in done.stderr
            and 'smoke=' not in done.stderr
            and 'kept' not in done.stderr
            and 'decode' not in done.stderr
        ), done.stderr
    lost = told('release', 'rum', '--out', 'x.safetensors', cwd=folder)
    assert lost.returncode == 2 and "'rum'" in lost.stderr and "Did you mean 'run'" in lost.stderr
    taught = told('train', '.', '--recipe', 'nano-emoji-dr', cwd=folder)
    assert (
        taught.returncode == 2
        and 'mobileclip reinforce PLAIN RICH' in taught.stderr
        and 'Traceback' not in taught.stderr
    )


def kept_bytes(folder):
    return {p: p.read_bytes() for p in folder.rglob('*') if p.is_file() and p.name != '.lock'}


@pytest.fixture
def here(folder, monkeypatch, capsys):
    "Commands in this process, which has loaded torch once: status and standard error, in the folder"
    import torch
    from mobileclip_nb.cli.main import main

    monkeypatch.chdir(folder)
    monkeypatch.setenv('OMP_WAIT_POLICY', 'PASSIVE')  # `main` sets it for its process
    before = torch.get_num_threads()

    def call(*words):
        try:
            status = main(words)
        except SystemExit as e:
            status = e.code
        out, err = capsys.readouterr()
        return subprocess.CompletedProcess(words, status, out, err)

    yield call
    torch.set_num_threads(before)


def test_nothing_of_another_input_is_overwritten(folder, here):
    "An output that something else made is an error that names it and the remedy; every byte stays"
    pics, other = folder / 'pics', folder / 'other'
    for place, color in ((pics, (9, 9, 99)), (other, (99, 9, 9))):
        place.mkdir()
        for i in range(3):
            Image.new('RGB', (48, 48), (*color[:2], color[2] + i)).save(place / f'{i}.png')
        (place / 'captions.csv').write_text(
            'image,caption\n' + '\n'.join(f'{i}.png,square {i}' for i in range(3)), encoding='utf-8'
        )
    assert here('embed', 'pics', '--out', 'e.npz').returncode == 0
    assert here('shards', 'build', 'pics', 'plain', '--per-shard', '2').returncode == 0
    assert here('shards', 'show', 'plain', '0', '--png', 'first.png').returncode == 0
    Image.new('RGB', (8, 8)).save(folder / 'photo.png')
    for name in ('notes', 'runs/shards'):
        (folder / name).mkdir(parents=True)
        (folder / name / 'manifest.json').write_text('["mine"]', encoding='utf-8')
    (folder / 'theirs.npz').write_bytes(b'mine')
    before = kept_bytes(folder)
    cases = {
        ('embed', 'other', '--out', 'e.npz'): (
            "'e.npz' holds embeddings of the folder",
            str(pics.resolve()),
            str(other.resolve()),
            'choose another file',
        ),
        ('embed', 'other', '--out', 'theirs.npz'): (
            "'theirs.npz' is no table of embeddings",
            'choose another file',
        ),
        ('shards', 'build', 'other', 'notes'): (
            'notes holds manifest.json',
            'choose an empty folder',
        ),
        ('shards', 'build', 'other', 'plain', '--per-shard', '1'): (
            'plain was begun as another job',
            'choose another folder',
        ),
        ('shards', 'build', 'other', 'plain', '--per-shard', '2'): (
            'plain was begun as another job: place was',
            str(pics.resolve()),
            str(other.resolve()),
        ),
        ('shards', 'join', 'plain', 'plain', 'notes'): (
            'notes holds manifest.json',
            'choose an empty folder',
        ),
        ('shards', 'show', 'plain', '1', '--png', 'first.png'): (
            "'first.png' shows the sample",
            'choose another file',
        ),
        ('shards', 'show', 'plain', '1', '--png', 'photo.png'): (
            "'photo.png' was not made by this command",
            'choose another file',
        ),
        ('reinforce', 'plain', 'notes', '--augmentations', '1'): (
            "notes' holds manifest.json",
            'Choose an empty folder',
        ),
        ('demo', '--out', 'runs', '--scale', 'smoke'): (
            "'runs' holds shards",
            'choose another --out',
        ),
    }
    for words, parts in cases.items():
        done = here(*words)
        assert done.returncode == 2 and all(part in done.stderr for part in parts), (
            words,
            done.stderr[-600:],
        )
        assert kept_bytes(folder) == before, words
    again = here('shards', 'show', 'plain', '0', '--png', 'first.png')
    assert again.returncode == 0, again.stderr


def test_the_same_folder_is_taken_in(folder, here, monkeypatch):
    "New, changed and removed pictures of the same folder change its table, also by another path"
    import numpy as np

    def rows():
        with np.load(folder / 'e.npz') as f:
            return dict(zip(f['paths'].tolist(), f['rows']))

    (folder / 'sub').mkdir()
    assert here('embed', '.', '--out', 'e.npz').returncode == 0
    first = rows()
    (folder / 'red0.png').unlink()
    Image.new('RGB', (9, 9), 'white').save(folder / 'blue0.png')
    Image.new('RGB', (9, 9), 'black').save(folder / 'new.png')
    monkeypatch.chdir(folder / 'sub')
    done = here('embed', '../', '--out', '../e.npz')
    assert done.returncode == 0, done.stderr
    second = rows()
    assert set(second) == set(first) - {'red0.png'} | {'new.png'}
    assert [n for n in second if n in first and not np.array_equal(first[n], second[n])] == [
        'blue0.png'
    ]


def test_device_threads_and_batch(folder, here):
    "An absent device is an error before anything is read or loaded; threads and batch change no answer; a pipe sees no bar"
    gone = ['--device', 'cuda:7', '--model', 'no/such.safetensors']
    for words in (
        ('predict', 'no.png', '--labels', 'red', *gone),
        ('embed', '.', '--out', 'e.npz', *gone),
        ('eval', 'no/such.safetensors', '--device', 'cuda:7'),
        ('caption', 'no.png', '--device', 'cuda:7', '--captioner', 'none'),
        ('reinforce', 'no', 'out', '--device', 'cuda:7'),
    ):
        done = here(*words)
        assert done.returncode == 2 and "'cuda:7' is not available here" in done.stderr, (
            words,
            done.stderr[-400:],
        )
    assert not (folder / 'e.npz').exists() and not (folder / 'out').exists()
    words = ['predict', '.', '--labels', 'red,blue', '--json']
    one, two = (
        here(*words, *more) for more in ((), ('--threads', '2', '--batch', '5', '--device', 'cpu'))
    )
    assert one.returncode == two.returncode == 0 and two.stderr == '', two.stderr
    probs = [
        [label['prob'] for line in done.stdout.splitlines() for label in json.loads(line)['labels']]
        for done in (one, two)
    ]
    assert len(probs[0]) == 24 and max(abs(a - b) for a, b in zip(*probs)) < 1e-4
    wrong = here('embed', '.', '--out', 'e.npz', '--threads', '0')
    assert (
        wrong.returncode == 2
        and "argument --threads: '0' is not a whole number from 1" in wrong.stderr
    )


@pytest.mark.parametrize(
    'cards, mps, device',
    [(1, False, 'cuda'), (1, True, 'cuda'), (0, True, 'mps'), (0, False, 'cpu')],
)
def test_auto_takes_the_best_device(monkeypatch, folder, cards, mps, device):
    "With simulated devices every verb hands on the one that `auto` chooses; reinforce keeps the CPU unless asked"
    import torch
    import mobileclip_nb.cli.main as cli
    from mobileclip_nb.models import factory
    from mobileclip_nb.reinforce import captioner, run_local

    monkeypatch.setattr(torch.cuda, 'is_available', lambda: cards > 0)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: cards)
    monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: mps)

    class Seen(Exception):
        pass

    def stop(found):
        raise Seen(found)

    monkeypatch.setattr(factory, 'create_model', lambda *a, device=None, **k: stop(device))
    monkeypatch.setattr(captioner, 'load_captioner', lambda spec, weights, device: stop(device))
    monkeypatch.setattr(
        run_local, 'reinforce', lambda src, out, spec, workers, device, *a, **k: stop(device)
    )
    picture = str(folder / 'red0.png')
    words = {
        ('predict', picture, '--labels', 'red'): device,
        ('embed', str(folder), '--out', str(folder / 'e.npz')): device,
        ('eval',): device,
        ('caption', picture): device,
        ('reinforce', 'in', 'out'): 'cpu',
        ('reinforce', 'in', 'out', '--device', 'auto'): device,
    }
    for verb, expected in words.items():
        with pytest.raises(Seen) as seen:
            cli.main(verb)
        assert seen.value.args == (expected,), verb
