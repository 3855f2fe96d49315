"The command as a shell meets it: a process, its exit status, its two streams, and an interrupt."
import json, os, signal, subprocess, sys, time
from pathlib import Path

import pytest
from PIL import Image

RUN = [sys.executable, '-c', 'from mobileclip_nb.cli import main; raise SystemExit(main())']
ENV = os.environ | dict(OMP_NUM_THREADS='1')

def told(*words, cwd): return subprocess.run([*RUN, *words], cwd=cwd, env=ENV, capture_output=True, text=True, timeout=300)

@pytest.fixture
def folder(tmp_path):
    "Twelve plain pictures with captions, and one that is cut short"
    colors = dict(red=(220, 30, 30), green=(20, 180, 40), blue=(30, 60, 220))
    for name, rgb in colors.items():
        for i in range(4): Image.new('RGB', (48+i, 48), rgb).save(tmp_path/f'{name}{i}.png')
    (tmp_path/'captions.csv').write_text('image,caption\n' + '\n'.join(f'{n}{i}.png,a {n} square' for n in colors for i in range(4)), encoding='utf-8')
    return tmp_path

def test_statuses_and_streams(folder):
    "All well is 0; one bad picture is 1 and named on standard error; nonsense is 2; standard output holds the answer alone"
    fine = told('predict', 'red0.png', 'blue0.png', '--labels', 'red,blue', '--json', cwd=folder)
    assert fine.returncode == 0, fine.stderr
    assert [sorted(json.loads(l)) for l in fine.stdout.splitlines()] == [['image', 'labels']]*2
    (folder/'cut.png').write_bytes((folder/'red0.png').read_bytes()[:60])
    some = told('predict', 'red0.png', 'cut.png', '--labels', 'red,blue', '--json', cwd=folder)
    assert some.returncode == 1 and 'cut.png' in some.stderr and len(some.stdout.splitlines()) == 1
    none = told('predict', 'red0.png', '--labels', 'red', '--model', 'mobileclip_s9', cwd=folder)
    assert none.returncode == 2 and none.stdout == '' and 'Did you mean' in none.stderr and 'Traceback' not in none.stderr
    assert told('labels', cwd=folder).returncode == 2

def test_embed_with_a_bad_file(folder):
    "A folder with a bad picture is embedded without it, and the status says so"
    (folder/'cut.png').write_bytes((folder/'red0.png').read_bytes()[:60])
    got = told('embed', '.', '--out', 'e.npz', '--json', cwd=folder)
    assert got.returncode == 1 and json.loads(got.stdout)['embedded'] == 12 and 'cut.png' in got.stderr

@pytest.mark.skipif(sys.platform == 'win32', reason='no SIGINT for a child on Windows')
def test_interrupt_and_resume(folder):
    "Ctrl-C ends with status 2 and keeps the state; --resume goes on from there and finishes"
    words = ['train', '.', '--out', 'run', '--steps', '40', '--scale', 'smoke']
    child = subprocess.Popen([*RUN, *words], cwd=folder, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.time()+120
    while not (folder/'run'/'begun').exists() and time.time() < deadline and child.poll() is None: time.sleep(.05)
    time.sleep(1)
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=120)
    assert child.returncode == 2 and 'stopped after step' in err and (folder/'run'/'state.pt').exists(), (child.returncode, err[-800:])
    refused = told(*words, cwd=folder)
    assert refused.returncode == 2 and 'resume' in refused.stderr
    done = told(*words, '--resume', '--json', cwd=folder)
    assert done.returncode == 0 and (folder/'run'/'model.safetensors').exists(), done.stderr[-800:]
    asked = told('eval', 'run/model.safetensors', '--on', '.', '--json', cwd=folder)
    assert asked.returncode == 0 and list(json.loads(asked.stdout).values())[0]['n_images'] == 12, asked.stderr[-800:]

def test_finetune_and_release(folder):
    "A trained model learns a folder; alpha 0 writes the old weights, and what is written says which run made it"
    import torch
    from mobileclip_nb.checkpoint import ABOUT, create_model, read_state
    words = ['finetune', 'mobileclip_nano', '.', '--out', 'tuned', '--scale', 'smoke', '--alpha', '0', '--json']
    done = told(*words, cwd=folder)
    assert done.returncode == 0 and 'measured here' in done.stderr, done.stderr[-800:]
    state, meta = read_state(folder/'tuned'/'model.safetensors')
    start = create_model('mobileclip_nano', 'emoji').state_dict()
    assert torch.equal(state['image.head.weight'], start['image.head.weight'].half()) and json.loads(meta[ABOUT])['run']['alpha'] == 0
    refused = told(*words, cwd=folder)
    assert refused.returncode == 2 and '--resume' in refused.stderr and 'Traceback' not in refused.stderr
    freed = told('release', 'tuned', '--out', 'new.safetensors', cwd=folder)
    assert freed.returncode == 0 and 'finetune' in freed.stdout and not torch.equal(read_state(folder/'new.safetensors')[0]['image.head.weight'], state['image.head.weight']), freed.stderr
    assert told('release', 'tuned', '--out', 'new.pt', cwd=folder).returncode == 2
