"The computed memory of a step against torch.profiler and the real step of eight simulated ranks."

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile

from mobileclip_nb.core.ledger import read
from mobileclip_nb.models.zoo import build, find_record
from mobileclip_nb.train.config import TrainSpec
from mobileclip_nb.train.fit import Fit, with_fit
from mobileclip_nb.train.memory import checkpoint_activations
from mobileclip_nb.train.objective import encode_batch, objective
from mobileclip_nb.train.optim import make_optimizer
from mobileclip_nb.train.options import check_folder
from mobileclip_nb.train.recipe import recipe, record_of
from mobileclip_nb.train.run import RunConfig, run
from mobileclip_nb.train.step import step
from mobileclip_nb.train.step_memory import (
    LiveBytes,
    StepMeasure,
    empty_batch,
    hollow_copy,
    measure_state,
    measure_towers,
    simulate_ranks,
)

PAIRS = 8


def allocated(prof):
    "Bytes after each event of the CPU's allocator, since the profile began"
    now, out = 0, [0]
    for event in prof.profiler.kineto_results.events():
        if event.name() == '[memory]' and event.device_type() == torch.profiler.DeviceType.CPU:
            now += event.nbytes()
            out.append(now)
    return out


def random_batch(rec):
    "Eight pairs with random pixels and tokens"
    batch = empty_batch(rec, PAIRS)
    batch.text.random_(1, 50)
    batch.text[:, -1] = rec.text.vocab - 1  # the end token
    batch.label.copy_(torch.arange(PAIRS))
    batch.image.normal_()
    return batch


@pytest.mark.parametrize('name', ['mobileclip_nano', 'mobileclip_s0'])
def test_activations_as_profiled(name):
    """Within a tenth of what torch.profiler sees after the forward pass.

    The peak that it sees has what kernels take for themselves, too, so it is no less than ours."""
    model, spec = build(find_record(name), empty=True).train(), TrainSpec()
    model.to(memory_format=torch.channels_last)
    for p in model.parameters():
        p.data.normal_(std=0.02)
        p.grad = torch.zeros_like(p)
    batch = random_batch(model.record)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as forward:
        features = encode_batch(model, batch, spec)
    del features
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as whole:
        objective(model, batch, spec).total.backward()
    found = measure_towers(model, spec)
    saved, peak = allocated(forward)[-1], max(allocated(whole))
    print(
        f'{name}: saved {found.saved.at(PAIRS) / saved:.4f}, peak {found.peak.at(PAIRS) / peak:.4f}'
    )
    assert 0.9 < found.saved.at(PAIRS) / saved < 1.1
    assert found.peak.at(PAIRS) < 1.01 * peak


def step_peak(model, spec, pairs, world):
    "Bytes of the real step on fake tensors, on one of `world` simulated ranks"
    live = LiveBytes()
    with FakeTensorMode(), simulate_ranks(world), torch.random.fork_rng():
        twin = hollow_copy(model, spec)
        opt = make_optimizer(twin, spec)
        batch = empty_batch(model.record, pairs, spec.loss.widths, True)
        with checkpoint_activations(twin, spec.checkpointing), live:
            there = [*twin.parameters(), *twin.buffers(), *(t for t in batch if t is not None)]
            for t in there:
                live.add(t)
            step(twin, batch, opt, spec)
    return sum(live.peak), sum(t.nbytes for t in batch if t is not None)


@pytest.mark.parametrize('checkpointing, parts', [(True, 1), (True, 2)])
def test_sum_is_the_real_step(checkpointing, parts):
    "The pieces add up to what the real step of one of eight ranks holds, in bfloat16"
    r = recipe('nano-emoji-dr').at('full')
    model = build(record_of(r), empty=True)
    spec = r.train.but(precision='bfloat16', ema=0.0)
    spec = with_fit(spec, Fit(checkpointing, parts))
    measure = StepMeasure(model, spec, 1024, 8, synthetic=True)
    found, one = measure.at(checkpointing, parts), measure_state(model, spec)
    peak, batch = step_peak(model, spec, 1024, 8)
    state = one.parameters + one.buffers + one.gradients + one.optimizer
    estimate = state + batch + found.activations + found.logits
    later = one.gradients + one.optimizer  # counted at every moment, made in the first step
    assert -0.01 * peak < estimate - peak < later + 0.01 * peak


def test_choice_is_kept(tmp_path):
    "A run in parts is another recipe, and goes on with its choice where no limit is named"
    r = recipe('nano-emoji').at('smoke')
    r = r.but(stream=r.stream.but(batch=32))
    measure = StepMeasure(build(record_of(r), empty=True), r.train, 32)
    limit = (measure.at(True, 1).total - 1) / 0.9e9
    ledger, quiet = tmp_path / 'ledger.jsonl', RunConfig(progress=False, watch=())
    first = run(r, 'emoji', tmp_path / 'run', config=quiet, memory=limit, ledger=ledger)
    chosen = first.data.fitted
    assert chosen.fit.parts > 1
    assert chosen.changes
    assert first.recipe.train.accumulate == chosen.fit.parts
    assert first.recipe.id != r.id
    (line,) = read(ledger)
    assert line.spec_id == first.recipe.id
    assert line.origin['memory']['fit'] == chosen.fit._asdict()
    check_folder(tmp_path / 'run', True, r, 'emoji')
    again = run(r, 'emoji', tmp_path / 'run', config=quiet, resume=True)
    assert again.data.fitted == chosen
    assert (again.run.new, again.recipe.id) == (0, first.recipe.id)
