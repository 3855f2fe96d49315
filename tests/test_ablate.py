"An ablation in several processes: killed with SIGKILL and called again, and the command that runs one."

import json, os, signal, subprocess, sys, time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from mobileclip_nb.core.config import Spec
from mobileclip_nb.core.ledger import append, read, record_run
from mobileclip_nb.experiments.ablate import Ablation, RunPlace, Variant, list_jobs, run_missing

HERE = Path(__file__).parent
RUN = [sys.executable, '-c', 'from mobileclip_nb.cli.main import main; raise SystemExit(main())']


@dataclass(frozen=True, repr=False)
class Slow(Spec, id_name='Slow'):
    "A run that takes a moment and learns nothing"

    factor: int = 0
    seed: int = 0

    def at(self, scale):
        return self


SLOW = Ablation(
    'slow',
    'Which factor?',
    (),
    ('factor',),
    Slow(),
    tuple(Variant(f'{k}', dict(factor=k)) for k in range(4)),
    {'heldout_r1': ''},
)


def take_time(spec, ledger, scale, seconds=0.0):
    "Wait, then write a line"
    time.sleep(seconds)
    metrics = dict(heldout_r1=0.1 * spec.factor)
    append(ledger, record_run('slow', spec, metrics, spec.seed, scale=scale))
    return metrics


def start_slow(seconds):
    return partial(take_time, seconds=seconds)


def make_all(folder, seconds, processes=2):
    "Make the runs that are missing in the ledger of a folder"
    folder = Path(folder)
    start = partial(start_slow, seconds)
    place = RunPlace(folder, processes=processes)
    return run_missing(list_jobs(SLOW, 'nano'), folder / 'l.jsonl', start, 'nano', place)


def lines(folder):
    path = folder / 'l.jsonl'
    return read(path) if path.exists() else []


def test_killed_and_resumed(tmp_path):
    "After kill -9 only what is missing runs, and no configuration has two lines"
    code = f'import sys; sys.path.insert(0, {str(HERE)!r}); import test_ablate; '
    code += f'test_ablate.make_all({str(tmp_path)!r}, 0.5)'
    child = subprocess.Popen([sys.executable, '-c', code])
    while len(lines(tmp_path)) < 3 and child.poll() is None:
        time.sleep(0.05)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    while True:  # its workers end with it
        before = len(lines(tmp_path))
        time.sleep(1.5)
        if before == len(lines(tmp_path)):
            break
    assert 3 <= before < 12
    kept = (tmp_path / 'l.jsonl').read_bytes()
    done = make_all(tmp_path, 0.0)
    assert len(done.made) == 12 - before
    assert done.left == 0
    assert (tmp_path / 'l.jsonl').read_bytes().startswith(kept)
    ids = [line.spec_id for line in lines(tmp_path)]
    assert len(ids) == len(set(ids)) == 12


def test_two_commands_share_the_runs(tmp_path):
    "Two that work at once on one folder make each run once"
    code = f'import sys; sys.path.insert(0, {str(HERE)!r}); import test_ablate; '
    code += f'test_ablate.make_all({str(tmp_path)!r}, 0.1, 1)'
    both = [subprocess.Popen([sys.executable, '-c', code]) for _ in range(2)]
    assert [p.wait() for p in both] == [0, 0]
    assert make_all(tmp_path, 0.0, 1).left == 0
    ids = [line.spec_id for line in lines(tmp_path)]
    assert len(ids) == len(set(ids)) == 12


def test_ray(tmp_path, monkeypatch):
    "On a local Ray cluster every run is made once"
    paths = [str(HERE), os.environ.get('PYTHONPATH', '')]
    monkeypatch.setenv('PYTHONPATH', os.pathsep.join(filter(None, paths)))
    place = RunPlace(tmp_path, processes=2, ray='local')
    jobs, ledger = list_jobs(SLOW, 'nano'), tmp_path / 'l.jsonl'
    done = run_missing(jobs, ledger, partial(start_slow, 0.0), 'nano', place)
    assert (len(done.made), done.failed, done.left) == (12, {}, 0)
    assert len(lines(tmp_path)) == 12


def test_ray_keeps_the_deadline(tmp_path, monkeypatch):
    "On Ray, too, no run begins after the minutes are over"
    paths = [str(HERE), os.environ.get('PYTHONPATH', '')]
    monkeypatch.setenv('PYTHONPATH', os.pathsep.join(filter(None, paths)))
    place = RunPlace(tmp_path, processes=1, ray='local', minutes=0)
    jobs, ledger = list_jobs(SLOW, 'nano')[:3], tmp_path / 'l.jsonl'
    done = run_missing(jobs, ledger, partial(start_slow, 0.0), 'nano', place)
    assert (done.made, done.failed, done.left) == ([], {}, 3)
    assert not ledger.exists()


def test_command(tmp_path):
    "`mobileclip ablate` says the price first, makes the runs, prints the table, and has nothing left"
    words = ['ablate', 'text-encoders', '--scale', 'smoke', '--seeds', '2']
    words += ['--ledger', 'l.jsonl', '--folder', 'sets', '--json']
    env = os.environ | dict(OMP_NUM_THREADS='1')
    how = dict(cwd=tmp_path, env=env, capture_output=True, text=True, timeout=600)
    made = subprocess.run([*RUN, *words], **how)
    assert made.returncode == 0, made.stderr
    assert made.stderr.index('ms a step') < made.stderr.index('seed 0')
    assert '4 runs made, 0 failed, 0 left' in made.stderr
    rows = json.loads(made.stdout)['metrics']['heldout_i2t_r1']
    assert [len(r['values']) for r in rows] == [2, 2]
    assert rows[1]['bar'] is not None
    assert len(lines(tmp_path)) == 4


def test_full_scale_is_built():
    "Every variant of every ablation has a recipe, a model and data of the papers' size"
    from mobileclip_nb.experiments.ablations import ABLATIONS, check_full, full_run

    for a in ABLATIONS.values():
        rows = check_full(a)
        assert [r.variant for r in rows] == [v.name for v in a.variants]
        assert min(r.pairs for r in rows) >= 30_000 * 8192
        assert min(r.image_m for r in rows) > 10
        assert all(r.stored for r in rows)
        for v in a.variants:
            assert full_run(a, v).record.text.context == 77
