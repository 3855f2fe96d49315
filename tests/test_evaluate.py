"The suite on several ranks, killed and resumed, and against CLIP_benchmark over the same folders."

import json, os, shutil, signal, subprocess, sys, time, types
from pathlib import Path

import pytest, torch
from PIL import Image

from mobileclip_nb.cli.main import main
from mobileclip_nb.evaluate.datasets import find_datasets, hub_repo, write_emoji_sets
from mobileclip_nb.evaluate.embeddings import embed_dataset, wrap_clip
from mobileclip_nb.evaluate.suite import mean38, read_results, run_suite
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


def run_eval(capsys, *options):
    "Exit status and the object printed by `mobileclip eval mobileclip_nano ... --json`"
    words = ['eval', 'mobileclip_nano', '--device', 'cpu', '--json', *map(str, options)]
    status = main(words)
    out, err = capsys.readouterr()
    return status, json.loads(out) if out else err


def put_image(path):
    "A small image of one color"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new('RGB', (32, 32), (200, 40, 40)).save(path)


@pytest.fixture
def aro(tmp_path):
    "ARO with 25 questions of one pair of attributes, one relation, and two captions of COCO-Order"
    folder = tmp_path / 'aro'
    put_image(folder / 'images' / 'a.png')
    row = dict(image_path='a.png', bbox_x=0, bbox_y=0, bbox_w=16, bbox_h=16)
    row |= dict(true_caption='a cat over a frog', false_caption='a frog over a cat')
    row |= dict(relation_name='over', attributes=['red', 'blue'])
    for name in ('relation', 'attribution'):
        (folder / f'visual_genome_{name}.json').write_text(json.dumps([row] * 25))
    captions = ['a red cat to the left of a blue frog', 'a bell over an owl and a chair']
    order = [dict(image='images/a.png', caption=captions)]
    (folder / 'coco_karpathy_test.json').write_text(json.dumps(order))
    return folder


def without_tagger(monkeypatch):
    "As where spaCy is not installed"

    def raise_missing():
        raise ModuleNotFoundError('`spacy` is not installed')

    monkeypatch.setattr('mobileclip_nb.datasets.caption_order.load_tagger', raise_missing)


def test_aro_without_tagger(aro, tmp_path, capsys, monkeypatch):
    "Two perturbations of four, under a key of their own; the absent test is not found"
    without_tagger(monkeypatch)
    out = tmp_path / 'lines.jsonl'
    status, found = run_eval(capsys, '--on', 'aro', '--data', aro, '--out', out)
    keys = ['comp/aro_vg_relation', 'comp/aro_vg_attribution', 'comp/aro_coco_order_partly']
    assert [line['key'] for line in found['lines']] == keys
    assert list(read_results(out)) == keys
    assert found['lines'][2]['notes'][0].endswith('`spacy` is not installed')
    assert list(found['not_found']) == ['comp/aro_flickr30k_order']
    assert found['failed'] == {} and status == 1


def test_aro_with_tagger(aro, capsys, monkeypatch):
    "All four perturbations where there is a tagger"

    def load():
        return lambda caption: [(word, 'NN') for word in caption.split()]

    monkeypatch.setattr('mobileclip_nb.datasets.caption_order.load_tagger', load)
    status, found = run_eval(capsys, '--on', 'aro', '--data', aro)
    line = found['lines'][2]
    assert (line['key'], line['chance']) == ('comp/aro_coco_order', 1 / 5)


def test_aro_keeps_lines(aro, tmp_path, capsys, monkeypatch):
    "A test that fails does not lose the lines of the others, and its own old line is removed"
    without_tagger(monkeypatch)
    out = tmp_path / 'lines.jsonl'
    run_eval(capsys, '--on', 'aro', '--data', aro, '--out', out)
    outside = [dict(image='../../a.png', caption=['a cat'])]
    (aro / 'coco_karpathy_test.json').write_text(json.dumps(outside))
    status, found = run_eval(capsys, '--on', 'aro', '--data', aro, '--out', out)
    assert "'../../a.png' leads out of" in found['failed']['comp/aro_coco_order']
    assert list(read_results(out)) == ['comp/aro_vg_relation', 'comp/aro_vg_attribution']
    assert status == 1


def test_out_of_another_model(aro, tmp_path, capsys, monkeypatch):
    "A results file of another model is an error before anything is evaluated"
    without_tagger(monkeypatch)
    out = tmp_path / 'lines.jsonl'
    run_eval(capsys, '--on', 'aro', '--data', aro, '--out', out)
    before = out.read_bytes().replace(b'"mobileclip_nano"', b'"another"')
    out.write_bytes(before)

    def fail(*args, **how):
        pytest.fail('it was evaluated first')

    monkeypatch.setattr('mobileclip_nb.evaluate.compositionality.evaluate_visual_genome', fail)
    status, err = run_eval(capsys, '--on', 'aro', '--data', aro, '--out', out)
    assert status == 2 and 'holds results of another, not of mobileclip_nano' in err
    assert out.read_bytes() == before


@pytest.fixture
def spacy_model(tmp_path):
    "A model of spaCy on disk: blank but for tags of a few words"
    spacy = pytest.importorskip('spacy')
    pipeline = spacy.blank('en')
    ruler = pipeline.add_pipe('attribute_ruler')
    for word, tag in {'cat': 'NN', 'frog': 'NN', 'bell': 'NN', 'red': 'JJ', 'blue': 'JJ'}.items():
        ruler.add([[{'LOWER': word}]], {'TAG': tag})
    pipeline.to_disk(tmp_path / 'tags')
    spacy.blank('en').to_disk(tmp_path / 'blank')
    return tmp_path / 'tags'


def test_spacy_model_from_folder(aro, spacy_model, capsys):
    "A model of spaCy by its folder moves nouns and adjectives; one without tags fails by name"
    from mobileclip_nb.datasets.caption_order import load_tagger, perturb_caption

    tagger = load_tagger(str(spacy_model))
    caption, kinds = 'a red cat to the left of a blue frog', ['shuffle_nouns_and_adj']
    found = {perturb_caption(caption, kinds, tagger, seed)[1] for seed in range(40)}
    assert len(found) == 4  # two nouns and two adjectives
    assert 'a blue cat to the left of a red frog' in found
    status, lines = run_eval(capsys, '--on', 'aro', '--data', aro, '--tagger', spacy_model)
    assert lines['lines'][2]['key'] == 'comp/aro_coco_order' and lines['failed'] == {}
    blank = spacy_model.parent / 'blank'
    status, lines = run_eval(capsys, '--on', 'aro', '--data', aro, '--tagger', blank)
    assert 'gives no tags' in lines['failed']['comp/aro_coco_order']
    gone = spacy_model.parent / 'gone'
    status, err = run_eval(capsys, '--on', 'aro', '--data', aro, '--tagger', gone)
    assert status == 2 and 'python -m spacy download' in err


def test_sugarcrepe_splits(tmp_path, capsys):
    "Splits of the seven that are absent are reported as not found"
    put_image(tmp_path / 'val2017' / 'a.png')
    row = dict(filename='a.png', caption='a red cat', negative_caption='a blue cat')
    (tmp_path / 'replace_att.json').write_text(json.dumps({'0': row}))
    status, found = run_eval(capsys, '--on', 'sugarcrepe', '--data', tmp_path)
    assert [line['key'] for line in found['lines']] == ['comp/sugarcrepe_replace_att']
    assert len(found['not_found']) == 6 and status == 1


def test_winogavil(tmp_path, capsys):
    "Alone, and as one of the 38; without its folder the message says where to put it"
    put_winogavil(tmp_path / 'winogavil')
    status, found = run_eval(capsys, '--on', 'winogavil', '--data', tmp_path / 'winogavil')
    assert (status, found['lines'][0]['key']) == (0, 'misc/winogavil')
    status, found = run_eval(capsys, '--on', 'suite38', '--data', tmp_path)
    assert [line['key'] for line in found['lines']] == ['misc/winogavil']
    assert len(found['not_found']) == 37 and status == 1
    with pytest.raises(ValueError, match='--winogavil FOLDER.* --data FOLDER'):
        hub_repo('misc/winogavil')
    status, err = run_eval(capsys, '--on', 'winogavil', '--data', tmp_path)
    assert status == 2 and "'winogavil_dataset.csv' is missing" in err


def put_winogavil(folder, games=3):
    "Games with ten candidates of which two fit"
    names = [f'e{i}' for i in range(10)]
    for name in names:
        put_image(folder / 'winogavil_images' / f'{name}.jpg')
    cell = json.dumps(names).replace('"', '""')
    rows = [f'red {i},"{cell}","[""e1"", ""e2""]"' for i in range(games)]
    lines = ['cue,candidates,associations', *rows]
    (folder / 'winogavil_dataset.csv').write_text('\n'.join(lines))


def test_suite_of_the_hub_with_winogavil(tmp_path, capsys, monkeypatch):
    "37 data sets from the hub and WinoGAViL from its folder are one mean over 38"
    from mobileclip_nb.evaluate.datasets import read_samples, suite38, write_wds

    write_emoji_sets(tmp_path / 'sets', limit=6)
    by_kind = {d.kind: d for d in find_datasets(tmp_path / 'sets')}
    single = by_kind['classification']
    put_winogavil(tmp_path / 'games')
    two = [s._replace(groups=s.groups[:2]) for s in read_samples(single)]  # GeoDE has two columns
    write_wds(tmp_path / 'two', single.kind, two, single.class_names)

    def fetch(key):
        if key.startswith('misc/'):
            hub_repo(key)  # which says where its files are to be put
        (facts,) = [f for f in suite38() if f.key == key]
        if key == 'fairness/geode':
            return find_datasets(tmp_path / 'two')[0]._replace(key=key)
        kind = 'multilabel' if facts.metric == 'mean_average_precision' else 'classification'
        return by_kind['retrieval' if facts.classes is None else kind]._replace(key=key)

    monkeypatch.setattr('mobileclip_nb.evaluate.datasets.fetch_dataset', fetch)
    out = ['--out', tmp_path / 'lines.jsonl', '--cache', tmp_path / 'cache']
    status, without = run_eval(capsys, '--on', 'suite38', *out)
    assert (status, without['mean'], without['missing']) == (1, None, ['misc/winogavil'])
    assert '--winogavil FOLDER' in without['not_found']['misc/winogavil']
    games = ['--winogavil', tmp_path / 'games']
    status, found = run_eval(capsys, '--on', 'suite38', *out, *games)
    assert (status, found['not_found'], found['failed']) == (0, {}, {})
    values = {line['key']: line['metrics']['main_metric'] for line in found['lines']}
    assert len(values) == 38 and 'misc/winogavil' in values
    assert abs(found['mean'] - sum(values.values()) / 38) < 1e-12
    assert len(read_results(tmp_path / 'lines.jsonl')) == 38
    status, err = run_eval(capsys, '--on', 'coco', *games)
    assert status == 2 and '--winogavil belongs to --on suite38' in err


def test_urban1k(tmp_path, capsys):
    "Two images with captions"
    (tmp_path / 'caption').mkdir()
    for name in ('1', '2'):
        put_image(tmp_path / 'image' / f'{name}.jpg')
        (tmp_path / 'caption' / f'{name}.txt').write_text(f'caption {name}')
    status, found = run_eval(capsys, '--on', 'urban1k', '--data', tmp_path)
    assert (status, found['lines'][0]['key']) == (0, 'longclip/urban1k')


def test_broken_set_beside_others(sets, tmp_path, capsys):
    "A data set that cannot be opened does not stop the others"
    shutil.copytree(sets, tmp_path / 'sets')
    (tmp_path / 'sets' / 'wds_broken_test' / 'test').mkdir(parents=True)
    (tmp_path / 'sets' / 'wds_broken_test' / 'test' / 'nshards.txt').write_text('two')
    options = ['--on', tmp_path / 'sets', '--cache', tmp_path / 'cache']
    status, found = run_eval(capsys, *options)
    assert status == 1 and len(found['lines']) == 4
    assert 'does not give a number of shards' in found['not_found']['broken']


def test_ranks_of_different_weights(nano, monkeypatch):
    "Every rank raises if the ranks hold different weights"
    monkeypatch.setattr('mobileclip_nb.evaluate.suite.gather_parts', lambda x: [x, ('a', 'b')])
    with pytest.raises(ValueError, match='the ranks hold 2 different sets of weights'):
        run_suite(nano, [])


def test_rank_0_decides(sets, nano, tmp_path, monkeypatch):
    "Another rank takes the line of rank 0, although its own file of results has none"
    data = find_datasets(sets)[:1]
    (line,) = run_suite(nano, data).lines
    monkeypatch.setattr('mobileclip_nb.evaluate.suite.find_ranks', lambda: (1, 2))

    def gather(part):
        return [part if isinstance(part, tuple) else line, part]

    monkeypatch.setattr('mobileclip_nb.evaluate.suite.gather_parts', gather)
    monkeypatch.setattr('mobileclip_nb.evaluate.suite.identify_run', lambda *args: 'another')
    assert run_suite(nano, data).lines == [line]


def test_folder_named_like_one_of_the_38(tmp_path, capsys):
    "Images in a folder `cars` are no Stanford Cars"
    for name in ('red', 'crimson', 'scarlet'):
        put_image(tmp_path / 'cars' / name / '1.png')
    status, found = run_eval(capsys, '--on', tmp_path / 'cars', '--cache', tmp_path / 'cache')
    (line,) = found['lines']
    assert (line['key'], line['chance']) == ('folder/cars', 1 / 3)
    assert mean38(found['lines']).mean_of_present is None


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


@pytest.mark.parametrize('split', ['replace_obj', 'swap_att'])
def test_clip_benchmark_sugarcrepe(tmp_path, split):
    "The same questions in SugarCrepe's layout, the same model: CLIP_benchmark's accuracy is ours"
    with_clip_benchmark()
    import open_clip
    from clip_benchmark.datasets.builder import build_dataset, get_dataset_collate_fn
    from clip_benchmark.metrics import image_caption_selection
    from mobileclip_nb.datasets.emoji import load_emoji
    from mobileclip_nb.evaluate.compositionality import (
        Preparation,
        evaluate_sugarcrepe,
        read_sugarcrepe,
        score_questions,
    )
    from mobileclip_nb.models.open_clip_adapter import register_open_clip

    drawn, step = load_emoji('heldout', side=64), {'replace_obj': 1, 'swap_att': 7}[split]
    (tmp_path / 'val2017').mkdir()
    rows = {}
    for i in range(60):
        Image.fromarray(drawn.images[i]).save(tmp_path / 'val2017' / f'{i}.png')
        pair = dict(caption=drawn.captions[i], negative_caption=drawn.captions[i + step])
        rows[str(3 * i)] = dict(filename=f'{i}.png', **pair)  # their indices have gaps, too
    (tmp_path / f'{split}.json').write_text(json.dumps(rows))
    register_open_clip()
    made = open_clip.create_model_and_transforms('mobileclip_nano', pretrained='emoji')
    name = f'sugar_crepe/{split}'
    where = dict(root=str(tmp_path), transform=made[2], download=False)
    theirs = build_dataset(name, task='image_caption_selection', **where)
    loader = torch.utils.data.DataLoader(theirs, 32, collate_fn=get_dataset_collate_fn(name))
    tokenizer = open_clip.get_tokenizer('mobileclip_nano')
    how = dict(device='cpu', amp=False)
    expected = image_caption_selection.evaluate(made[0].eval(), loader, tokenizer, **how)
    ours = wrap_clip(create_model('mobileclip_nano', 'emoji'))
    how = Preparation(tokens=ours.tokens, prepare=ours.prepare)
    scores = score_questions(ours.module, read_sugarcrepe(tmp_path, splits=[split])[split], how)
    assert (
        scores[:, 0] != scores[:, 1]
    ).all()  # a tie is right there, and wrong here as in SugarCrepe
    (line,) = evaluate_sugarcrepe(ours.module, tmp_path, splits=[split], how=how)
    assert 0.5 < line['metrics']['acc'] < 1
    for key in ('acc', 'text_acc'):
        assert abs(line['metrics'][key] - expected[key]) < 1e-6


def add_small_vit(folder):
    "A small model of open_clip, `small-vit`, with another embedding width than ours"
    import open_clip

    vision = dict(image_size=32, layers=1, width=32, head_width=16, patch_size=16)
    text = dict(context_length=16, vocab_size=49408, width=32, heads=2, layers=1)
    config = dict(embed_dim=24, vision_cfg=vision, text_cfg=text)
    (folder / 'small-vit.json').write_text(json.dumps(config))
    open_clip.add_model_config(folder)


def test_ensemble(sets, tmp_path, capsys):
    "`eval 2*A+B+C`: logits are the weighted mean of the members' own, in any size; it resumes"
    from mobileclip_nb.evaluate.embeddings import wrap_open_clip
    from mobileclip_nb.evaluate.zeroshot import build_classifier

    add_small_vit(tmp_path)
    torch.manual_seed(0)
    model = '2*mobileclip_nano+teacher_nano_b+open_clip:small-vit'
    data = find_datasets(sets)[2]
    folder = data.files[0].parents[1]
    words = ['--on', folder, '--cache', tmp_path / 'cache', '--out', tmp_path / 'lines.jsonl']
    words = ['eval', model, '--device', 'cpu', '--json', *map(str, words)]
    assert main(words) == 0
    (line,) = json.loads(capsys.readouterr().out)['lines']
    assert line['model'] == '2*mobileclip_nano+teacher_nano_b+small-vit'
    torch.manual_seed(0)
    members = [
        wrap_clip(create_model(name, 'emoji', folded=True))
        for name in ('mobileclip_nano', 'teacher_nano_b')
    ]
    members.append(wrap_open_clip('small-vit'))
    logits = 0
    for weight, m in zip((0.5, 0.25, 0.25), members):
        found = embed_dataset(m, data)
        classes = build_classifier(m.module, data.class_names, data.templates, m.tokens)
        scale = m.module.logit_scale.exp().item()
        logits = logits + weight * scale * torch.from_numpy(found.rows) @ classes
    right = logits.argmax(1) == torch.tensor(found.labels)
    assert line['metrics']['acc1'] == right.double().mean().item()
    assert line['images'] == 120
    assert len(list((tmp_path / 'cache').glob('*/*.npz'))) == 4  # of the members, and joint


def test_ensemble_on_pictures(tmp_path, capsys):
    "An ensemble, and a model of open_clip, on a folder of captioned pictures"
    from mobileclip_nb.datasets.emoji import write_folder

    add_small_vit(tmp_path)
    write_folder(tmp_path / 'pictures', 'heldout', limit=30)
    for model in ('mobileclip_nano+open_clip:small-vit', 'open_clip:small-vit'):
        words = ['eval', model, '--on', str(tmp_path / 'pictures'), '--device', 'cpu', '--json']
        assert main(words) == 0
        found = json.loads(capsys.readouterr().out)['pictures']
        assert found['n_images'] == 30 and found['i2t_r10'] >= found['i2t_r1']


def test_teachers_tune(tmp_path, capsys):
    "A scale a teacher from pairs in a folder, as JSON; what cannot be read is named, with status 2"
    from mobileclip_nb.datasets.emoji import write_folder

    add_small_vit(tmp_path)
    write_folder(tmp_path / 'pictures', 'heldout', limit=30)
    words = ['--on', str(tmp_path / 'pictures'), '--scales', '10,40,100', '--device', 'cpu']
    assert main(['teachers', 'tune', 'teacher_nano_a', *words, '--json']) == 0
    found = json.loads(capsys.readouterr().out)
    (teacher,) = found['teachers']
    nll = {r['scale']: r['nll'] for r in found['readings']}
    assert found['pairs'] == 30 and list(nll) == [10, 40, 100]
    assert nll[teacher['best']] == min(nll.values()) == teacher['nll']
    assert f'"scale": {teacher["best"]}' in found['lines']['reinforce']
    for wrong, message in {
        ('teacher_nano_x',): "No model 'teacher_nano_x'",
        ('gone.json',): "No recipe file 'gone.json'",
        ('open_clip:small-vit',): 'A teacher needs weights',
        ('teacher_nano_a', '--out', 'new.json'): 'name one in place of models',
        ('teacher_nano_a', '--scales', 'high'): 'write numbers',
    }.items():
        assert main(['teachers', 'tune', *wrong[:1], *words, *wrong[1:]]) == 2
        assert message in capsys.readouterr().err


def test_open_clip_models(sets, tmp_path):
    "A model of open_clip that is not ours; and ours through open_clip's interface, with equal embeddings"
    import open_clip
    from mobileclip_nb.evaluate.embeddings import wrap_open_clip
    from mobileclip_nb.models.open_clip_adapter import register_open_clip

    add_small_vit(tmp_path)
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
