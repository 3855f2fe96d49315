"""What stored files depend on: ids of configurations, bits of generators, the version of the code.

`python tests/test_stored.py` adds ids that `fixtures/ids.json` does not have; it changes none.
"""

import ast, importlib, inspect, json, os, pkgutil, shutil, subprocess, sys, textwrap
from dataclasses import dataclass
from pathlib import Path

import pytest, torch
from safetensors import safe_open

import mobileclip_nb
from mobileclip_nb.augment.pipeline import rng_for
from mobileclip_nb.loaders.batches import seeded
from mobileclip_nb.reinforce.caption_sampling import caption_uniforms
from mobileclip_nb.loaders.epoch_order import generator
from mobileclip_nb.core.config import Spec
from mobileclip_nb.train.recipe import RECIPES
from mobileclip_nb.models.zoo import ZOO, Record

ROOT, FIXTURES = Path(__file__).resolve().parents[1], Path(__file__).parent / 'fixtures'
IDS = FIXTURES / 'ids.json'


def subclasses(cls):
    "All subclasses of a class that the library defines"
    for c in cls.__subclasses__():
        if c.__module__.startswith('mobileclip_nb.'):
            yield c
        yield from subclasses(c)


def spec_classes():
    "Every Spec class of the library by its `id_name`"
    for m in pkgutil.walk_packages(mobileclip_nb.__path__, 'mobileclip_nb.'):
        if not m.name.endswith('__main__'):
            importlib.import_module(m.name)
    found = list(subclasses(Spec))
    named = {c.id_name: c for c in found}
    assert len(named) == len(found), 'two Spec classes have one id_name'
    return named


def run_lines():
    text = (ROOT / 'results' / 'ledger.jsonl').read_text(encoding='utf-8')
    return [json.loads(line) for line in text.splitlines()]


def class_of(line, classes):
    "The class whose id a line bears; of six lines by an older Recipe, the class that reads them"
    read = {}
    for name, cls in classes.items():
        try:
            read[name] = cls.from_dict(line['spec']).id
        except (TypeError, ValueError, AttributeError):
            continue
    return next((name for name, i in read.items() if i == line['spec_id']), next(iter(read)))


def weight_records():
    "The record in every shipped weight file, by the file's name; a captioner's file has none"
    for path in sorted((ROOT / 'mobileclip_nb' / 'weights').glob('*.safetensors')):
        with safe_open(path, 'pt') as f:
            about = json.loads(f.metadata()['mobileclip_nb'])
        if 'record' in about:
            yield path.name, about['record']


def stored_runs():
    "The spec in every stored checkpoint, by its path in `fixtures`"
    for path in sorted(FIXTURES.rglob('state*.pt')):
        yield str(path.relative_to(FIXTURES)), torch.load(path, weights_only=True)['spec']


def current_ids(classes):
    "All ids as this code computes them"
    lines = [(class_of(line, classes), line) for line in run_lines()]
    return dict(
        default={name: cls().id for name, cls in sorted(classes.items())},
        ledger=[[d['spec_id'], name, classes[name].from_dict(d['spec']).id] for name, d in lines],
        weights={name: Record.from_dict(d).id for name, d in weight_records()},
        runs={name: classes['TrainSpec'].from_dict(d).id for name, d in stored_runs()},
        recipes={name: r.id for name, r in sorted(RECIPES.items())},
        zoo={name: r.id for name, r in sorted(ZOO.items())},
    )


@pytest.fixture(scope='module')
def classes():
    return spec_classes()


def test_ids(classes):
    "Ledger lines, weights, stored runs, recipes and models have the ids that were recorded"
    recorded, now = json.loads(IDS.read_text(encoding='utf-8')), current_ids(classes)
    assert now['ledger'][: len(recorded['ledger'])] == recorded['ledger']
    for spec_id, name, computed in now['ledger'][len(recorded['ledger']) :]:
        assert computed == spec_id, name
    for kind in ('default', 'weights', 'runs', 'recipes', 'zoo'):
        assert {k: now[kind].get(k) for k in recorded[kind]} == recorded[kind], kind
        assert set(now[kind]) == set(recorded[kind]), f'{kind}: run python tests/test_stored.py'


def test_every_class_states_its_name(classes):
    "A Spec class names itself in its first line, so that its id does not hang on the class's name"
    for cls in classes.values():
        node = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
        stated = {k.arg: ast.literal_eval(k.value) for k in node.keywords}
        assert stated.get('id_name') == cls.id_name, f'{cls.__name__} states no id_name'


def test_renaming_moves_no_id(classes):
    "A class of another name with the same id_name has the same ids; without one it has its own"
    line = next(l for l in run_lines() if l['spec_id'] == '077bb2dc4b')

    @dataclass(frozen=True, repr=False)
    class TrainingRecipe(classes['Recipe'], id_name='Recipe'):
        pass

    @dataclass(frozen=True, repr=False)
    class Other(classes['Recipe']):
        pass

    assert TrainingRecipe.from_dict(line['spec']).id == line['spec_id']
    assert Other.from_dict(line['spec']).id != line['spec_id']


SEED = 4880863877093318445
SEEDED = [
    4072193932,
    2189064502,
    3139265110,
    3463436757,
    1221225321,
    3401582793,
    3018906877,
    1006365628,
]
GENERATOR = [
    8384422338204891761,
    465494806177900368,
    8566580408302315150,
    16367079560053132617,
    18419928637582755609,
    10864247697425581754,
    14277896475984387213,
    8149266107314277438,
]
RNG_FOR = [
    0.3647139782375155,
    0.8834859325726186,
    0.6600082336276866,
    0.7553736145038144,
    0.500184930553439,
    0.34236814131437776,
    0.7397972061594386,
    0.5726092186965722,
]
DRAWS = [
    0.1654115686096802,
    0.8634995615890604,
    0.7557091608846072,
    0.7499178388396763,
    0.18054237803224926,
    0.5801526151336952,
    0.49719421886757564,
    0.5081902834292504,
]


def test_draws():
    "Each way of making a generator from keys gives the bits it gave when this was recorded"
    g = seeded(7, 'epoch', 3, 'größe')
    assert g.initial_seed() == SEED
    assert torch.randint(2**32, (8,), generator=g).tolist() == SEEDED
    assert generator(7, 'epoch', 3, 'größe').bit_generator.random_raw(8).tolist() == GENERATOR
    rng = rng_for(7, 'größe', 3)
    assert [rng.random() for _ in range(8)] == RNG_FOR
    assert caption_uniforms(7, 'größe', 3, 8) == DRAWS


def git(*words, cwd):
    "What git prints, without the settings of this machine"
    env = os.environ | dict(GIT_CONFIG_GLOBAL=os.devnull, GIT_CONFIG_SYSTEM=os.devnull)
    command = ['git', '-c', 'user.name=test', '-c', 'user.email=test@example.org', *words]
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=True)
    return done.stdout.strip()


CODE = """import mobileclip_nb
from mobileclip_nb.core.ledger import record_run
print(record_run('run', {}, {}).code, mobileclip_nb.__file__)"""


def recorded_code(folder):
    "The version that a run in a folder's copy of the library records"
    env = os.environ | dict(PYTHONPATH=str(folder), PYTHONDONTWRITEBYTECODE='1')
    command = [sys.executable, '-c', CODE]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=True)
    code, path = done.stdout.split()
    assert Path(path).is_relative_to(folder)
    return code


@pytest.mark.skipif(not shutil.which('git'), reason='needs git')
def test_a_run_in_a_clone_records_its_commit(tmp_path):
    "`git:` and the commit, `-dirty` where a file differs from it, neither where there is no commit"
    ours = tmp_path / 'ours'
    left_out = shutil.ignore_patterns('__pycache__', '*.safetensors')
    shutil.copytree(ROOT / 'mobileclip_nb', ours / 'mobileclip_nb', ignore=left_out)
    assert not recorded_code(ours).startswith('git:')
    for words in (['init', '-q'], ['add', '.'], ['commit', '-qm', 'all']):
        git(*words, cwd=ours)
    clone = tmp_path / 'clone'
    git('clone', '-q', str(ours), str(clone), cwd=tmp_path)
    commit = git('rev-parse', '--short=10', 'HEAD', cwd=clone)
    assert recorded_code(clone) == f'git:{commit}'
    init = clone / 'mobileclip_nb' / '__init__.py'
    init.write_text(init.read_text(encoding='utf-8') + '# changed\n', encoding='utf-8')
    assert recorded_code(clone) == f'git:{commit}-dirty'


def record_ids():
    "Add what is new to `fixtures/ids.json`; what stands there stays"
    now = current_ids(spec_classes())
    old = json.loads(IDS.read_text(encoding='utf-8'))
    made = {k: now[k] | old[k] for k in now if k != 'ledger'}
    made['ledger'] = old['ledger'] + now['ledger'][len(old['ledger']) :]
    IDS.write_text(json.dumps(made, indent=1) + '\n', encoding='utf-8')


if __name__ == '__main__':
    record_ids()
