"What the loop keeps and when, the statistics that short runs are judged with, and the two speeds of a run."

import math, time

import pytest, torch, torch.distributed as dist
from torch import nn

from mobileclip_nb.train.distributed import current_ranks
from mobileclip_nb.loaders.compose import Slice
from mobileclip_nb.train import between_steps
from mobileclip_nb.train.loop import plain
from mobileclip_nb.train.checkpoint import checkpoints, load_run, read_checkpoint
from mobileclip_nb.train.statistics import is_lagging, recompute_statistics
from test_train import JOINT, SPEC, data, losses, pair, same, small, train

SCORES = {1: 0.1, 2: 0.3, 3: 0.2, 4: 0.3, 5: 0.4, 6: math.nan, 7: 0.2, 8: 0.1}


class Scores:
    "A judge whose scores are known beforehand, by the step it is asked at"

    def __init__(self, step=0, stop=None):
        self.step, self.stop = step, stop

    def __call__(self, model):
        self.step += 1
        if self.step == self.stop:
            raise MemoryError('stopped by the test')
        return dict(r1=SCORES[self.step], loss=1.0)


def crash_at(step):
    "An objective that fails in the middle of a step, so that nothing is saved there"
    calls = []

    def objective(model, batch, spec):
        calls.append(1)
        if len(calls) == step:
            raise MemoryError('stopped by the test')
        return plain(model, batch, spec)

    return objective


def test_the_best_checkpoint_stays(tmp_path):
    "The highest judgement's checkpoint is kept whatever else is removed; among equals the earliest; each new best is said once"
    told = []
    run = train(
        small(),
        data(),
        SPEC,
        tmp_path,
        Scores(),
        1,
        save_every=1,
        keep=1,
        progress=False,
        best='r1',
        say=told.append,
    )
    assert sorted(p.name for p in tmp_path.glob('*.pt')) == ['best.pt', 'state.pt']
    held = read_checkpoint(tmp_path / 'best.pt')
    assert held['step'] == 5 and (held['judged'][-1]['step'], held['judged'][-1]['r1']) == (5, 0.4)
    assert told == [
        f'best so far: r1 {r:g} after step {s}, kept as best.pt'
        for s, r in ((1, 0.1), (2, 0.3), (5, 0.4))
    ]
    assert (
        load_run(tmp_path)['step'] == 8 and run.new == 8
    )  # a run goes on from its newest checkpoint, not from its best


def test_the_best_is_saved_without_save_every(tmp_path):
    "A best judgement writes a checkpoint of its own step"
    train(small(), data(), SPEC, tmp_path, Scores(), 1, progress=False, best='r1')
    assert read_checkpoint(tmp_path / 'best.pt')['step'] == 5


def test_a_resumed_run_knows_its_best(tmp_path, monkeypatch):
    "Killed after a lower judgement, a run does not take a lower one for the best; killed between checkpoint and second name, it gives the name"
    with pytest.raises(MemoryError):
        train(
            small(),
            data(),
            SPEC,
            tmp_path,
            Scores(stop=7),
            1,
            save_every=1,
            progress=False,
            best='r1',
        )
    told = []
    train(
        small(1),
        data(),
        SPEC,
        tmp_path,
        Scores(step=7),
        1,
        resume=True,
        progress=False,
        best='r1',
        say=told.append,
    )
    assert read_checkpoint(tmp_path / 'best.pt')['step'] == 5 and told == [
        'goes on from step 7 of 8'
    ]
    linked = between_steps.link_file

    def killed(path, name):
        if read_checkpoint(path)['step'] == 5:
            raise KeyboardInterrupt('killed')
        linked(path, name)

    monkeypatch.setattr(between_steps, 'link_file', killed)
    with pytest.raises(KeyboardInterrupt):
        train(small(), data(), SPEC, tmp_path / 'b', Scores(), 1, progress=False, best='r1')
    assert read_checkpoint(tmp_path / 'b/best.pt')['step'] == 2  # the one before is whole
    monkeypatch.undo()
    train(
        small(1),
        data(),
        SPEC,
        tmp_path / 'b',
        Scores(step=5),
        1,
        resume=True,
        progress=False,
        best='r1',
    )
    assert read_checkpoint(tmp_path / 'b/best.pt')['step'] == 5


def test_a_metric_that_is_not_there(tmp_path):
    "Without a judge the error comes before the first step; else at the first judgement, with the names there are, and nothing is lost"
    with pytest.raises(ValueError, match="best='r1' names a metric, and there is no judge"):
        train(small(), data(), SPEC, tmp_path, progress=False, best='r1')
    assert not list(tmp_path.iterdir())
    with pytest.raises(KeyError, match="Did you mean 'r1'. There are: r1, loss"):
        train(small(), data(), SPEC, tmp_path, Scores(), 3, progress=False, best='r11')
    assert load_run(tmp_path)['step'] == 3


class Clock:
    "Each look takes so many seconds"

    def __init__(self, seconds):
        self.now, self.seconds = 0.0, seconds

    def __call__(self):
        self.now += self.seconds
        return self.now


def crash_by_clock(out, clock):
    "A run that dies at its sixth step; its steps take as long as the clock says"
    with pytest.raises(MemoryError):
        train(
            small(),
            data(),
            SPEC,
            out,
            save_every=200,
            objective=crash_at(6),
            progress=False,
            clock=clock,
        )


def test_the_first_checkpoint_comes_early(tmp_path):
    "A run killed after a minute of slow steps does not start over, and ends at the numbers of a run that was left alone"
    whole = train(small(), data(), SPEC, progress=False)
    crash_by_clock(tmp_path, Clock(25.0))
    assert (
        load_run(tmp_path)['step'] == 3 and len(checkpoints(tmp_path)) == 1
    )  # 25, 50 and 75 s; and no second one by the clock
    again = train(small(1), data(), SPEC, tmp_path, resume=True, progress=False, clock=Clock(25.0))
    assert losses(again.history) == losses(whole.history) and same(again.model, whole.model)


def test_a_clock_that_stands_writes_nothing(tmp_path):
    "Only the clock decides"
    crash_by_clock(tmp_path, lambda: 0.0)
    assert not checkpoints(tmp_path)


def early(ranks, out):
    "Two ranks whose clocks differ, and how often they ask each other"
    calls, reduce = [], dist.all_reduce

    def counted(*a, **k):
        calls.append(1)
        return reduce(*a, **k)

    dist.all_reduce = counted

    def go(folder, clock, objective=plain):
        calls.clear()
        try:
            train(
                small(drop=0.0),
                Slice(data(), ranks.rank, ranks.world),
                JOINT.but(steps=6),
                out / folder,
                save_every=200,
                progress=False,
                objective=objective,
                clock=clock,
            )
        except MemoryError:
            pass
        return len(calls)

    saved = go('first', Clock(25.0 if ranks.rank == 0 else 1e6), crash_at(5))
    # asking for a checkpoint costs no collective; writing it gathers what readers left out
    assert saved == 1 + go('none', lambda: 0.0, crash_at(5))
    go('second', (lambda: 0.0) if ranks.rank == 0 else Clock(1e6), crash_at(5))
    dist.barrier()
    assert (
        load_run(out / 'first')['step'] == 3
        and not checkpoints(out / 'none')
        and not checkpoints(out / 'second')
    )
    run = train(
        small(drop=0.0),
        Slice(data(), ranks.rank, ranks.world),
        JOINT.but(steps=6),
        out / 'best',
        lambda m: dict(r1=float(current_ranks().rank)),
        2,
        progress=False,
        best='r1',
    )
    assert run.judged == [dict(step=s, r1=0.0) for s in (2, 4, 6)]
    dist.barrier()
    assert read_checkpoint(out / 'best/best.pt')['step'] == 2


def test_ranks_save_together(tmp_path):
    "The first rank's clock decides for all, in the collective that every step has already; best.pt is written once"
    codes, said = pair(tmp_path, early, tmp_path)
    assert codes == [0, 0], said


# Statistics of batch normalization.
def statistics(model):
    return {k: v for k, v in model.state_dict().items() if 'running' in k}


def spread(model, images):
    "Mean cosine between different pictures"
    with torch.no_grad():
        rows = nn.functional.normalize(model.image(images), dim=1)
    n = len(rows)
    return ((rows.sum(0).square().sum() - n) / (n * (n - 1))).item()


def test_a_short_run_is_judged_with_its_own_statistics():
    "What running statistics map to one point is told apart with recomputed ones; the weights are the same bits either way"
    short, seen = SPEC.but(steps=6, warmup=0, lr=8e-3, ema=0.0), {}
    for how in (False, None):

        def judge(model):
            return dict(cosine=spread(model, data().batch_at(0).image))

        run = train(small(drop=0.0), data(), short, judge=judge, progress=False, statistics=how)
        seen[how] = run
    old, new = seen[False].judged[0], seen[None].judged[0]
    assert new['statistics_batches'] == 6 and 'statistics_batches' not in old
    assert new['cosine'] < old['cosine'] - 0.01
    assert same(seen[False].raw, seen[None].raw) and losses(seen[False].history) == losses(
        seen[None].history
    )
    assert seen[None].metrics['statistics_batches'] == 6


def test_long_and_frozen_runs_keep_running_statistics():
    "The rule goes by the steps of the run; statistics that are held stay; a tower that is frozen keeps its own"
    model = small()
    assert (
        is_lagging(model, SPEC, 99)
        and not is_lagging(model, SPEC, 100)
        and not is_lagging(model, SPEC.but(frozen_norm=True), 8)
    )
    held = train(small(), data(), SPEC.but(frozen='image'), progress=False)
    assert all(
        torch.equal(a, b)
        for a, b in zip(statistics(held.model.image).values(), statistics(small().image).values())
    )
    assert any(
        not torch.equal(a, b)
        for a, b in zip(statistics(held.model.text).values(), statistics(held.raw.text).values())
    )


@pytest.mark.parametrize('ema', (0.0, 0.9))
def test_statistics_after_a_resume(tmp_path, ema):
    "A resumed run is judged by the numbers of one that was left alone, average or not, activation checkpointing or not"
    spec = SPEC.but(ema=ema, checkpointing=not ema)

    def judge(model):
        return dict(cosine=spread(model, data().batch_at(0).image))

    whole = train(small(), data(), spec, judge=judge, judge_every=4, progress=False)
    with pytest.raises(MemoryError):
        train(
            small(),
            data(),
            spec,
            tmp_path,
            judge,
            4,
            save_every=5,
            objective=crash_at(7),
            progress=False,
            statistics=True,
        )
    again = train(small(1), data(), spec, tmp_path, judge, 4, resume=True, progress=False)
    assert (
        again.judged == whole.judged
        and same(again.model, whole.model)
        and same(again.raw, whole.raw)
    )
    assert not same(whole.model, whole.raw)


def pooled(ranks, out):
    "Statistics of the batches of both ranks, alone and by a run"
    one = data()
    share = Slice(one, ranks.rank, ranks.world)
    model = small(drop=0.0)
    for sync in (False, True):
        spec = JOINT.but(sync_norm=sync, frozen_norm=False, steps=3)
        got = recompute_statistics(model, share.since(0), spec, 3)
        torch.save(
            dict(statistics=statistics(got.model), batches=got.batches),
            out / f'{sync}{ranks.rank}.pt',
        )
        run = train(
            small(drop=0.0),
            share,
            spec,
            judge=lambda m: dict(mean=m.image.stem[0].convs[0].norm.running_mean[0].item()),
            progress=False,
        )
        torch.save(
            dict(judged=run.judged, model=run.model.state_dict(), raw=run.raw.state_dict()),
            out / f'run{sync}{ranks.rank}.pt',
        )

    def broken():
        yield from (b for b, _ in zip(share.since(0), range(1 if ranks.rank else 3)))

    try:
        recompute_statistics(model, broken(), JOINT.but(frozen_norm=False), 3)
    except (EOFError, ConnectionError) as e:
        (out / f'broken{ranks.rank}').write_text(f'{type(e).__name__}: {e}')


def test_ranks_pool_their_batches(tmp_path):
    "Both ranks hold the same statistics; normalized over all ranks they are those of one process; a rank without data hangs nobody"
    codes, said = pair(tmp_path, pooled, tmp_path)
    assert codes == [0, 0], said
    one = statistics(
        recompute_statistics(
            small(drop=0.0), data().since(0), JOINT.but(frozen_norm=False), 3
        ).model
    )
    for sync in (False, True):
        a, b = (torch.load(tmp_path / f'{sync}{k}.pt', weights_only=True) for k in range(2))
        assert a['batches'] == b['batches'] == 6 and all(
            torch.equal(t, b['statistics'][k]) for k, t in a['statistics'].items()
        )
        first = (
            'image.stem.0.convs.0.norm.running_var'  # before any normalization, so known either way
        )
        assert torch.allclose(a['statistics'][first], one[first], rtol=1e-4)
        close = [
            torch.allclose(t, one[k], rtol=1e-3, atol=1e-4) for k, t in a['statistics'].items()
        ]
        assert all(close) if sync else not all(close)
        a, b = (torch.load(tmp_path / f'run{sync}{k}.pt', weights_only=True) for k in range(2))
        assert a['judged'] == b['judged'] and a['judged'][0]['statistics_batches'] == 6
        assert all(torch.equal(t, b['model'][k]) for k, t in a['model'].items())
        assert not torch.equal(a['model'][first], a['raw'][first])
    assert (
        'EOFError: The source has 1 batches, and statistics were asked for over 3'
        in (tmp_path / 'broken1').read_text()
    )
    assert (
        'ConnectionError: Rank 0 stops because another rank' in (tmp_path / 'broken0').read_text()
    )


def test_waiting_counts_in_the_wall_speed(tmp_path):
    "A source that keeps the loop waiting moves one speed and not the other; older histories have no such metric"

    class Slow(type(data())):
        def since(self, step=0):
            for b in super().since(step):
                time.sleep(0.05)
                yield b

    source = data()
    run = train(
        small(),
        Slow(source.data, source.spec),
        SPEC.but(steps=3, warmup=1),
        tmp_path,
        progress=False,
    )
    waited = sum(row['wait'] for row in run.history)
    assert waited >= 0.15 and all(row['wait'] >= 0.05 for row in load_run(tmp_path)['history'])
    m = run.metrics
    assert m['images_per_s'] == pytest.approx(24 / m['seconds']) and m[
        'images_per_s_wall'
    ] == pytest.approx(24 / (m['seconds'] + waited))
    old = run._replace(
        history=[{k: v for k, v in row.items() if k != 'wait'} for row in run.history]
    )
    assert (
        'images_per_s_wall' not in old.metrics and old.metrics['images_per_s'] == m['images_per_s']
    )
