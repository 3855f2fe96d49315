"""Homes with models of the papers, with random weights in which every branch counts; and the page, used as a person would.

A home whose software is missing is skipped by name. JavaScript: `npm ci --ignore-scripts` in `tests/export/js`; a browser: the
package `chromium` of the system; Python packages: the extra `homes`.
"""

import base64, gc, os
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest, torch
from PIL import Image

from mobileclip_nb.blocks.reparam import randomize_
from mobileclip_nb.datasets.emoji import draw_emoji
from mobileclip_nb.export.contract import ExportSpec, measure_gap
from mobileclip_nb.export.destinations import (
    find_npm_package,
    has_node,
    installed_version,
    make_trial,
)
from mobileclip_nb.export.transformers_js import (
    LABELS,
    LIBRARY,
    TEMPLATE,
    ask_transformers_js,
    request_trial,
)
from mobileclip_nb.export.web import RUNTIME, find_browser, run_in_browser
from mobileclip_nb.export.write import check_export, export_model
from mobileclip_nb.models.factory import create_model
from mobileclip_nb.models.zoo import build, find_record

has_library = has_node() and find_npm_package(LIBRARY) is not None
has_ultralytics = installed_version('ultralytics') or installed_version(
    'ultralytics-opencv-headless'
)
needs_library = pytest.mark.skipif(not has_library, reason=f'needs Node and {LIBRARY}')
needs_page = pytest.mark.skipif(
    not (find_browser() and find_npm_package(RUNTIME)),
    reason=f'needs Chromium, Playwright and {RUNTIME}',
)
INSTALLED = dict(
    fastembed=bool(installed_version('fastembed')),
    ultralytics=bool(has_ultralytics),
    mlx=bool(installed_version('mlx')),
    open_clip=True,
    immich=bool(installed_version('tokenizers')),
)


@pytest.fixture(autouse=True)
def no_grad():
    with torch.inference_mode():
        yield
    gc.collect()


def random_model(name):
    model = randomize_(build(find_record(name), empty=True).eval())
    model.text.token.weight.mul_(model.record.text.width**0.5)  # tokens outweigh positions
    return model


@pytest.fixture(scope='module')
def nano():
    return create_model('mobileclip_nano', 'emoji')


CASES = [
    ('immich', 'mobileclip_s0'),
    ('immich', 'mobileclip_b'),
    ('fastembed', 'mobileclip_s0'),
    ('fastembed', 'mobileclip_s2'),
    ('ultralytics', 'mobileclip_b_lt'),
    ('ultralytics', 'mobileclip2_b'),
    ('open_clip', 'mobileclip_s2'),
    ('open_clip', 'mobileclip_b'),
    ('open_clip', 'mobileclip2_s0'),
    ('mlx', 'mobileclip_s0'),
]
if os.environ.get('EXPORT_ALL'):  # slow: mlx computes on the CPU
    CASES += [('mlx', 'mobileclip_s2'), ('mlx', 'mobileclip_b'), ('mlx', 'mobileclip_s3')]


@pytest.mark.parametrize('home,name', CASES, ids=[f'{h}-{n}' for h, n in CASES])
def test_home(home, name, tmp_path):
    "Graphs and settings agree with the model, by the home's own software"
    if not INSTALLED[home]:
        pytest.skip(f'the software of {home} is not installed (extra homes)')
    manifest = export_model(random_model(name), home, tmp_path / 'x')
    for part in manifest.parts:
        print(home, name, part.name, part.checked_by, part.gap)
        assert part.gap is not None
        assert part.gap.max_abs <= 1e-4
        assert not part.gap.is_blind
    assert check_export(tmp_path / 'x') == []


TRANSFORMERS = [
    ('mobileclip_s0', 'both'),
    ('mobileclip_s2', 'image'),
    ('mobileclip_s2', 'text'),
    ('mobileclip_b', 'text'),
    ('mobileclip_s3', 'image'),
]


@needs_library
@pytest.mark.parametrize('name,tower', TRANSFORMERS, ids=[f'{n}-{t}' for n, t in TRANSFORMERS])
def test_transformers_js(name, tower, tmp_path):
    "Strings by the library's tokenizer; pixels prepared here to rounding, its own resize to a cosine"
    model = random_model(name)
    manifest = export_model(model, 'transformers.js', tmp_path / 'x', ExportSpec(tower=tower))
    for part in manifest.parts:
        print(name, part.name, part.gap, part.notes)
        if part.name == 'preprocessing' and part.gap:
            assert part.gap.cosine >= 0.98
        elif part.gap:
            assert part.gap.max_abs <= 1e-4
    exact = [n for n in manifest.parts[-1].notes if n.startswith('from pixels prepared here')]
    if tower != 'text':
        assert float(exact[0].split()[-1]) <= 1e-4
    assert check_export(tmp_path / 'x') == []


@needs_library
@pytest.mark.parametrize('dtype', ['fp32', 'fp16', 'q8', 'q4'])
def test_zero_shot_pipeline(nano, dtype, tmp_path):
    "The pipeline names the drawings; texts are padded to the longest, cut texts lose their end token"
    export_model(nano, 'transformers.js', tmp_path / 'x', ExportSpec(precision=dtype))
    trial = make_trial(nano, tmp_path, 6)
    request = request_trial(nano, trial, ['image', 'text', 'joint'], dtype)
    short = ['a dog', 'a red apple']
    answer = ask_transformers_js(tmp_path / 'x', request | dict(texts=short))
    right = nano.encode_text(nano.tokenizer(short), normalize=True)
    limit = dict(fp32=1e-5, fp16=5e-3, q8=0.05, q4=0.3)[dtype]
    assert answer['lengths']['longest'] < answer['lengths']['context'] == 20
    for rows in answer['text'].values():
        assert measure_gap([rows], [right]).max_abs <= limit
    labels = nano.encode_text(
        nano.tokenizer([TEMPLATE.replace('{}', x) for x in LABELS]), normalize=True
    )
    expected = (trial.image @ labels.T).argmax(-1).tolist()
    assert [row[0]['label'] for row in answer['zeroshot']] == [LABELS[i] for i in expected]
    assert expected[:2] == [0, 1]  # not all look alike


# --- the page ------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def page_folder(nano, tmp_path_factory):
    out = tmp_path_factory.mktemp('web') / 'page'
    manifest = export_model(nano, 'web', out)
    print(manifest.parts[-1].notes)
    return out


@needs_page
def test_page(nano, page_folder, tmp_path):
    "A picture is chosen, labels are typed, pictures are added and searched; the numbers are the model's"
    photo = Image.fromarray(draw_emoji('🦋', side=256)).crop((0, 30, 256, 220))
    photo.save(tmp_path / 'butterfly.png')
    Image.fromarray(draw_emoji('🐌', side=100)).save(tmp_path / 'snail.png')
    labels = ['butterfly', 'snail', 'a curly quote ’s & more']

    def work(page):
        errors = []
        page.on('pageerror', lambda e: errors.append(str(e)))
        page.set_input_files('#file', str(tmp_path / 'butterfly.png'))
        page.fill('#template', 'an emoji of a {}')
        page.fill('#labels', '\n'.join([*labels, labels[0], '']))
        page.wait_for_selector('#scores li >> nth=2')
        page.set_input_files(
            '#more', [str(tmp_path / 'snail.png'), str(tmp_path / 'butterfly.png')]
        )
        page.wait_for_selector('#gallery li[data-name="butterfly.png"]')
        page.fill('#query', 'a snail')
        page.click('#search button')
        page.wait_for_selector('#gallery li.best[data-name="snail.png"]')
        found = page.evaluate(
            '() => [["#scores", "label"], ["#gallery", "name"]].map(([s, k]) =>'
            ' [...document.querySelectorAll(s + " li")].map((e) => [e.dataset[k], +e.dataset.score]))'
        )
        return found, errors, page.screenshot(full_page=True)

    ((scores, gallery), errors, picture), outside = run_in_browser(page_folder, work)
    assert errors == []
    assert outside == []
    if place := os.environ.get('SCREENSHOT'):
        Path(place).write_bytes(picture)
    sentences = [f'an emoji of a {label}' for label in labels]
    right = nano(nano.preprocess(photo)[None], nano.tokenizer(sentences)).logits().softmax(-1)[0]
    assert len(scores) == len(labels)
    assert [p for _, p in scores] == sorted((p for _, p in scores), reverse=True)
    for label, p in zip(labels, right.tolist()):
        assert abs(dict(scores)[label] - p) <= 1e-4
    text = nano.encode_text(nano.tokenizer('a snail'), normalize=True)[0]
    for name, score in gallery:
        path = tmp_path / name if '.' in name else page_folder / 'pictures' / f'{name}.png'
        image = nano.encode_image(nano.preprocess(Image.open(path))[None], normalize=True)[0]
        assert abs(score - float(image @ text)) <= 1e-4
    assert [s for _, s in gallery] == sorted((s for _, s in gallery), reverse=True)


@needs_page
def test_page_by_keyboard(page_folder):
    "Fields can be reached with the tab key, in the order of the page, and each has a name"

    def work(page):
        order = []
        page.focus('body')
        for _ in range(6):
            page.keyboard.press('Tab')
            order.append(
                page.evaluate('() => document.activeElement.id || document.activeElement.tagName')
            )
        unnamed = page.evaluate(
            '() => [...document.querySelectorAll("input, textarea")]'
            '.filter((e) => !e.labels.length && !e.ariaLabel).map((e) => e.id)'
        )
        return order, unnamed, page.evaluate('() => document.documentElement.lang')

    (order, unnamed, language), _ = run_in_browser(page_folder, work)
    assert order == ['file', 'labels', 'template', 'query', 'BUTTON', 'more']
    assert unnamed == []
    assert language == 'en'


@needs_page
def test_jpeg_transparency_and_orientation(nano, page_folder, tmp_path):
    "Other files than opaque PNG: the browser's decoder and its compositing round in their own way"
    picture = Image.fromarray(draw_emoji('🍎', side=200)).crop((0, 20, 200, 170))
    exif = Image.Exif()
    exif[0x112] = 6
    picture.save(tmp_path / 'a.jpg', quality=92)
    picture.save(tmp_path / 'b.jpg', quality=92, exif=exif)
    rgba = picture.convert('RGBA')
    rgba.putalpha(Image.fromarray(np.tile(np.linspace(0, 255, 200).astype(np.uint8), (150, 1))))
    rgba.save(tmp_path / 'c.png')
    paths = sorted(tmp_path.glob('?.*'))
    text = (files('mobileclip_nb') / 'data' / 'web_trial.js').read_text(encoding='utf-8')
    pictures = [base64.b64encode(p.read_bytes()).decode() for p in paths]
    request = dict(texts=['a'], pictures=pictures)
    answer, _ = run_in_browser(
        page_folder, lambda p: p.evaluate(text[text.index('async') :], request)
    )
    right = nano.encode_image(nano.preprocess.batch([Image.open(p) for p in paths]), normalize=True)
    for path, found, expected in zip(paths, answer['image'], right):
        gap = measure_gap([[found]], [expected[None]])
        print(path.name, gap.max_abs, gap.cosine)
        assert gap.cosine >= 0.999


@needs_page
def test_page_at_width_of_a_phone(page_folder):
    "Nothing is wider than a narrow screen"

    def work(page):
        page.set_viewport_size(dict(width=360, height=740))
        return page.evaluate('() => document.documentElement.scrollWidth')

    width, _ = run_in_browser(page_folder, work)
    assert width <= 360


@needs_page
def test_page_of_s0(tmp_path):
    "A model at its own width in the browser"
    manifest = export_model(random_model('mobileclip_s0'), 'web', tmp_path / 'x')
    for part in manifest.parts:
        print(part.name, part.gap, part.notes)
        assert part.gap.max_abs <= 1e-4
        assert not part.gap.is_blind


@needs_page
def test_half_precision_page(nano, tmp_path):
    "float16 inside the graph, in WebAssembly"
    spec = ExportSpec(precision='fp16')
    for part in export_model(nano, 'web', tmp_path / 'x', spec).parts:
        assert part.gap.cosine >= 0.999
