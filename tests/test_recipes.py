"Recipes from their name to weights: every published run at its smallest, on shards of the published form; and the verbs that learn."

import io, json, os, subprocess, sys
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from stand_ins import Hub, published_records, write_released

from mobileclip_nb.blocks.reparam import count_parameters
from mobileclip_nb.models.clip import CLIP
from mobileclip_nb.models.mci import MCi
from mobileclip_nb.train.paper_recipes import ROWS
from mobileclip_nb.shards.io import write_shard
from mobileclip_nb.shards.sample import Sample, StoreSpec
from mobileclip_nb.models.text_repmixer import TextRepMixer
from mobileclip_nb.models.text_transformer import TextSpec
from mobileclip_nb.train.finetune import METHODS
from mobileclip_nb.train.loop import train
from mobileclip_nb.train.cost import price, published_data
from mobileclip_nb.train.recipe import learner, recipe, record_of
from mobileclip_nb.train.release import from_run
from mobileclip_nb.train.run import run as run_recipe
from mobileclip_nb.train.source import Opening, open_run, source
from mobileclip_nb.models.zoo import build, find_record

RUN = [sys.executable, '-c', 'from mobileclip_nb.cli.main import main; raise SystemExit(main())']
ENV = os.environ | dict(OMP_NUM_THREADS='1')


def told(*words, cwd):
    return subprocess.run(
        [*RUN, *words], cwd=cwd, env=ENV, capture_output=True, text=True, timeout=300
    )


def rows(rng, k, widths):
    return np.concatenate(
        [
            (v := rng.standard_normal((k, w)).astype('f'))
            / np.linalg.norm(v, axis=1, keepdims=True)
            for w in widths
        ],
        1,
    )


def write_published(at):
    "Sixteen samples as the papers publish them: two teachers of 768, two augmentations, two lists of synthetic captions, no manifest"
    rng, keys = np.random.default_rng(0), ('syn_text', 'syn_text_dfn_mscoco38k')

    def sample(i):
        f = io.BytesIO()
        Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(f, 'JPEG')
        aug = tuple(
            [[2, 3, 50, 40], [[9, -0.26999998092651367], [3, -30.45317268371582]]] for _ in range(2)
        )
        return Sample(
            f'{i:04}',
            f.getvalue(),
            'jpg',
            (f'picture {i}',),
            {k: (f'one {i}', f'a {i}') for k in keys},
            aug,
            rows(rng, 2, (768, 768)),
            dict(text=rows(rng, 1, (768, 768))) | {k: rows(rng, 2, (768, 768)) for k in keys},
        )

    at.mkdir(parents=True, exist_ok=True)
    for n in range(2):
        write_shard(
            at / f'{n:08}.tar',
            [sample(8 * n + i) for i in range(8)],
            StoreSpec('bf16' if n else 'float32'),
        )
    return at


@pytest.fixture(scope='module')
def shards(tmp_path_factory):
    return write_published(tmp_path_factory.mktemp('shards'))


@pytest.mark.parametrize('name', ROWS)
def test_published_recipe(name, shards):
    "The recipe's own pictures, captions, rows, loss, optimizer and schedule, two steps, with a small model in the place of its own; its own is built and counted without memory"
    r = recipe(name).at('smoke')
    small = CLIP(
        MCi('mci_nano', 32),
        TextRepMixer(
            TextSpec(width=32, heads=2, layers=1, conv_blocks=1, kernel=5, context=77), 32
        ),
    )
    run = train(small, source(r, shards), r.train, progress=False)
    assert [np.isfinite(s['loss']) for s in run.history] == [True, True] and run.batch == 4
    whole = recipe(name).at('full')
    with torch.device('meta'):
        model = build(record_of(whole), empty=True)
    assert count_parameters(model) > 50e6
    cost = price(whole, 12.8e6 / 1.3 / 3600, published_data(whole.data), 'Table 4d, eight A100')
    assert (
        cost.samples == ROWS[name].steps * ROWS[name].batch
        and cost.stored > 5e11
        and 'Table 4d' in str(cost)
    )


# ---- on two ranks


def run_on_ranks(shards, at):
    "What every published recipe and every fine-tuning ends with, on each of two ranks"
    hub = Hub(at / 'hub')
    write_released(hub)
    start = ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2']
    script = Path(__file__).with_name('recipes_on_ranks.py')
    done = subprocess.run(
        [sys.executable, *start, str(script), str(shards), str(at)],
        env=hub.env,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((at / f'{rank}.json').read_text()) for rank in range(2)]


def check_ranks(name, first, second):
    "Both ranks took two finite steps together, with their share of the batch, to the same weights"
    for one in (first, second):
        assert one['ranks'] == 2, name
        assert one['pairs'] == 2, name
        assert np.isfinite(one['losses']).tolist() == [True, True], name
    assert first['losses'] == second['losses'], name
    assert first['weights'] == second['weights'], name


def test_published_names_on_two_ranks(shards, tmp_path):
    """Under torchrun, with a narrow model of the same kind in the place of its own: each published recipe by its
    name, and fine-tuning of each released model by its name, its weights found in its repository
    """
    first, second = run_on_ranks(shards, tmp_path)
    assert list(first['train']) == list(ROWS)
    for name, row in ROWS.items():
        one = first['train'][name]
        check_ranks(name, one, second['train'][name])
        assert one['record'] == row.model
        assert one['teachers'] == [*row.weights, list(row.scales)]
    assert list(first['tune']) == [r.name for r in published_records()]
    for name, one in first['tune'].items():
        check_ranks(name, one, second['tune'][name])
        assert one['record'] == name
    assert {one['method'] for one in first['tune'].values()} == set(METHODS)


def test_released_models_are_built():
    "At their own widths, without memory"
    for record in published_records():
        with torch.device('meta'):
            model = build(find_record(record.name), empty=True)
        assert count_parameters(model) > 50e6, record.name


def test_names_of_finetuning_are_those_of_open_clip():
    "Tags and repositories are open_clip's where it has the model; four it does not have"
    listed = {}
    for model, tag in open_clip.list_pretrained():
        if 'MobileCLIP' in model:
            repo = open_clip.get_pretrained_cfg(model, tag)['hf_hub'].strip('/')
            listed[find_record(model, tag).name] = {tag: f'hf-hub:{repo}'}
    ours = {r.name: r.weights for r in published_records()}
    assert {name: ours[name] for name in listed} == listed
    absent = {'mobileclip_s0', 'mobileclip_s3', 'mobileclip_s4', 'mobileclip_l14'}
    assert set(ours) - set(listed) == absent


def test_real_model_of_a_published_recipe(shards, tmp_path):
    "MobileCLIP-S0 itself takes two steps of its own recipe"
    r = recipe('mobileclip_s0.datacompdr1b').at('smoke')
    r = r.but(stream=r.stream.but(batch=2))
    run = train(learner(r), source(r, shards), r.train, progress=False)
    assert len(run.history) == 2 and all(np.isfinite(s['loss']) for s in run.history)


def test_train_on_shards_mixed_and_released(shards, tmp_path):
    "Shards and a folder in one run, a price first, a field by its name, raw weights out of the folder, and a refusal that names the field"
    Image.new('RGB', (64, 64), 'red').save(tmp_path / 'a.png')
    Image.new('RGB', (64, 64), 'blue').save(tmp_path / 'b.png')
    (tmp_path / 'captions.csv').write_text(
        'image,caption\na.png,a red square\nb.png,a blue square\n'
    )
    words = [
        'train',
        f'{shards}:3,{tmp_path}:1',
        '--scale',
        'smoke',
        '--steps',
        '2',
        '--set',
        'stream.batch=8',
        '--out',
        'run',
        '--freeze',
        'image',
        '--json',
    ]
    done = told(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-800:]
    assert '2 steps of 8: 16 pairs' in done.stderr and 'measured here' in done.stderr
    again = told(*words, '--resume', cwd=tmp_path)
    assert (
        again.returncode == 0
        and json.loads(again.stdout)['metrics']['loss_nats']
        == json.loads(done.stdout)['metrics']['loss_nats']
    ), again.stderr[-800:]
    freed = told('release', 'run', '--out', 'raw.safetensors', '--raw', '--json', cwd=tmp_path)
    assert freed.returncode == 0 and json.loads(freed.stdout)['run']['weights'] == 'raw', (
        freed.stderr
    )
    wrong = told('train', '.', '--set', 'train.lrr=1', cwd=tmp_path)
    assert (
        wrong.returncode == 2
        and "Did you mean 'lr" in wrong.stderr
        and 'Traceback' not in wrong.stderr
    )


def test_price_of_a_published_run(tmp_path):
    "A published run has a price without its data, and says that its rate is assumed"
    got = told(
        'train',
        '--recipe',
        'mobileclip_s0.datacompdr1b',
        '--scale',
        'full',
        '--price',
        '--rate',
        '20000',
        '--json',
        cwd=tmp_path,
    )
    p = json.loads(got.stdout)
    assert (
        got.returncode == 0
        and p['samples'] == 200_000 * 65_536
        and abs(p['hours'] - p['samples'] / 20_000 / 3600) < 1e-6
        and p['assumed'] == 'assumed: --rate'
    )
    person = told(
        'train',
        '--recipe',
        'mobileclip_s0.datacompdr1b',
        '--price',
        '--rate',
        '20000',
        cwd=tmp_path,
    )
    assert (
        person.returncode == 0
        and '140 TB of data' in person.stdout
        and 'e+' not in person.stdout
        and 'This is not the published run' in person.stderr
    )
    absent = told('train', '--recipe', 'mobileclip_s0.datacompdr1b', cwd=tmp_path)
    assert (
        absent.returncode == 2
        and 'datacompdr1b' in absent.stderr
        and 'Traceback' not in absent.stderr
    )


def test_release_of_a_short_run(tmp_path):
    "Its statistics are computed again from its data, as it was judged; where these are gone or others, the running ones stay and it is said"
    for i in range(12):
        Image.new('RGB', (64, 64), (20 * i, 240 - 20 * i, 60)).save(tmp_path / f'{i}.png')
    (tmp_path / 'captions.csv').write_text(
        'image,caption\n' + ''.join(f'{i}.png,color {i}\n' for i in range(12))
    )
    out, r = tmp_path / 'run', recipe('nano-emoji').at('smoke')
    r = r.but(stream=r.stream.but(batch=8))
    data = open_run(r, tmp_path, Opening(progress=False))
    done = run_recipe(
        data.recipe, data.source, out, progress=False, place=str(tmp_path), held_out=data.shares
    )
    raw, said = from_run(out, 'raw')
    assert said['statistics'] == 'running' and all(
        torch.equal(t, raw.state_dict()[k]) for k, t in done.run.raw.state_dict().items()
    )
    model, said = from_run(out)
    assert (
        said['statistics'] == 'recomputed over 4 batches'
        and 'images_per_s_wall' not in said['metrics']
    )
    assert all(torch.equal(t, model.state_dict()[k]) for k, t in done.model.state_dict().items())
    plain, said = from_run(out, statistics=False)
    moved = {
        k.rpartition('.')[2]
        for k, t in plain.state_dict().items()
        if not torch.equal(t, model.state_dict()[k])
    }
    assert said['statistics'] == 'running' and moved == {'running_mean', 'running_var'}
    freed = told('release', 'run', '--out', 'free.safetensors', '--json', cwd=tmp_path)
    assert (
        freed.returncode == 0
        and json.loads(freed.stdout)['run']['statistics'] == 'recomputed over 4 batches'
    ), freed.stderr
    (tmp_path / '11.png').unlink()
    heard = []
    assert (
        from_run(out, say=heard.append)[1]['statistics'] == 'running'
        and 'other data than the run learned from' in heard[0]
    )
    for p in tmp_path.glob('*.png'):
        p.unlink()
    gone = told('release', 'run', '--out', 'free.safetensors', '--json', cwd=tmp_path)
    assert (
        gone.returncode == 0
        and json.loads(gone.stdout)['run']['statistics'] == 'running'
        and 'cannot be opened' in gone.stderr
    ), gone.stderr


def test_tuned_weights_keep_their_statistics(tmp_path):
    "A run that began with weights is not judged by the rule of runs that began with none"
    r = recipe('nano-emoji').at('smoke')
    r = r.but(stream=r.stream.but(batch=8))
    data = source(r, 'emoji', progress=False)

    def judge(model):
        return dict(loss=1.0)

    runs = [
        run_recipe(r, data, judge=judge, progress=False, started=name) for name in ('', 'weights')
    ]
    assert ['statistics_batches' in x.run.judged[0] for x in runs] == [True, False]
    assert all(torch.equal(a, b) for a, b in zip(*(x.run.raw.state_dict().values() for x in runs)))
