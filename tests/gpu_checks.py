"""What only a GPU can show, as one table: `make test-gpu`.

Every check runs on the GPU. Where there is none, its stand-in runs: the `meta` device, which meets each tensor that was
left on the CPU, or a process group that only pretends. The table says which, and what has not run. With a GPU the
figures are written to results/gpu.json."""

import json, os, sys, time
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent))
from test_devices import TAUGHT, batch_of, unfused
from test_train import data, small

from mobileclip_nb.augment.jitter import Jitter
from mobileclip_nb.loaders.batches import Batches
from mobileclip_nb.models.zoo import build, find_record
from mobileclip_nb.train import checkpoint
from mobileclip_nb.train.checkpoint import start_run
from mobileclip_nb.train.config import TrainSpec
from mobileclip_nb.train.objective import objective
from mobileclip_nb.train.paper_recipes import ROWS
from mobileclip_nb.train.recipe import RECIPES, recipe
from mobileclip_nb.train.step import Readings, place_batch, start_step
from mobileclip_nb.train.step_memory import StepMeasure, empty_batch, measure_loss

ROOT = Path(__file__).resolve().parents[1]
HAS_GPU = torch.cuda.is_available()


def steps_on(device, spec, count=1, model=None):
    "The last row of a few steps of a narrow model; on `meta` there are no numbers"
    state = start_run((model or small(drop=0.1)).to(device), spec, 'checks')
    readings = Readings(every=99)
    for _ in range(count):
        start_step(state, batch_of(spec), spec, objective, readings)
    if device == 'meta':
        return {v.device.type for v in readings.values}
    ((row, _), *_) = reversed(readings.take(readings.fetch()))
    return row


def narrow(spec):
    "The spec of a recipe for a narrow model and a batch of eight"
    loss = (
        spec.loss.but(widths=TAUGHT.widths, scales=TAUGHT.scales)
        if spec.loss.distill
        else spec.loss
    )
    return spec.but(steps=4, warmup=1, hold=0, loss=loss, accumulate=1)


def check_placement(device):
    "Two steps of every recipe"
    for name in RECIPES:
        spec = narrow(recipe(name).train)
        if device == 'meta':
            with patch.object(torch, 'autocast', lambda *a, **k: nullcontext()):
                with patch.object(checkpoint, 'make_optimizer', unfused):
                    found = steps_on('meta', spec.but(precision='float32', checkpointing=False), 2)
            assert found == {'meta'}, name
        else:
            row = steps_on(device, spec, 2)
            assert row['loss'] == row['loss'], f'{name}: {row}'
    return f'{len(RECIPES)} recipes, {len(ROWS)} of them published'


def check_autocast(device):
    "Loss in bfloat16 beside float32"
    losses = [
        steps_on(device, TrainSpec(steps=4, warmup=1, precision=p))['loss']
        for p in ('float32', 'bfloat16')
    ]
    assert abs(losses[0] - losses[1]) < 0.05 * abs(losses[0]), losses
    return f'loss {losses[0]:.4f} in float32, {losses[1]:.4f} in bfloat16'


def check_compile(device):
    "Loss of compiled towers beside plain ones"
    found = []
    for wanted in (False, True):
        torch.manual_seed(0)
        model = small()
        if wanted:
            for tower in (model.image, model.text):
                tower.compile()
        found.append(steps_on(device, TrainSpec(steps=4, warmup=1), model=model)['loss'])
    assert abs(found[0] - found[1]) < 1e-3 * abs(found[0]), found
    return f'loss {found[0]:.5f} plain, {found[1]:.5f} compiled'


def check_group(device):
    "A step in a group of one rank"
    kind, backend = ('cpu', 'gloo') if device == 'cpu' else ('cuda', 'cpu:gloo,cuda:nccl')
    os.environ |= dict(MASTER_ADDR='127.0.0.1', MASTER_PORT='29517', RANK='0', WORLD_SIZE='1')
    dist.init_process_group(backend)
    try:
        total = torch.ones(3, device=kind)
        dist.all_reduce(total)
        assert total.tolist() == [1, 1, 1]
        row = steps_on(kind, TrainSpec(steps=4, warmup=1))
    finally:
        dist.destroy_process_group()
    return f'{backend}: loss {row["loss"]:.4f}'


def check_many_ranks(device):
    "The loss of eight ranks, seven of them pretended"
    one, eight = (
        measure_loss(find_record('mobileclip_nano'), TrainSpec(), 64, world) for world in (1, 8)
    )
    assert eight > one
    return f'{eight / 1e6:.1f} MB on one of eight ranks, {one / 1e6:.1f} MB alone'


def check_memory(device, name='mobileclip2_s0', pairs=64):
    "Computed memory of a step beside the most that was allocated; within 15 %"
    spec = TrainSpec(steps=4, warmup=1, precision='bfloat16', ema=0.9995)
    model = build(find_record(name), empty=True).train()
    for p in model.parameters():
        p.data.normal_(std=0.02)
    expected = sum(StepMeasure(model, spec, pairs).at())
    if device != 'cuda':
        return f'{expected / 1e9:.2f} GB computed for {name} and {pairs} pairs'
    batch = empty_batch(model.record, pairs)
    batch.text.random_(1, 50)
    batch.label.copy_(torch.arange(pairs))
    batch.image.normal_()
    state = start_run(model.cuda(), spec, 'memory')
    torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        start_step(state, batch, spec, objective, Readings(every=99))
    torch.cuda.synchronize()
    seen = torch.cuda.max_memory_allocated()
    assert abs(expected / seen - 1) < 0.15, (expected, seen)
    return f'{expected / 1e9:.2f} GB computed, {seen / 1e9:.2f} GB seen: {expected / seen:.2f}'


def check_feed(device, steps=50):
    "Images a second from bytes in memory to normalized numbers on the device"
    source = data()
    batches = Batches(source.data, source.spec.but(jitter=Jitter()))
    model = small().to('cuda' if device == 'cuda' else 'cpu')
    stream = batches.raw_since(0)
    start = time.perf_counter()
    for _ in range(steps):
        batch = place_batch(next(stream), model)
    if device == 'cuda':
        torch.cuda.synchronize()
    rate = steps * len(batch.index) / (time.perf_counter() - start)
    assert batch.image.dtype == torch.float32
    return f'{rate:,.0f} images/s of {batch.image.shape[-1]} pixels'


# name, function, its stand-in without a GPU (None: nothing), and why
CHECKS = [
    ('placement of every recipe', check_placement, 'meta', 'the `meta` device, without autocast'),
    ('bfloat16 by autocast', check_autocast, 'cpu', "the CPU's autocast"),
    ('compiled towers', check_compile, None, 'tests/test_feed.py compares graphs on the CPU'),
    ('NCCL, one rank', check_group, 'cpu', 'gloo on the CPU'),
    ('eight ranks', check_many_ranks, 'cpu', 'a process group that only pretends'),
    ('memory of a step', check_memory, 'cpu', 'computed only; not compared with a device'),
    ('from the reader to the device', check_feed, 'cpu', 'the CPU'),
]


def main():
    rows, is_failed = [], False
    for name, check, stand_in, why in CHECKS:
        where = 'cuda' if HAS_GPU else stand_in
        if where is None:
            rows.append((name, 'not run', why))
            continue
        try:
            found = check(where)
            rows.append((name, where if HAS_GPU else f'not on a GPU; {why}', found))
        except Exception as e:
            is_failed = True
            rows.append((name, where, f'FAILED: {type(e).__name__}: {str(e)[:200]}'))
    device = (
        torch.cuda.get_device_name() if HAS_GPU else 'no GPU here: what follows ran in its place'
    )
    print(device)
    for row in rows:
        print(' | '.join(row))
    if HAS_GPU and not is_failed:
        content = dict(device=device, torch=torch.__version__, rows=rows)
        (ROOT / 'results' / 'gpu.json').write_text(json.dumps(content, indent=1) + '\n')
    return is_failed


if __name__ == '__main__':
    raise SystemExit(main())
