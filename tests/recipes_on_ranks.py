"""Every published recipe, and fine-tuning of every released model, one after the other on the ranks of one group.

`torchrun --nproc_per_node 2 tests/recipes_on_ranks.py SHARDS OUT`, with the weights of `stand_ins.write_released` in
the hub's cache. Each rank writes OUT/RANK.json: what every run ended with.
"""

import hashlib, json, sys
from pathlib import Path

import stand_ins
import torch

from mobileclip_nb.train.finetune import METHODS, choose_method, finetune
from mobileclip_nb.train.paper_recipes import ROWS
from mobileclip_nb.train.process_group import group
from mobileclip_nb.train.recipe import recipe
from mobileclip_nb.train.run import RunConfig, run

QUIET = RunConfig(progress=False, watch=(), device='cpu')


def digest(model):
    "Hash of all tensors, to compare ranks"
    state = model.state_dict().values()
    return hashlib.sha256(b''.join(t.float().numpy().tobytes() for t in state)).hexdigest()


def ended(result, method=''):
    "What a run ended with, in JSON"
    loss, model = result.recipe.train.loss, result.model
    return dict(
        record=model.record.name,
        losses=[row['loss'] for row in result.run.history],
        ranks=result.metrics['ranks'],
        pairs=result.data.source.batch,
        teachers=[loss.clip, loss.distill, list(loss.scales)],
        weights=digest(model),
        method=method,
    )


def train_published(shards, ranks):
    "Each published recipe at its smallest"
    return {
        name: ended(run(recipe(name).at('smoke'), shards, ranks=ranks, config=QUIET))
        for name in ROWS
    }


def tune_released(shards):
    "Each released model by its name, by one method after the other; its weights come from the hub"
    r = recipe('finetune').at('smoke')
    r, found = r.but(stream=r.stream.but(batch=4)), {}
    methods = list(METHODS)
    for i, record in enumerate(stand_ins.published_records()):
        method = methods[i % len(methods)]
        tuned = choose_method(r, method, 2)
        keep = 0.5 if method == 'whole' else 0.0
        done = finetune(record.name, shards, r=tuned, keep=keep, config=QUIET)
        found[record.name] = ended(done.fit, method)
    return found


if __name__ == '__main__':
    shards, out = sys.argv[1:]
    torch.set_num_threads(1)
    stand_ins.narrow_zoo()
    with group('cpu', 4) as ranks:
        found = dict(train=train_published(shards, ranks), tune=tune_released(shards))
        (Path(out) / f'{ranks.rank}.json').write_text(json.dumps(found))
