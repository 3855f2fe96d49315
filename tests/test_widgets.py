"""Panels of `widgets`: every control is moved once and shows what `render_*` draws, and bad input gives a message."""

import io, time
from datetime import datetime, timezone
from pathlib import Path

import pytest
from PIL import Image

from mobileclip_nb.core.errors import import_optional
from mobileclip_nb.widgets import augmentation_bench, caption_bench, folding, frontier_explorer
from mobileclip_nb.widgets import runs, targets, zeroshot_bench
from mobileclip_nb.widgets.parts import CAUGHT
from trial_panel import make_captions

widgets = import_optional('ipywidgets', extra='lab')
RESULTS = Path(__file__).resolve().parents[1] / 'results'
LONG = 'x' * 10_000

PANELS = dict(
    augmentation=(
        augmentation_bench.make_augmentation_bench,
        augmentation_bench.render_augmentations,
    ),
    captions=(make_captions, caption_bench.render_captions),
    folding=(folding.make_folding, folding.render_folding),
    targets=(targets.make_targets, targets.render_targets),
    frontier=(
        lambda: frontier_explorer.make_frontier(str(RESULTS / 'latency.json')),
        frontier_explorer.render_frontier,
    ),
    runs=(lambda: runs.make_runs_panel(RESULTS / 'ledger.jsonl'), runs.render_runs),
    zeroshot=(zeroshot_bench.make_zeroshot_bench, zeroshot_bench.render_zeroshot),
)


# controls that change nothing at the first values of the others, and why
WITHOUT_EFFECT = {
    ('captions', 'top_k'): 'the method is top_p',
    **dict.fromkeys(
        [('captions', name) for name in ('method', 'top_p', 'repetition')],
        'at temperature 1 the nano model is certain of its words',
    ),
    ('frontier', 'record'): 'the view is of published points',
    ('frontier', 'runtime'): 'the view is of published points',
    ('frontier', 'threads'): 'the view is of published points',
    ('runs', 'width'): 'a ledger is not smoothed',
    ('zeroshot', 'first'): 'the pictures are not of a folder',
}


def moved(control):
    "Another value of a control; None for one that is not moved"
    if isinstance(control, (widgets.IntSlider, widgets.FloatSlider, widgets.BoundedIntText)):
        return control.max if control.value != control.max else control.min
    if isinstance(control, widgets.FloatLogSlider):
        return 10.0 if control.value != 10 else 20.0
    if isinstance(control, widgets.FloatRangeSlider):
        return (control.min, control.max)
    if isinstance(control, widgets.Dropdown):
        values = [v for _, v in control._options_full]
        return values[(values.index(control.value) + 1) % len(values)]
    if isinstance(control, widgets.SelectMultiple):
        return (control.options[0],)
    if isinstance(control, widgets.Checkbox):
        return not control.value
    if isinstance(control, (widgets.Text, widgets.Textarea)):
        return f'{control.value} x'
    return None


def check(panel, render):
    "A panel shows the picture of its values, or a message where they have none"
    try:
        expected, fault = render(**panel.values()), ''
    except CAUGHT as e:
        expected, fault = b'', str(e)
    assert panel.shown == expected
    assert bool(panel.parts['message'].value) == bool(fault)
    assert bool(panel.parts['picture'].value) == bool(expected)
    return fault


@pytest.mark.parametrize('name', PANELS)
def test_controls(name):
    make, render = PANELS[name]
    panel = make()
    assert not check(panel, render)
    assert set(panel.values()) <= {*panel.parts, 'theme'} - {'picture', 'message'}
    for part, control in panel.parts.items():
        value = moved(control)
        if value is None:
            continue
        before, started, computed = control.value, time.perf_counter(), time.process_time()
        shown = panel.shown
        control.value = value
        assert (panel.shown == shown) == ((name, part) in WITHOUT_EFFECT), part
        wall, cpu = time.perf_counter() - started, time.process_time() - computed
        fault = check(panel, render)
        times = f'{wall * 1e3:6.0f} ms, computing {cpu * 1e3:6.0f} ms'
        print(f'{name:13} {part:15} {times} {fault[:60]}')
        control.value = before
        check(panel, render)


@pytest.mark.parametrize('name', PANELS)
def test_labels_and_words(name):
    panel = PANELS[name][0]()
    for part, control in panel.parts.items():
        if part not in ('picture', 'message'):
            assert control.description, part
    words = panel.parts['picture'].value.split('alt="')[1].split('"')[0]
    assert len(words) > 20
    assert 'image/png' in panel._repr_mimebundle_()


def uploaded(data, name='picture.png'):
    about = dict(name=name, type='image/png', size=len(data), content=memoryview(data))
    return (about | dict(last_modified=datetime.now(timezone.utc)),)


def pixel():
    out = io.BytesIO()
    Image.new('RGB', (1, 1), 'red').save(out, format='PNG')
    return out.getvalue()


BAD = [
    ('augmentation', dict(source=LONG), '10,000 characters'),
    ('augmentation', dict(source='no/such/folder'), 'No image file'),
    ('augmentation', dict(source='http://127.0.0.1:9/x.png'), 'Cannot fetch'),
    ('augmentation', dict(source=str(RESULTS)), 'is a folder'),
    ('captions', dict(source=''), '0 characters'),
    ('captions', dict(source=LONG), '10,000 characters'),
    ('targets', dict(emoji=LONG), '1 emoji'),
    ('targets', dict(emoji=''), '0 emoji'),
    ('frontier', dict(view='measured, models', record='missing.json'), 'missing.json'),
    ('frontier', dict(view='measured, models', record=LONG), '10,000 characters'),
    ('frontier', dict(families=('MCi',)), 'families of this view'),
    ('runs', dict(place='no/such/folder'), 'no/such/folder'),
    ('runs', dict(place=LONG), '10,000 characters'),
    ('runs', dict(where=LONG), 'name=value'),
    ('zeroshot', dict(labels=''), '0 labels'),
    ('zeroshot', dict(labels=LONG), ''),
    ('zeroshot', dict(templates=LONG), 'has no {}'),
    ('zeroshot', dict(pictures='no/such/folder'), 'No image file'),
]


@pytest.mark.parametrize('name, values, message', BAD)
def test_bad_values(name, values, message):
    make, render = PANELS[name]
    panel = make()
    for part, value in values.items():
        panel.parts[part].value = value
    fault = check(panel, render)
    assert message in fault
    assert bool(message) == bool(fault)
    assert len(panel.parts['message'].value) < 500


@pytest.mark.parametrize('name', ['augmentation', 'captions', 'zeroshot'])
def test_bad_uploads(name):
    make, render = PANELS[name]
    panel = make()
    panel.parts['upload'].value = uploaded(pixel())
    assert not check(panel, render)
    panel.parts['upload'].value = uploaded(b'\x89PNG and no more', 'broken.png')
    assert 'broken.png' in check(panel, render)
    panel.parts['upload'].value = ()
    assert not check(panel, render)


def test_folder_with_a_corrupt_picture(tmp_path):
    (tmp_path / 'broken.png').write_bytes(b'no picture')
    panel = zeroshot_bench.make_zeroshot_bench(str(tmp_path))
    assert 'can be read' in panel.parts['message'].value
    (tmp_path / 'dot.png').write_bytes(pixel())
    panel.update()
    assert not check(panel, zeroshot_bench.render_zeroshot)


def test_points_of_the_frontier_answer():
    panel = PANELS['frontier'][0]()
    html = panel.layer.value
    marks = frontier_explorer.chart_view(**panel.values()).marks
    assert html.count('tabindex="0"') == html.count('<title>') == len(marks)
    assert all(f'<title>{m.words}</title>' in html for m in marks)
    panel.parts['record'].value = 'missing.json'
    panel.parts['view'].value = 'five stages against four'
    assert panel.layer.value == ''
