"Two processes against one: the same loss, the same gradients, the same curve. Only real processes can show it."

import hashlib, math, socket, time
from dataclasses import dataclass
from itertools import islice

import pytest, torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from mobileclip_nb.loaders.batches import Batch, Batches, BatchSpec, pair_data
from mobileclip_nb.augment.jitter import STILL
from mobileclip_nb.blocks.reparam import randomize_
from mobileclip_nb.models.clip import CLIP
from mobileclip_nb.train.optim import freeze
from mobileclip_nb.train.distributed import check_same_size, current_ranks, gather, gather_rows
from mobileclip_nb.models.mci import MCI, MCi
from mobileclip_nb.loaders.compose import Mixture, Slice
from mobileclip_nb.train.optim import clamp_scale, lr_at, make_optimizer, set_lr
from mobileclip_nb.train.config import OptimSpec
from mobileclip_nb.loaders.ranged import Ranged
from mobileclip_nb.loaders.stream import Stream
from mobileclip_nb.train.distributed import SyncNorm2d, sync_norms
from mobileclip_nb.models.text_repmixer import TextRepMixer
from mobileclip_nb.preprocessing.tokenizer import tokenize
from mobileclip_nb.models.text_transformer import TextSpec
from mobileclip_nb.train.accumulate import accumulate_gradient
from mobileclip_nb.train.objective import objective, with_bias
from mobileclip_nb.train.config import LossSpec

LIMIT = 400  # seconds a pair of processes may take; then they are ended
WIDTHS = (5, 7)
TAUGHT = LossSpec(clip=0.25, distill=0.75, widths=WIDTHS, scales=(70.0, 60.0))
LOSSES = dict(
    plain=LossSpec(),
    same=LossSpec(same=True),
    reinforced=TAUGHT,
    chunked=TAUGHT.but(chunk=3, same=True),
    before=TAUGHT.but(clip=0.0, distill=1.0, after_softmax=False),
    sigmoid=TAUGHT.but(kind='sigmoid', biases=(-30.0,), same=True),
)
IDS = tokenize('red blue small large old fox moon tree heart ship', context_length=16).unique()
WORDS = 'red blue small large old fox moon tree heart ship'.split()


@dataclass(frozen=True)
class Run(OptimSpec):
    "What a run is asked, in the shape the objective reads"

    precision: str = 'float32'
    loss: LossSpec = LossSpec()
    steps: int = 20
    warmup: int = 5


def model_of(loss=LossSpec(), frozen=True, scale=1 / 0.07):
    "A small model whose scales and statistics are all drawn, since fresh ones would hide mistakes"
    text = TextSpec(
        width=32,
        heads=2,
        layers=1,
        conv_blocks=1,
        kernel=5,
        context=8,
        rows=len(IDS),
        layer_scale=0.1,
    )  # rows for these words only
    model = randomize_(
        CLIP(
            MCi(MCI['mci_nano'].but(depths=(1, 1, 1, 1), dims=(8, 8, 16, 32), drop=0.0), 16),
            TextRepMixer(text, 16),
        )
    ).train()
    model.text.token.ids.copy_(IDS)
    model.logit_scale.data.fill_(math.log(scale))
    if loss.kind == 'sigmoid':
        with_bias(model, scale=4.0, bias=-2.0)
    return freeze(model, statistics=frozen)


def batch_of(n=16, seed=0, mixed=False):
    "Pairs with what teachers said of them; some captions are equal"
    g = torch.Generator().manual_seed(seed)
    say = lambda: [
        ' '.join(WORDS[i] for i in torch.randint(len(WORDS), (2,), generator=g)) for _ in range(n)
    ]
    true, syn = say(), say()
    true[-1], syn[1] = true[0], syn[0]
    label = [torch.tensor([c.index(x) for x in c]) for c in (true, syn)]
    emb = [
        torch.cat([F.normalize(torch.randn(n, w, generator=g), dim=1) for w in WIDTHS], 1)
        for _ in range(3)
    ]
    whole = Batch(
        torch.rand(n, 3, 32, 32, generator=g),
        tokenize(true, context_length=8),
        torch.arange(n),
        label[0],
        tokenize(syn, context_length=8),
        label[1],
        *emb,
    )
    return whole._replace(syn=None, syn_label=None, syn_emb=None) if mixed else whole


def share(batch, rank, world):
    "The rows of one rank"
    n = len(batch.image) // world
    return Batch(*(None if t is None else t[rank * n : (rank + 1) * n] for t in batch))


def mean_over_ranks(x):
    "What a log would say: the mean of the ranks' losses"
    x = x.detach().double().clone()
    if current_ranks().world > 1:
        dist.all_reduce(x)
    return x / current_ranks().world


def one_step(loss, frozen=True, sync=False, parts=0, mixed=False, exact=False):
    "Loss and gradients of a batch, on however many ranks there are"
    scale = (
        1.0 if sync and not exact else 1 / 0.07
    )  # gradients of about 1: 1e-5 is then a few of float32's steps through all layers
    model, ranks, spec = model_of(loss, frozen, scale), current_ranks(), Run(loss=loss)
    if exact:
        model = model.double()
    if sync:
        model = sync_norms(model)
    net = DistributedDataParallel(model) if ranks.world > 1 else model
    batch = share(batch_of(mixed=mixed), *ranks)
    if exact:
        batch = Batch(
            *(t.double() if t is not None and t.is_floating_point() else t for t in batch)
        )
    if parts:
        out = accumulate_gradient(net, batch, spec, parts)
    else:
        out = objective(net, batch, spec)
        out.total.backward()
    statistics = {k: v.clone() for k, v in model.named_buffers() if 'running' in k}
    return dict(
        loss=mean_over_ranks(out.total),
        parts={k: mean_over_ranks(v) for k, v in out._asdict().items()},
        grads={k: p.grad for k, p in model.named_parameters()},
        statistics=statistics,
    )


def twenty(frozen):
    "A loss curve"
    model, ranks, spec = model_of(TAUGHT, frozen), current_ranks(), Run(loss=TAUGHT, lr=4e-3)
    if not frozen:
        model = sync_norms(model)
    net, opt, curve = (
        (DistributedDataParallel(model) if ranks.world > 1 else model),
        make_optimizer(model, spec),
        [],
    )
    for k in range(spec.steps):
        set_lr(opt, lr_at(k, spec))
        opt.zero_grad()
        loss = objective(net, share(batch_of(seed=k % 2), *ranks), spec).total
        loss.backward()
        opt.step()
        clamp_scale(model)
        curve.append(mean_over_ranks(loss).item())
    return curve


def counted(loss):
    "How many collectives of each kind a forward and a backward pass need, outside DDP"
    calls, keep = {}, {k: getattr(dist, k) for k in ('all_gather', 'all_reduce')}

    def count(name):
        def call(*a, **k):
            calls[name] = calls.get(name, 0) + 1
            return keep[name](*a, **k)

        return call

    for k in keep:
        setattr(dist, k, count(k))
    try:
        objective(
            model_of(loss), share(batch_of(), *current_ranks()), Run(loss=loss)
        ).total.backward()
    finally:
        for k, f in keep.items():
            setattr(dist, k, f)
    return calls


def alone():
    "All cases"
    cases = {f'frozen {k}': one_step(l) for k, l in LOSSES.items()}
    cases['mixed captions'] = one_step(TAUGHT, mixed=True)
    cases['accumulated'] = one_step(TAUGHT, parts=2)
    cases['synced plain'], cases['synced reinforced'] = (
        one_step(l, frozen=False, sync=True) for l in (LossSpec(), TAUGHT)
    )
    cases['live, not synced'] = one_step(TAUGHT, frozen=False)
    cases['synced exactly'] = one_step(TAUGHT, frozen=False, sync=True, exact=True)
    return cases | {'curve frozen': twenty(True), 'curve synced': twenty(False)}


def refusals():
    "What ranks of different sizes are told; and rows of every kind"
    ranks, said = current_ranks(), {}
    try:
        check_same_size(8 + 2 * ranks.rank, ranks)
    except ValueError as e:
        said['sizes'] = str(e)
    x = torch.arange(6.0).view(3, 2).T.requires_grad_()  # not contiguous
    everybody = gather((x + 10 * ranks.rank), ranks)
    (everybody * torch.arange(4.0)[:, None] * (1 + ranks.rank)).sum().backward()
    said |= dict(
        everybody=everybody.detach(),
        grad=x.grad,
        half=gather(x.detach().bfloat16(), ranks).dtype,
        start=gather_rows(x, ranks).start,
        quiet=gather(x, ranks, grad=False).requires_grad,
        kinds=[
            type(m).__name__
            for m in sync_norms(model_of(frozen=False)).modules()
            if isinstance(m, SyncNorm2d)
        ][:1],
    )
    with torch.inference_mode():
        said['inferred'] = gather(torch.ones(1, 2), ranks, grad=False).shape
    return said


def worker(rank, world, port, out):
    "One of two processes"
    from datetime import timedelta

    torch.set_num_threads(1)
    dist.init_process_group(
        'gloo',
        init_method=f'tcp://127.0.0.1:{port}',
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=LIMIT / 2),
    )
    try:
        got = alone() | dict(counts={k: counted(l) for k, l in LOSSES.items()}, said=refusals())
        torch.save(got, f'{out}/{rank}.pt')
        dist.barrier()
    finally:
        dist.destroy_process_group()


def pair(target, *args, world=2, limit=LIMIT):
    "Run `target(rank, world, port, ...)` in new processes; an error in one, or the time limit, ends all of them"
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    started = mp.spawn(target, (world, port, *args), nprocs=world, join=False, daemon=True)
    end = time.monotonic() + limit
    try:
        while not started.join(max(end - time.monotonic(), 0)):
            assert time.monotonic() < end, f'still running after {limit} s'
    finally:
        for p in started.processes:
            p.kill()
            p.join(10)


@pytest.fixture(scope='module')
def both(tmp_path_factory):
    "What one process and what each of two processes found"
    out = tmp_path_factory.mktemp('ranks')
    pair(worker, str(out))
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        one = alone()
    finally:
        torch.set_num_threads(n)
    return one, [torch.load(out / f'{r}.pt', weights_only=True) for r in range(2)]


def gap(a, b):
    return max((a[k] - b[k]).abs().max().item() for k in a)


CASES = [
    *(f'frozen {k}' for k in LOSSES),
    'mixed captions',
    'accumulated',
    'synced plain',
    'synced reinforced',
]


@pytest.mark.parametrize('case', CASES)
def test_step(both, case):
    "Loss within 1e-6, every gradient within 1e-5, on every rank; and there is something to compare"
    one, two = both[0][case], [r[case] for r in both[1]]
    assert max(g.abs().max().item() for g in one['grads'].values()) > 1e-2
    for r in two:
        assert abs(r['loss'] - one['loss']) <= 1e-6, (r['loss'], one['loss'])
        assert set(r['grads']) == set(one['grads']) and gap(one['grads'], r['grads']) <= 1e-5
        assert max(abs(r['parts'][k] - one['parts'][k]) for k in one['parts']) <= 2e-6
        if 'synced' in case:
            assert gap(one['statistics'], r['statistics']) <= 1e-5


def test_exactly(both):
    "In float64 nothing is left of the difference, so that in float32 it is rounding and no mistake"
    one, two = both[0]['synced exactly'], both[1][0]['synced exactly']
    assert abs(one['loss'] - two['loss']) < 1e-12 and gap(one['grads'], two['grads']) < 1e-10


def test_not_blind(both):
    "Without synchronization the same comparison fails, and accumulation equals the whole batch"
    assert gap(both[0]['live, not synced']['grads'], both[1][0]['live, not synced']['grads']) > 1e-3
    assert gap(both[0]['accumulated']['grads'], both[0]['frozen reinforced']['grads']) <= 1e-5


@pytest.mark.parametrize('case', ['curve frozen', 'curve synced'])
def test_curve(both, case):
    "Twenty steps stay within 1e-3 of one process, and the loss moves by much more"
    a, b = both[0][case], both[1][0][case]
    assert len(a) == 20 and max(abs(x - y) for x, y in zip(a, b)) <= 1e-3 and max(a) - min(a) > 0.1


def test_collectives(both):
    "One gather a tower, one for all teachers; labels only when asked for; backward adds one sum a tower"
    for r in both[1]:
        assert r['counts']['plain'] == dict(all_gather=2, all_reduce=2)
        assert r['counts']['reinforced'] == dict(all_gather=3, all_reduce=2)
        assert r['counts']['chunked'] == dict(all_gather=4, all_reduce=2)


def test_gather(both):
    "Rows come in the order of ranks; gradients return to where rows came from; unequal ranks are refused"
    for k, r in enumerate(both[1]):
        said = r['said']
        assert 'Ranks hold [8, 10] pairs' in said['sizes']
        assert said['everybody'].tolist() == [[0, 2, 4], [1, 3, 5], [10, 12, 14], [11, 13, 15]]
        assert said['grad'].tolist() == [
            [3.0 * (2 * k)] * 3,
            [3.0 * (2 * k + 1)] * 3,
        ]  # 1 and 2 times the row's number, added
        assert (said['half'], said['start'], said['quiet'], said['kinds'], said['inferred']) == (
            torch.bfloat16,
            2 * k,
            False,
            ['SyncNorm2d'],
            (2, 2),
        )


def _hang(rank, world, port):
    time.sleep(60) if rank else None


def _fail(rank, world, port):
    if rank:
        raise ValueError('rank 1 fails')
    time.sleep(60)


def test_an_error_ends_all():
    "The error of one process is raised here, and the other one does not run on"
    with pytest.raises(mp.ProcessRaisedException, match='rank 1 fails'):
        pair(_fail, limit=60)


def test_limits_bite():
    "A process that never ends does not keep the tests"
    with pytest.raises(AssertionError, match='still running'):
        pair(_hang, limit=12)


# RangeAugment's noise over ranks. A rank is a pair of numbers here, so no process is needed.
def ramps(n=16, batch=8, step=7):
    "Batches of small pictures that are all different"
    x = (torch.arange(n * 8 * 8 * 3).view(n, 8, 8, 3) * step % 251).byte()
    return Batches(
        pair_data(x, [f'thing {i}' for i in range(n)]),
        BatchSpec(batch=batch, context=8, jitter=STILL),
    )


def noisy(source, ranks=(0, 1), step=3):
    "Pictures of a step, with noise"
    return next(Ranged(source, (40.0, 20.0), 10, ranks=ranks).since(step)).image


class Joined:
    "What one rank would read that read the batches of all ranks, one after the other"

    def __init__(self, sources):
        self.sources, self.batch, self.id = sources, sum(s.batch for s in sources), 'joined'

    def since(self, step=0):
        for each in zip(*(s.since(step) for s in self.sources)):
            yield Batch(*(None if rows[0] is None else torch.cat(rows) for rows in zip(*each)))


def ranked_sources(kind, folder, world=2):
    "The source of each rank"
    if kind == 'slice':
        return [Slice(ramps(), r, world) for r in range(world)]
    if kind == 'mixture':
        return [
            Mixture([Slice(ramps(), r, world), Slice(ramps(batch=4, step=11), r, world)])
            for r in range(world)
        ]
    from test_stream import SPEC, shards

    place = shards(folder / 's', (5, 9, 2))
    return [Stream(place, SPEC, (r, world), memory=folder / 'm') for r in range(world)]


@pytest.mark.parametrize('kind', ['slice', 'mixture', 'stream'])
def test_ranks_draw_noise_of_their_own(tmp_path, kind):
    "Each picture of each rank has the noise that one rank would draw for it, and not where ranks do not know of each other"
    sources = ranked_sources(kind, tmp_path)
    want = noisy(Joined(sources))
    assert torch.equal(torch.cat([noisy(s, (r, 2)) for r, s in enumerate(sources)]), want)
    assert not torch.equal(torch.cat([noisy(s) for s in sources]), want)


def test_ranks_draw_the_noise_of_the_whole_batch():
    "Two halves of a batch that one rank reads whole, through the recipe's own source"
    assert torch.equal(
        torch.cat([noisy(Slice(ramps(), r, 2), (r, 2)) for r in range(2)]), noisy(ramps())
    )
    assert not torch.equal(
        noisy(ramps(), (0, 2)), noisy(ramps(), (1, 2))
    )  # the same pictures on both ranks


def test_source_tells_noise_of_the_ranks(tmp_path):
    "A recipe with `psnr` reads the same pictures with the same noise on two ranks as on one"
    from PIL import Image
    from mobileclip_nb.train.recipe import recipe
    from mobileclip_nb.train.source import source

    for i in range(16):
        Image.new('RGB', (64, 64), (16 * i, 255 - 16 * i, 40)).save(tmp_path / f'{i}.png')
    (tmp_path / 'captions.csv').write_text(
        'image,caption\n' + ''.join(f'{i}.png,color {i}\n' for i in range(16)), encoding='utf-8'
    )
    r = recipe('nano-emoji').at('smoke')
    r = r.but(psnr=(40.0, 20.0), stream=r.stream.but(batch=8))

    def images(ranks):
        return torch.stack(
            [b.image for b in islice(source(r, tmp_path, ranks, progress=False).since(), 3)]
        )

    assert torch.equal(torch.cat([images((0, 2)), images((1, 2))], 1), images((0, 1)))


def test_noise_of_one_rank_is_pinned():
    "The bits that a single process draws; a change of them changes runs with `psnr`"

    def digest(step):
        return hashlib.sha256(
            (noisy(ramps(), step=step) * 255).round().byte().contiguous().numpy().tobytes()
        ).hexdigest()[:16]

    assert [digest(3), digest(4)] == ['c3db3186ccfd742c', '4fae022f014c1e6d']
