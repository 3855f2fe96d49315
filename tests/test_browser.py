"""Widgets and apps as a person meets them: a headless browser, JupyterLab, Voilà, and the keyboard.

A panel is made twice, here and in a kernel. Keys move a control in the browser, its value is set here; then the picture
in the page must be, byte by byte, what `render_*` draws of the new values. Nothing may be fetched from another host, and
an error on the console of the browser fails the test. Screenshots and times are kept in `runs/browser`.

Without a browser the tests are skipped by name; with CI=true they fail.
"""

import base64, html, http.client, importlib.util, io, json, os, re, signal, socket, subprocess, sys, time
import urllib.parse
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import nbformat
import pytest
from PIL import Image

from mobileclip_nb.export.web import find_browser

ROOT = Path(__file__).resolve().parents[1]
KEPT = Path(os.environ.get('BROWSER_KEPT', ROOT / 'runs' / 'browser'))
IN_CI = os.environ.get('CI') == 'true'
pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.skipif(
        not find_browser() and not IN_CI, reason='needs Chromium (apt: chromium) and Playwright'
    ),
]
SECONDS = float(
    os.environ.get('BROWSER_SECONDS', 60)
)  # that a picture or a page may take on a busy machine
# what the browser may write to its console although nothing is wrong: a pattern and the reason
HARMLESS = {
    r'favicon': 'pages have no icon',
}


def typed(text):
    "Keys that replace the text of a field"
    return ['Control+a', *(['Delete'] if not text else [dict(text=text)]), 'Enter']


def typed_area(text):
    "Keys that replace the text of an area of several lines, and leave it"
    return ['Control+a', dict(text=text), 'Tab']


def chosen(words):
    "What chooses an option by its words; JupyterLab takes letters for itself, `m` makes Markdown of a cell"
    return [dict(option=words)]


def option(number):
    "What finds the value of an option of a dropdown"

    def find(control):
        chosen = control.options[number]
        return chosen[1] if isinstance(chosen, tuple) else chosen

    return find


class Fails(NamedTuple):
    "A value that has no picture, and words of the message"

    value: object
    words: str


FIRST = ['Home']  # option of a dropdown
LAST = ['End']  # option of a dropdown; JupyterLab takes the arrow keys up and down for itself
# Panels of a notebook: name, module and function of `widgets`, arguments (`{place}` is replaced by a path of the
# fixture `places`), and moves: the name of a control, the keys, and the value that it has afterwards.
PANELS = [
    ('parts', 'trial_panel.make_trial', [], [
        ('n', ['ArrowRight'], 3),
        ('n', ['ArrowRight'] * 3, Fails(6, 'above')),
        ('n', ['ArrowLeft'] * 5, 1),
        ('word', LAST, option(-1)),
        ('dark', ['Space'], True),
    ]),
    ('search', 'apps.make_search', ['{index}'], [
        ('text', typed('a cat'), 'a cat'),
        ('top', ['ArrowRight'], 18),
        ('dark', ['Space'], True),
    ]),
    ('map', 'embedding_map.make_map', ['{index}'], [
        ('axes', LAST, option(-1)),
        ('right', typed('a red heart'), 'a red heart'),
        ('up', typed('a cat'), 'a cat'),
        ('zoom', ['ArrowRight', 'ArrowRight'], 0.5),
        ('x', ['ArrowRight'], 0.501),
        ('y', ['ArrowLeft'], 0.499),
        ('dark', ['Space'], True),
    ]),
    ('inspector', 'sample_browser.browse_samples', ['{shards}'], [
        ('position', typed('3'), 3),
        ('first', ['ArrowRight'], 1),
        ('view', ['Tab', 'Enter'], 'thumbnails'),
        ('view', ['Enter'], 'sample'),
        ('teacher', LAST, option(-1)),
        ('sort', LAST, option(-1)),
        ('descending', ['Space'], True),
        ('search', typed('china'), 'china'),
        ('search', typed(''), ''),
        ('where', typed('captions >= 99'), Fails('captions >= 99', 'No sample of 12')),
        ('where', typed(''), ''),
        ('where', typed('captions >='), Fails('captions >=', 'is no number')),
        ('where', typed(''), ''),
        ('key', typed('no such key'), Fails('no such key', 'No sample')),
        ('dark', ['Space'], True),
    ]),
    ('augmentation', 'augmentation_bench.make_augmentation_bench', [], [
        ('seed', ['ArrowRight'], 1),
        ('views', ['ArrowLeft'] * 6, 2),
        ('area', ['ArrowRight'], (0.1, 1.0)),
        ('aspect', ['ArrowRight'], (0.76, 1.33)),
        ('operations', ['ArrowRight'], 3),
        ('level', ['ArrowRight'] * 9, 18),
        ('flip', ['End'], 1.0),
        ('erase', ['End'], 1.0),
        ('model', LAST, option(-1)),
        ('source', typed('🐱'), '🐱'),
        ('dark', ['Space'], True),
        ('source', typed('no/such/picture.png'), Fails('no/such/picture.png', 'No image file')),
    ]),
    ('captions', 'trial_panel.make_captions', [], [
        ('n', ['ArrowLeft'] * 2, 3),
        ('temperature', ['End'], 3.0),
        ('seed', ['ArrowRight'], 1),
        ('top_p', ['Home'], 0.05),
        ('method', chosen('top_k'), 'top_k'),
        ('repetition', ['End'], 2.0),
        ('top_k', ['Home'], 1),
        ('source', typed('🍎'), '🍎'),
        ('captioner', LAST, option(-1)),
        ('dark', ['Space'], True),
    ]),
    ('folding', 'folding.make_folding', [], [
        ('kernel', LAST, option(-1)),
        ('branches', ['ArrowRight'], 4),
        ('channel', ['ArrowRight'], 1),
        ('seed', ['ArrowRight'], 1),
        ('block', LAST, option(-1)),
        ('dark', ['Space'], True),
    ]),
    ('targets', 'targets.make_targets', [], [
        ('after_softmax', ['Space'], False),
        ('teachers', LAST, option(-1)),
        ('teacher_scale', ['Home'], 1.0),
        ('student_scale', ['Home'], 1.0),
        ('emoji', typed('🦊 🐱 🍎'), '🦊 🐱 🍎'),
        ('emoji', typed('🦊'), Fails('🦊', '1 emoji')),
        ('emoji', typed('🐱 🍎'), '🐱 🍎'),
        ('dark', ['Space'], True),
    ]),
    ('frontier', 'frontier_explorer.make_frontier', ['{record}'], [
        ('accuracy', FIRST, option(0)),
        ('has_names', ['Space'], False),
        ('view', chosen('measured, models'), 'measured, models'),
        ('threads', LAST, option(-1)),
        ('runtime', chosen('onnx'), 'onnx'),
        ('families', ['Home'], lambda control: Fails(control.options[:1], 'families of this view')),
        ('families', chosen('MobileCLIP2'), ('MobileCLIP2',)),
        ('dark', ['Space'], True),
        ('record', typed('missing.json'), Fails('missing.json', 'No record')),
    ]),
    ('runs', 'runs.make_runs_panel', ['{ledger}'], [
        ('metric', LAST, option(-1)),
        ('recipe', LAST, option(-1)),
        ('is_log', ['Space'], True),
        ('where', typed('no_field=1'), Fails('no_field=1', 'No field')),
        ('where', typed(''), ''),
        ('dark', ['Space'], True),
        ('place', typed('nowhere.jsonl'), Fails('nowhere.jsonl', 'nowhere.jsonl')),
    ]),
    ('logs', 'runs.make_runs_panel', ['{logs}'], [
        ('width', ['End'], 100),
        ('metric', LAST, option(-1)),
    ]),
    ('zeroshot', 'zeroshot_bench.make_zeroshot_bench', ['{folder}'], [
        ('first', typed('9'), 9),
        ('first', typed('1000'), Fails(1000, 'there is no number 1,000')),
        ('first', typed('1'), 1),
        ('top', ['ArrowLeft'], 3),
        ('model', LAST, option(-1)),
        ('pictures', typed('🦊 🎸'), '🦊 🎸'),
        ('labels', typed_area('fox'), 'fox'),
        ('labels', typed_area('fox\ncat'), 'fox\ncat'),
        ('templates', typed_area('a photo of {}'), 'a photo of {}'),
        ('templates', typed_area('a photo'), Fails('a photo', 'has no {}')),
        ('templates', typed_area('{}'), '{}'),
        ('dark', ['Space'], True),
    ]),
]  # fmt: skip


def moves_of(name, without=()):
    "The moves of a panel, without some controls"
    moves = next(row[3] for row in PANELS if row[0] == name)
    return [move for move in moves if move[0] not in without]


def typed_outside(name, *places):
    "Moves to places that an app must not open"
    return [(name, typed(place), Fails(place, 'not in the folder')) for place in places]


# Apps: words of the command after `mobileclip app`, and moves.
OUTSIDE = ('/etc/hostname', '../index', '/', 'http://127.0.0.1:9/a.png', '/no/such/file')
APPS = [
    (['search', '--index', '{index}'], [
        *moves_of('search'),
        ('text', typed(''), Fails('', 'no text')),
        ('text', typed('a house <b>'), 'a house <b>'),
    ]),
    (['inspector', '--shards', '{shards}'], moves_of('inspector')),
    (['frontier', '--record', '{record}'], moves_of('frontier') + typed_outside('record', *OUTSIDE)),
    (['zeroshot', '--folder', '{folder}'], moves_of('zeroshot') + typed_outside('pictures', *OUTSIDE)),
    (['map', '--index', '{index}', '--theme', 'dark'], [
        *moves_of('map', ['dark']),
        ('dark', ['Space'], False),
    ]),
]  # fmt: skip


# --- servers and the browser ---------------------------------------------------------------------


@pytest.fixture(scope='session')
def places(tmp_path_factory):
    "A folder of drawings, its index and table, and shards; by name"
    from mobileclip_nb.datasets.emoji import load_emoji
    from mobileclip_nb.inference.index import build_index
    from mobileclip_nb.inference.embed import embed

    folder = tmp_path_factory.mktemp('places')
    heldout = load_emoji('heldout', side=64)
    (folder / 'pictures').mkdir()
    for i in range(120):
        name = re.sub(r'\W', '_', heldout.captions[i])
        Image.fromarray(heldout.images[i]).save(folder / 'pictures' / f'{i:03} {name}.png')
    write_shards(folder / 'shards', heldout)
    build_index(folder / 'pictures', folder / 'index')
    embed(folder / 'pictures', folder / 'table.npz')
    (folder / 'logs').mkdir()
    lines = [dict(step=i, loss=4 / (1 + i % 3), rate=0.1 * i) for i in range(20)]
    (folder / 'logs' / 'log.jsonl').write_text('\n'.join(map(json.dumps, lines)))
    found = dict(folder='pictures', index='index', table='table.npz', shards='shards', logs='logs')
    kept = dict(record='latency.json', ledger='ledger.jsonl')
    kept = {name: str(ROOT / 'results' / path) for name, path in kept.items()}
    return kept | {name: str(folder / path) for name, path in found.items()}


def write_shards(folder, drawings, n=12):
    "Two shards of reinforced drawings, made with the nano teachers"
    from mobileclip_nb.augment.pipeline import DATACOMPDR, apply, pack, rng_for
    from mobileclip_nb.augment.pipeline import sample as draw_params
    from mobileclip_nb.reinforce.teachers import TeacherSpec, join_embeddings, load_ensemble
    from mobileclip_nb.shards.io import Entry, write_manifests, write_shard
    from mobileclip_nb.shards.sample import Sample

    spec = DATACOMPDR.but(side=64)
    team = load_ensemble([TeacherSpec(name) for name in ('teacher_nano_a', 'teacher_nano_b')])
    samples = []
    for i in range(n):
        picture, key, out = Image.fromarray(drawings.images[i]), f'{i:08}', io.BytesIO()
        picture.save(out, 'PNG')
        params = [draw_params(spec, picture.size, rng_for(0, key, j)) for j in range(4)]
        views = [apply(spec, picture, p) for p in params]
        words = dict(
            text=(drawings.captions[i],),
            syn_text=(f'an emoji of {drawings.captions[i]}', drawings.captions[i + 1]),
        )
        samples.append(
            Sample(
                key,
                out.getvalue(),
                'png',
                words['text'],
                dict(syn_text=words['syn_text']),
                tuple(pack(spec, p) for p in params),
                join_embeddings(team.image(views)).numpy(),
                {k: join_embeddings(team.text(v)).numpy() for k, v in words.items()},
            )
        )
    folder.mkdir()
    for name, part in (('0', samples[: n // 2]), ('1', samples[n // 2 :])):
        write_shard(folder / f'{name}.tar', part, widths=team.widths)
    teachers = [dict(name=a, width=w, scale=1.0) for a, w in zip(team.names, team.widths)]
    about = dict(image_augmentation=spec.to_config(), teachers=teachers)
    write_manifests(folder, [Entry(name, n // 2, '', 0) for name in '01'], about)


def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def environment(folder):
    "Variables of a process that reads no settings of this user"
    own = dict(
        PYTHONPATH=f'{ROOT}{os.pathsep}{ROOT / "tests"}', OMP_NUM_THREADS='1', MPLBACKEND='agg'
    )
    for name in ('JUPYTER_CONFIG_DIR', 'JUPYTERLAB_SETTINGS_DIR', 'JUPYTERLAB_WORKSPACES_DIR'):
        own[name] = str(folder / name.lower())
    return os.environ | own | dict(IPYTHONDIR=str(folder / 'ipython'))


def children(pid):
    "Processes that a process started"
    listed = subprocess.run(
        ['ps', '--ppid', str(pid), '-o', 'pid='], capture_output=True, text=True
    )
    return [int(line) for line in listed.stdout.split()]


def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def stop(server, number=signal.SIGTERM):
    "End a server by a signal; its status, and the kernels that are left"
    kernels = children(server.pid)
    server.send_signal(number)
    try:
        status = server.wait(timeout=30)
    except subprocess.TimeoutExpired:
        server.kill()
        status = None
    return status, [pid for pid in kernels if is_alive(pid)]


@pytest.fixture(scope='session')
def browser():
    if not find_browser():
        pytest.fail('CI=true, and there is no Chromium or no Playwright')
    from playwright.sync_api import sync_playwright

    KEPT.mkdir(parents=True, exist_ok=True)
    flags = ['--no-sandbox'] if os.geteuid() == 0 else []
    with sync_playwright() as p:
        yield p.chromium.launch(executable_path=find_browser(), args=flags)


class Visit:
    "A page, what its console says, and what it asks of other hosts"

    def __init__(self, browser, width=1100, height=1000):
        self.context = browser.new_context(viewport=dict(width=width, height=height))
        self.page, self.errors, self.outside = self.context.new_page(), [], []
        self.page.on('console', self.hear)
        self.page.on('pageerror', lambda e: self.errors.append(f'{e}'))
        self.page.route('**/*', self.check)
        self.page.set_default_timeout(1000 * SECONDS)

    def hear(self, message):
        text = f'{message.text} {message.location.get("url", "")}'
        if message.type == 'error' and not any(re.search(known, text) for known in HARMLESS):
            self.errors.append(text)

    def check(self, route):
        if urllib.parse.urlsplit(route.request.url).hostname in ('127.0.0.1', None):
            return route.continue_()
        self.outside.append(route.request.url)
        route.abort()

    def must_be_quiet(self):
        assert self.outside == []
        assert self.errors == []


@contextmanager
def visiting(browser, url, **how):
    visit = Visit(browser, **how)
    try:
        visit.page.goto(url)
        yield visit
    finally:
        visit.context.close()


# --- panels in a page ----------------------------------------------------------------------------

PNG = 'img[src^="data:image/png;base64,"]'
SHOWN = f'.mobileclip-panel {PNG}'  # of a live panel, not the picture that is stored behind it
SAID = '.mobileclip-panel [role=alert]'


def find_function(function):
    "Module and name of a function of `widgets`, or of the panel for trials beside this file"
    module, name = function.rsplit('.', 1)
    return module if module == 'trial_panel' else f'mobileclip_nb.widgets.{module}', name


def make(function, arguments, places):
    "A panel by the name of its function"
    module, name = find_function(function)
    given = [a.format(**places) if isinstance(a, str) else a for a in arguments]
    return getattr(importlib.import_module(module), name)(*given)


def find_control(area, control):
    "The element of a control that takes the focus, found by its description"
    kind, words = type(control).__name__, control.description
    if kind == 'Button':
        return area.locator('button.jupyter-button', has_text=re.compile(f'^{re.escape(words)}$'))
    if kind == 'FileUpload':
        return area.locator('button.jupyter-button', has_text=words)
    if kind == 'Checkbox':
        return area.locator('.widget-checkbox', has_text=words).locator('input')
    if kind == 'ToggleButtons':
        return area.locator('.widget-toggle-buttons', has_text=words).locator('button').first
    label = f'label.widget-label:text-is("{words}")'
    row = area.locator(f'.widget-inline-hbox:has(> {label})')
    return row.locator('.noUi-handle, select, input, textarea, button').first


def press(page, area, control, keys):
    "Move a control by the keyboard alone"
    found = find_control(area, control)
    found.focus()
    for key in keys:
        if isinstance(key, str):
            page.keyboard.press(key)
        elif 'option' in key:
            found.select_option(label=key['option'])
        else:
            page.keyboard.insert_text(key['text'])


def wait_for_picture(area, panel, seconds=SECONDS):
    "Wait until an area shows the picture of a panel made here, or its message; milliseconds"
    began = time.perf_counter()
    while time.perf_counter() - began < seconds:
        sources = area.locator(SHOWN).evaluate_all('(all) => all.map((e) => e.src)')
        shown = [base64.b64decode(source.partition(',')[2]) for source in sources]
        if panel.shown and panel.shown in shown:
            return 1e3 * (time.perf_counter() - began)
        if not panel.shown and not shown:
            said = area.locator(SAID).all_inner_texts()
            if html.unescape(re.sub('<.*?>', '', panel.parts['message'].value)) in said:
                return 1e3 * (time.perf_counter() - began)
        time.sleep(0.01)
    area.screenshot(path=str(KEPT / 'failed.png'))
    (KEPT / 'expected.png').write_bytes(panel.shown)
    (KEPT / 'found.png').write_bytes(shown[0] if shown else b'')
    raise AssertionError(f'another picture after {seconds} s: see {KEPT}/expected.png, found.png')


def is_moved_by_values(control):
    "Whether a part of a panel is a control with a value that keys can change"
    import ipywidgets

    kinds = (ipywidgets.HTML, ipywidgets.Button, ipywidgets.FileUpload)
    return bool(getattr(control, 'description', '')) and not isinstance(control, kinds)


def must_move_every_control(panel, moves):
    "The controls of a panel are those of its moves"
    controls = {name for name, part in panel.parts.items() if is_moved_by_values(part)}
    assert controls == {name for name, *_ in moves}


def move_all(page, area, panel, moves):
    "Make moves in a page and here; the picture must follow. Milliseconds by control"
    spent = {}
    for name, keys, value in moves:
        before, said = panel.shown, panel.parts['message'].value
        value = value(panel.parts[name]) if callable(value) else value
        value, words = value if isinstance(value, Fails) else (value, '')
        panel.parts[name].value = value
        reason = html.unescape(panel.parts['message'].value)
        assert words in reason, f'{name}={value!r}: {reason}'
        assert bool(words) == bool(reason), f'{name}={value!r}: {reason}'
        assert bool(panel.shown) == (not words)
        assert (panel.shown, reason) != (before, said), f'{name}={value!r} changes nothing'
        press(page, area, panel.parts[name], keys)
        spent[name] = round(wait_for_picture(area, panel))
    return spent


def keep(name, area, spent=()):
    "Keep a screenshot, and times"
    area.screenshot(path=str(KEPT / f'{name}.png'))
    if spent:
        print(name, spent)
        (KEPT / f'{name}.json').write_text(json.dumps(spent))


# --- JupyterLab ----------------------------------------------------------------------------------


@pytest.fixture(scope='session')
def lab(tmp_path_factory):
    "Address and token of a JupyterLab, and its folder"
    home = tmp_path_factory.mktemp('lab')
    (home / 'work').mkdir()
    for name, text in (
        ('notebook-extension/tracker', '{"windowingMode": "none"}'),
        ('apputils-extension/notification', '{"fetchNews": "false", "checkForUpdates": false}'),
    ):
        path = home / f'jupyterlab_settings_dir/@jupyterlab/{name}.jupyterlab-settings'
        path.parent.mkdir(parents=True)
        path.write_text(text)
    port, token = free_port(), os.urandom(24).hex()
    words = [sys.executable, '-m', 'jupyterlab', '--no-browser', '--allow-root']
    words += ['--ip=127.0.0.1', f'--port={port}', f'--IdentityProvider.token={token}']
    words += [f'--ServerApp.root_dir={home / "work"}', '--LabApp.expose_app_in_browser=True']
    words += ['--LabApp.extension_manager=readonly']
    log = open(home / 'log.txt', 'w')
    server = subprocess.Popen(words, env=environment(home), stdout=log, stderr=log, cwd=home)
    try:
        for _ in range(600):
            with socket.socket() as s:
                if s.connect_ex(('127.0.0.1', port)) == 0:
                    break
            assert server.poll() is None, (home / 'log.txt').read_text()
            time.sleep(0.1)
        yield f'http://127.0.0.1:{port}', token, home / 'work'
    finally:
        stop(server)


def write_notebook(path, rows, places):
    "A notebook with a panel a cell"
    cells = ['import mobileclip_nb']
    for _, function, arguments, _ in rows:
        module, name = find_function(function)
        given = ', '.join(repr(a.format(**places) if isinstance(a, str) else a) for a in arguments)
        cells.append(f'from {module} import {name}\n\n{name}({given})')
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
    nb.metadata.kernelspec = dict(display_name='python3', language='python', name='python3')
    nbformat.write(nb, path)


def run_all(visit):
    "Run all cells of the notebook of a page"
    visit.page.wait_for_selector('.jp-Notebook .jp-CodeCell', timeout=1000 * SECONDS)
    visit.page.locator('text=/\\| Idle/').first.wait_for(timeout=1000 * SECONDS)
    visit.page.evaluate("() => { window.jupyterapp.commands.execute('notebook:run-all-cells') }")


@pytest.fixture(scope='session')
def panels_page(lab, browser, places):
    "A notebook with a panel a cell, run in JupyterLab"
    url, token, folder = lab
    write_notebook(folder / 'panels.ipynb', PANELS, places)
    with visiting(browser, f'{url}/doc/tree/panels.ipynb?token={token}') as visit:
        run_all(visit)
        yield visit


@pytest.mark.parametrize('row', PANELS, ids=[row[0] for row in PANELS])
def test_panel_in_lab(row, panels_page, places):
    "Keys move every control of a panel, and the picture is that of the new values"
    name, function, arguments, moves = row
    visit, number = panels_page, 1 + [other[0] for other in PANELS].index(name)
    area = visit.page.locator('.jp-Notebook .jp-CodeCell').nth(number)
    area.locator(SHOWN).first.wait_for(state='attached', timeout=3000 * SECONDS)
    panel = make(function, arguments, places)
    must_move_every_control(panel, [m for r in PANELS if r[1] == function for m in r[3]])
    wait_for_picture(area, panel)
    spent = move_all(visit.page, area, panel, moves)
    keep(f'lab-{name}', area, spent)
    visit.must_be_quiet()


def test_hands_on_the_map(panels_page, places):
    "Keys, wheel, drag and lasso on the map itself; the picture follows, and the table names the points"
    if 'map' not in [row[0] for row in PANELS]:
        pytest.skip('no map among the panels')
    visit, number = panels_page, 1 + [row[0] for row in PANELS].index('map')
    area = visit.page.locator('.jp-Notebook .jp-CodeCell').nth(number)
    area.locator(SHOWN).first.wait_for(state='attached', timeout=3000 * SECONDS)
    pad, panel = (
        area.locator('.mobileclip-map'),
        make('embedding_map.make_map', ['{index}'], places),
    )
    moved = make('embedding_map.make_map', ['{index}'], places)
    pad.focus()
    visit.page.keyboard.press('0')
    for name in ('axes', 'right', 'up', 'dark'):  # as an earlier test left them
        control = find_control(area, moved.parts[name])
        is_box = name == 'dark'
        panel.parts[name].value = control.is_checked() if is_box else control.input_value()
    wait_for_picture(area, panel)
    for keys, view in (
        (['+'], [0.5, 0.5, 0.5]),
        (['+'], [0.5, 0.5, 1.0]),
        (['ArrowRight'], [0.55, 0.5, 1.0]),
        (['ArrowUp'], [0.55, 0.55, 1.0]),
        (['-'], [0.55, 0.55, 0.5]),
    ):
        for key in keys:
            pad.press(key)
        panel.parts['pad'].view = view
        wait_for_picture(area, panel)
    pad.press('Enter')
    panel.parts['pad'].entered += 1
    wait_for_picture(area, panel)
    assert area.locator('caption').inner_text() == 'points chosen: 1'
    assert area.locator('tr td').first.inner_text() == panel.chosen()[0]
    pad.press('0')
    panel.parts['pad'].view = [0.5, 0.5, 0.0]
    wait_for_picture(area, panel)
    pad.scroll_into_view_if_needed()
    place = pad.bounding_box()
    left, top, width, height, whole, _ = panel.parts['pad'].plot
    scale = place['width'] / whole
    visit.page.keyboard.down('Shift')
    for i, (x, y) in enumerate([(0.02, 0.02), (0.98, 0.02), (0.98, 0.98), (0.02, 0.98)]):
        at = place['x'] + scale * (left + x * width), place['y'] + scale * (top + y * height)
        visit.page.mouse.move(*at)
        if i == 0:
            visit.page.mouse.down()
            visit.page.mouse.move(*at)
    visit.page.mouse.up()
    visit.page.keyboard.up('Shift')
    area.locator('caption', has_text=re.compile(r'points chosen: \d\d')).wait_for()
    find_control(area, panel.parts['open']).focus()
    visit.page.keyboard.press('Enter')
    area.locator('label.widget-label:text-is("chosen")').wait_for()
    keep('lab-map-lasso', area)
    visit.must_be_quiet()


REOPENED = [row for row in PANELS if row[0] in ('parts', 'inspector', 'folding', 'map')]


def test_reopened_after_its_kernel_ended(lab, browser, places):
    "Run, saved, kernel ended, opened again: each panel is its picture; before, it is the widget"
    url, token, folder = lab
    path, count = 'reopened.ipynb', len(REOPENED)
    write_notebook(folder / path, REOPENED, places)
    address = f'{url}/doc/tree/{path}?token={token}'
    with visiting(browser, address, height=4000) as visit:
        run_all(visit)
        visit.page.wait_for_function(
            f"() => document.querySelectorAll('{SHOWN}').length == {count}",
            timeout=3000 * SECONDS,
        )
        static = visit.page.locator(f'.mobileclip-static {PNG}')
        static.nth(count - 1).wait_for(state='attached', timeout=3000 * SECONDS)
        assert static.count() == count
        assert visit.page.locator(f'.mobileclip-static {PNG}:visible').count() == 0
        visit.page.evaluate("() => window.jupyterapp.commands.execute('docmanager:save')")
        visit.page.wait_for_timeout(1000)
        visit.must_be_quiet()
    stored = [o for c in nbformat.read(folder / path, 4).cells for o in c.get('outputs', ())]
    assert sum('mobileclip-static' in o['data'].get('text/html', '') for o in stored) == count
    for session in json.loads(ask(address, '/api/sessions', Authorization=f'token {token}')[1]):
        if session['path'] == path:
            way = f'/api/sessions/{session["id"]}'
            assert ask(address, way, 'DELETE', Authorization=f'token {token}')[0] == 204
    with visiting(browser, address, height=4000) as visit:
        pictures = visit.page.locator(f'.mobileclip-static {PNG}:visible')
        pictures.nth(count - 1).wait_for()
        visit.page.locator('text=model not found').nth(count - 1).wait_for(state='attached')
        assert pictures.count() == count
        seen = visit.page.locator('.jp-Notebook').inner_text().lower()
        assert 'model not found' not in seen
        assert 'loading widget' not in seen
        keep('reopened', visit.page)
        assert all('not found' in error for error in visit.errors)  # JupyterLab's own words
        assert visit.outside == []


STORED = sorted((ROOT / 'nbs').glob('widgets/*.ipynb')) + sorted(
    (ROOT / 'nbs').glob('apps/*.ipynb')
)


@pytest.mark.parametrize('path', STORED, ids=[path.stem for path in STORED])
def test_stored_notebook(path, lab, browser):
    "A notebook that is opened without being run shows its pictures, and no missing widget"
    url, token, folder = lab
    pictures = [
        output
        for cell in nbformat.read(path, 4).cells
        for output in cell.get('outputs', ())
        if 'image/png' in output.get('data', {})
    ]
    (folder / path.name).write_bytes(path.read_bytes())
    with visiting(browser, f'{url}/doc/tree/{path.name}?token={token}', height=1400) as visit:
        visit.page.wait_for_selector('.jp-Notebook .jp-CodeCell', timeout=1000 * SECONDS)
        shown = visit.page.locator(f'.jp-OutputArea-output {PNG}, .jp-OutputArea-output{PNG}')
        visit.page.wait_for_function(
            f"() => document.querySelectorAll('.jp-OutputArea img').length >= {len(pictures)}",
            timeout=1000 * SECONDS,
        )
        assert shown.count() + visit.page.locator('.jp-RenderedSVG').count() >= len(pictures)
        outputs = visit.page.locator('.jp-OutputArea-output').all_inner_texts()
        text = '\n'.join(outputs).lower()
        assert 'model not found' not in text
        assert 'error displaying widget' not in text
        keep(f'stored-{path.stem}', visit.page)
        visit.must_be_quiet()


def test_link_opens_the_other_notebook(lab, browser):
    "A link between notebooks, from one folder to another, opens a tab in JupyterLab"
    url, token, folder = lab
    names = 'tutorials/09_token_mixer', 'blocks/04_repmixer'
    for name in names:
        copy = folder / f'{name}.ipynb'
        copy.parent.mkdir()
        copy.write_bytes((ROOT / 'nbs' / f'{name}.ipynb').read_bytes())
    with visiting(browser, f'{url}/lab/tree/{names[0]}.ipynb?token={token}') as visit:
        visit.page.locator('.jp-RenderedMarkdown a', has_text=names[1]).first.click()
        visit.page.locator('.lm-TabBar-tabLabel', has_text='04_repmixer.ipynb').wait_for()
        visit.page.locator('.jp-RenderedMarkdown h1', has_text='RepMixer').wait_for()
        visit.must_be_quiet()


# --- apps ----------------------------------------------------------------------------------------


@pytest.fixture(scope='session')
def serve(places, tmp_path_factory):
    "Start an app by its words, once; its address. At the end each stops, and leaves no kernel"
    home, servers = tmp_path_factory.mktemp('apps'), {}

    def start(words):
        words = tuple(word.format(**places) for word in words)
        if words not in servers:
            command = [sys.executable, '-m', 'mobileclip_nb', 'app', *words, '--json']
            log = open(home / f'{words[0]}.txt', 'w')
            how = dict(env=environment(home), cwd=home, stdout=subprocess.PIPE, stderr=log)
            server = subprocess.Popen(command, text=True, **how)
            line = server.stdout.readline()
            assert line, (home / f'{words[0]}.txt').read_text()
            servers[words] = server, json.loads(line)['url']
        return servers[words][1]

    yield start
    left = [stop(server) for server, _ in servers.values()]
    assert left == [(0, [])] * len(servers)


@pytest.mark.parametrize('words,moves', APPS, ids=[words[0] for words, _ in APPS])
def test_app(words, moves, serve, browser, places):
    "Keys move the controls of an app, every control is reached by Tab, and nothing comes from outside"
    from mobileclip_nb.widgets.apps import open_app

    asked = dict(zip(words[1::2], words[2::2]))
    theme = asked.pop('--theme', 'light')
    options = {k.removeprefix('--'): v.format(**places) for k, v in asked.items()}
    with visiting(browser, serve(words)) as visit:
        area = visit.page.locator('body')
        area.locator(SHOWN).first.wait_for(state='attached', timeout=3000 * SECONDS)
        panel = open_app(words[0], options, theme)
        wait_for_picture(area, panel)
        keep(f'app-{words[0]}-first', visit.page)
        must_move_every_control(panel, moves)
        reach_by_tab(visit.page, area, panel)
        spent = move_all(visit.page, area, panel, moves)
        keep(f'app-{words[0]}', visit.page, spent)
        visit.must_be_quiet()


def reach_by_tab(page, area, panel):
    "The tab key alone reaches every control"
    import ipywidgets

    controls = [c for c in panel.parts.values() if hasattr(c, 'description')]
    controls = [c for c in controls if not isinstance(c, ipywidgets.HTML)]
    missing = {c.description: find_control(area, c).element_handle() for c in controls}
    page.evaluate('() => document.activeElement.blur()')
    for _ in range(6 * len(missing) + 10):
        page.keyboard.press('Tab')
        for name, element in list(missing.items()):
            if element.evaluate('(e) => e === document.activeElement'):
                del missing[name]
    assert missing == {}


def test_app_with_bad_data(serve, browser, tmp_path):
    "What cannot be opened is a sentence in the page, not a traceback"
    (tmp_path / 'index.json').write_text('{"format": "other"}')
    with visiting(browser, serve(['search', '--index', str(tmp_path)])) as visit:
        said = visit.page.locator('[role=alert]')
        said.wait_for(timeout=2000 * SECONDS)
        assert 'index.json' in said.inner_text()
        assert 'Traceback' not in visit.page.locator('body').inner_text()
        visit.must_be_quiet()


def token_of(url):
    "The token of an address that was printed"
    return urllib.parse.parse_qs(urllib.parse.urlsplit(url).query)['token'][0]


def ask(url, path, method='GET', **headers):
    "Status and body of an answer; the path is sent as it is"
    place = urllib.parse.urlsplit(url)
    connection = http.client.HTTPConnection(place.hostname, place.port, timeout=60)
    connection.putrequest(method, path, skip_host='Host' in headers)
    for name, value in headers.items():
        connection.putheader(name, value)
    connection.endheaders()
    answer = connection.getresponse()
    return answer.status, answer.read().decode(errors='replace')


KERNEL = '0a0a0a0a-0b0b-0c0c-0d0d-0e0e0e0e0e0e'
WEBSOCKET = {
    'Upgrade': 'websocket',
    'Connection': 'Upgrade',
    'Sec-WebSocket-Key': 'AAAAAAAAAAAAAAAAAAAAAA==',
    'Sec-WebSocket-Version': '13',
}


def test_app_needs_its_token(serve):
    "Pages, files, kernels and their channels, with no token or a wrong one, and by another host name"
    url = serve(APPS[0][0])
    token = token_of(url)
    paths = ['/', '/login', '/app.ipynb', '/voila/files/app.ipynb', '/voila/static/voila.js']
    paths += ['/api/kernels', f'/api/kernels/{KERNEL}', '/api/contents', '/api/sessions']
    paths += ['/voila/templates/lab/static/voila.js', '/voila/labextensions/anywidget/package.json']
    for path in paths:
        assert ask(url, path)[0] == 403, path
        assert ask(url, f'{path}?token=wrong')[0] == 403, path
    for path in ('/', '/voila/static/voila.js', f'/api/kernels/{KERNEL}'):
        assert ask(url, path)[0] == 403
        assert ask(url, path, Authorization=f'token {token}', Host='evil.example')[0] == 403
    channels = f'/api/kernels/{KERNEL}/channels'
    known = dict(Authorization=f'token {token}')
    assert ask(url, channels, **WEBSOCKET)[0] == 403
    assert ask(url, channels, Host='evil.example', **known, **WEBSOCKET)[0] == 403
    assert ask(url, f'/voila/api/shutdown/{KERNEL}', 'POST')[0] == 403
    script = '/voila/templates/base/static/voila.js'
    assert ask(url, script)[0] == 403
    assert ask(url, script, **known)[0] == 200
    assert ask(url, '/voila/templates/base/voila.js', **known)[0] == 404


def test_two_visitors(serve, browser, places):
    "Each has a kernel of their own; an address does not change the theme"
    from mobileclip_nb.widgets.apps import open_app

    url = serve(APPS[0][0])
    panels = [open_app('search', dict(index=places['index'])) for _ in range(2)]
    with visiting(browser, f'{url}&theme=dark&voila-theme=dark') as a, visiting(browser, url) as b:
        for visit, panel, text in zip((a, b), panels, ('a cat', 'a house')):
            area = visit.page.locator('body')
            area.locator(SHOWN).first.wait_for(state='attached', timeout=3000 * SECONDS)
            move_all(visit.page, area, panel, [('text', typed(text), text)])
        for visit, panel in zip((a, b), panels):
            wait_for_picture(visit.page.locator('body'), panel)
            assert visit.page.locator('body').get_attribute('data-jp-theme-light') == 'true'
            visit.must_be_quiet()
    assert panels[0].shown != panels[1].shown


def test_app_serves_no_files(serve, tmp_path):
    "Not with the token either, however the way is written"
    url = serve(APPS[0][0])
    token = token_of(url)
    secret = tmp_path / 'secret.png'
    secret.write_text('a secret')
    inside = str(secret)[1:]
    for up in ('../', '%2e%2e/', '..%2f', '%2e%2e%2f', '..%5c', '....//', '%252e%252e%252f'):
        for start in ('voila/files', 'voila/static', 'voila/templates/lab/static',
                      'voila/templates', 'voila/labextensions', 'voila/api/themes', ''):  # fmt: skip
            for path in (f'/{start}/{up * 14}{inside}', f'/{start}//{inside}'):
                status, text = ask(url, path, Authorization=f'token {token}')
                assert status != 200, path
                assert 'a secret' not in text
    for path in ('/voila/files/app.ipynb', '/app.ipynb', '/api/contents/app.ipynb'):
        status, text = ask(url, path, Authorization=f'token {token}')
        assert status != 200
        assert 'open_asked_app' not in text


def test_app_ends_at_ctrl_c(browser, places, tmp_path):
    "With a page open: the status is that of a command that was stopped, and its kernel is gone"
    command = [sys.executable, '-m', 'mobileclip_nb', 'app', 'search', '--index', places['index']]
    command += ['--pages', '1']
    log = open(tmp_path / 'log.txt', 'w')
    how = dict(env=environment(tmp_path), stdout=subprocess.PIPE, stderr=log, text=True)
    # a test that runs in the background of a shell ignores Ctrl-C, and what it starts would, too
    how['preexec_fn'] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    server = subprocess.Popen(command, **how)
    url = server.stdout.readline().strip()
    with visiting(browser, url) as visit:
        visit.page.locator(SHOWN).first.wait_for(timeout=2000 * SECONDS)
        assert len(children(server.pid)) == 1
        answer = ask(url, '/', Authorization=f'token {token_of(url)}')
        assert answer == (
            503,
            '1 pages are open, and each holds 0.6 GB; close one, and wait a minute\n',
        )
        assert len(children(server.pid)) == 1
        status, left = stop(server, signal.SIGINT)
    assert status in (0, 2)
    assert left == []
    said = (tmp_path / 'log.txt').read_text()
    assert 'Traceback' not in said
    assert 'ping_timeout' not in said
    assert 'starting search' in said


def test_other_machines_are_not_served_unasked(places, tmp_path):
    "Another address needs a token, and is said"
    command = [sys.executable, '-m', 'mobileclip_nb', 'app', 'search', '--index', places['index']]
    command += ['--ip', '0.0.0.0']
    done = subprocess.run([*command, '--no-token'], capture_output=True, text=True)
    assert done.returncode == 2
    assert 'everybody who reaches this machine' in done.stderr
    log = tmp_path / 'log.txt'
    how = dict(stdout=subprocess.PIPE, stderr=open(log, 'w'), env=environment(tmp_path))
    server = subprocess.Popen(command, text=True, **how)
    assert 'token=' in server.stdout.readline()
    assert stop(server) == (0, [])
    assert 'every machine that reaches this one' in log.read_text()
