"The suite on several ranks, killed and resumed, and against CLIP_benchmark over the same folders."

import json, os, signal, subprocess, sys, time, types
from pathlib import Path

import pytest, torch

from mobileclip_nb.evaluate.datasets import find_datasets, write_emoji_sets
from mobileclip_nb.evaluate.embeddings import embed_dataset, wrap_clip
from mobileclip_nb.evaluate.suite import read_results, run_suite
from mobileclip_nb.models.factory import create_model

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope='module')
def sets(tmp_path_factory):
    "Four data sets made of emoji, in DataComp's layout"
    folder = tmp_path_factory.mktemp('sets')
    write_emoji_sets(folder, side=64, limit=120)
    return folder


@pytest.fixture(scope='module')
def nano():
    return wrap_clip(create_model('mobileclip_nano', 'emoji', folded=True))


def shell(*words, start=(sys.executable, '-m'), **how):
    "Start a process of the library"
    env = os.environ | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1')
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen([*start, *map(str, words)], env=env, **pipes, **how)


def strip(lines):
    "Result lines without what depends on the clock"
    return [{k: v for k, v in line.items() if k != 'images_per_s'} for line in lines]


def close(one, two):
    "Equal metrics by name"
    return one.keys() == two.keys() and all(
        one[k] == two[k] or abs(one[k] - two[k]) < 1e-6 for k in one
    )


def test_two_ranks(sets, nano, tmp_path):
    "Two processes share the images and give the lines of one; the first one prints and writes"
    torchrun = ['-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2']
    asked = ['eval', 'mobileclip_nano', '--on', sets, '--device', 'cpu', '--json']
    asked += ['--out', tmp_path / 'two.jsonl', '--cache', tmp_path / 'cache']
    done = shell(*torchrun, '-m', 'mobileclip_nb', *asked, start=[sys.executable])
    out, err = done.communicate(timeout=240)
    assert done.returncode == 0, err[-3000:]
    two = json.loads(out)['lines']  # one object: rank 1 is silent
    one = run_suite(nano, find_datasets(sets), batch=50).lines
    assert [line['key'] for line in two] == [line['key'] for line in one]
    for a, b in zip(two, one):
        assert a['images'] == b['images'] == 120 and a['run'] == b['run']
        assert close(a['metrics'], b['metrics']), (a, b)
    assert strip(read_results(tmp_path / 'two.jsonl').values()) == strip(two)


def test_killed(sets, tmp_path):
    "A run killed after a data set computes only the others"
    asked = ['eval', 'mobileclip_nano', '--on', sets, '--device', 'cpu', '--json']
    asked += ['--out', tmp_path / 'lines.jsonl', '--cache', tmp_path / 'cache']
    process = shell('mobileclip_nb', *asked)
    for _ in range(2400):
        if (tmp_path / 'lines.jsonl').exists() or process.poll() is not None:
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    before = read_results(tmp_path / 'lines.jsonl')
    assert 1 <= len(before) <= 4
    process = shell('mobileclip_nb', *asked)
    out, err = process.communicate(timeout=240)
    lines = json.loads(out)['lines']
    assert process.returncode == 0 and len(lines) == 4, err[-2000:]
    for line in lines[: len(before)]:
        assert line == before[line['key']]  # with its time: it was read, not computed


def test_datacomp_reads_ours(sets, nano, tmp_path):
    "What DataComp's evaluate.py takes from a line, as strict JSON"
    run_suite(nano, find_datasets(sets)[:1], tmp_path / 'ours.jsonl')
    text = (tmp_path / 'ours.jsonl').read_text()
    line = json.loads(text, parse_constant=lambda name: pytest.fail(name))
    assert list(line)[:3] == ['key', 'dataset', 'metrics']
    assert isinstance(line['metrics']['main_metric'], float)


def with_clip_benchmark():
    "CLIP_benchmark without its captioning metrics, which bring 230 MB, and with a mended accuracy"
    pytest.importorskip('clip_benchmark')
    name = 'clip_benchmark.metrics.captioning'
    sys.modules.setdefault(name, types.ModuleType(name))
    from clip_benchmark.metrics import zeroshot_classification

    def accuracy(output, target, topk=(1,)):
        "Theirs calls `float` on an array of one element, which numpy 2.4 does not accept"
        best = output.topk(max(topk), 1, True, True)[1]
        return [(best[:, :k] == target[:, None]).any(1).double().mean().item() for k in topk]

    zeroshot_classification.accuracy = accuracy


@pytest.mark.parametrize('index', range(4))
def test_clip_benchmark(sets, index):
    "The same folder, the same model: CLIP_benchmark's numbers are ours"
    with_clip_benchmark()
    import open_clip
    from clip_benchmark.datasets.builder import build_dataset, image_captions_collate_fn
    from clip_benchmark.metrics import zeroshot_classification, zeroshot_retrieval
    from mobileclip_nb.models.open_clip_adapter import register_open_clip

    data = find_datasets(sets)[index]
    register_open_clip()
    made = open_clip.create_model_and_transforms('mobileclip_nano', pretrained='emoji')
    model, transform, tokenizer = (
        made[0].eval(),
        made[2],
        open_clip.get_tokenizer('mobileclip_nano'),
    )
    folder = data.files[0].parents[1]
    task = 'zeroshot_retrieval' if data.kind == 'retrieval' else 'zeroshot_classification'
    where = dict(root=str(folder), transform=transform, split='test', task=task)
    theirs = build_dataset(f'wds/{data.key}', **where)
    retrieval = data.kind == 'retrieval'
    collate = image_captions_collate_fn if retrieval else None
    batches = theirs.batched(32, collation_fn=collate) if retrieval else theirs.batched(32)
    loader = torch.utils.data.DataLoader(batches, batch_size=None)
    loader.dataset.classes, loader.dataset.templates = theirs.classes, theirs.templates
    if retrieval:
        how = dict(device='cpu', amp=False, recall_k_list=[1, 5, 10])
        expected = zeroshot_retrieval.evaluate(model, loader, tokenizer, **how)
    else:
        words = (theirs.classes, theirs.templates)
        how = dict(device='cpu', amp=False)
        expected = zeroshot_classification.evaluate(model, loader, tokenizer, *words, **how)
    ours = wrap_clip(create_model('mobileclip_nano', 'emoji'))
    metrics = run_suite(ours, [data]).lines[0]['metrics']
    assert len(expected) >= 1
    for name, value in expected.items():
        assert abs(metrics[name] - value) < 1e-6, (name, metrics[name], value)


def test_open_clip_models(sets, tmp_path):
    "A model of open_clip that is not ours; and ours through open_clip's interface, with equal embeddings"
    import open_clip
    from mobileclip_nb.evaluate.embeddings import wrap_open_clip
    from mobileclip_nb.models.open_clip_adapter import register_open_clip

    vision = dict(image_size=32, layers=1, width=32, head_width=16, patch_size=16)
    text = dict(context_length=16, vocab_size=49408, width=32, heads=2, layers=1)
    config = dict(embed_dim=24, vision_cfg=vision, text_cfg=text)
    (tmp_path / 'small-vit.json').write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path)
    data = find_datasets(sets)[2]
    small = data._replace(files=data.files[:1])
    line = run_suite(wrap_open_clip('small-vit'), [small]).lines[0]
    assert line['model'] == 'small-vit' and line['metrics']['mean_per_class_recall'] < 0.5
    register_open_clip()
    theirs = embed_dataset(wrap_open_clip('mobileclip_nano', 'emoji'), small)
    ours = embed_dataset(wrap_clip(create_model('mobileclip_nano', 'emoji')), small)
    assert abs(theirs.rows - ours.rows).max() < 1e-5


def test_mteb(sets, tmp_path):
    "A zero-shot task of mteb on the same images and prompts: its accuracy is ours"
    mteb = pytest.importorskip('mteb')
    import io
    from datasets import Dataset, DatasetDict
    from mteb.abstasks.task_metadata import TaskMetadata
    from mteb.abstasks.zeroshot_classification import AbsTaskZeroShotClassification
    from PIL import Image
    from mobileclip_nb.evaluate.datasets import read_samples
    from mobileclip_nb.evaluate.mteb_adapter import MtebEncoder

    data = find_datasets(sets)[2]._replace(templates=('an emoji of {}',))
    samples = list(read_samples(data))
    rows = dict(label=[s.label for s in samples])
    rows['image'] = [Image.open(io.BytesIO(s.image)) for s in samples]
    about = dict(name='EmojiWords', description='Words of emoji', reference='https://example.org')
    about |= dict(dataset=dict(path='none/none', revision='1'), type='ZeroShotClassification')
    about |= dict(category='i2t', eval_splits=['test'], eval_langs=['eng-Latn'])
    about |= dict(main_score='accuracy', modalities=['text', 'image'], bibtex_citation='')
    for name in ('date', 'domains', 'task_subtypes', 'license', 'annotations_creators'):
        about[name] = None
    about |= dict(dialect=None, sample_creation=None)

    class EmojiWords(AbsTaskZeroShotClassification):
        metadata = TaskMetadata(**about)

        def load_data(self, *args, **how):
            self.dataset = DatasetDict(test=Dataset.from_dict(rows))
            self.data_loaded = True

        def get_candidate_labels(self):
            return [f'an emoji of {name}' for name in data.class_names]

    encoder = MtebEncoder('mobileclip_nb/mobileclip_nano', device='cpu')
    assert encoder.mteb_model_meta.name == 'mobileclip_nb/mobileclip_nano'
    result = mteb.evaluate(encoder, [EmojiWords()], cache=None, co2_tracker=False)
    score = result.task_results[0].scores['test'][0]
    line = run_suite(wrap_clip(create_model('mobileclip_nano', 'emoji', folded=True)), [data])
    assert abs(score['accuracy'] - line.lines[0]['metrics']['acc1']) < 1e-9
