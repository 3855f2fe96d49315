"Reinforcement under fire: other workers, a cluster, kill -9, bad shards, bad samples, full disks; the bytes stay the same."

import hashlib, io, json, os, random, re, resource, signal, subprocess, sys, threading, time
from pathlib import Path

import design
import numpy as np
import pytest
import torch
from PIL import Image

from mobileclip_nb.augment.pipeline import DATACOMPDR, apply, unpack
from mobileclip_nb.cli.main import main
from mobileclip_nb.models.precision import ComputeSpec
from mobileclip_nb.reinforce.captioner import CaptionerSpec
from mobileclip_nb.core.files import read_bytes, write_bytes
from mobileclip_nb.reinforce.run_local import reinforce
from mobileclip_nb.reinforce.recipe import ReinforceSpec, find_reinforce_recipe
from mobileclip_nb.reinforce.annotate import Models
from mobileclip_nb.shards.io import read_manifest, read_shard, write_shard
from mobileclip_nb.shards.sample import Sample, StoreSpec
from mobileclip_nb.reinforce.teachers import TeacherSpec


class Toys:
    "Two teachers with a matrix each; one picture kills whoever sees it, one makes it stumble"

    names, widths, scales = ('left', 'right'), (8, 6), (100.0, 70.0)

    def __init__(self):
        g = torch.Generator().manual_seed(0)
        self.see = [torch.randn(768, w, generator=g) for w in self.widths]
        self.read = [torch.randn(256, w, generator=g) for w in self.widths]

    def rows(self, x, mats):
        return {n: torch.nn.functional.normalize(x @ m, dim=1) for n, m in zip(self.names, mats)}

    def image(self, images):
        if os.environ.get('CRASH') and any(im.getpixel((9, 9)) == (1, 2, 3) for im in images):
            os.kill(os.getpid(), signal.SIGKILL)
        x = (
            torch.stack(
                [
                    torch.from_numpy(np.asarray(im.resize((16, 16)), dtype=np.float32)).flatten()
                    for im in images
                ]
            )
            / 255
            + 0.01
        )
        return {
            n: r * (float('nan') if os.environ.get('STUMBLE') else 1)
            for n, r in self.rows(x, self.see).items()
        }

    def text(self, texts):
        return self.rows(
            torch.stack(
                [
                    torch.bincount(torch.tensor(list(t.encode())), minlength=256).float()
                    for t in texts
                ]
            ),
            self.read,
        )


class Namer:
    def captions(self, images, keys):
        return [
            [f'picture {k}, {im.width} wide', f'number {i}']
            for i, (im, k) in enumerate(zip(images, keys))
        ]


def toys(spec, device):
    return Models(
        (Namer(),) * len(spec.captioners), Toys() if spec.teachers else None, dict(toys='1')
    )


def never(spec, device):
    raise AssertionError('models were loaded for nothing')


TOY = ReinforceSpec(
    name='toy',
    augment=DATACOMPDR.but(side=32),
    n_augmentations=2,
    captioners=(CaptionerSpec(),),
    teachers=(TeacherSpec(), TeacherSpec(model='teacher_nano_b')),
    batch=3,
)


def picture(i, side=40):
    rng = np.random.default_rng(i)
    b = io.BytesIO()
    Image.fromarray(
        np.kron(rng.integers(0, 256, (5, 5, 3)), np.ones((8, 8, 1))).astype(np.uint8)
    ).resize((side, side)).save(b, 'png')
    return b.getvalue()


def plain(start, n):
    return [
        Sample(f'{i:06}', picture(i), 'png', (f'pattern number {i}',))
        for i in range(start, start + n)
    ]


@pytest.fixture(scope='module')
def shards(tmp_path_factory):
    "Twenty small shards in two folders, with the same names in both"
    place = tmp_path_factory.mktemp('in')
    for i in range(20):
        write_shard(place / f'{i // 10:02}/{i % 10:08}.tar', plain(4 * i, 4), StoreSpec())
    return place


def made(out):
    return {
        p.relative_to(out).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in Path(out).rglob('*')
        if p.suffix in ('.tar', '.jsonl') or p.name == 'manifest.json'
    }


@pytest.fixture(scope='module')
def undisturbed(shards, tmp_path_factory):
    out = tmp_path_factory.mktemp('undisturbed') / 'out'
    report = reinforce(shards, out, TOY, load=toys, progress=False)
    assert report.ok and (report.done, report.samples) == (20, 80)
    return made(out)


# ---- the same bytes whoever does the work


@pytest.fixture(scope='module')
def nano(tmp_path_factory):
    "A few shards, and what one worker makes of them with the nano recipe's own models"
    place = tmp_path_factory.mktemp('nano')
    spec = find_reinforce_recipe('nano-emoji').but(n_augmentations=2, batch=4)
    for i in range(6):
        write_shard(place / f'in/{i:08}.tar', plain(100 + 8 * i, 8), StoreSpec())
    assert reinforce(place / 'in', place / 'one', spec, progress=False).ok
    return place, spec


def test_two_workers(nano):
    place, spec = nano
    report = reinforce(place / 'in', place / 'two', spec, workers=2, progress=False)
    assert report.ok and report.done == 6, str(report)
    assert made(place / 'two') == made(place / 'one') and len(made(place / 'one')) == 8


def test_ray(nano):
    pytest.importorskip('ray', reason='ray is not installed; it comes with the extra reinforce')
    from mobileclip_nb.reinforce.run_ray import reinforce_on_ray as on_ray

    place, spec = nano
    report = on_ray(place / 'in', place / 'ray', spec, workers=2, progress=False)
    assert report.ok and report.done == 6, str(report)
    assert made(place / 'ray') == made(place / 'one')
    assert on_ray(place / 'in', place / 'ray', spec, progress=False, load=never).skipped == 6


def test_rows_belong_to_what_they_say(nano):
    "Every sample is complete, also those beyond the first batch; text rows are as many as captions"
    place, spec = nano
    for s in (
        s
        for p in sorted((place / 'one').glob('*.tar'))
        for s in read_shard(p, wants=('param_aug', 'image_emb', 'text_emb', 'synthetic', 'sha256'))
    ):
        assert len(s.param_aug) == len(s.image_emb) == 2 and {
            k: len(v) for k, v in s.text_emb.items()
        } == {'text': 1, 'syn_text': len(s.synthetic['syn_text'])}
        assert s.sha256 == hashlib.sha256(s.image).hexdigest()
    assert read_manifest(place / 'one').samples == 48


# ---- kill -9


def zygote(src):
    "A process that has imported everything and forks a run for each line it reads; it computes nothing itself"
    for line in sys.stdin:
        told = json.loads(line)
        if not (pid := os.fork()):
            if 'limit' in told:
                resource.setrlimit(resource.RLIMIT_FSIZE, (told['limit'],) * 2)
            status = 0
            try:
                status = not reinforce(src, told['out'], TOY, load=toys, progress=False).ok
            except BaseException as e:
                Path(told['out'] + '.error').write_text(f'{type(e).__name__}: {e}')
                status = 3
            finally:
                os._exit(status)
        print(pid, flush=True)
        print(os.waitpid(pid, 0)[1], flush=True)


class Runs:
    "Starts runs quickly, through a zygote"

    def __init__(self, src):
        code = f'import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_reinforce; test_reinforce.zygote({str(src)!r})'
        self.process = subprocess.Popen(
            [sys.executable, '-c', code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | dict(OMP_NUM_THREADS='1'),
        )

    def start(self, **told):
        self.process.stdin.write(json.dumps(told) + '\n')
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def status(self):
        return int(self.process.stdout.readline())

    def close(self):
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait(30)


@pytest.fixture(scope='module')
def runs(shards):
    r = Runs(shards)
    yield r
    r.close()


def finished(out):
    return [
        p.relative_to(out / '.done').as_posix()[:-5] for p in (out / '.done').rglob('*.tar.json')
    ]


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs fork')
def test_ten_times_kill_nine(runs, shards, undisturbed, tmp_path):
    "Killed at ten moments drawn by a seed, and resumed: the bytes of an undisturbed run, and nothing that was finished is touched"
    rng, middle, halves = random.Random(9), 0, 0
    for i in range(10):
        out, after, wait = tmp_path / f'out{i}', rng.randrange(19), rng.uniform(0, 0.03)
        pid, began = runs.start(out=str(out)), time.monotonic()
        while len(finished(out)) < after and time.monotonic() - began < 60:
            time.sleep(0.001)
        time.sleep(wait)
        os.kill(pid, signal.SIGKILL)
        assert runs.status() in (9, 0)
        before = {n: (out / n).stat().st_mtime_ns for n in finished(out)}
        halves += bool(list(out.rglob('.*.part*')))
        middle += 0 < len(before) < 20
        report = reinforce(shards, out, TOY, load=toys, progress=False)
        assert report.ok and report.skipped == len(before) and report.done == 20 - len(before)
        assert {n: (out / n).stat().st_mtime_ns for n in before} == before
        assert made(out) == undisturbed and not list(out.rglob('.*.part*'))
    assert middle >= 5, f'only {middle} of ten kills fell in the middle of a run'


def children(pid):
    return [
        int(c)
        for t in Path(f'/proc/{pid}/task').iterdir()
        for c in (t / 'children').read_text().split()
    ]


def alive(pid):
    try:
        return Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0] != 'Z'
    except OSError:
        return False


@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='looks for processes in /proc')
def test_the_parent_is_killed(shards, undisturbed, tmp_path):
    "Two worker processes end with their parent, instead of writing into the next run's folder"
    code = f'import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\nfrom test_reinforce import *\nif __name__ == "__main__": reinforce({str(shards)!r}, {str(tmp_path / "out")!r}, TOY, workers=2, load=toys, progress=False)'
    p, began = (
        subprocess.Popen([sys.executable, '-c', code], env=os.environ | dict(OMP_NUM_THREADS='1')),
        time.monotonic(),
    )
    while not finished(tmp_path / 'out') and time.monotonic() - began < 90 and p.poll() is None:
        time.sleep(0.002)
    workers = children(p.pid)
    p.kill()
    p.wait()
    assert len(workers) >= 2, workers
    began = time.monotonic()
    while any(map(alive, workers)) and time.monotonic() - began < 20:
        time.sleep(0.05)
    assert not any(map(alive, workers))
    assert reinforce(shards, tmp_path / 'out', TOY, load=toys, progress=False).ok
    assert made(tmp_path / 'out') == undisturbed


def test_a_worker_dies(shards, tmp_path, monkeypatch):
    "Its shard is set aside, the others are done, and the next run tries it again"
    for i in range(3):
        write_shard(tmp_path / f'in/{i}.tar', plain(4 * i, 4), StoreSpec())
    b = io.BytesIO()
    Image.new('RGB', (40, 40), (1, 2, 3)).save(b, 'png')
    write_shard(tmp_path / 'in/killer.tar', [plain(90, 1)[0].but(image=b.getvalue())], StoreSpec())
    steady = TOY.but(
        augment=DATACOMPDR.but(side=32, rand_augment=None)
    )  # the color that kills stays as it is
    monkeypatch.setenv('CRASH', '1')
    report = reinforce(
        tmp_path / 'in', tmp_path / 'out', steady, workers=2, load=toys, progress=False
    )
    assert (
        list(report.failed) == ['killer.tar']
        and 'signal 9' in report.failed['killer.tar']
        and report.done == 3
    )
    monkeypatch.delenv('CRASH')
    again = reinforce(tmp_path / 'in', tmp_path / 'out', steady, load=toys, progress=False)
    assert (
        again.ok
        and (again.done, again.skipped) == (1, 3)
        and not list((tmp_path / 'out/.failed').rglob('*.json'))
    )


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs fork')
def test_a_disk_that_is_full(runs, shards, undisturbed, tmp_path):
    "The run stops with a clear error; what is finished stays, and the next run goes on"
    out = tmp_path / 'out'
    runs.start(out=str(out), limit=6000)  # no file may be larger: a shard is, a marker is not
    assert runs.status() == 3 << 8
    told = Path(f'{out}.error').read_text()
    assert (
        told.startswith('OSError')
        and 'cannot go on writing' in told
        and 'run the same again' in told
    ), told
    assert reinforce(shards, out, TOY, load=toys, progress=False).ok and made(out) == undisturbed


def test_a_disk_that_is_full_for_workers(shards, tmp_path):
    "A worker whose writing fails says so and ends; the parent does not wait for it"
    code = f'''import resource, sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_reinforce import *
resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))
try: reinforce({str(shards)!r}, {str(tmp_path / "out")!r}, TOY, workers=2, load=toys, progress=False)
except OSError as e: print(e)'''
    told = subprocess.run(
        [sys.executable, '-c', code],
        env=os.environ | dict(OMP_NUM_THREADS='1'),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert 'cannot go on writing' in told.stdout and 'run the same again' in told.stdout, (
        told.stdout + told.stderr
    )


# ---- again, otherwise, elsewhere


def test_again_and_otherwise(shards, undisturbed, tmp_path):
    "The same recipe again does nothing; another recipe, other weights or other input under old names are refused by name"
    out = tmp_path / 'out'
    assert reinforce(shards, out, TOY, load=toys, progress=False).done == 20
    stamps = {p: p.stat().st_mtime_ns for p in out.rglob('*.tar*')}
    again = reinforce(shards, out, TOY, load=never, progress=False)
    assert (again.done, again.skipped, again.ok) == (0, 20, True) and stamps == {
        p: p.stat().st_mtime_ns for p in out.rglob('*.tar*')
    }
    with pytest.raises(ValueError, match=r'batch: 3 there, 4 here.*Choose another folder'):
        reinforce(shards, out, TOY.but(batch=4), load=never)
    (out / '01/00000003.tar').unlink()
    with pytest.raises(ValueError, match='other weights'):
        reinforce(
            shards,
            out,
            TOY,
            load=lambda s, d: toys(s, d)._replace(weights=dict(toys='2')),
            progress=False,
        )
    with pytest.raises(ValueError, match='other inputs of the same name'):
        reinforce(other(tmp_path), out, TOY, load=never)
    with pytest.raises(ValueError, match='lie in each other'):
        reinforce(shards, shards / 'out', TOY, load=never)
    assert (
        reinforce(shards, out, TOY, load=toys, progress=False).done == 1
        and made(out) == undisturbed
    )


def other(place):
    "A shard of other content under a name that was used"
    write_shard(place / 'other/00/00000000.tar', plain(500, 4), StoreSpec())
    return place / 'other'


def test_bad_shards(shards, tmp_path):
    "No tar, cut short, not there, without samples: each set aside with its error, and tried again when mended"
    for i in range(5):
        write_shard(tmp_path / f'in/{i}.tar', plain(4 * i, 4), StoreSpec())
    whole = (tmp_path / 'in/1.tar').read_bytes()
    (tmp_path / 'in/1.tar').write_bytes(whole[:5000])
    (tmp_path / 'in/2.tar').write_bytes(b'no tar')
    write_shard(tmp_path / 'in/3.tar', [], StoreSpec())
    report = reinforce(
        f'{tmp_path}/in/{{0..5}}.tar', tmp_path / 'out', TOY, load=toys, progress=False
    )
    assert (
        set(report.failed) == {'1.tar', '2.tar', '3.tar', '5.tar'}
        and report.done == 2
        and not report.ok
    )
    assert (
        'ends early' in report.failed['1.tar']
        and 'empty' in report.failed['3.tar']
        and 'FileNotFoundError' in report.failed['5.tar']
    )
    (tmp_path / 'in/1.tar').write_bytes(whole)
    assert reinforce(tmp_path / 'in', tmp_path / 'out', TOY, load=toys, progress=False).done == 1
    with pytest.raises(FileNotFoundError, match='No shards'):
        reinforce(tmp_path / 'nothing', tmp_path / 'x', TOY)


def test_bad_samples(tmp_path):
    "Those that fail are dropped with their reason, and their neighbors have the rows they would have had"
    good = plain(0, 9)
    bad = [
        good[0].but(key='a', image=b'no picture'),
        good[0].but(key='b', image=good[0].image[:200]),
        good[0].but(key='c', captions=()),
        good[0].but(key='d', image=None),
    ]
    write_shard(tmp_path / 'good/0.tar', good, StoreSpec())
    write_shard(
        tmp_path / 'in/0.tar', [bad[0], *good[:4], bad[1], bad[2], *good[4:], bad[3]], StoreSpec()
    )
    for name in ('good', 'in'):
        report = reinforce(
            tmp_path / name, tmp_path / f'{name}_out', TOY, load=toys, progress=False
        )
    assert report.ok and report.dropped == dict(image=2, missing=2) and report.samples == 9
    marker = json.loads((tmp_path / 'in_out/.done/0.tar.json').read_text())
    assert [d[0] for d in marker['dropped']] == list('abcd')
    assert (tmp_path / 'in_out/0.tar').read_bytes() == (tmp_path / 'good_out/0.tar').read_bytes()


def test_rows_that_are_no_numbers(tmp_path, monkeypatch):
    "A model that answers nothing but NaN is no sample's fault: the shard is set aside, nothing is emptied"
    write_shard(tmp_path / 'in/0.tar', plain(0, 4), StoreSpec())
    monkeypatch.setenv('STUMBLE', '1')
    report = reinforce(tmp_path / 'in', tmp_path / 'out', TOY, load=toys, progress=False)
    assert 'not finite' in report.failed['0.tar'] and not list((tmp_path / 'out').glob('*.tar'))


def test_reinforced_again(tmp_path):
    "Old parameters and rows are replaced together; captions under other keys stay, and are embedded"
    write_shard(tmp_path / 'in/0.tar', plain(0, 5), StoreSpec())
    reinforce(tmp_path / 'in', tmp_path / 'first', TOY, load=toys, progress=False)
    second = TOY.but(
        captioners=(CaptionerSpec(key='syn_text_b'),),
        n_augmentations=3,
        seed=1,
        store=StoreSpec(form='float32'),
    )
    assert reinforce(tmp_path / 'first', tmp_path / 'second', second, load=toys, progress=False).ok
    old, new = (list(read_shard(tmp_path / x / '0.tar')) for x in ('first', 'second'))
    for a, b in zip(old, new, strict=True):
        assert (
            set(b.synthetic) == {'syn_text', 'syn_text_b'} == set(b.text_emb) - {'text'}
            and b.synthetic['syn_text'] == a.synthetic['syn_text']
        )
        assert (
            len(b.param_aug) == len(b.image_emb) == 3
            and b.param_aug[:2] != a.param_aug
            and b.image == a.image
        )


def test_in_memory(shards, undisturbed):
    "Any place that fsspec knows; processes are refused where memory is not shared"
    for p in shards.rglob('*.tar'):
        write_bytes(f'memory://reinforce/in/{p.relative_to(shards).as_posix()}', p.read_bytes())
    report = reinforce(
        'memory://reinforce/in', 'memory://reinforce/out', TOY, load=toys, progress=False
    )
    assert report.ok and report.done == 20
    assert {
        n: hashlib.sha256(read_bytes(f'memory://reinforce/out/{n}')).hexdigest()
        for n in undisturbed
    } == undisturbed
    assert (
        reinforce(
            'memory://reinforce/in', 'memory://reinforce/out', TOY, load=never, progress=False
        ).skipped
        == 20
    )
    with pytest.raises(ValueError, match='memory of this process'):
        reinforce('memory://reinforce/in', 'memory://reinforce/out', TOY, workers=2)


def test_an_interrupt(shards, undisturbed, tmp_path):
    "Ctrl-C drops what is in flight and says how to go on"

    class Impatient(Toys):
        def text(self, texts):
            if 'pattern number 30' in texts:
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.2)
            return super().text(texts)

    before = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a shell that runs us in the background has told us to ignore it
    try:
        with pytest.raises(KeyboardInterrupt, match='of 20 shards.*the same command goes on'):
            reinforce(
                shards,
                tmp_path / 'out',
                TOY,
                load=lambda s, d: Models((Namer(),), Impatient(), dict(toys='1')),
                progress=False,
            )
    finally:
        signal.signal(signal.SIGINT, before)
    assert not list((tmp_path / 'out').rglob('.*.part*')) and len(finished(tmp_path / 'out')) < 20
    assert (
        reinforce(shards, tmp_path / 'out', TOY, load=toys, progress=False).ok
        and made(tmp_path / 'out') == undisturbed
    )


# ---- precision


def test_precision_is_in_recipe_manifest_and_rows(tmp_path, capsys):
    "`--precision bfloat16`: another id, recorded, rows near those of float32 and not equal to them"
    write_shard(tmp_path / 'in/0.tar', plain(0, 6), StoreSpec())
    words = ['--recipe', 'nano-emoji', '--augmentations', '2', '--store', 'float32']
    half = ['--precision', 'bfloat16', '--channels-last']
    rows, ids = {}, {}
    for name, more in (('exact', []), ('half', half)):
        out = tmp_path / name
        assert main(['reinforce', str(tmp_path / 'in'), str(out), *words, *more]) == 0
        rows[name] = np.concatenate([s.image_emb for s in read_shard(out / '0.tar')])
        about = read_manifest(out).about
        ids[name] = about['recipe_id']
        assert about['recipe'] == json.loads((out / 'recipe.json').read_text())['recipe']
    compute = dict(precision='bfloat16', channels_last=True, compile=False)
    assert about['recipe']['compute'] == compute
    assert ids['half'] != ids['exact']
    cosines = (rows['exact'] * rows['half']).sum(1) / 2  # two teachers
    assert 0.99 < cosines.min()
    assert not np.array_equal(rows['exact'], rows['half'])
    capsys.readouterr()
    assert main(['reinforce', str(tmp_path / 'in'), str(tmp_path / 'half'), *words]) == 2
    assert "compute.precision: 'bfloat16' there, 'float32' here" in capsys.readouterr().err


def test_sets_of_earlier_versions_go_on(tmp_path):
    "A folder whose recipe says nothing of a precision is continued, and its manifest keeps its words"
    for i in range(2):
        write_shard(tmp_path / f'in/{i}.tar', plain(4 * i, 4), StoreSpec())
    src, out = tmp_path / 'in', tmp_path / 'out'
    assert reinforce(src, out, TOY, load=toys, progress=False).done == 2
    earlier = json.loads((out / 'recipe.json').read_text())
    del earlier['recipe']['compute']
    (out / 'recipe.json').write_text(json.dumps(earlier))
    (out / '1.tar').unlink()
    assert reinforce(src, out, TOY, load=toys, progress=False).done == 1
    assert read_manifest(out).about['recipe'] == earlier['recipe']
    half = TOY.but(compute=ComputeSpec('float16'))
    with pytest.raises(ValueError, match="compute.precision: 'float32' there, 'float16' here"):
        reinforce(src, out, half, load=never)


# ---- defects of the public generator (nbs/reinforce/08_reference_defects)


def replayed(sample, spec=TOY):
    "What the toy teachers make of a sample's stored parameters, row by row"
    image = Image.open(io.BytesIO(sample.image)).convert('RGB')
    views = [apply(spec.augment, image, unpack(spec.augment, p)) for p in sample.param_aug]
    return torch.cat(list(Toys().image(views).values()), 1).numpy()


EXACT = TOY.but(store=StoreSpec(form='float32'))


def test_rows_beyond_the_first_batch(tmp_path):
    "Seven samples, three in a batch: every image row is that of the view which its parameters replay, every text row that of its text"
    write_shard(tmp_path / 'in/0.tar', plain(0, 7), StoreSpec())
    assert reinforce(tmp_path / 'in', tmp_path / 'out', EXACT, load=toys, progress=False).ok
    samples = list(read_shard(tmp_path / 'out/0.tar'))
    assert len(samples) == 7
    for s in samples:
        np.testing.assert_allclose(s.image_emb, replayed(s), atol=1e-6)
        for key, texts in dict(text=s.captions, **s.synthetic).items():
            rows = torch.cat(list(Toys().text(list(texts)).values()), 1).numpy()
            np.testing.assert_allclose(s.text_emb[key], rows, atol=1e-6)


def test_a_text_that_fails(tmp_path):
    "A sample whose text a teacher cannot embed is dropped after its image was embedded; its neighbors keep their rows"

    class Stumbler(Toys):
        def text(self, texts):
            if 'pattern number 2' in texts:
                raise ValueError('no such word')
            return super().text(texts)

    def load(spec, device):
        return Models((Namer(),), Stumbler(), dict(toys='1'))

    write_shard(tmp_path / 'in/0.tar', plain(0, 7), StoreSpec())
    report = reinforce(tmp_path / 'in', tmp_path / 'out', EXACT, load=load, progress=False)
    assert report.ok
    assert report.dropped == dict(model=1)
    samples = list(read_shard(tmp_path / 'out/0.tar'))
    assert [s.key for s in samples] == [f'{i:06}' for i in (0, 1, 3, 4, 5, 6)]
    for s in samples:
        np.testing.assert_allclose(s.image_emb, replayed(s), atol=1e-6)


def test_a_batch_without_an_image(tmp_path):
    "A whole batch of samples without a usable image, in the middle of a shard"
    good = plain(0, 6)
    bad = [good[0].but(key=f'bad{i}', image=b'no picture') for i in range(TOY.batch)]
    write_shard(tmp_path / 'in/0.tar', [*good[:3], *bad, *good[3:]], StoreSpec())
    report = reinforce(tmp_path / 'in', tmp_path / 'out', TOY, load=toys, progress=False)
    assert report.ok
    assert (report.samples, report.dropped) == (6, dict(image=TOY.batch))


@pytest.mark.parametrize('layout', ['current', 'legacy'])
def test_several_true_captions(tmp_path, layout):
    "A list of true captions is written, embedded row by row and read again"
    true = ('a fox', 'a red fox', 'an animal')
    write_shard(tmp_path / 'in/0.tar', [plain(0, 1)[0].but(captions=true)], StoreSpec())
    spec = TOY.but(store=StoreSpec(form='float32', layout=layout))
    assert reinforce(tmp_path / 'in', tmp_path / 'out', spec, load=toys, progress=False).ok
    (s,) = read_shard(tmp_path / 'out/0.tar')
    assert s.captions == true
    assert {k: len(rows) for k, rows in s.text_emb.items()} == dict(text=3, syn_text=2)
    rows = torch.cat(list(Toys().text(list(true)).values()), 1).numpy()
    np.testing.assert_allclose(s.text_emb['text'], rows, atol=1e-6)


def test_names_that_hold_emb(tmp_path):
    "Keys of captions and fields of metadata with `emb` in them are what they are, also in a second run"
    source = plain(0, 2)[0].but(meta=dict(member_id='m1', embargo=True))
    write_shard(tmp_path / 'in/0.tar', [source], StoreSpec())
    key = 'syn_text_emb_b'
    spec = TOY.but(captioners=(CaptionerSpec(key=key),))
    assert reinforce(tmp_path / 'in', tmp_path / 'one', spec, load=toys, progress=False).ok
    assert reinforce(tmp_path / 'one', tmp_path / 'two', TOY, load=toys, progress=False).ok
    (s,) = read_shard(tmp_path / 'two/0.tar')
    assert s.meta == source.meta
    assert set(s.synthetic) == {key, 'syn_text'}
    assert {k: len(rows) for k, rows in s.text_emb.items()} == {'text': 1, key: 2, 'syn_text': 2}


def test_written_and_not_marked(shards, undisturbed, tmp_path):
    "A shard that was written before its worker died is written again under its own name, with the same bytes"
    out = tmp_path / 'out'
    assert reinforce(shards, out, TOY, load=toys, progress=False).ok
    (out / '.done/01/00000004.tar.json').unlink()
    assert reinforce(shards, out, TOY, load=toys, progress=False).done == 1
    assert made(out) == undisturbed


def test_names_that_begin_alike(tmp_path):
    "A shard whose name begins another's is not taken for it"
    for i, name in enumerate(('1.tar', '10.tar', '1.tar.tar')):
        write_shard(tmp_path / f'in/{name}', plain(4 * i, 4), StoreSpec())
    for src, done in (('in/10.tar', 1), ('in/1.tar.tar', 1), ('in', 1)):
        report = reinforce(tmp_path / src, tmp_path / 'out', TOY, load=toys, progress=False)
        assert report.ok
        assert report.done == done
    assert [p.name for p in sorted((tmp_path / 'out').glob('*.tar'))] == [
        '1.tar',
        '1.tar.tar',
        '10.tar',
    ]


def test_stages_overlap(shards, monkeypatch, tmp_path):
    "While the models compute the first shard, the second one is already read"
    from mobileclip_nb.reinforce import run_local

    second = threading.Event()

    def read(url, *words, **more):
        if url.endswith('00000001.tar'):
            second.set()
        return read_shard(url, *words, **more)

    class Patient(Toys):
        seen = []

        def image(self, images):
            self.seen.append(second.wait(60))
            return super().image(images)

    monkeypatch.setattr(run_local, 'read_shard', read)
    place = f'{shards}/00/{{00000000..00000001}}.tar'
    report = reinforce(
        place,
        tmp_path / 'out',
        TOY,
        load=lambda s, d: Models((Namer(),), Patient(), dict(toys='1')),
        progress=False,
    )
    assert report.done == 2
    assert Patient.seen[0]


def test_no_credential_is_written(tmp_path, monkeypatch, caplog, capfd):
    "Credentials of the environment and of a URL stand in no log, no message and no file"
    monkeypatch.setenv('AWS_SECRET_ACCESS_KEY', 'hunter2')
    caplog.set_level('DEBUG')
    write_shard(tmp_path / 'in/0.tar', plain(0, 3), StoreSpec())
    report = reinforce(tmp_path / 'in', tmp_path / 'out', TOY, load=toys, progress=False)
    assert report.ok
    with pytest.raises(Exception) as e:
        reinforce('s3://me:hunter2@nowhere.invalid/in?key=hunter2', tmp_path / 'x', TOY, load=never)
    said = [str(report), str(e.value), caplog.text, *capfd.readouterr()]
    assert not [text for text in said if 'hunter2' in text]
    files = [p for p in tmp_path.rglob('*') if p.is_file()]
    assert len(files) > 4
    assert not [p.name for p in files if b'hunter2' in p.read_bytes()]


def test_reference_defects_name_their_tests():
    "Each of the 22 defects has a test, and every test that the table names exists"
    nb = next(n for n in design.notebooks() if n.name == 'reinforce/08_reference_defects')
    table = next(c.source for c in nb.prose if '| # |' in c.source)
    rows = [line.split('|')[1:-1] for line in table.splitlines() if re.match(r'\| *\d', line)]
    assert [int(row[0]) for row in rows] == list(range(1, 23))
    cells = {f'{n.name}#{c.id}' for n in design.notebooks() for c in n.code}
    for row in rows:
        named = re.findall(r'`([^`]+)`', row[-1])
        assert named, row
        for name in named:
            file, _, test = name.partition('::')
            text = (design.ROOT / file).read_text(encoding='utf-8') if test else ''
            assert name in cells or f'\ndef {test}(' in text, name
