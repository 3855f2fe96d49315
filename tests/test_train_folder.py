"A run on one's own folder: captions as they are, a held-out part, mixtures with few pictures, folders that are taken, a price on every way."

import json, os, re, socket

import pytest
from test_train import LIMIT, ended, losses, quietly, server

from mobileclip_nb.cli.main import main
from mobileclip_nb.datasets.emoji import write_folder
from mobileclip_nb.preprocessing.tokenizer import encode
from mobileclip_nb.train.heldout import BEST_BY
from mobileclip_nb.train.options import run_of
from mobileclip_nb.train.recipe import NOTE, read_note, recipe
from mobileclip_nb.train.run import run as run_recipe
from mobileclip_nb.train.source import source
from mobileclip_nb.train.checkpoint import load_run

SHORT = ('--scale', 'smoke', '--set', 'stream.batch=8', '--rate', '100', '--json')


@pytest.fixture
def folder(tmp_path, monkeypatch):
    "Eighty pictures, every fourth with a caption of more than 20 tokens, in a folder that we stand in"
    monkeypatch.chdir(tmp_path)
    write_folder('pics', 'train', limit=80)
    lines = open('pics/captions.csv').read().splitlines()
    lines = [
        f'{l} seen on a large white sheet of paper with a thin black outline and flat bright colours from very near'
        if i % 4 == 1
        else l
        for i, l in enumerate(lines)
    ]
    open('pics/captions.csv', 'w').write('\n'.join(lines))
    write_folder('one', 'heldout', limit=1)
    return tmp_path


@pytest.fixture
def told(capsys):
    "Run the command line in this process; exit status, standard output and standard error"

    def run(*words):
        capsys.readouterr()
        status = main([str(w) for w in words])
        return status, *capsys.readouterr()

    return run


def test_own_captions(folder, told):
    "No template, nothing cut, a held-out part whose recall stands beside the loss, and the best checkpoint marked"
    status, out, err = told('train', 'pics', '--out', 'run', '--steps', '20', *SHORT)
    assert status == 0, err
    note, held = read_note('run'), load_run('run')
    longest = max(
        len(encode(l.partition(',')[2])) + 2
        for l in open('pics/captions.csv').read().splitlines()[1:]
    )
    assert note.recipe.stream.templates == ('{}',) and 20 < note.record.context_length <= longest
    assert (
        f'each as it is; the model reads {note.record.context_length} tokens instead of 20' in err
        and 'are cut' not in err
    )
    n = int(re.search(r'held out: (\d+) of 80', err)[1])
    assert 5 < n < 30 and note.held_out == (0.2,) and f'{80 - n} captions' in err
    assert [j['step'] for j in held['judged']] == [10, 20] and held['judged'][-1][
        'heldout_n_images'
    ] == n
    for line in ('step 10, loss', 'step 20, loss'):
        assert re.search(
            line + r' \d\.\d+; \d+ held-out pictures: image to text R@1 .* \(chance .*R@5', err
        ), err
    logged = [json.loads(l) for l in open('run/log.jsonl')]
    assert [l['step'] for l in logged if 'judged' in l] == [10, 20]
    result = json.loads(out)
    best = max(held['judged'], key=lambda j: j[BEST_BY])
    assert (
        result['best'] == dict(step=best['step'], recall=best[BEST_BY], chance=pytest.approx(1 / n))
        and load_run('run/best.pt')['step'] == best['step']
    )
    assert result['metrics']['heldout_t2i_r5'] == held['judged'][-1]['heldout_t2i_r5']
    assert run_of('run/model.safetensors')['held_out'] == [0.2]
    again = told('train', 'pics', '--out', 'run', '--steps', '20', *SHORT, '--resume')
    assert again[0] == 0 and 'all 20 steps are made already' in again[2]


def test_eval_of_a_folder(folder, told):
    "Weights are judged on what they did not see apart from what they saw; words that a vocabulary lacks are said"
    assert told('train', 'pics', '--out', 'run', *SHORT)[0] == 0
    found = json.loads(told('eval', 'run/model.safetensors', '--on', 'pics', '--json')[1])
    assert (
        list(found) == ['pics, held out', 'pics, trained on']
        and sum(f['n_images'] for f in found.values()) == 80
    )
    os.rename('pics', 'others')
    assert list(
        json.loads(told('eval', 'run/model.safetensors', '--on', 'others', '--json')[1])
    ) == ['others']
    with open('one/captions.csv') as f:
        text = f.read()
    with open('one/captions.csv', 'w') as f:
        f.write(
            text.splitlines()[0]
            + '\n'
            + text.splitlines()[1].split(',')[0]
            + ',quokkas zigzagging fjordwards'
        )
    status, _, err = told('eval', 'run/model.safetensors', '--on', 'one', '--json')
    assert (
        status == 0
        and 'does not know 3 of the 3 words of these captions' in err
        and 'recall near chance is to be expected' in err
    )


def test_asked_otherwise(folder, told):
    "Templates by name stay and are said; without a held-out part all pictures train; a few pictures have none"
    _, out, err = told(
        'train',
        'pics',
        '--out',
        'a',
        *SHORT,
        '--set',
        'stream.templates=["{}", "a drawing of {}"]',
        '--held-out',
        '0',
    )
    note = read_note('a')
    assert (
        note.recipe.stream.templates == ('{}', 'a drawing of {}')
        and note.held_out == (0.0,)
        and not json.loads(out)['best']
    )
    assert (
        "80 captions, each in one of 2 templates, such as 'a drawing of {}'" in err
        and 'all pictures train, 80 in number' in err
    )
    write_folder('few', 'heldout', limit=20)
    assert '64 or more have one by default' in told('train', 'few', '--out', 'b', *SHORT)[
        2
    ] and read_note('b').held_out == (0.0,)
    status, _, err = told('train', 'emoji', '--out', 'c', *SHORT, '--held-out', '.1')
    assert status == 2 and 'held-out concepts of their own' in err


def test_what_is_cut_is_said(folder, told):
    "A trained model keeps its context, so captions are cut: how many, and how much of the longest"
    status, out, err = told('finetune', 'mobileclip_nano', 'pics', '--out', 'run', *SHORT)
    cut = re.search(
        r'(\d+) of them are longer and are cut; the longest loses (\d+) of (\d+) tokens', err
    )
    assert (
        status == 0
        and 10 < int(cut[1]) <= 20
        and int(cut[3]) - int(cut[2]) == 20
        and json.loads(out)['best']['step'] == 2
    ), err


def test_a_run_begun_before(folder, told):
    "A run without a word of a held-out part in its note goes on with all its data and its templates, to the numbers of an unbroken one"
    r = recipe('nano-emoji').but(smoke=8).at('smoke')
    r = r.but(stream=r.stream.but(batch=8))
    whole = run_recipe(r, source(r, 'pics', progress=False), progress=False).run

    def stop(model, batch, spec, calls=[]):
        from mobileclip_nb.train.objective import objective

        calls.append(1)
        if len(calls) == 4:
            os.kill(os.getpid(), 2)
        return objective(model, batch, spec)

    with pytest.raises(KeyboardInterrupt):
        run_recipe(
            r,
            source(r, 'pics', progress=False),
            'run',
            progress=False,
            place='pics',
            objective=stop,
        )
    note = json.load(open(f'run/{NOTE}'))
    del note['held_out']
    json.dump(note, open(f'run/{NOTE}', 'w'))
    status, _, err = told('train', 'pics', '--out', 'run', '--steps', '8', *SHORT, '--resume')
    assert status == 0 and 'goes on from step 4 of 8' in err and 'as it was begun' in err, err
    held = load_run('run')
    assert held['data'] == whole.data and losses(held['history']) == losses(whole.history)
    assert all((held['model'][k] == t).all() for k, t in whole.raw.state_dict().items())
    status, _, err = told(
        'train', 'pics', '--out', 'run', '--steps', '8', *SHORT, '--resume', '--held-out', '.2'
    )
    assert status == 2 and 'held-out share 0.2 (was 0)' in err


def test_a_place_of_one_picture(folder, told):
    "It does not shrink the batch of a mixture, and stands in every batch once; a run of pairs that have nothing to be compared with is an error"
    status, out, err = told(
        'train',
        'pics:1,one:1',
        '--out',
        'mix',
        '--scale',
        'smoke',
        '--rate',
        '100',
        '--price',
        '--json',
        '--set',
        'stream.batch=32',
    )
    assert (
        status == 0
        and json.loads(out)['batch'] == 32
        and 'one has 1 pictures and gives 1 pairs to each step instead of 16' in err
    ), err
    for words in (('one',), ('pics', '--set', 'stream.batch=1')):
        status, _, err = told('train', *words, '--out', 'x', '--scale', 'smoke')
        assert (
            status == 2
            and 'that of a single pair is always 0' in err
            and '--set stream.batch=64' in err
            and not os.path.exists('x')
        ), err


def test_a_folder_that_is_taken(folder, told):
    "Another run is refused before anything is read, by both names, resumed or not; files of others are not overwritten"
    assert told('train', 'pics', '--out', 'run', *SHORT)[0] == 0
    before = open('run/model.safetensors', 'rb').read()
    for more in ((), ('--resume',)):
        status, _, err = told('train', 'one', '--out', 'run', *SHORT, *more)
        assert (
            status == 2
            and "'run' holds the run nano-emoji on pics, and nano-emoji on one is asked for" in err
            and 'decode' not in err
        )
        status, _, err = told('finetune', 'mobileclip_nano', 'pics', '--out', 'run', *SHORT, *more)
        assert status == 2 and 'finetune on pics from mobileclip_nano is asked for' in err
    assert open('run/model.safetensors', 'rb').read() == before
    os.mkdir('mine')
    open('mine/log.jsonl', 'w').write('{"mine": 1}\n')
    status, _, err = told('train', 'pics', '--out', 'mine', *SHORT)
    assert (
        status == 2
        and 'holds log.jsonl, and no run of ours that wrote it' in err
        and open('mine/log.jsonl').read() == '{"mine": 1}\n'
    )


def test_release_overwrites_its_own_alone(folder, told):
    "The run's own file may be written again; another run's, or no weights at all, is an error that names both"
    for name, seed in (('a', 0), ('b', 1)):
        assert told('train', 'pics', '--out', name, *SHORT, '--seed', seed)[0] == 0
    assert [
        told('release', 'a', '--out', 'w.safetensors', *more)[0] for more in ((), ('--raw',), ())
    ] == [0, 0, 0]
    before = open('w.safetensors', 'rb').read()
    status, _, err = told('release', 'b', '--out', 'w.safetensors')
    a, b = (run_of(f'{n}/model.safetensors')['recipe_id'] for n in 'ab')
    assert (
        status == 2
        and f"holds nano-emoji ({a}) on pics, and nano-emoji ({b}) on pics would overwrite it"
        in err
    )
    assert open('w.safetensors', 'rb').read() == before
    open('notes.safetensors', 'w').write('not weights')
    assert (
        told('release', 'a', '--out', 'notes.safetensors')[0] == 2
        and open('notes.safetensors').read() == 'not weights'
    )


def as_rank(port, rank, words):
    "Call torchrun's module as one of two ranks"
    from mobileclip_nb.train.__main__ import main as module

    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE='2',
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE='2',
        MASTER_ADDR='127.0.0.1',
        MASTER_PORT=str(port),
    )
    if module(words):
        raise SystemExit(1)


def run_as_ranks(folder, words, world=2):
    "Run torchrun's module as two ranks, and wait for both"
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    ps = [
        server().Process(target=quietly, args=(folder, k, as_rank, port, k, words))
        for k in range(world)
    ]
    for p in ps:
        p.start()
    said = [folder / f'said{k}' for k in range(world)]
    assert ended(*ps) == [0] * world, '\n'.join(f.read_text() for f in said)


def test_one_experiment_has_one_id(folder, told):
    "The console, the module and the module on two ranks write the same id, and one line each"
    from mobileclip_nb.core.ledger import read
    from mobileclip_nb.train.__main__ import main as module

    short = ['--scale', 'smoke', '--set', 'stream.batch=8', '--device', 'cpu']
    rank = ['nano-emoji', '--data', 'pics', *short, '--quiet', '--watch', '--resume']
    alone = [*rank, '--out', 'b', '--ledger', 'b.jsonl']
    pair = [*rank, '--out', 'c', '--ledger', 'c.jsonl', '--patience', '2']
    for _ in range(2):  # the second time no step is left, and no line is written
        assert told('train', 'pics', '--out', 'a', *short, '--resume')[0] == 0
        assert module(alone) == 0
        run_as_ranks(folder, pair)
    (console,), (one,), (two,) = map(read, ('runs/ledger.jsonl', 'b.jsonl', 'c.jsonl'))
    for line in (one, two):
        assert (line.run, line.spec_id, line.seed) == ('nano-emoji', console.spec_id, console.seed)
        assert (line.spec, line.scale) == (console.spec, console.scale)
    assert console.spec_id == read_note('a').recipe.id
    assert one.metrics['loss_nats'] == console.metrics['loss_nats']
    assert one.metrics['heldout_i2t_r1'] == console.metrics['heldout_i2t_r1']
    assert two.metrics['ranks'] == 2


def test_two_ranks_say_the_price_once(folder):
    "The price is measured by both ranks and said by the first; so are the held-out part and its recall, and the run goes on on both"
    words = [
        'nano-emoji',
        '--data',
        str(folder / 'pics'),
        '--out',
        str(folder / 'run'),
        '--scale',
        'smoke',
        '--set',
        'stream.batch=8',
        '--device',
        'cpu',
        '--quiet',
        '--patience',
        '2',
        '--resume',
    ]
    for _ in range(2):
        run_as_ranks(folder, words)
    first, second = (folder / 'said0').read_text(), (folder / 'said1').read_text()
    assert (
        second == ''
        and first.count('measured here, in a few steps') == 1
        and first.count('held-out pictures: image to text R@1') == 2
    ), first
    assert (
        first.index('measured here') < first.index('step 4, loss')
        and 'all 4 steps are made already' in first
    )
    assert (folder / 'run/best.pt').exists() and read_note(folder / 'run').held_out == (0.2,)
