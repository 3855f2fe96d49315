"What the loop keeps, and when: the best checkpoint, an early first one."
import math, time

import pytest, torch.distributed as dist

from mobileclip_nb.gather import here
from mobileclip_nb.mixture import Slice
from mobileclip_nb.train import loop
from mobileclip_nb.train.loop import plain
from mobileclip_nb.train.state import checkpoints, load_run, read_state
from test_train import JOINT, SPEC, data, losses, pair, same, small, train

SCORES = {1: .1, 2: .3, 3: .2, 4: .3, 5: .4, 6: math.nan, 7: .2, 8: .1}

class Scores:
    "A judge whose scores are known beforehand, by the step it is asked at"
    def __init__(self, step=0, stop=None): self.step, self.stop = step, stop
    def __call__(self, model):
        self.step += 1
        if self.step == self.stop: raise MemoryError('stopped by the test')
        return dict(r1=SCORES[self.step], loss=1.)

def crash_at(step):
    "An objective that fails in the middle of a step, so that nothing is saved there"
    calls = []
    def objective(model, batch, spec):
        calls.append(1)
        if len(calls) == step: raise MemoryError('stopped by the test')
        return plain(model, batch, spec)
    return objective

def test_the_best_checkpoint_stays(tmp_path):
    "The highest judgement's checkpoint is kept whatever else is removed; among equals the earliest; each new best is said once"
    told = []
    run = train(small(), data(), SPEC, tmp_path, Scores(), 1, save_every=1, keep=1, progress=False, best='r1', say=told.append)
    assert sorted(p.name for p in tmp_path.glob('*.pt')) == ['best.pt', 'state.pt']
    held = read_state(tmp_path/'best.pt')
    assert held['step'] == 5 and (held['judged'][-1]['step'], held['judged'][-1]['r1']) == (5, .4)
    assert told == [f'best so far: r1 {r:g} after step {s}, kept as best.pt' for s, r in ((1, .1), (2, .3), (5, .4))]
    assert load_run(tmp_path)['step'] == 8 and run.new == 8             # a run goes on from its newest checkpoint, not from its best

def test_the_best_is_saved_without_save_every(tmp_path):
    "A best judgement writes a checkpoint of its own step"
    train(small(), data(), SPEC, tmp_path, Scores(), 1, progress=False, best='r1')
    assert read_state(tmp_path/'best.pt')['step'] == 5

def test_a_resumed_run_knows_its_best(tmp_path, monkeypatch):
    "Killed after a lower judgement, a run does not take a lower one for the best; killed between checkpoint and second name, it gives the name"
    with pytest.raises(MemoryError): train(small(), data(), SPEC, tmp_path, Scores(stop=7), 1, save_every=1, progress=False, best='r1')
    told = []
    train(small(1), data(), SPEC, tmp_path, Scores(step=7), 1, resume=True, progress=False, best='r1', say=told.append)
    assert read_state(tmp_path/'best.pt')['step'] == 5 and told == ['goes on from step 7 of 8']
    linked = loop.linked
    def killed(path, name):
        if read_state(path)['step'] == 5: raise KeyboardInterrupt('killed')
        linked(path, name)
    monkeypatch.setattr(loop, 'linked', killed)
    with pytest.raises(KeyboardInterrupt): train(small(), data(), SPEC, tmp_path/'b', Scores(), 1, progress=False, best='r1')
    assert read_state(tmp_path/'b/best.pt')['step'] == 2                # the one before is whole
    monkeypatch.undo()
    train(small(1), data(), SPEC, tmp_path/'b', Scores(step=5), 1, resume=True, progress=False, best='r1')
    assert read_state(tmp_path/'b/best.pt')['step'] == 5

def test_a_metric_that_is_not_there(tmp_path):
    "Without a judge the error comes before the first step; else at the first judgement, with the names there are, and nothing is lost"
    with pytest.raises(ValueError, match="best='r1' names a metric, and there is no judge"): train(small(), data(), SPEC, tmp_path, progress=False, best='r1')
    assert not list(tmp_path.iterdir())
    with pytest.raises(KeyError, match="Did you mean 'r1'. There are: r1, loss"): train(small(), data(), SPEC, tmp_path, Scores(), 3, progress=False, best='r11')
    assert load_run(tmp_path)['step'] == 3

class Clock:
    "Each look takes so many seconds"
    def __init__(self, seconds): self.now, self.seconds = 0., seconds
    def __call__(self): self.now += self.seconds; return self.now

def test_the_first_checkpoint_comes_early(tmp_path):
    "A run killed after a minute of slow steps does not start over, and ends at the numbers of a run that was left alone"
    whole = train(small(), data(), SPEC, progress=False)
    with pytest.raises(MemoryError):
        train(small(), data(), SPEC, tmp_path, save_every=200, objective=crash_at(6), progress=False, clock=Clock(25.))
    assert load_run(tmp_path)['step'] == 3 and len(checkpoints(tmp_path)) == 1        # 25, 50 and 75 s; and no second one by the clock
    again = train(small(1), data(), SPEC, tmp_path, resume=True, progress=False, clock=Clock(25.))
    assert losses(again.history) == losses(whole.history) and same(again.model, whole.model)

def test_a_clock_that_stands_writes_nothing(tmp_path):
    "Only the clock decides"
    with pytest.raises(MemoryError):
        train(small(), data(), SPEC, tmp_path, save_every=200, objective=crash_at(6), progress=False, clock=lambda: 0.)
    assert not checkpoints(tmp_path)

def early(ranks, out):
    "Two ranks whose clocks differ, and how often they ask each other"
    calls, reduce = [], dist.all_reduce
    def counted(*a, **k): calls.append(1); return reduce(*a, **k)
    dist.all_reduce = counted
    def go(folder, clock, objective=plain):
        calls.clear()
        try: train(small(drop=0.), Slice(data(), ranks.rank, ranks.world), JOINT.but(steps=6), out/folder, save_every=200, progress=False, objective=objective, clock=clock)
        except MemoryError: pass
        return len(calls)
    assert go('first', Clock(25. if ranks.rank == 0 else 1e6), crash_at(5)) == go('none', lambda: 0., crash_at(5))      # the same collectives
    go('second', (lambda: 0.) if ranks.rank == 0 else Clock(1e6), crash_at(5))
    dist.barrier()
    assert load_run(out/'first')['step'] == 3 and not checkpoints(out/'none') and not checkpoints(out/'second')
    run = train(small(drop=0.), Slice(data(), ranks.rank, ranks.world), JOINT.but(steps=6), out/'best', lambda m: dict(r1=float(here().rank)), 2, progress=False, best='r1')
    assert run.judged == [dict(step=s, r1=0.) for s in (2, 4, 6)]
    dist.barrier()
    assert read_state(out/'best/best.pt')['step'] == 2

def test_ranks_save_together(tmp_path):
    "The first rank's clock decides for all, in the collective that every step has already; best.pt is written once"
    codes, said = pair(tmp_path, early, tmp_path)
    assert codes == [0, 0], said
