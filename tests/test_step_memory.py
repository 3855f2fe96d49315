"The computed memory of a step against torch.profiler, the real step, and eight simulated ranks."

import copy

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile

from mobileclip_nb.models.zoo import build, find_record
from mobileclip_nb.train.config import TrainSpec
from mobileclip_nb.train.fit import fit_model, with_fit
from mobileclip_nb.train.objective import encode_batch, objective
from mobileclip_nb.train.optim import make_optimizer
from mobileclip_nb.train.recipe import recipe, record_of
from mobileclip_nb.train.step import step
from mobileclip_nb.train.step_memory import (
    LiveBytes,
    StepMeasure,
    empty_batch,
    hollow_copy,
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
    batch.text[:, -1] = rec.text.vocab - 1 if hasattr(rec.text, 'vocab') else 49407
    batch.label.copy_(torch.arange(PAIRS))
    batch.image.normal_()
    return batch


@pytest.mark.parametrize('name', ['mobileclip_nano', 'mobileclip_s0'])
def test_activations_as_profiled(name):
    "Within a tenth of what torch.profiler sees: after the forward pass, and at the peak"
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
    print(f'{name}: saved {found.saved.at(PAIRS) / saved:.4f}, peak {found.peak.at(PAIRS) / peak:.4f}')
    assert 0.9 < found.saved.at(PAIRS) / saved < 1.1
    assert 0.9 < found.peak.at(PAIRS) / peak < 1.1
