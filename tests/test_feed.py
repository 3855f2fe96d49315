"How batches get to the device and losses get back: nothing of it changes what is learned."

import pytest, torch
import torch.distributed as dist
from torch._dynamo.utils import counters
from torch.testing._internal.distributed.fake_pg import FakeStore

from test_train import SPEC, data, losses, same, small
from mobileclip_nb.loaders.batches import Batches, finish_batch
from mobileclip_nb.loaders.ranged import Ranged
from mobileclip_nb.models.clip import CLIP
from mobileclip_nb.models.mci import MCI, MCi
from mobileclip_nb.models.text_transformer import TextSpec, TextTransformer
from mobileclip_nb.models.vit import ViT, ViTSpec
from mobileclip_nb.train.checkpoint import load_run
from mobileclip_nb.train.distributed import current_ranks
from mobileclip_nb.train.loop import agree, train
from mobileclip_nb.train.memory import compile_towers
from mobileclip_nb.train.optim import make_optimizer
from mobileclip_nb.train.step import step


class Finished(Batches):
    "The same batches, as floats and between two steps, as every source was read before"

    def since(self, start=0):
        while True:
            yield self.batch_at(start)
            start += 1


def test_bytes_ahead_train_the_same_model(tmp_path):
    "Raw batches in a thread and losses in groups of three: the losses and weights of floats, step by step"
    source = data()
    plain = train(small(), Finished(source.data, source.spec), SPEC, progress=False)
    grouped = train(small(), source, SPEC, tmp_path, progress=False, log_every=3)
    assert losses(grouped.history) == losses(plain.history)
    assert same(grouped.raw, plain.raw) and same(grouped.model, plain.model)
    rows = [{k: v for k, v in row.items() if k not in ('seconds', 'wait')} for row in plain.history]
    for row, expected in zip(grouped.history, rows, strict=True):
        assert {k: row[k] for k in expected} == expected
        assert list(row) == list(plain.history[0]) and row['seconds'] >= 0
    assert load_run(tmp_path)['history'] == grouped.history


def test_a_bad_step_is_noticed_late_and_undone(tmp_path):
    "With losses fetched every fourth step, step 5 is named, and the weights saved are those after step 4"

    def objective(model, batch, spec):
        from mobileclip_nb.train.objective import objective as plain

        objective.calls += 1
        loss = plain(model, batch, spec)
        return loss._replace(total=loss.total * float('inf')) if objective.calls == 6 else loss

    objective.calls = 0
    how = dict(progress=False, log_every=4, objective=objective)
    with pytest.raises(FloatingPointError, match='Step 5: the loss is inf'):
        train(small(), data(), SPEC, tmp_path, save_every=3, **how)
    assert load_run(tmp_path)['step'] == 3
    bad = load_run(tmp_path / 'nonfinite.pt')
    good = train(
        small(), data(), SPEC.but(steps=8), progress=False, judge=lambda m: {}, judge_every=5
    )
    assert bad['step'] == 5 and len(bad['history']) == 5
    assert losses(bad['history']) == losses(good.history)[:5]


def test_one_agreement_a_step(monkeypatch):
    "Everything that ranks decide before a step, and the losses of the steps before, travel in one message"
    dist.init_process_group('fake', rank=0, world_size=2, store=FakeStore())
    sent = []
    monkeypatch.setattr(
        dist, 'all_reduce', lambda x, *a, **k: sent.append((x.shape, x.device.type))
    )
    try:
        numbers = torch.ones(3, 5)
        agreed = agree(False, True, current_ranks(), 0, numbers)
    finally:
        dist.destroy_process_group()
    assert sent == [(torch.Size([4 + 15]), 'cpu')]
    assert agreed.save and not agreed.stop and agreed.numbers.shape == (3, 5)


def test_noise_is_drawn_by_rank_and_step():
    "The draws of a rank at a step are those of its rows in the batch of all ranks, and of no other step"
    source = data()
    ranked = [Ranged(source, (40.0, 20.0), 10, ranks=(r, 2)).draw(3, 8) for r in range(2)]
    whole = Ranged(source, (40.0, 20.0), 10).draw(3, 16)
    assert torch.equal(torch.cat([d.strength for d in ranked]), whole.strength)
    assert torch.equal(torch.cat([d.seed for d in ranked]), whole.seed)
    other = Ranged(source, (40.0, 20.0), 10).draw(4, 16)
    assert not torch.equal(other.strength, whole.strength) and other.share > whole.share


def towers(kind):
    "A narrow model of each kind"
    if kind == 'nano':
        return small(drop=0.0)
    torch.manual_seed(0)
    text = TextTransformer(TextSpec(width=32, heads=2, layers=1, context=8), 16)
    if kind == 'mci':
        return CLIP(
            MCi(MCI['mci0'].but(depths=(1, 1, 1, 1), dims=(8, 8, 16, 32), drop=0.0), 16), text
        )
    return CLIP(ViT(ViTSpec(dim=32, heads=2, depth=2, side=32, patch=16), 16), text)


@pytest.mark.parametrize('kind', ['nano', 'mci', 'vit'])
def test_compiled_towers_learn_the_same(kind):
    "One graph a tower without a break, and a training step with the same loss and gradient"
    batch = finish_batch(next(data().raw_since(0)))
    found = []
    for wanted in (False, True):
        model = towers(kind).train()
        counters.clear()
        torch._dynamo.reset()
        with torch.compiler.set_stance('default', force_backend='aot_eager'):
            with compile_towers(model, wanted):
                done = step(model, batch, make_optimizer(model, SPEC), SPEC)
        graphs = counters['stats']['unique_graphs']
        found.append((done.loss.total, done.norm, graphs, dict(counters['graph_break'])))
    (loss, norm, *_), (compiled_loss, compiled_norm, graphs, breaks) = found
    assert (graphs, breaks) == (2, {})
    torch.testing.assert_close(compiled_loss, loss, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(compiled_norm, norm, rtol=1e-3, atol=1e-3)
