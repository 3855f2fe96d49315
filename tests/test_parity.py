"""Whole models against others: Apple's answers for S0 and S2, open_clip on shared random weights for the rest; and folding.

Features are normalized, everything is float32, the largest absolute difference allowed is 1e-5. Weights are scaled so that two images
really get different answers, and statistics and layer scales are randomized, or half of the network would not be seen.
"""

import gc, json, zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mobileclip_nb.blocks.reparam import fold
from mobileclip_nb.models.weights import load_weights
from mobileclip_nb.models.key_maps import from_native, recognize, to_native
from mobileclip_nb.preprocessing.tokenizer import tokenize
from mobileclip_nb.models.zoo import ZOO, Undrawn, build, find_record

GOLDEN = Path(__file__).parent / 'golden'
LIMIT = 1e-5
CAPTIONS = ['a photo of a cat', 'two people ride horses along the beach at sunset']
OPEN_CLIP = {
    'MobileCLIP-S1': 'mobileclip_s1',
    'MobileCLIP-S2': 'mobileclip_s2',
    'MobileCLIP-B': 'mobileclip_b',
    'MobileCLIP2-S0': 'mobileclip2_s0',
    'MobileCLIP2-S2': 'mobileclip2_s2',
    'MobileCLIP2-B': 'mobileclip2_b',
    'MobileCLIP2-S3': 'mobileclip2_s3',
    'MobileCLIP2-S4': 'mobileclip2_s4',
    'MobileCLIP2-L-14': 'mobileclip2_l14',
}


@pytest.fixture(autouse=True)
def no_grad():
    with torch.inference_mode():
        yield
    gc.collect()


def gap(a, b):
    "Largest absolute difference of normalized rows"
    return (F.normalize(a.float(), dim=-1) - F.normalize(b.float(), dim=-1)).abs().max().item()


def telling(y):
    "Refuse features that hardly depend on the input: comparing them would prove nothing"
    y = F.normalize(y.float(), dim=-1)
    assert (y[0] - y[1]).abs().max() > 1e-3, 'the rows are alike, so this comparison is blind'
    return y


def stir(state, seed=0):
    "Fill tensors with weights that let signals through, and statistics and layer scales far from their first values"
    g = torch.Generator().manual_seed(seed)
    for k, t in state.items():
        if not t.is_floating_point():
            t.zero_()
        elif k == 'logit_scale':
            t.fill_(3.0)
        elif k.endswith('running_var'):
            t.uniform_(0.5, 1.5, generator=g)
        elif 'gamma' in k or 'layer_scale' in k:
            t.uniform_(0.05, 0.3, generator=g)
        elif t.ndim <= 1:
            t.normal_(0, 0.1, generator=g).add_(1.0 if k.endswith('weight') else 0.0)
        elif any(w in k for w in ('embedding', 'pos', 'cls', 'token.weight')) and t.ndim <= 3:
            t.normal_(0, 0.5, generator=g)
        else:
            t.normal_(
                0,
                (t.shape[0] if k.endswith('text_projection') else t[0].numel()) ** -0.5,
                generator=g,
            )


def fill(key, shape):
    "One official tensor by the rule of the golden files"
    r = np.random.RandomState(zlib.crc32(key.encode()))
    if key.endswith('num_batches_tracked'):
        return torch.zeros((), dtype=torch.int64)
    if key == 'logit_scale':
        return torch.tensor(np.log(100.0), dtype=torch.float32)
    z = r.standard_normal(shape).astype(np.float32)
    if key.endswith('running_var'):
        v = 0.5 + r.random_sample(shape)
    elif key.endswith('running_mean'):
        v = 0.1 * z
    elif 'layer_scale' in key:
        v = 0.02 + 0.08 * r.random_sample(shape)
    elif len(shape) <= 1:
        v = 1 + 0.1 * z if key.endswith('.weight') else 0.1 * z
    elif any(w in key for w in ('embedding_layer', 'pos_embed', 'cls_token')):
        v = 0.5 * z
    else:
        v = z / np.sqrt(
            shape[0] if key.endswith(('proj', 'projection_layer')) else np.prod(shape[1:])
        )
    return torch.from_numpy(np.asarray(v, dtype=np.float32))


@pytest.mark.parametrize('name', ['mobileclip_s0', 'mobileclip_s2'])
def test_golden(name, tmp_path):
    "Apple's answers, from a file in Apple's naming; train form and folded"
    about, data = json.loads((GOLDEN / f'{name}.json').read_text()), np.load(GOLDEN / f'{name}.npz')
    state = {k: fill(k, s) for k, s in about['state_dict'].items()}
    torch.save(state, tmp_path / f'{name}.pt')
    seen = recognize(state)
    assert (seen.naming, seen.form, seen.models) == ('apple', 'train', [name])
    model = load_weights(build(find_record(name), empty=True), tmp_path / f'{name}.pt').eval()
    (tmp_path / f'{name}.pt').unlink()
    side = about['image_size']
    assert side == model.record.pixels.side
    x = torch.from_numpy(
        np.random.RandomState(7).random_sample((2, 3, side, side)).astype(np.float32)
    )
    tokens = torch.from_numpy(data['tokens']).long()
    assert torch.equal(tokenize(about['captions']), tokens)
    image, text = (torch.from_numpy(data[f'{k}_features']) for k in ('image', 'text'))
    telling(image)
    telling(text)
    for form, m in dict(train=model, folded=fold(model)).items():
        gi, gt = gap(m.encode_image(x), image), gap(m.encode_text(tokens), text)
        print(f'{name} {form:6} image {gi:.1e} text {gt:.1e}')
        assert max(gi, gt) <= LIMIT
    for tower, official in about['reparameterised_params'].items():
        ours = sum(p.numel() for p in getattr(fold(model), tower).parameters())
        extra = (
            model.image.head.bias.numel() if tower == 'image' else 0
        )  # Apple's projection has no bias
        assert ours - extra <= official
    back = from_native(model.state_dict(), 'apple')
    assert (
        list(back) != []
        and back.keys() == state.keys()
        and all(torch.equal(back[k], state[k]) for k in state)
    )


@pytest.mark.parametrize('theirs', OPEN_CLIP)
def test_open_clip(theirs):
    "The same random weights in open_clip's model and in ours; then ours folded"
    import open_clip

    r = find_record(theirs)
    assert r.name == OPEN_CLIP[theirs]
    with Undrawn():
        other = open_clip.create_model(theirs).eval()
    state = other.state_dict()
    stir(state)
    got = to_native(state, 'open_clip')
    assert not got.unknown
    model = build(r, empty=True)
    model.load_state_dict(got.state)
    model.eval()
    assert r.name in recognize(state).models
    x, tokens = (
        torch.rand(2, 3, r.pixels.side, r.pixels.side, generator=torch.Generator().manual_seed(1)),
        tokenize(CAPTIONS),
    )
    image, text = telling(other.encode_image(x)), telling(other.encode_text(tokens))
    del other, state, got
    gc.collect()
    mine = model.encode_image(x), model.encode_text(tokens)
    gi, gt = gap(mine[0], image), gap(mine[1], text)
    thin = fold(model.image)  # these text towers have nothing to fold
    raw = (thin(x) - mine[0]).abs().max().item()
    folded = gap(thin(x), mine[0])
    print(f'{theirs} image {gi:.1e} text {gt:.1e}; fold {folded:.1e} (raw {raw:.1e})')
    assert max(gi, gt, folded, gap(thin(x), image)) <= LIMIT


OURS = ('mobileclip_nano', 'teacher_nano_a', 'teacher_nano_b')


@pytest.mark.parametrize(
    'name,image',
    [
        ('mobileclip_s0', 'mci0'),
        ('mobileclip_b', 'vit_b16_v1'),
        *((n, find_record(n).image) for n in OURS),
    ],
)
def test_fold_gap(name, image):
    "Folding for what open_clip does not have: Text-RepMixer, Apple's form of B, nano and its teachers"
    model = build(find_record(name).but(image=image), empty=True)
    stir(model.state_dict())
    model.eval()
    if model.record.text.rows:
        model.text.token.ids.copy_(torch.arange(model.record.text.rows))
    r = model.record
    x, tokens = torch.rand(2, 3, r.pixels.side, r.pixels.side), tokenize(CAPTIONS, r.context_length)
    a, thin = (model.encode_image(x), model.encode_text(tokens)), fold(model)
    b = thin.encode_image(x), thin.encode_text(tokens)
    telling(a[0])
    gaps = [gap(u, v) for u, v in zip(a, b)]
    print(
        f'{name} fold image {gaps[0]:.1e} text {gaps[1]:.1e} (raw {(a[0] - b[0]).abs().max():.1e}, {(a[1] - b[1]).abs().max():.1e})'
    )
    assert max(gaps) <= LIMIT


def test_every_variant_is_covered():
    "A variant not named above shares both towers with one that is, so its gaps are the same"
    towers = {
        (r.image, r.text, r.embed_dim)
        for n in (*OPEN_CLIP.values(), 'mobileclip_s0', *OURS)
        for r in [find_record(n)]
    }
    assert {(r.image, r.text, r.embed_dim) for r in ZOO.values()} == towers


def test_two_forms_of_b_differ():
    "Apple's and open_clip's form of B share all weights and yet answer differently, which is why a file's naming decides"
    a = build(find_record('mobileclip_b'), empty=True)
    stir(a.state_dict())
    b = build(find_record('mobileclip_b').but(image='vit_b16_v1'), empty=True)
    b.load_state_dict(a.state_dict())
    x = torch.rand(1, 3, 224, 224)
    d = gap(a.eval().encode_image(x), b.eval().encode_image(x))
    print(f'the two forms of B differ by {d:.1e}')
    assert d > LIMIT
