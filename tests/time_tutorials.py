"""Time the tutorials on two cores, at their default scale: `python tests/time_tutorials.py [NAME ...]`.

Each in a process of its own, from its start to the last cell, imports among it; then its answers. Seconds of the clock
contain the other work of the machine, so its load is noted, and processor seconds beside them: with one thread, as here, a
page takes about these on free cores, and less with two. (Threads that wait for each other on a busy machine spin, and what
they spin counts as processor time.) Writes `results/tutorials.json`; with names, only their entries change.
"""

import json, os, resource, subprocess, sys, time
from pathlib import Path

import notebook_server

ROOT = Path(__file__).resolve().parents[1]
TUTORIALS = ROOT / 'nbs' / 'tutorials'
RESULT = ROOT / 'results' / 'tutorials.json'
CORES = 2
AIM = 60  # seconds


def processor_seconds():
    "Of this process and of those that it started and that have ended"
    kinds = resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN
    return sum(u.ru_utime + u.ru_stime for u in map(resource.getrusage, kinds))


def run(path):
    "In this process: run cells and answers; seconds of both, and of the processor for the cells"
    from execnb.shell import CaptureShell

    os.chdir(path.parent)
    sys.path.insert(0, '')
    shell, seconds = CaptureShell(mpl_format='png'), {}
    for name, sources in (
        ('cells', notebook_server.code_cells(path)),
        ('answers', notebook_server.answers(path)),
    ):
        begun = time.perf_counter()
        notebook_server.run_sources(path, shell, sources)
        seconds[name] = time.perf_counter() - begun
        seconds.setdefault('processor', processor_seconds())  # when the cells have run
    return seconds


def measure(path):
    "In a process of its own: seconds from start to the last cell, and of the answers"
    env = {k: v for k, v in os.environ.items() if k not in ('SCALE', 'MOBILECLIP_RUNS')}
    env |= dict(OMP_NUM_THREADS='1', TOKENIZERS_PARALLELISM='false')
    load, begun = os.getloadavg()[0], time.perf_counter()
    words = [sys.executable, __file__, '--in-this-process', str(path)]
    done = subprocess.run(words, env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f'{path.stem} failed:\n{done.stderr[-3000:]}')
    inside = json.loads(done.stdout.splitlines()[-1])
    whole = time.perf_counter() - begun - inside['answers']
    found = dict(seconds=whole, load=load, processor=inside['processor'], answers=inside['answers'])
    return {name: round(value, 1) for name, value in found.items()}


def main(names):
    from mobileclip_nb.core.files import atomic_write
    from mobileclip_nb.core.ledger import code_version, host

    if hasattr(os, 'sched_setaffinity'):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
    paths = [p for p in sorted(TUTORIALS.glob('*.ipynb')) if not names or p.stem in names]
    kept = json.loads(RESULT.read_text()) if RESULT.exists() else dict(tutorials={})
    found = dict(host=host(), code=code_version(), aim=AIM, tutorials=kept['tutorials'])
    for path in paths:
        if path.stem == '00_course':  # it reads this file
            continue
        found['tutorials'][path.stem] = timed = measure(path)
        print(f'{path.stem:26}', timed, flush=True)
        with atomic_write(RESULT) as part:
            part.write_text(json.dumps(found, indent=1, sort_keys=True) + '\n')


if __name__ == '__main__':
    if sys.argv[1:2] == ['--in-this-process']:
        print(json.dumps(run(Path(sys.argv[2]))))
    else:
        main(sys.argv[1:])
