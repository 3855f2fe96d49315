"Sets of reinforced samples made in seconds, for tests and benchmarks of what looks at them"

import io
from functools import lru_cache

import numpy as np
from PIL import Image

from mobileclip_nb.augment.pipeline import DATACOMPDR, pack, rng_for, sample as draw
from mobileclip_nb.datasets.emoji import draw_emoji
from mobileclip_nb.shards.io import Entry, write_manifests, write_shard
from mobileclip_nb.shards.sample import Sample

SPEC, SIDE, WIDTHS, NAMES = DATACOMPDR.but(side=256), 256, (512, 256), ('one', 'two')
EMOJI = {'🦊': 'fox', '🐸': 'frog', '🍎': 'apple', '🚗': 'car', '🌻': 'sunflower', '🐙': 'octopus'}


@lru_cache
def encoded(emoji, side=SIDE):
    "An emoji as a JPEG file"
    out = io.BytesIO()
    Image.fromarray(draw_emoji(emoji, side=side)).save(out, format='JPEG', quality=85)
    return out.getvalue()


@lru_cache
def stored(emoji, views):
    "Stored augmentations, the same for each sample of an emoji"
    return tuple(pack(SPEC, draw(SPEC, (SIDE, SIDE), rng_for(0, emoji, k))) for k in range(views))


def make_sample(i, views=5, synthetic=5):
    "Number `i` of a set: an emoji and random embeddings"
    rng, (emoji, name) = np.random.default_rng(i), list(EMOJI.items())[i % len(EMOJI)]
    texts = tuple(f'picture {i} of a {name}, caption {k}' for k in range(synthetic))
    rows = rng.normal(size=(views + 1 + synthetic, sum(WIDTHS))).astype(np.float32)
    return Sample(
        f'{i:08d}',
        encoded(emoji),
        'jpg',
        (f'a {name}',),
        dict(syn_text=texts),
        stored(emoji, views),
        rows[:views],
        dict(text=rows[views : views + 1], syn_text=rows[views + 1 :]),
    )


def write_set(place, n, per, make=make_sample):
    "`n` samples in shards of `per`, with a manifest"
    entries = []
    for shard, first in enumerate(range(0, n, per)):
        samples = [make(i) for i in range(first, min(first + per, n))]
        write_shard(f'{place}/{shard:05d}.tar', samples, widths=WIDTHS)
        entries.append(Entry(f'{shard:05d}', len(samples), '', 0))
    teachers = [dict(name=name, width=width, scale=1.0) for name, width in zip(NAMES, WIDTHS)]
    write_manifests(place, entries, dict(image_augmentation=SPEC.to_config(), teachers=teachers))
