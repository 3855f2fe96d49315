"A small documentation site: what a page shows, links, formulas, API, search, slides, launchers."

import json, re, sys, threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import parse_qs, urlsplit

import pytest

from mobileclip_nb.export.web import find_browser

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / 'docs'))
import crawl, design, library, prose

NEEDED = ('sphinx', 'myst_nb', 'pydata_sphinx_theme', 'latex2mathml', 'sphinx_revealjs')
LACKING = [name for name in NEEDED if find_spec(name) is None]
needs_sphinx = pytest.mark.skipif(bool(LACKING), reason=f'needs {LACKING}: pip install .[docs]')

WIDGET = 'application/vnd.jupyter.widget-view+json'
NAMES = ['index', 'losses/01_distillation', 'blocks/04_repmixer', 'evaluate/12_ensemble']
NAMES += ['tutorials/01_predict']


@pytest.fixture(scope='module')
def site(tmp_path_factory):
    "A site of five notebooks, with formulas, figures, a stored widget and a tutorial"
    import make_site

    folder = tmp_path_factory.mktemp('docs')
    found = make_site.build(folder / 'site', folder / 'work', NAMES)

    def page(name):
        return (folder / 'site' / f'{name}.html').read_text(encoding='utf-8')

    return SimpleNamespace(out=folder / 'site', found=found, page=page, work=folder / 'work')


def page_text(html):
    return re.sub(r'\s+', ' ', re.sub(r'<[^>]+>', '', html))


@needs_sphinx
def test_site_has_no_faults(site):
    "No warning of Sphinx, no dead link, no page out of reach, nothing fetched from elsewhere"
    assert site.found == []
    pages, links, _ = crawl.crawl(site.out)
    assert pages > 15
    assert links > 500


@needs_sphinx
def test_directives_and_hidden_cells_vanish(site):
    source = (ROOT / 'nbs' / 'losses' / '01_distillation.ipynb').read_text(encoding='utf-8')
    assert '#| hide' in source
    hidden = 'from torch.utils._python_dispatch import TorchDispatchMode'
    assert hidden in source
    page = site.page('losses/01_distillation')
    assert hidden not in page_text(page)
    for name in NAMES:
        assert '#| ' not in page_text(site.page(name))
    assert 'tag_exported' in page


@needs_sphinx
def test_names_lead_to_the_api(site):
    "A public name in backticks is a link into the API; from there a link leads to its cell"
    page = site.page('losses/01_distillation')
    name = 'mobileclip_nb.losses.distillation.reinforced_loss'
    assert f'href="../api/losses.distillation.html#{name}"' in page
    api = site.page('api/losses.distillation')
    assert f'id="{name}"' in api
    (cell,) = [
        c.id
        for c in design.Notebook(ROOT / 'nbs' / 'losses' / '01_distillation.ipynb').exported
        if 'def reinforced_loss(' in c.source
    ]
    assert f'href="../losses/01_distillation.html#cell-{cell}"' in api
    assert f'id="cell-{cell}"' in page


@needs_sphinx
def test_api_shows_comments_of_parameters(site):
    text = page_text(site.page('api/losses.distillation'))
    assert 'logit scale of each teacher, or one for all' in text  # scales of teacher_probs
    assert 'Returns Tensor: (b, B) float32 probabilities, rows sum to 1' in text
    assert 'after_softmax bool True average probabilities; otherwise add logits' in text
    page = site.page('api/losses.distillation')
    assert re.search(r'/mobileclip_nb/losses/distillation.py#L\d+-L\d+', page)


@needs_sphinx
def test_formulas_need_no_script(site):
    page = site.page('losses/01_distillation')
    assert '<math xmlns="http://www.w3.org/1998/Math/MathML"' in page
    assert 'mathjax' not in ' '.join(crawl.Page(page).fetched).lower()


@needs_sphinx
def test_formula_with_doubled_backslashes_is_a_fault():
    from mathml import formula

    assert '<mi>&#x003BB;</mi>' in formula(r'\lambda', 'inline')
    with pytest.raises(ValueError, match='doubled backslashes'):
        formula(r'\\lambda', 'inline')


@needs_sphinx
def test_formula_keeps_no_command_of_tex():
    "The converter leaves a double bar behind a size as TeX; a prime is raised by the font alone"
    from mathml import formula

    assert '>&#x02016;</mo>' in formula(r'a\big\|b', 'block')
    assert '<msup>' not in formula("W' = W", 'inline')
    with pytest.raises(ValueError, match='keeps a command'):
        formula(r'\big\Vert', 'inline')


@needs_sphinx
def test_folder_with_other_files_is_kept(tmp_path):
    import make_site

    (tmp_path / 'thesis.txt').write_text('all of it')
    (fault,) = make_site.build(tmp_path, tmp_path / 'work', NAMES)
    assert 'holds other files' in fault
    assert (tmp_path / 'thesis.txt').read_text() == 'all of it'


@needs_sphinx
def test_stored_widget_is_no_script(site):
    raw = (ROOT / 'nbs' / 'evaluate' / '12_ensemble.ipynb').read_text(encoding='utf-8')
    cells = json.loads(raw)['cells']
    cells.append(widget_cell(WIDGET))
    from stage import shown_output

    kept = shown_output(cells[-1]['outputs'][0], str)
    assert kept['data'] == {'image/png': 'abc'}
    assert (
        shown_output(
            dict(output_type='display_data', data={WIDGET: {}, 'text/plain': 'VBox()'}), str
        )
        is None
    )
    page = site.page('evaluate/12_ensemble')
    assert 'widget-view' not in page
    assert 'require.js' not in page


def widget_cell(kind):
    "A cell that shows a widget and its picture"
    output = dict(output_type='display_data', data={kind: {}, 'image/png': 'abc'})
    return dict(cell_type='code', source='panel', outputs=[output])


@needs_sphinx
def test_search_finds(site):
    "The index that the browser searches has the words and the pages they stand in"
    text = (site.out / 'searchindex.js').read_text(encoding='utf-8')
    index = json.loads(text.removeprefix('Search.setIndex(').removesuffix(')'))
    names = index['docnames']

    def pages(word):
        found = [index[part].get(word, []) for part in ('terms', 'titleterms')]
        return {names[k] for one in found for k in ([one] if isinstance(one, int) else one)}

    assert 'blocks/04_repmixer' in pages('repmix')  # the stem of RepMixer
    assert {'losses/01_distillation', 'api/losses.distillation'} <= pages('logit') & pages('scale')
    assert pages('manifest') != set()


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        "Write nothing"


@pytest.fixture
def address(site):
    "The site behind a plain server of files"
    server = ThreadingHTTPServer(('127.0.0.1', 0), partial(Quiet, directory=site.out))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}'
    server.shutdown()


@pytest.fixture
def tab():
    "A page of a headless browser"
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=find_browser(), args=['--no-sandbox'])
        yield browser.new_page(viewport=dict(width=390, height=800))
        browser.close()


@needs_sphinx
@pytest.mark.skipif(not find_browser(), reason='needs Chromium (apt: chromium) and Playwright')
def test_browser_searches_and_asks_nobody(site, address, tab):
    "Each search lists pages; no page asks another host, writes an error or is wider than a phone"
    asked, errors = [], []
    tab.on('request', lambda request: asked.append(request.url))
    tab.on('console', lambda m: errors.append(m.text) if m.type == 'error' else None)
    for words in ('RepMixer', 'logit scale', 'manifest'):
        tab.goto(f'{address}/search.html?q={words}')
        tab.wait_for_selector('#search-results li a')
        tab.wait_for_load_state('networkidle')
    for name in [*NAMES, 'api/losses.distillation', 'tutorials/01_predict.slides']:
        tab.goto(f'{address}/{name}.html')
        tab.wait_for_load_state('networkidle')
        assert tab.evaluate('document.documentElement.scrollWidth') <= 390, name
    assert len(asked) > 20
    assert [url for url in asked if not url.startswith((address, 'data:'))] == []
    assert errors == []


@needs_sphinx
def test_slides(site):
    "A deck beside each tutorial, with reveal.js in the folder"
    deck = site.page('tutorials/01_predict.slides')
    assert deck.count('class="slide"') > 8
    assert 'src="../_static/reveal/dist/reveal.js"' in deck
    assert (site.out / '_static' / 'reveal' / 'dist' / 'reveal.js').is_file()
    assert 'page-links' not in deck
    extras = (ROOT / '.binder' / 'requirements.txt').read_text().strip().removeprefix('-e .')
    assert f'mobileclip_nb{extras} @ git+' in page_text(site.page('tutorials/01_predict'))


# --- the parts, without Sphinx -------------------------------------------------------------------


def test_crawl_finds_what_is_planted(tmp_path):
    (tmp_path / 'index.html').write_text(
        '<a href="gone.html">x</a><a href="there.html#here">x</a><a href="there.html#nowhere">x</a>'
        '<script src="https://cdn.example.org/x.js"></script><a href="../out.html">x</a>'
        '<a href="https://example.org/page">a reader may follow this</a>'
    )
    (tmp_path / 'there.html').write_text(
        '<p id="here"></p><style>a { background: url(//h.org/b) }</style>'
    )
    (tmp_path / 'lost.html').write_text('')
    (tmp_path / 'a.css').write_text('a { background: url("no.png") } b { background: url(a.css) }')
    pages, links, found = crawl.crawl(tmp_path)
    assert pages == 3
    assert links == 4
    assert found == [
        'index.html: gone.html: no such file',
        'index.html: there.html#nowhere: no such place in the page',
        'index.html: ../out.html: leads out of the site',
        'index.html: https://cdn.example.org/x.js: fetched from elsewhere',
        'there.html: //h.org/b: fetched from elsewhere',
        'a.css: no.png: no such file',
        'lost.html: no page leads here',
    ]


def test_names_in_prose():
    names = {'RepMixer': 'p.RepMixer', 'split': 'p.split', 'fold': 'p.fold'}
    here = prose.names_here(names, {'fold'})
    text = (
        '`RepMixer` and `fold(...)`, [`RepMixer`](a.ipynb), `split`\n# `RepMixer`\n```\n`fold`\n```'
    )
    assert prose.link_names(text, here) == (
        '{py:obj}`RepMixer <p.RepMixer>` and {py:obj}`fold(...) <p.fold>`, [`RepMixer`](a.ipynb), '
        '`split`\n# `RepMixer`\n```\n`fold`\n```'
    )


def test_links_to_files_lead_to_the_repository():
    path = ROOT / 'nbs' / 'index.ipynb'
    text = '[a](../LICENSE) [b](../tests) [c](demo.ipynb) [d](https://example.org)'
    base = library.REPOSITORY

    def is_notebook(file):
        return file.suffix == '.ipynb'

    assert prose.link_names(text, {}, path, is_notebook) == (
        f'[a]({base}/blob/main/LICENSE) [b]({base}/tree/main/tests) [c](demo.ipynb) '
        '[d](https://example.org)'
    )


def test_names_are_all_public_names():
    "What the site knows by reading the source is what the modules offer"
    import mobileclip_nb
    from mobileclip_nb.losses import distillation

    module = library.Module('losses.distillation')
    assert list(module.definitions) + list(module.values) == distillation.__all__
    assert set(library.front_names()) == set(mobileclip_nb.__all__)
    path, lines = library.source_lines('mobileclip_nb.losses.distillation.split', [module])
    first = int(re.match(r'#L(\d+)', lines)[1])
    assert (ROOT / path).read_text().splitlines()[first - 1] == 'def split('


TUTORIALS = sorted((ROOT / 'nbs' / 'tutorials').glob('*.ipynb'))


@needs_sphinx
@pytest.mark.parametrize('path', TUTORIALS, ids=lambda p: p.stem)
def test_launch_links(path):
    "Colab and Binder open files that are in the tree, of the repository that settings.ini names"
    import stage

    links = stage.launch_links(design.Notebook(path))
    place = f'{library.SETTINGS["user"]}/{library.SETTINGS["repo"]}'
    branch = library.SETTINGS['branch']
    colab = urlsplit(links['Colab']).path.removeprefix(f'/github/{place}/blob/{branch}/')
    binder = urlsplit(links['Binder'])
    assert (ROOT / colab).is_file()
    assert binder.path == f'/v2/gh/{place}/{branch}'
    (opened,) = parse_qs(binder.query)['urlpath']
    assert (ROOT / opened.removeprefix('lab/tree/')).is_file()


def test_binder_installs_known_extras():
    (line,) = (ROOT / '.binder' / 'requirements.txt').read_text().split('\n')[:-1]
    extras = re.fullmatch(r'-e \.\[(.+)\]', line)[1].split(',')
    assert all(f'{extra}_requirements' in library.SETTINGS for extra in extras)
    assert (ROOT / '.binder' / 'postBuild').stat().st_mode & 0o100


def test_workflow_runs_make_docs():
    "The workflow runs the command that is tried here and publishes the folder that it writes"
    import yaml

    text = (ROOT / '.github' / 'workflows' / 'docs.yml').read_text(encoding='utf-8')
    jobs = yaml.safe_load(text)['jobs']
    steps = jobs['build']['steps']
    assert [s['run'] for s in steps if 'run' in s] == ['make docs']
    assert steps[-1]['with']['path'] == library.SETTINGS['doc_path']
    used = [s['uses'] for job in jobs.values() for s in job['steps'] if 'uses' in s]
    assert all(name.startswith('actions/') for name in used)
    makefile = (ROOT / 'Makefile').read_text(encoding='utf-8')
    assert '\ndocs: .venv/with-docs\n\t$(BIN)/python docs/make_site.py\n' in makefile
