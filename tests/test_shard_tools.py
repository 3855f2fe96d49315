"Shards under conditions that a notebook cannot make: real kills, and a store that is no disk."

import os, random, signal, threading, time

import pytest
from tqdm import tqdm

from mobileclip_nb.augment.pipeline import DATACOMPDR, pack, rng_for, sample as draw
from mobileclip_nb.datasets.emoji import write_folder
from mobileclip_nb.core.files import list_shards
from mobileclip_nb.reinforce.filter import FilterSpec, filter_shards
from mobileclip_nb.shards.build import build_shards, inspect_image
from mobileclip_nb.shards.io import read_shard, write_shard
from mobileclip_nb.shards.join import join_shards
from mobileclip_nb.shards.sample import Sample
from mobileclip_nb.shards.verify import show_sample, verify_shards


def contents(folder):
    "All files but the report, which says how many shards were found finished"
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in sorted(folder.rglob('*'))
        if p.is_file() and p.name != 'report.json'
    }


def metadata(at, samples, per=12):
    "What DataCompDR publishes of samples, without embeddings"

    def bare(s):
        return s.but(
            image=None,
            captions=(),
            meta={},
            synthetic=dict(syn_text=('a drawing',)),
            param_aug=tuple(
                pack(DATACOMPDR, draw(DATACOMPDR, inspect_image(s.image)[1], rng_for(0, s.key, i)))
                for i in range(2)
            ),
        )

    for n in range(0, len(samples), per):
        write_shard(f'{at}/{n // per:08d}.tar', map(bare, samples[n : n + per]))


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    at = tmp_path_factory.mktemp('folder')
    write_folder(at, 'heldout', limit=60)
    return at


def killed(work, moment):
    "Do work in a child and kill it at a moment, seconds; whether it was killed before it ended"
    tqdm.set_lock(threading.RLock())  # by default one that a killed child would hold for ever
    if not (pid := os.fork()):
        try:
            work()
        finally:
            os._exit(0)
    time.sleep(moment)
    os.kill(pid, signal.SIGKILL)
    return os.waitpid(pid, 0)[1] == signal.SIGKILL


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='no fork here')
def test_kill_nine(folder, tmp_path):
    "Killed ten times at random moments, then asked again: the bytes of an undisturbed run, and no half file left"

    def built(out):
        return build_shards(folder, out, progress=False, per_shard=7)

    start = time.perf_counter()
    built(tmp_path / 'whole')
    took = time.perf_counter() - start
    samples = [s for u in list_shards(tmp_path / 'whole') for s in read_shard(u)]
    metadata(tmp_path / 'meta', samples)

    def put(out):
        return join_shards(tmp_path / 'whole', tmp_path / 'meta', out, progress=False)

    put(tmp_path / 'joined')
    rng, kills = random.Random(0), 0
    for work, good, out in ((built, 'whole', 'killed'), (put, 'joined', 'killed_join')):
        for _ in range(5):
            kills += killed(lambda: work(tmp_path / out), rng.uniform(0, took))
        begun = (tmp_path / out / 'job.json').exists()  # not if every kill came before it
        place = tmp_path / out / '.done' if begun else tmp_path / out
        half = place / '.abcdefgh.part.json'  # what a kill may leave, seldom
        half.parent.mkdir(parents=True, exist_ok=True)
        half.write_bytes(b'half')
        assert work(tmp_path / out).samples == 60 and contents(tmp_path / out) == contents(
            tmp_path / good
        )
    assert kills > 0


def test_far_away(folder):
    "Build, join, verify and show between stores that are no disk"
    base = 'memory://test_shard_tools'
    assert build_shards(folder, f'{base}/plain', progress=False, per_shard=25).shards == 3
    metadata(f'{base}/meta', [s for u in list_shards(f'{base}/plain') for s in read_shard(u)])
    r = join_shards(f'{base}/plain', f'{base}/meta', f'{base}/joined', progress=False)
    assert (r.ok, r.samples, r.shards) == (True, 60, 5)
    assert (
        build_shards(folder, f'{base}/plain', progress=False, per_shard=25).kept == 3
        and join_shards(f'{base}/plain', f'{base}/meta', f'{base}/joined', progress=False).kept == 5
    )
    v = verify_shards(f'{base}/joined', progress=False)
    assert (v.ok, v.manifest, v.samples) == (True, 'ours', 60)
    assert 'a drawing' in show_sample(f'{base}/joined', 59) and 'crop' in show_sample(
        f'{base}/joined', 59
    )


def test_pictures_beside_shards_are_not_passed_over(tmp_path):
    "One forgotten tar in a folder of pictures, or an output folder in it, must not hide the pictures"
    write_folder(tmp_path / 'in', 'heldout', limit=4)
    build_shards(tmp_path / 'in', tmp_path / 'in' / 'out', progress=False)
    with pytest.raises(ValueError, match='holds pictures .* and shards'):
        build_shards(tmp_path / 'in', tmp_path / 'other', progress=False)


def test_join_keeps_every_shard_and_no_pair_twice(folder, tmp_path):
    "Metadata shards of one name in many folders, a uid in two shards, and a run that goes on: nothing lost, nothing doubled"
    build_shards(folder, tmp_path / 'plain', progress=False)
    samples = [s for u in list_shards(tmp_path / 'plain') for s in read_shard(u)]
    metadata(tmp_path / 'meta' / 'a' / '00', samples[:20], 20)
    metadata(tmp_path / 'meta' / 'b' / '00', samples[10:], 50)
    r = join_shards(tmp_path / 'plain', tmp_path / 'meta', tmp_path / 'out', progress=False)
    assert (r.shards, r.samples, r.left_out) == (2, 60, {'duplicate metadata': 10})
    whole = contents(tmp_path / 'out')
    assert 'a/00/00000000.tar' in whole and verify_shards(tmp_path / 'out', progress=False).ok
    for gone in ('b/00/00000000.tar', 'manifest.jsonl'):
        (tmp_path / 'out' / gone).unlink()
        join_shards(tmp_path / 'plain', tmp_path / 'meta', tmp_path / 'out', progress=False)
        assert contents(tmp_path / 'out') == whole


def test_two_processes_one_hash_seed_each(folder, tmp_path):
    "Bytes do not depend on the order in which Python keeps its sets"
    import subprocess, sys

    code = f"from mobileclip_nb.shards.build import build_shards; build_shards({str(folder)!r}, 'OUT', progress=False, per_shard=30)"
    for seed in '12':
        subprocess.run(
            [sys.executable, '-c', code.replace('OUT', str(tmp_path / seed))],
            check=True,
            env=os.environ | dict(PYTHONHASHSEED=seed, OMP_NUM_THREADS='1'),
        )
    assert contents(tmp_path / '1') == contents(tmp_path / '2')


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='no fork here')
def test_a_killed_filter(tmp_path):
    "Killed at random moments while it scores and while it copies: the same bytes in the end"
    rng = random.Random(1)
    for k in range(12):
        samples = [
            Sample(f'{k:02}{i:03}', captions=('a',), meta=dict(score=rng.randrange(50)))
            for i in range(300)
        ]
        write_shard(tmp_path / f'pool/{k:08d}.tar', samples)
    spec = FilterSpec('score', keep=0.3)

    def work(out):
        return filter_shards(tmp_path / 'pool', tmp_path / out, spec, progress=False)

    start = time.perf_counter()
    assert work('whole').samples == 1080
    took, kills = time.perf_counter() - start, 0
    for _ in range(6):
        kills += killed(lambda: work('killed'), rng.uniform(0, took))
    assert work('killed').samples == 1080
    for name in ('whole', 'killed'):
        (tmp_path / name / '.lock').unlink(missing_ok=True)
    assert contents(tmp_path / 'killed') == contents(tmp_path / 'whole')
    assert kills > 0
