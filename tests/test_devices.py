"Mistakes of device without a GPU: a step on the `meta` device meets every tensor that was left on the CPU."

from contextlib import nullcontext

import pytest, torch

from test_train import data, small
from mobileclip_nb.augment.jitter import Jitter
from mobileclip_nb.loaders.batches import Batches
from mobileclip_nb.loaders.ranged import Ranged
from mobileclip_nb.train import checkpoint
from mobileclip_nb.train.checkpoint import start_run
from mobileclip_nb.train.config import LossSpec, TrainSpec
from mobileclip_nb.train.objective import objective, with_bias
from mobileclip_nb.train.optim import parameter_groups
from mobileclip_nb.train.step import Readings, place_batch, start_step

TAUGHT = LossSpec(clip=0.25, distill=0.75, widths=(5, 7), scales=(70.0, 60.0))
SPEC = TrainSpec(steps=4, warmup=1, ema=0.9)
CASES = dict(
    plain=SPEC,
    same=SPEC.but(same=True),
    taught=SPEC.but(loss=TAUGHT),
    logits=SPEC.but(loss=TAUGHT.but(after_softmax=False, clip=0.0, distill=1.0)),
    chunked=SPEC.but(loss=TAUGHT.but(chunk=3)),
    sigmoid=SPEC.but(loss=TAUGHT.but(kind='sigmoid', biases=(-30.0,))),
    parts=SPEC.but(accumulate=2, frozen_norm=True),
    no_clip=SPEC.but(clip=0.0, channels_last=False),
)


class Unfused(torch.optim.AdamW):
    "PyTorch's fused AdamW does not know `meta`; this one ignores the flag for a bad step"

    _step_supports_amp_scaling = True

    def step(self):
        self.grad_scale = self.found_inf = None
        super().step()


def unfused(model, spec):
    return Unfused(parameter_groups(model, spec.decay), lr=spec.lr, foreach=True)


@pytest.fixture(autouse=True)
def meta_lacks(monkeypatch):
    "PyTorch has no autocast for `meta` either; types are not what is tested here"
    monkeypatch.setattr(torch, 'autocast', lambda *a, **k: nullcontext())
    monkeypatch.setattr(checkpoint, 'make_optimizer', unfused)


def batch_of(spec):
    "A raw batch on the CPU, with teacher embeddings where they are needed"
    source = data()
    raw = next(Batches(source.data, source.spec.but(jitter=Jitter())).raw_since(0))
    if not spec.loss.distill:
        return raw
    n, width = len(raw.index), sum(spec.loss.widths)
    rows = {k: torch.randn(n, width) for k in ('image_emb', 'text_emb', 'syn_emb')}
    return raw._replace(
        batch=raw.batch._replace(syn=raw.batch.text, syn_label=raw.batch.label, **rows)
    )


@pytest.mark.parametrize('name', CASES)
def test_a_step_leaves_nothing_on_the_cpu(name):
    "Two whole steps, from bytes on the CPU to the average of weights; no number is asked for"
    spec = CASES[name]
    model = small(drop=0.1)
    if spec.loss.kind == 'sigmoid':
        with_bias(model)
    state = start_run(model.to('meta'), spec, 'meta')
    readings = Readings(every=99)
    for _ in range(2):
        start_step(state, batch_of(spec), spec, objective, readings)
    assert state.step == 2 and {v.device.type for v in readings.values} == {'meta'}
    assert {p.grad.device.type for p in model.parameters()} == {'meta'}


def test_noise_is_added_on_the_device():
    "RangeAugment with a jitter before it, and normalization, where the bytes are"
    source = data()
    moved = Batches(source.data, source.spec.but(jitter=Jitter()))
    for inner in (source, moved):
        batch = place_batch(next(Ranged(inner, (40.0, 20.0), 10).raw_since(0)), small().to('meta'))
        assert {t.device.type for t in batch if t is not None} == {'meta'}
        assert batch.image.shape == (8, 3, 32, 32) and batch.image.dtype == torch.float32


def test_a_tensor_on_the_cpu_is_noticed():
    "The device does what it is used for: an objective that forgets one tensor fails"
    spec = CASES['plain']
    state = start_run(small(drop=0.1).to('meta'), spec, 'meta')

    def forgetful(model, batch, spec):
        loss = objective(model, batch, spec)
        return loss._replace(total=(loss.total * torch.ones(2)).sum())

    with pytest.raises(RuntimeError, match='device'):
        start_step(state, batch_of(spec), spec, forgetful, Readings(every=99))


def test_table_of_gpu_checks(capsys, monkeypatch):
    "Without a GPU the table says what stands in and what has not run; a check that fails is seen"
    import gpu_checks

    if gpu_checks.HAS_GPU:
        pytest.skip('there is a GPU: `make test-gpu`')
    monkeypatch.setattr(gpu_checks, 'RECIPES', ['nano-emoji-dr', 'mobileclip2_s0.dfndr2b'])

    def small_check(device):
        return gpu_checks.check_memory(device, 'mobileclip_nano', 8)

    checks = [
        (n, small_check if n == 'memory of a step' else c, *r) for n, c, *r in gpu_checks.CHECKS
    ]
    monkeypatch.setattr(gpu_checks, 'CHECKS', checks)
    assert not gpu_checks.main()
    told = capsys.readouterr().out
    assert told.count('not on a GPU') == len(checks) - 1
    assert 'compiled towers | not run' in told

    def broken(device):
        raise ValueError('no such thing')

    monkeypatch.setattr(gpu_checks, 'CHECKS', [('broken', broken, 'cpu', '')])
    assert gpu_checks.main()
    assert 'FAILED: ValueError: no such thing' in capsys.readouterr().out
