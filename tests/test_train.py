"The loop where the world meets it: killed, cut short, out of data, one of two."

import contextlib, json, multiprocessing, os, random, shutil, signal, socket, subprocess, sys, time, warnings
from pathlib import Path

import pytest, torch
from torch import nn

from mobileclip_nb.loaders.batches import Batches, BatchSpec, pair_data
from mobileclip_nb.blocks.reparam import randomize_
from mobileclip_nb.models.clip import CLIP
from mobileclip_nb.train.distributed import current_ranks
from mobileclip_nb.models.mci import MCI, MCi
from mobileclip_nb.loaders.compose import Slice
from mobileclip_nb.models.text_repmixer import TextRepMixer
from mobileclip_nb.models.text_transformer import TextSpec
from functools import partial

from mobileclip_nb.train.loop import TrainSpec, plain, train as train_
from mobileclip_nb.train.checkpoint import checkpoints, load_run
from mobileclip_nb.train.config import LossSpec
from mobileclip_nb.train.objective import load_online
from mobileclip_nb.train.process_group import group

OLD = Path(__file__).parent / 'fixtures/v1'
train = partial(train_, watch=())  # TensorBoard takes seconds to import
LIMIT = 240  # seconds that processes may take on a busy machine; then they are ended
SPEC = TrainSpec(steps=8, warmup=2, lr=2e-3, ema=0.9)


class Words(nn.Module):
    "The text tower of the stored checkpoint"

    def __init__(self, rows, out):
        super().__init__()
        self.token = nn.Embedding(rows, out)

    def forward(self, t):
        return self.token(t % len(self.token.weight)).mean(1)


def toy(seed=0):
    "The model of the stored checkpoint"
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return CLIP(
            nn.Sequential(nn.Conv2d(3, 4, 4, 4), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 4)),
            Words(32, 4),
        )


def small(seed=0, drop=0.3):
    "A model of the real kind, with stochastic depth"
    text = TextSpec(
        width=32, heads=2, layers=1, conv_blocks=1, kernel=5, context=8, rows=40, layer_scale=0.1
    )
    model = randomize_(
        CLIP(
            MCi(MCI['mci_nano'].but(depths=(1, 1, 1, 1), dims=(8, 8, 16, 32), drop=drop), 16),
            TextRepMixer(text, 16),
        ),
        seed,
    )
    nn.init.constant_(model.logit_scale, 2.6)
    return model


def data(side=32, n=48, batch=8, context=8):
    g = torch.Generator().manual_seed(0)
    return Batches(
        pair_data(
            torch.randint(256, (n, side, side, 3), generator=g).byte(),
            [f'thing {i}' for i in range(n)],
        ),
        BatchSpec(batch=batch, context=context),
    )


def losses(history):
    return [r['loss'] for r in history]


def same(a, b):
    return all(
        torch.equal(x, y)
        for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


# Processes of our own: a server imports everything once and forks, so that a start costs milliseconds.
# `torch.multiprocessing.spawn` would end a rank when the other fails, and `test_a_rank_fails` reads what both report.
def server():
    s = multiprocessing.get_context('forkserver')
    s.set_forkserver_preload(['test_train'])
    return s


def ended(*ps):
    "Wait for processes, and end them when their time is over"
    deadline = time.time() + LIMIT
    for p in ps:
        p.join(max(deadline - time.time(), 0))
    late = [p for p in ps if p.is_alive()]
    for p in late:
        p.kill()
        p.join()
    assert not late, 'a process hung'
    return [p.exitcode for p in ps]


def quietly(out, k, work, *words):
    "In a child: one thread, and what it says in a file"
    torch.set_num_threads(1)
    with open(f'{out}/said{k}', 'a') as f, contextlib.redirect_stderr(f):
        try:
            work(*words)
        except BaseException as e:
            print(f'{type(e).__name__}: {e}', file=f, flush=True)
            raise SystemExit(2)


def test_a_checkpoint_of_the_first_format(tmp_path):
    "A run that an older version began goes on here, to the losses that it had there"
    shutil.copytree(OLD / 'run', tmp_path / 'run')
    spec = TrainSpec(steps=6, warmup=2, lr=1e-2, ema=0.9, seed=3)
    assert load_run(tmp_path / 'run')['spec'] == spec
    run = train(toy(5), data(8, 16, 4), spec, tmp_path / 'run', resume=True, progress=False)
    assert run.new == 3 and losses(run.history) == pytest.approx(
        json.loads((OLD / 'losses.json').read_text()), abs=1e-4
    )


def alone(out):
    train(
        small(9),
        data(),
        SPEC.but(steps=11),
        f'{out}/run',
        save_every=1,
        resume=True,
        progress=False,
    )


def test_killed_anywhere(tmp_path):
    "kill -9 at drawn moments, saving included, and go on: the losses and weights of a run that was left alone, bit for bit"
    torch.set_num_threads(1)
    whole, draw, kills = (
        train(small(9), data(), SPEC.but(steps=11), progress=False),
        random.Random(4),
        0,
    )
    for k in range(12):
        p = server().Process(target=quietly, args=(tmp_path, 0, alone, tmp_path))
        p.start()
        log, seen = (
            tmp_path / 'run/log.jsonl',
            len(checkpoints(tmp_path / 'run')) and load_run(tmp_path / 'run')['step'],
        )
        deadline = time.time() + LIMIT
        while (
            kills < 3
            and p.is_alive()
            and time.time() < deadline
            and not (log.exists() and len(log.read_text().splitlines()) >= seen + 2)
        ):
            time.sleep(0.002)
        if kills == 3 or not p.is_alive():
            break
        time.sleep(draw.uniform(0, 0.05))
        p.kill()
        p.join()
        kills += 1
    assert ended(p) == [0] and kills == 3, (tmp_path / 'said0').read_text()
    held = load_run(tmp_path / 'run')
    assert losses(held['history']) == losses(whole.history)
    assert all(torch.equal(held['model'][n], t) for n, t in whole.raw.state_dict().items())
    assert len(checkpoints(tmp_path / 'run')) == 3 and [
        json.loads(l)['step'] for l in log.read_text().splitlines()
    ] == list(range(11))


def test_a_checkpoint_cut_short(tmp_path):
    "The one before it is taken, with a warning, and the run ends at the same numbers; with none left the error is clear"

    def stop(model, batch, spec, calls=[]):
        calls.append(1)
        if len(calls) == 8:
            raise MemoryError  # in the middle of a step, so that nothing is saved
        return plain(model, batch, spec)

    whole = train(small(), data(), SPEC, progress=False)
    with pytest.raises(MemoryError):
        train(small(), data(), SPEC, tmp_path, save_every=2, objective=stop, progress=False)
    newest = tmp_path / 'state.pt'
    newest.write_bytes(newest.read_bytes()[:-4000])
    with pytest.warns(UserWarning, match="'state.pt' cannot be read.*of step 4"):
        run = train(small(2), data(), SPEC, tmp_path, resume=True, progress=False)
    assert (
        losses(run.history) == losses(whole.history)
        and run.new == 4
        and same(run.model, whole.model)
    )
    for p in checkpoints(tmp_path):
        p.write_bytes(b'PK')
    with pytest.raises(ValueError, match='cannot be read as a checkpoint.*Start anew'):
        train(small(2), data(), SPEC, tmp_path, resume=True, progress=False)


class Files:
    "A source that reads a file a step, as one that streams shards does"

    def __init__(self, folder):
        self.of, self.folder, self.batch, self.id = data(), folder, 8, 'files'
        for k in range(SPEC.steps):
            (folder / f'{k}.tar').write_text('')

    def since(self, step):
        for k in range(step, SPEC.steps):
            (self.folder / f'{k}.tar').read_text()
            yield self.of.batch_at(k)


def test_data_that_vanish(tmp_path):
    "A shard that is deleted in the middle of a run is named; nothing is lost; when it is back, the run goes on"
    (tmp_path / 'shards').mkdir()
    files = Files(tmp_path / 'shards')
    (tmp_path / 'shards/5.tar').unlink()
    with pytest.raises(FileNotFoundError, match='5.tar'):
        train(small(), files, SPEC, tmp_path / 'run', save_every=2, progress=False)
    assert load_run(tmp_path / 'run')['step'] == 5  # not a step is lost, whatever save_every says
    run = train(
        small(1), Files(tmp_path / 'shards'), SPEC, tmp_path / 'run', resume=True, progress=False
    )
    assert run.new == 3 and losses(run.history) == losses(
        train(small(), data(), SPEC, progress=False).history
    )


def test_a_shard_that_vanishes(tmp_path, monkeypatch):
    "The same with the reader of shards: named, saved, and the same losses when the shard is back"
    from test_stream import SPEC as STREAM, shards
    from mobileclip_nb.loaders.stream import Stream

    place, spec = shards(tmp_path / 's', (24, 24, 24)), SPEC.but(steps=6, warmup=1, ema=0.0)

    def stream(memory):
        return Stream(place, STREAM.but(batch=12, context=8, rows=False), memory=tmp_path / memory)

    whole = train(small(), stream('a'), spec, progress=False)
    broken, seen = stream('b'), Stream.raw_since

    def raw_since(self, step=0):
        for k, b in enumerate(seen(self, step), step):
            yield b
            if k == 1:
                for f in (tmp_path / 's').glob('*.tar'):
                    f.rename(f.with_suffix('.gone'))

    monkeypatch.setattr(Stream, 'raw_since', raw_since)
    with pytest.raises(FileNotFoundError, match='.tar') as told:
        train(small(), broken, spec, tmp_path / 'run', progress=False)
    at = load_run(tmp_path / 'run')['step']
    assert (
        2 <= at < 6
        and f'stopped after step {at} of 6; resume=True goes on' in told.value.__notes__[0]
    )
    monkeypatch.undo()
    for f in (tmp_path / 's').glob('*.gone'):
        f.rename(f.with_suffix('.tar'))
    again = train(small(3), stream('c'), spec, tmp_path / 'run', resume=True, progress=False)
    assert losses(again.history) == losses(whole.history) and same(again.model, whole.model)


# Signals to a whole group of processes, the loop's and its readers': what a cluster or torchrun sends.
def grouped(out, tokens=None):
    "Train from shards with two readers"
    from test_stream import SPEC as STREAM
    from mobileclip_nb.loaders.stream import Stream

    torch.set_num_threads(1)
    reader = Stream(
        out / 's',
        STREAM.but(batch=12, context=8, rows=False),
        workers=2,
        memory=out / 'm',
        tokens=tokens,
    )
    try:
        train(small(), reader, SPEC.but(steps=100_000), out / 'run', progress=False)
    except KeyboardInterrupt as e:
        print(f'stopped well: {e}', file=sys.stderr, flush=True)


def sleeper(texts, context):
    time.sleep(600)  # a read that hangs


def group_of(pgid):
    "Processes of a group that are no zombies"
    stats = [
        p.read_text().rpartition(')')[2].split()
        for p in Path('/proc').glob('[0-9]*/stat')
        if p.exists()
    ]
    return sum(int(s[2]) == pgid and s[0] != 'Z' for s in stats)


def until(what, seconds=60):
    deadline = time.time() + seconds
    while not what() and time.time() < deadline:
        time.sleep(0.02)
    return what()


@pytest.fixture
def band(tmp_path):
    "Start a program in a group of its own, wait until it is at work, and end what a test has left of it"
    from test_stream import shards

    shards(tmp_path / 's', (24, 24))
    log, ps = tmp_path / 'run/log.jsonl', []

    def start(tokens='None'):
        code = f'import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\nfrom test_train import *\nif __name__ == "__main__": grouped(Path({str(tmp_path)!r}), {tokens})'
        with open(tmp_path / 'said', 'a') as f:
            ps.append(
                subprocess.Popen(
                    [sys.executable, '-c', code],
                    env=os.environ | dict(OMP_NUM_THREADS='1'),
                    stderr=f,
                    start_new_session=True,
                )
            )

        def busy():
            return group_of(ps[0].pid) >= 3 and (
                tokens != 'None' or log.exists() and len(log.read_text().splitlines()) > 3
            )

        assert until(busy), (tmp_path / 'said').read_text()
        return ps[0]

    yield start
    for p in ps:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(p.pid, signal.SIGKILL)
        p.wait()


@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='looks for processes in /proc')
@pytest.mark.parametrize(
    'numbers',
    [(signal.SIGTERM,), (signal.SIGTERM,) * 2, (signal.SIGINT,)],
    ids=['TERM', 'twice', 'INT'],
)
def test_a_signal_to_the_group(tmp_path, band, numbers):
    "The readers do not die before the loop, which saves its last step and says so, and nobody else says a word; Slurm and torchrun together send it twice"
    p = band()
    for n in numbers:
        os.killpg(p.pid, n)
        time.sleep(0.005)
    assert p.wait(60) == 0 and until(lambda: not group_of(p.pid), 4), (
        tmp_path / 'said'
    ).read_text()
    said, step = (tmp_path / 'said').read_text().splitlines(), load_run(tmp_path / 'run')['step']
    assert said == [f'stopped well: stopped after step {step} of 100000; resume=True goes on'], said
    assert len((tmp_path / 'run/log.jsonl').read_text().splitlines()) == step


@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='looks for processes in /proc')
@pytest.mark.parametrize('tokens', ('None', 'sleeper'))
def test_readers_end_with_the_loop(band, tokens):
    "kill -9 to the loop's process alone: no reader is left, in the middle of a read or not"
    p = band(tokens)
    if tokens == 'sleeper':
        time.sleep(1)  # the readers are in the read that hangs
    p.kill()
    p.wait()
    assert until(lambda: not group_of(p.pid), 4)


def test_savings_change_nothing():
    "Gradient checkpointing, bit for bit, statistics included; what is frozen stays, statistics included"
    a, b = (
        train(small(), data(), SPEC.but(checkpointing=c), progress=False) for c in (False, True)
    )
    assert losses(a.history) == losses(b.history) and same(a.raw, b.raw) and same(a.model, b.model)
    start, held = small(), train(small(), data(), SPEC.but(frozen='image'), progress=False).raw
    assert same(start.image, held.image) and not same(start.text, held.text)
    still = train(small(), data(), SPEC.but(frozen_norm=True), progress=False).raw.state_dict()
    assert all(
        torch.equal(t, still[n]) for n, t in start.state_dict().items() if 'running' in n
    ) and not torch.equal(still['image.head.weight'], start.image.head.weight)


def test_teachers_who_are_asked():
    "Two teachers at training time, through the loop: the losses of the same teachers called as an objective, and scales and widths of their own"
    asked = LossSpec(
        clip=0.5,
        distill=0.5,
        scales=(100.0,),
        online=(('teacher_nano_a', 'emoji'), ('teacher_nano_b', 'emoji')),
    )
    spec = SPEC.but(steps=2, warmup=1, ema=0.0, loss=asked)
    a = train(small(drop=0.0), data(batch=4), spec, progress=False)
    b = train(small(drop=0.0), data(batch=4), spec, objective=load_online(asked), progress=False)
    plainly = train(small(drop=0.0), data(batch=4), spec.but(loss=LossSpec()), progress=False)
    assert (
        losses(a.history) == pytest.approx(losses(b.history), abs=1e-5)
        and abs(a.history[0]['loss'] - plainly.history[0]['loss']) > 1e-3
    )


# Two processes.
TAUGHT = LossSpec(clip=0.25, distill=0.75, widths=(5, 7), scales=(70.0, 60.0))


class Taught(Slice):
    "With rows of two teachers"

    def since(self, start=0):
        rows = [
            torch.cat(
                [
                    nn.functional.normalize(
                        torch.randn(48, w, generator=torch.Generator().manual_seed(k + w)), dim=1
                    )
                    for w in (5, 7)
                ],
                1,
            )
            for k in range(2)
        ]
        for b in super().since(start):
            yield b._replace(image_emb=rows[0][b.index], text_emb=rows[1][b.index])


JOINT = SPEC.but(steps=3, warmup=1, frozen_norm=True, lr=1e-3)


def pair(tmp_path, work, *words):
    "Two ranks on gloo; their exit codes, and what they said"
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    ps = [
        server().Process(target=quietly, args=(tmp_path, k, ranked, port, k, work, *words))
        for k in range(2)
    ]
    for p in ps:
        p.start()
    return ended(*ps), [(tmp_path / f'said{k}').read_text() for k in range(2)]


def ranked(port, rank, work, *words):
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE='2',
        LOCAL_RANK=str(rank),
        MASTER_ADDR='127.0.0.1',
        MASTER_PORT=str(port),
    )
    with group(minutes=2) as ranks:
        work(ranks, *words)


def hear(step, rank):
    "A source's wrapper that sends its own process SIGTERM while a step's batch is made"

    class Told(Slice):
        def since(self, start=0):
            for k, b in enumerate(super().since(start), start):
                if (k, current_ranks().rank) == (step, rank):
                    signal.raise_signal(signal.SIGTERM)
                yield b

    return Told


def both_ways(ranks, out):
    "DDP and FSDP2, each left alone, and each ended by a signal to one rank and resumed"

    def go(spec, folder, kind=Slice, seed=0, **how):
        return train(
            small(seed, drop=0.0),
            kind(data(batch=8), ranks.rank, ranks.world),
            spec,
            out / folder,
            progress=False,
            **how,
        )

    for way in ('ddp', 'fsdp'):
        spec = JOINT.but(parallel=way, checkpointing=way == 'fsdp')
        run = go(
            spec, way, judge=lambda m: dict(norm=m.logit_scale.item()), ledger=out / 'ledger.jsonl'
        )
        torch.save(
            dict(
                losses=losses(run.history),
                norms=[r['norm'] for r in run.history],
                model=run.model.state_dict(),
                raw=run.raw.state_dict(),
                judged=run.judged,
            ),
            out / f'{way}{ranks.rank}.pt',
        )
        try:
            go(spec, f'{way}-stopped', hear(1, 1))
            raise AssertionError('not stopped')
        except KeyboardInterrupt as e:
            assert 'stopped after step 1 of 3' in str(e), str(e)
        again = go(spec, f'{way}-stopped', seed=7, resume=True)
        assert (
            losses(again.history) == losses(run.history)
            and same(again.model, run.model)
            and again.new == 2
        )
    once, parts = (go(JOINT.but(loss=TAUGHT, accumulate=k), f'parts{k}', Taught) for k in (1, 2))
    assert (
        max(abs(x - y) for x, y in zip(losses(once.history), losses(parts.history), strict=True))
        < 1e-4
    )
    assert all(
        torch.allclose(x, y, atol=2e-3)
        for x, y in zip(once.raw.parameters(), parts.raw.parameters(), strict=True)
    )
    live = go(
        JOINT.but(steps=2, frozen_norm=False, sync_norm=True), 'live'
    )  # statistics of all ranks
    assert not any(
        'Sync' in type(m).__name__ for m in live.raw.modules()
    )  # and the caller's model as it was
    torch.save(
        dict(losses=losses(live.history), raw=live.raw.state_dict()), out / f'live{ranks.rank}.pt'
    )


def test_two_ranks_are_one(tmp_path):
    "Two processes train the model that one trains, by DDP and by FSDP2, stop together and resume to the same bits"
    codes, said = pair(tmp_path, both_ways, tmp_path)
    assert codes == [0, 0], said
    one = train(small(drop=0.0), data(), JOINT, progress=False)
    for way in ('ddp', 'fsdp'):
        a, b = (torch.load(tmp_path / f'{way}{k}.pt', weights_only=True) for k in range(2))
        assert (
            a['losses'] == b['losses']
            and a['norms'] == b['norms']
            and a['judged'] == b['judged']
            and a['judged'][0]['step'] == 3
        )
        assert a['losses'] == pytest.approx(losses(one.history), abs=1e-3) and a[
            'norms'
        ] == pytest.approx([r['norm'] for r in one.history], rel=1e-2)
        assert all(torch.equal(t, b['raw'][n]) for n, t in a['raw'].items()) and list(
            a['raw']
        ) == list(one.raw.state_dict())
        assert all(
            torch.allclose(t.float(), one.raw.state_dict()[n].float(), atol=5e-3)
            for n, t in a['raw'].items()
        )
    live, solo = (
        torch.load(tmp_path / 'live0.pt', weights_only=True),
        train(small(drop=0.0), data(), JOINT.but(steps=2, frozen_norm=False), progress=False),
    )
    assert live['losses'] == pytest.approx(losses(solo.history), abs=1e-3)
    assert all(
        torch.allclose(t.float(), solo.raw.state_dict()[n].float(), atol=5e-3)
        for n, t in live['raw'].items()
    )
    assert (
        len(json.loads((tmp_path / 'ledger.jsonl').read_text().splitlines()[0])['metrics'])
        and (tmp_path / 'ddp/state.pt').exists()
    )
    assert [
        json.loads(l)['spec']['ranks'] for l in (tmp_path / 'ledger.jsonl').read_text().splitlines()
    ] == [2, 2]
    with pytest.raises(ValueError, match='started with 2 ranks and now there are 1'):
        train(
            small(drop=0.0),
            data(),
            JOINT.but(parallel='ddp'),
            tmp_path / 'ddp-stopped',
            resume=True,
            progress=False,
        )


def failing(ranks, out, how):
    "One rank fails in the third step"

    class Bad(Slice):
        def since(self, start=0):
            for k, b in enumerate(super().since(start), start):
                if k == 2 and self.rank == 1:
                    if how == 'killed':
                        os.kill(os.getpid(), signal.SIGKILL)
                    if how == 'raises':
                        raise FileNotFoundError('Nothing at 00000002.tar to read')
                    b = b._replace(image=b.image * float('nan'))
                yield b

    train(
        small(drop=0.0),
        Bad(data(), ranks.rank, ranks.world),
        JOINT,
        out / how,
        save_every=1,
        progress=False,
    )


@pytest.mark.parametrize(
    'how,first,second',
    [
        ('killed', 'Rank 0 lost another one', ''),
        ('raises', "Rank 0 lost another one's data", 'FileNotFoundError: Nothing at 00000002.tar'),
        ('not finite', 'FloatingPointError: Step 2', 'batch_at(2) of rank 1, pictures'),
    ],
)
def test_a_rank_fails(tmp_path, how, first, second):
    "Nobody hangs; the rank that failed says why, the other one that it was not itself; the last checkpoint stands"
    codes, said = pair(tmp_path, failing, tmp_path, how)
    assert 0 not in codes and first in said[0] and second in said[1], said
    assert load_run(tmp_path / how)['step'] == 2


def test_torchrun(tmp_path):
    "The command line of the notebook, short: two processes, a folder of pictures, a checkpoint, and again with --resume"
    from PIL import Image

    for i in range(16):
        Image.new('RGB', (64, 64), (16 * i, 255 - 16 * i, 40)).save(tmp_path / f'{i}.png')
    (tmp_path / 'captions.csv').write_text(
        'image,caption\n' + ''.join(f'{i}.png,color {i}\n' for i in range(16)), encoding='utf-8'
    )
    line = [
        sys.executable,
        '-m',
        'torch.distributed.run',
        '--standalone',
        '--nproc_per_node',
        '2',
        '-m',
        'mobileclip_nb.train',
        'nano-emoji',
        '--data',
        '.',
        '--scale',
        'smoke',
        '--set',
        'stream.batch=8',
        '--steps',
        '2',
        '--set',
        'train.warmup=1',
        '--out',
        'run',
        '--device',
        'cpu',
        '--quiet',
        '--watch',
    ]
    done = subprocess.run(
        line,
        cwd=tmp_path,
        env=os.environ | dict(OMP_NUM_THREADS='1'),
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    assert (
        done.returncode == 0
        and 'ranks 2' in done.stdout
        and load_run(tmp_path / 'run')['step'] == 2
    ), done.stderr[-2000:]
    assert (
        load_run(tmp_path / 'run')['world'] == 2
        and len((tmp_path / 'run/log.jsonl').read_text().splitlines()) == 2
    )


# Threads. Tests run on one; a process of its own has the number that it is given.
def unbroken_and_resumed(out):
    "Two unbroken runs and one that is stopped at its half and resumed: in how many tensors they agree"
    threads, spec = torch.get_num_threads(), SPEC.but(steps=6)
    text = TextSpec(
        width=64, heads=2, layers=1, conv_blocks=1, kernel=5, context=16, rows=40, layer_scale=0.1
    )
    image = MCI['mci_nano'].but(depths=(1, 1, 1, 1), dims=(8, 8, 16, 32))

    def model():
        torch.manual_seed(0)
        net = CLIP(MCi(image, 16), TextRepMixer(text, 16))
        nn.init.constant_(net.logit_scale, 2.6)
        return net

    def go(folder, resume=False):
        return train(
            model(),
            data(32, 96, 48, 16),
            spec,
            f'{out}/{folder}',
            save_every=3,
            resume=resume,
            progress=False,
        )

    for folder in ('a', 'b', 'c'):
        go(folder)
    for name in ('state.pt', 'log.jsonl'):
        (Path(out) / 'c' / name).unlink()  # the checkpoint of step 3 is left
    go('c', resume=True)

    def flat(x):
        return (
            [x]
            if torch.is_tensor(x)
            else [t for v in (x.values() if isinstance(x, dict) else x) for t in flat(v)]
            if isinstance(x, (dict, list, tuple))
            else []
        )

    a, b, c = (
        flat([load_run(f'{out}/{k}')[part] for part in ('model', 'ema', 'opt')]) for k in 'abc'
    )
    print(
        json.dumps(
            dict(
                threads=threads,
                tensors=len(a),
                unbroken=sum(map(torch.equal, a, b)),
                resumed=sum(map(torch.equal, a, c)),
            )
        )
    )


@pytest.mark.parametrize('threads', [1, 2])
def test_runs_repeat_to_the_bit(tmp_path, threads):
    "Two unbroken runs on as many threads, and one that was resumed, agree in every tensor: weights, their average and Adam's memory"
    code = f'import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\nfrom test_train import unbroken_and_resumed\nunbroken_and_resumed({str(tmp_path)!r})'
    how = dict(
        OMP_NUM_THREADS=str(threads), OMP_WAIT_POLICY='PASSIVE'
    )  # as `mobileclip train` has it
    done = subprocess.run(
        [sys.executable, '-c', code],
        env=os.environ | how,
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    got = json.loads(done.stdout)
    assert got['threads'] == min(threads, os.cpu_count()) and got['tensors'] > 300
    assert got['unbroken'] == got['resumed'] == got['tensors'], got


def test_threads_of_a_run(tmp_path):
    "`--threads` decides on how many threads the loop computes, in both programs; readers compute on one"
    from test_stream import SPEC as STREAM, shards
    from mobileclip_nb.loaders.stream import Stream
    from mobileclip_nb.cli.main import main as console
    from mobileclip_nb.train.__main__ import main as module

    before, there = torch.get_num_threads(), str(tmp_path / 'nothing')
    try:
        for program, words in (
            (module, ['nano-emoji', '--data', there]),
            (console, ['train', there]),
        ):
            torch.set_num_threads(1)
            assert (
                program([*words, '--threads', '2', '--device', 'cpu']) == 2
                and torch.get_num_threads() == 2
            )  # the data are not there
            assert (
                program([*words, '--threads', '0', '--device', 'cpu']) == 2
                and torch.get_num_threads() == 2
            )
        stream = Stream(
            shards(tmp_path / 's', (24,)),
            STREAM.but(batch=4, context=8, rows=False),
            workers=1,
            memory=tmp_path / 'm',
            tokens=threads_of,
        )
        assert set(next(stream.since()).text.flatten().tolist()) == {1}
    finally:
        torch.set_num_threads(before)


def threads_of(texts, context):
    return torch.full((len(texts), context), torch.get_num_threads())


def test_parts_with_live_statistics_are_told():
    "A run that accumulates says at its start what its normalization does, once; without parts, or with statistics held, nothing"

    def told(**changes):
        said = []
        train(
            small(), data(), SPEC.but(steps=1, warmup=1, **changes), progress=False, say=said.append
        )
        return said

    (live,) = told(accumulate=2)
    assert (
        live.startswith('accumulate=2: ')
        and 'each part of about 4 pairs and not from all 8' in live
    )
    assert 'train/12_accumulate' in live and 'train.frozen_norm=true' in live and '\n' not in live
    assert told() == told(accumulate=2, frozen_norm=True) == []
