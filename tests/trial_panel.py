"A panel with one control of each kind, for `test_browser.py`: cheap, and wrong on purpose for some values"

import ipywidgets

from mobileclip_nb.core.plots import figure, png, style
from mobileclip_nb.widgets.caption_bench import make_caption_bench
from mobileclip_nb.widgets.parts import make_panel


def render_trial(n, word, theme):
    "A bar of a length, and a word; above 5 there is no picture"
    if n > 5:
        raise ValueError(f'n={n} is <above> 5')
    with style(theme):
        fig = figure(4, 1)
        fig.add_subplot().barh(word, n)
    return png(fig)


def make_trial():
    "A slider, a dropdown and a box"
    n = ipywidgets.IntSlider(2, 0, 9, description='length', continuous_update=False)
    word = ipywidgets.Dropdown(options=['narrow', 'wide'], description='word')
    describe = lambda n, word, theme: f'a bar "{word}" of length {n}'
    return make_panel(dict(n=n, word=word), render_trial, describe)


def count_captions(images, keys, sampling):
    "Captions without a model"
    return [[f'caption {i}' for i in range(sampling.n)] for _ in images]


def make_captions():
    "The caption bench with captioners that need no download"
    return make_caption_bench(captioners=[count_captions])
