"Every notebook runs: each one pytest item, in a process of its own (tests/notebook_server.py)."

import importlib.util, json, os, select, signal, subprocess, sys
from pathlib import Path

import design, pytest

LIMIT = 240  # seconds a notebook (60 is the aim)
EVERY = design.notebooks()
RUNTIMES = {  # the package a notebook needs beyond those of `make test`; `make test-export` has it
    'export/11_litert': 'litert_torch',
    'export/12_executorch': 'executorch',
    'export/16_coreai': 'coreai_torch',
}


def name_of(nb):
    return str(nb.path.relative_to(design.NBS).with_suffix(''))


class Server:
    "The process that notebooks are forked from, one for each pytest worker"

    def __init__(self):
        script = Path(__file__).with_name('notebook_server.py')
        env = os.environ | dict(OMP_NUM_THREADS='1')
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.process = subprocess.Popen([sys.executable, str(script)], env=env, **pipes)

    def run(self, path, env, log, seconds):
        "Run one notebook; its exit status, or None after `seconds`"
        asked = dict(path=str(path), folder=str(path.parent), env=env, log=str(log))
        self.process.stdin.write((json.dumps(asked) + '\n').encode())
        self.process.stdin.flush()
        pid = int(self.process.stdout.readline())
        in_time, _, _ = select.select([self.process.stdout], [], [], seconds)
        if not in_time:
            os.killpg(pid, signal.SIGKILL)
        status = int(self.process.stdout.readline())
        return status if in_time else None


@pytest.fixture(scope='session')
def server():
    server = Server()
    yield server
    server.process.stdin.close()
    server.process.wait()


def run_whole(nb, server, tmp_path):
    log = tmp_path / 'log.txt'
    env = dict(IN_TEST='1', SCALE='smoke', MOBILECLIP_RUNS=str(tmp_path))
    status = server.run(nb.path, env, log, LIMIT)
    printed = log.read_text(errors='replace')[-8000:]
    assert status is not None, f'not done after {LIMIT} s\n{printed}'
    assert status == 0, printed


@pytest.mark.timeout(LIMIT + 60)
@pytest.mark.parametrize('nb', [nb for nb in EVERY if name_of(nb) not in RUNTIMES], ids=name_of)
def test_runs(nb, server, tmp_path):
    run_whole(nb, server, tmp_path)


@pytest.mark.timeout(LIMIT + 60)
@pytest.mark.parametrize('nb', [nb for nb in EVERY if name_of(nb) in RUNTIMES], ids=name_of)
def test_runtime_pages(nb, server, tmp_path):
    if not importlib.util.find_spec(RUNTIMES[name_of(nb)]):
        pytest.skip(f'needs {RUNTIMES[name_of(nb)]}; `make test-export` runs it')
    run_whole(nb, server, tmp_path)


def test_a_wrong_answer_fails(server, tmp_path):
    "The program of a folded answer runs after the cells of a tutorial, with their names"
    path = tmp_path / 'tutorials' / '01_page.ipynb'
    path.parent.mkdir()
    for n, expected in ((2, 0), (3, 1)):
        folded = f'1. How many?\n\n<details>\n\n```python\nassert x == {n}\n```\n\n</details>'
        cells = [dict(cell_type='markdown', source=folded), dict(cell_type='code', source='x = 2')]
        path.write_text(json.dumps(dict(cells=cells)))
        assert server.run(path, {}, tmp_path / 'log.txt', LIMIT) == expected
