"Engines: what a Ray cluster makes is what one process makes, to the byte; a job that kills its actors is set aside."

import os, signal

import pytest

pytest.importorskip('ray', reason='ray is not installed; it comes with the extra reinforce')

from mobileclip_nb.core.processes import Event
from mobileclip_nb.core.ray import Engine, run_actors, start_cluster
from mobileclip_nb.datasets.emoji import write_folder
from mobileclip_nb.inference.embed import embed
from mobileclip_nb.inference.embed_many import embed_folder, embed_shards
from mobileclip_nb.reinforce.filter import FilterSpec, filter_shards
from mobileclip_nb.reinforce.teachers import TeacherSpec
from mobileclip_nb.shards.build import build_shards
from mobileclip_nb.shards.io import read_shard, write_shard
from mobileclip_nb.shards.join import join_shards
from mobileclip_nb.shards.join_ray import join_on_ray

RAY = Engine('ray', 2)


@pytest.fixture(scope='module')
def home(tmp_path_factory):
    "Forty pictures, shards of them with a third of the captions wrong, and metadata of these"
    at = tmp_path_factory.mktemp('engines')
    write_folder(at / 'pictures', 'train', limit=40)
    build_shards('emoji', at / 'pool', noise=1 / 3, per_shard=10, limit=40, progress=False)
    samples = [s for k in range(4) for s in read_shard(at / f'pool/{k:08d}.tar')]
    metas = [
        s.but(image=None, captions=(), meta={}, synthetic=dict(syn_text=('a',))) for s in samples
    ]
    metas = metas[1:] + [metas[3].but(key='again'), metas[5].but(key='other', uid='nobody')]
    for k in range(3):
        write_shard(at / f'meta/{k:08d}.tar', metas[k::3])
    os.environ['RAY_memory_monitor_refresh_ms'] = '0'  # neighbours' memory is no test of ours
    os.environ['RAY_worker_niceness'] = '0'  # by default 15, and workers starve beside other tests
    with start_cluster(None, 2):  # one cluster for all tests; it is joined, not started again
        yield at


def contents(folder):
    found = sorted(p for p in folder.rglob('*') if p.is_file())
    names = {p: str(p.relative_to(folder)) for p in found if p.name not in ('report.json', '.lock')}
    return {name: p.read_bytes() for p, name in names.items()}


def test_filter(home):
    spec = FilterSpec(teacher=TeacherSpec(), keep=0.3)
    local = filter_shards(home / 'pool', home / 'filter-local', spec, progress=False)
    there = filter_shards(home / 'pool', home / 'filter-ray', spec, RAY, progress=False)
    assert there.samples == local.samples == 12
    assert contents(home / 'filter-ray') == contents(home / 'filter-local')


def test_join(home):
    places = home / 'pool', home / 'meta'
    local = join_shards(*places, home / 'join-local', progress=False)
    there = join_on_ray(*places, home / 'join-ray', progress=False)
    assert local.samples == 39
    assert local.left_out == {'duplicate metadata': 1, 'missing image': 1, 'missing metadata': 1}
    assert there.left_out == local.left_out
    assert contents(home / 'join-ray') == contents(home / 'join-local')
    for name in ('00000001.tar', '.done/00000001.tar.json', 'report.json'):
        (home / 'join-ray' / name).unlink()
    assert join_on_ray(*places, home / 'join-ray', progress=False).kept == 2
    assert contents(home / 'join-ray') == contents(home / 'join-local')


def test_embed(home):
    embed(home / 'pictures', home / 'local.npz', batch=8)
    embed_folder(home / 'pictures', home / 'ray.npz', batch=8, engine=RAY)
    assert (home / 'ray.npz').read_bytes() == (home / 'local.npz').read_bytes()
    embed_shards(home / 'pool', home / 'tables-local')
    report = embed_shards(home / 'pool', home / 'tables-ray', engine=RAY)
    assert (report.shards, report.images) == (4, 40)
    assert contents(home / 'tables-ray') == contents(home / 'tables-local')


def test_a_job_that_kills_its_actors(home):
    "It costs two actors and is set aside by name; the other jobs are done"

    class Task:
        def __init__(self, name):
            self.name = name

    class Fragile:
        def ready(self):
            return 'ready'

        def run(self, job):
            if job.name == 'bad':
                os.kill(os.getpid(), signal.SIGKILL)
            return [Event('done', job.name)]

    jobs = [Task(name) for name in ('good', 'bad', 'fine')]
    lost = lambda job, why: Event('failed', job.name, why)
    events = list(run_actors(jobs, 1, Fragile, (), lost))
    assert {e.name: e.kind for e in events[1:]} == dict(good='done', bad='failed', fine='done')
    assert '2 actors were lost' in next(e.value for e in events if e.kind == 'failed')
