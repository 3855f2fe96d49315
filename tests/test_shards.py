"""Shards against the published format (DataCompDR and DFNDR), and against strangers.

Three parts. What we write is read by an independent reader that knows the published layout and nothing of ours. What is published, made
here by hand in every container and layout, is read by us. And what a stranger may send is refused or skipped with its reason."""

import gzip, io, json, os, pickle, re, struct, tarfile, tracemalloc, zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset

from mobileclip_nb.core.files import list_shards, list_folder, read_bytes, write_bytes
from mobileclip_nb.shards.io import (
    Entry,
    ShardWriter,
    Skips,
    read_manifest,
    read_members,
    read_shard,
    write_manifests,
    write_shard,
)
from mobileclip_nb.shards.safe_io import Limits
from mobileclip_nb.core.errors import Faulty
from mobileclip_nb.shards.sample import (
    Sample,
    StoreSpec,
    differing_fields,
    from_members,
    to_members,
)

WIDTHS, A = (12, 8), 4  # two teachers of different width, four augmentations
WIDTH = sum(WIDTHS)
FORMS = ('bf16', 'float32', 'compact')
# as they stand in published data: magnitudes are float32 numbers printed as doubles
PARAMS = [
    [[98, 42, 376, 439], [[9, -0.26999998092651367], [3, -30.45317268371582]]],
    [[6, 79, 471, 432], [[2, 0.09000000357627869], [4, 30.45317268371582]]],
    [[129, 247, 282, 249], [[2, 0.09000000357627869], [11, 178.5]]],
    [[131, 158, 288, 267], [[12, 0.0], [3, -30.45317268371582]]],
]


def unit(rows, seed):
    "Rows whose slices, one a teacher, have length one, as teachers give them"
    x = np.random.default_rng(seed).standard_normal((rows, WIDTH))
    return np.concatenate(
        [
            p / np.linalg.norm(p, axis=1, keepdims=True)
            for p in np.split(x, np.cumsum(WIDTHS)[:-1], axis=1)
        ],
        1,
    ).astype(np.float32)


def bf16(x):
    return torch.from_numpy(x).bfloat16().float().numpy()


def make(i, keys=('syn_text',), n_gt=1, **changes):
    synthetic = {k: tuple(f'{k} {i} {j}' for j in range(3 + n)) for n, k in enumerate(keys)}
    s = Sample(
        f'{i:08d}',
        b'\xff\xd8image%d' % i,
        captions=tuple(f'caption {i} {j}, größer' for j in range(n_gt)),
        synthetic=synthetic,
        param_aug=tuple(PARAMS),
        image_emb=unit(A, 10 * i),
        text_emb=dict(text=unit(n_gt, 10 * i + 1))
        | {k: unit(len(v), 10 * i + 2 + n) for n, (k, v) in enumerate(synthetic.items())},
        uid=f'{i:08d}',
        sha256='ab' * 32,
        url=f'https://example.org/{i}.jpg',
        meta=dict(width=512, more=dict(b=[1, None], a='x')),
    )
    return s.but(**changes)


# ---- what we write, read by the published logic


class Published:
    "A reader written from the published layout with the webdataset package: the augmentation, the true pair and the synthetic pair of a sample"

    def __init__(self, url, pattern='^syn_text.*$'):
        self.raw = list(
            webdataset.WebDataset(
                str(url),
                shardshuffle=False,
                empty_check=False,
                handler=webdataset.reraise_exception,
            )
        )
        self.pattern = pattern

    def keep(self):
        return [
            s
            for s in self.raw
            if 'txt' in s and any(e in s for e in ('png', 'jpg', 'jpeg', 'webp'))
        ]

    def arrays(self, s):
        if 'npz' in s:
            return dict(np.load(io.BytesIO(s['npz'])))
        return {
            k: t.float().numpy()
            for k, t in torch.load(
                io.BytesIO(gzip.decompress(s['pth.gz'])), weights_only=True
            ).items()
        }

    def pairs(self, s):
        "All that a trainer may draw: by augmentation, and by synthetic key and caption"
        arrays, params, syn = (
            self.arrays(s),
            json.loads(s['paug.json'])['param_aug'],
            json.loads(s['syn.json']),
        )
        true = [s['txt'].decode()]
        n_gt = len(true)
        out = [(('image', a), params[a], arrays['image_emb'][a]) for a in range(len(params))] + [
            (('text', 0), true[0], arrays['text_emb'][0])
        ]
        for key in (k for k in syn if re.match(self.pattern, k)):
            for i, text in enumerate(syn[key]):
                row = (
                    arrays['text_emb'][n_gt + i]
                    if len(arrays['text_emb']) > n_gt
                    else arrays[key + '_emb'][i]
                )
                out.append(((key, i), text, row))
        return {k: (what, row) for k, what, row in out}


@pytest.mark.parametrize('form', ['bf16', 'float32'])
@pytest.mark.parametrize('layout', ['current', 'legacy'])
@pytest.mark.parametrize('n_gt', [1, 3])
def test_ours_is_read_by_the_published_reader(tmp_path, form, layout, n_gt):
    samples = [make(i, n_gt=n_gt, ext=('jpg', 'png', 'webp')[i % 3]) for i in range(5)]
    write_shard(tmp_path / '00000000.tar', samples, StoreSpec(form=form, layout=layout), WIDTHS)
    them = Published(tmp_path / '00000000.tar')
    assert [s['__key__'] for s in them.keep()] == [s.key for s in samples]
    kept = bf16 if form == 'bf16' else (lambda x: x)
    for s, raw in zip(samples, them.keep()):
        assert raw[s.ext] == s.image and raw['url.txt'].decode() == s.url
        d = json.loads(raw['json'])
        assert (d['uid'], d['sha256']) == (s.uid, s.sha256)
        pairs = them.pairs(raw)
        assert len(pairs) == A + 1 + 3
        for (key, i), (what, row) in pairs.items():
            if key == 'image':
                want, x = PARAMS[i], s.image_emb[i]
            else:
                want, x = (s.captions if key == 'text' else s.synthetic[key])[i], s.text_emb[key][i]
            assert what == want
            np.testing.assert_array_equal(row, kept(x))
    assert them.arrays(them.raw[0])['text_emb'].shape == ((4 if layout == 'legacy' else 1), WIDTH)


def test_several_captioners_reach_the_published_reader(tmp_path):
    samples = [
        make(i, keys=('syn_text', 'syn_text_dfn_mscoco38k', 'blip_captions')) for i in range(3)
    ]
    write_shard(tmp_path / 'a.tar', samples, StoreSpec(), WIDTHS)
    for s, raw in zip(samples, Published(tmp_path / 'a.tar').keep()):
        pairs = Published(tmp_path / 'a.tar').pairs(raw)
        for key in ('syn_text', 'syn_text_dfn_mscoco38k'):
            for i, text in enumerate(s.synthetic[key]):
                assert pairs[key, i][0] == text
                np.testing.assert_array_equal(pairs[key, i][1], bf16(s.text_emb[key][i]))


def test_members_are_those_published(tmp_path):
    plain = make(0, meta={}, url=None)
    write_shard(tmp_path / 'a.tar', [plain], StoreSpec(form='float32'), WIDTHS)
    with tarfile.open(tmp_path / 'a.tar') as t:
        assert t.getnames() == [
            f'00000000.{e}' for e in ('jpg', 'json', 'npz', 'paug.json', 'syn.json', 'txt')
        ]
        for m in t:
            assert (m.mtime, m.uid, m.gid, m.uname, m.gname, m.isreg()) == (0, 0, 0, '', '', True)
        read = {m.name.split('.', 1)[1]: t.extractfile(m).read() for m in t}
    assert read['json'] == json.dumps(dict(uid='00000000', sha256='ab' * 32)).encode()
    assert read['paug.json'] == json.dumps(dict(param_aug=PARAMS)).encode()
    assert list(json.loads(read['syn.json'])) == ['syn_text']
    assert (tmp_path / 'a.tar').stat().st_size % 10240 == 0


@pytest.mark.parametrize('form', FORMS)
def test_same_samples_same_bytes(tmp_path, form):
    keys = ('syn_text', 'blip_captions')

    def turned(s):
        back = lambda d: dict(reversed(d.items()))
        return s.but(
            synthetic=back(s.synthetic),
            text_emb=back(s.text_emb),
            meta=dict(more=dict(a='x', b=[1, None]), width=512),
            others=back(s.others),
        )

    samples = [make(i, keys=keys, others=dict(cls=b'7', note=b'n')) for i in range(3)]
    a = write_shard(tmp_path / 'a.tar', samples, StoreSpec(form=form), WIDTHS)
    b = write_shard(
        tmp_path / 'b' / 'other.tar', [turned(s) for s in samples], StoreSpec(form=form), WIDTHS
    )
    assert (
        a == b and (tmp_path / 'a.tar').read_bytes() == (tmp_path / 'b' / 'other.tar').read_bytes()
    )
    assert (
        write_shard('memory://shards/same.tar', samples, StoreSpec(form=form), WIDTHS) == a
        and read_bytes('memory://shards/same.tar') == (tmp_path / 'a.tar').read_bytes()
    )


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('n_gt', [1, 2])
def test_round_trip(tmp_path, form, n_gt):
    samples = [make(i, keys=('syn_text', 'syn_text_b'), n_gt=n_gt) for i in range(4)]
    write_shard(tmp_path / 'a.tar', samples, StoreSpec(form=form), WIDTHS)
    skips = Skips()
    back = list(
        read_shard(
            tmp_path / 'a.tar',
            skips,
            widths=WIDTHS,
            wants=('image', 'captions', 'synthetic', 'param_aug', 'image_emb', 'text_emb'),
        )
    )
    assert (skips.kept, skips.total) == (4, 0)
    for a, b in zip(samples, back):
        assert set(differing_fields(a, b)) <= {'image_emb', 'text_emb'}
        tolerance = dict(bf16=4e-3, float32=0, compact=2e-2)[form]
        for x, y in [
            (a.image_emb, b.image_emb),
            *((a.text_emb[k], b.text_emb[k]) for k in a.text_emb),
        ]:
            assert x.shape == y.shape and y.dtype == np.float32 and np.abs(x - y).max() <= tolerance


# ---- what is published, read by us: made by hand


def npz(**arrays):
    out = io.BytesIO()
    np.savez_compressed(out, **arrays)
    return out.getvalue()


def pth(d, legacy=False):
    out = io.BytesIO()
    torch.save(d, out, _use_new_zipfile_serialization=not legacy)
    return gzip.compress(out.getvalue())


def container(form, arrays):
    return (
        {'npz': npz(**arrays)}
        if form == 'npz'
        else {'pth.gz': pth({k: torch.from_numpy(v).bfloat16() for k, v in arrays.items()})}
    )


def published(form='npz', layout='legacy', params='list', image=True, syn=None):
    "The members of one published sample"
    syn = syn or {'syn_text': [f's{j}' for j in range(5)]}
    param_aug = dict(
        list=PARAMS, string=json.dumps(PARAMS), strings=[json.dumps(p) for p in PARAMS]
    )[params]
    text = unit(1, 1)
    rows = {k: unit(len(v), 2 + n) for n, (k, v) in enumerate(syn.items())}
    arrays = dict(image_emb=unit(A, 0)) | (
        dict(text_emb=np.concatenate([text, *rows.values()]))
        if layout == 'legacy'
        else dict(text_emb=text) | {k + '_emb': v for k, v in rows.items()}
    )
    out = {
        'json': json.dumps(dict(uid='u1', sha256='cd' * 32)).encode(),
        'syn.json': json.dumps(syn).encode(),
        'paug.json': json.dumps(dict(param_aug=param_aug)).encode(),
        'url.txt': b'https://x.org/1',
    }
    return out | (dict(jpg=b'\xff\xd8', txt=b'a dog') if image else {}) | container(form, arrays)


def tar(members, fmt=tarfile.PAX_FORMAT, end=True):
    "A tar by the standard library: names with bytes, or TarInfo with bytes"
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode='w', format=fmt) as t:
        for name, data in members:
            m = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            if not isinstance(name, tarfile.TarInfo):
                m.size, m.mtime = len(data), 1700000000.25
            t.addfile(m, io.BytesIO(data))
        size = out.tell()
    return out.getvalue() if end else out.getvalue()[:size]


def read(blob, tmp_path, **options):
    "Write bytes to a file and read them as a shard: samples by key, and the skips"
    (tmp_path / 'in.tar').write_bytes(blob)
    skips = Skips()
    return {s.key: s for s in read_shard(tmp_path / 'in.tar', skips, **options)}, skips


@pytest.mark.parametrize('form', ['npz', 'pth.gz'])
@pytest.mark.parametrize('layout', ['legacy', 'current'])
@pytest.mark.parametrize('params', ['list', 'string', 'strings'])
@pytest.mark.parametrize('image', [True, False])
def test_published_forms_are_read(tmp_path, form, layout, params, image):
    members = published(form, layout, params, image)
    for order in (sorted(members), sorted(members, reverse=True)):
        got, skips = read(
            tar([(f'shard.7/abc.{e}', members[e]) for e in order]), tmp_path, widths=WIDTHS
        )
        assert (skips.kept, skips.total) == (1, 0)
        s = got['shard.7/abc']
        kept = (lambda x: x) if form == 'npz' else bf16
        assert (s.uid, s.sha256, s.url, s.meta, s.others) == (
            'u1',
            'cd' * 32,
            'https://x.org/1',
            {},
            {},
        )
        assert (s.image, s.captions) == ((b'\xff\xd8', ('a dog',)) if image else (None, ()))
        assert (
            s.synthetic == {'syn_text': ('s0', 's1', 's2', 's3', 's4')}
            and list(s.param_aug) == PARAMS
        )
        np.testing.assert_array_equal(s.image_emb, kept(unit(A, 0)))
        np.testing.assert_array_equal(s.text_emb['text'], kept(unit(1, 1)))
        np.testing.assert_array_equal(s.text_emb['syn_text'], kept(unit(5, 2)))
        assert all(x.dtype == np.float32 for x in (s.image_emb, *s.text_emb.values()))


@pytest.mark.parametrize('fmt', [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_kind_of_tar(tmp_path, fmt):
    key = (
        'f' * 90 + '/' + 'g' * 60
        if fmt == tarfile.USTAR_FORMAT
        else 'f' * 120 + '/größe ' + 'g' * 60
    )
    folder = tarfile.TarInfo('f' * 90)
    folder.type = tarfile.DIRTYPE
    got, skips = read(
        tar(
            [
                (folder, b''),
                (f'{key}.jpg', b'x' * 700),
                (f'{key}.TXT', b'a dog'),
                ('./z.jpg', b'y'),
            ],
            fmt,
        ),
        tmp_path,
    )
    assert (
        list(got) == [key, 'z']
        and got[key].captions == ('a dog',)
        and got[key].image == b'x' * 700
        and not skips.total
    )


def test_image_kinds_and_dots(tmp_path):
    got, skips = read(
        tar([(f'a.b/{e}.{e}', e.encode()) for e in ('jpg', 'jpeg', 'png', 'webp')]), tmp_path
    )
    assert {s.ext: s.image for s in got.values()} == {
        e: e.encode() for e in ('jpg', 'jpeg', 'png', 'webp')
    } and not skips.total


def test_npz_is_preferred(tmp_path):
    got, _ = read(
        tar(
            [
                (f'a.{e}', b)
                for e, b in (
                    published('npz')
                    | container('pth.gz', dict(image_emb=unit(A, 9), text_emb=unit(6, 9)))
                ).items()
            ]
        ),
        tmp_path,
    )
    np.testing.assert_array_equal(got['a'].image_emb, unit(A, 0))


def test_unknown_members_and_unopened_embeddings_pass_untouched(tmp_path):
    members = published('pth.gz', 'current') | dict(cls=b'3', npy=b'odd')
    (tmp_path / 'in.tar').write_bytes(tar([(f'a.{e}', b) for e, b in members.items()]))
    (s,) = read_shard(tmp_path / 'in.tar', embeddings=False)
    assert s.image_emb is None and s.others == {k: members[k] for k in ('cls', 'npy', 'pth.gz')}
    assert {k: v for k, v in to_members(s).items()} == members  # byte for byte
    with pytest.raises(ValueError, match='begin with sample.bare'):
        to_members(s.but(image_emb=unit(A, 0)), StoreSpec('float32'))
    assert set(to_members(s.bare())) == {'cls', 'jpg', 'json', 'npy', 'syn.json', 'txt', 'url.txt'}


def test_parameters_survive_bit_for_bit():
    for params in (
        PARAMS,
        [
            [[94, 46, 348, 398], True, None, None],
            [[33, 76, 370, 401], True, [[12, 0.0], [6, -0.26999998092651367]], None],
        ],
    ):
        members = {'paug.json': json.dumps(dict(param_aug=params)).encode(), 'jpg': b'i'}
        assert to_members(from_members('a', members))['paug.json'] == members['paug.json']


# ---- pairs that the published reader takes wrongly, in silence


def test_two_synthetic_lists_with_one_array_are_refused():
    members = published(layout='legacy', syn={'syn_text': ['a', 'b'], 'syn_text_2': ['c', 'd']})
    with pytest.raises(Faulty, match='ambiguous: text_emb has 5 rows and there are 2 lists'):
        from_members('a', members)
    with pytest.raises(ValueError, match="Use layout='current'"):
        to_members(make(0, keys=('syn_text', 'b')), StoreSpec(layout='legacy'), WIDTHS)


FAULTS = dict(
    fewer_params=('rows: 4 image rows for 3 augmentations', dict(paug=dict(param_aug=PARAMS[:3]))),
    no_params=('params: 4 image rows without', dict(paug=None)),
    empty_params=('params: param_aug is empty', dict(paug=dict(param_aug=[]))),
    params_number=('params: param_aug is a int', dict(paug=dict(param_aug=3))),
    params_flat=('params: param_aug holds 1, not lists', dict(paug=dict(param_aug=[1, 2, 3, 4]))),
    params_other=("params: paug.json has no field 'param_aug'", dict(paug=dict(params=PARAMS))),
    params_garbage=('json: param_aug', dict(paug=dict(param_aug='[[[32, 291'))),
    legacy_rows=(
        'rows: text_emb has 5 rows for 1 true and 5 synthetic',
        dict(arrays=dict(image_emb=unit(A, 0), text_emb=unit(5, 1))),
    ),
    legacy_rows_without_text=(
        'rows: text_emb has 5 rows for unknown true',
        dict(txt=None, arrays=dict(image_emb=unit(A, 0), text_emb=unit(5, 1))),
    ),
    both_layouts=(
        'rows: 6 rows of text for 1 captions',
        dict(arrays=dict(image_emb=unit(A, 0), text_emb=unit(6, 1), syn_text_emb=unit(5, 1))),
    ),
    synthetic_rows=(
        'rows: 4 rows of syn_text for 5',
        dict(arrays=dict(image_emb=unit(A, 0), text_emb=unit(1, 1), syn_text_emb=unit(4, 1))),
    ),
    orphan_rows=(
        "arrays: array 'other_emb' belongs to no captions",
        dict(arrays=dict(image_emb=unit(A, 0), text_emb=unit(1, 1), other_emb=unit(4, 1))),
    ),
    zero_rows=(
        'rows: image_emb is empty',
        dict(arrays=dict(image_emb=unit(A, 0)[:0], text_emb=unit(6, 1))),
    ),
    widths_differ=(
        'width: rows of text are 10 wide, not 20',
        dict(arrays=dict(image_emb=unit(A, 0), text_emb=unit(6, 1)[:, :10])),
    ),
    nan=(
        'values: image_emb holds numbers that are not finite, first in row 1',
        dict(
            arrays=dict(
                image_emb=np.where(np.arange(A)[:, None] == 1, np.nan, unit(A, 0)).astype('f4'),
                text_emb=unit(6, 1),
            )
        ),
    ),
    infinite=(
        'values: text_emb',
        dict(arrays=dict(image_emb=unit(A, 0), text_emb=unit(6, 1) * np.float32(np.inf))),
    ),
    overflow=(
        'values: text_emb',
        dict(arrays=dict(image_emb=unit(A, 0), text_emb=unit(6, 1).astype('f8') * 1e300)),
    ),
    three_axes=(
        'rows: image_emb has shape',
        dict(arrays=dict(image_emb=unit(A, 0)[None], text_emb=unit(6, 1))),
    ),
    integers=(
        'arrays: image_emb holds int64, not floats',
        dict(arrays=dict(image_emb=np.ones((A, WIDTH), int), text_emb=unit(6, 1))),
    ),
    syn_null=(
        "captions: syn.json: 'syn_text' is not a list of texts",
        dict(syn=dict(syn_text=None)),
    ),
    syn_text=(
        "captions: syn.json: 'syn_text' is not a list of texts",
        dict(syn=dict(syn_text='a dog')),
    ),
    syn_empty=(
        "captions: no captions under 'syn_text'",
        dict(syn=dict(syn_text=[]), arrays=dict(image_emb=unit(A, 0))),
    ),
    syn_list=('json: syn.json is a list', dict(syn=['a'])),
    syn_taken=(
        "captions: synthetic captions cannot be called 'text'",
        dict(syn=dict(text=['a']), arrays=dict(image_emb=unit(A, 0))),
    ),
    empty_caption=('captions: an empty caption', dict(txt=b' \n')),
    latin=('captions: txt is not UTF-8', dict(txt='größe'.encode('latin-1'))),
    two_images=('ambiguous: two images, jpg and png', dict(png=b'x')),
    no_bytes=('image: an image of no bytes', dict(jpg=b'')),
    uid_number=('json: uid is not text', dict(json=dict(uid=3))),
)


@pytest.mark.parametrize('fault', FAULTS)
def test_what_does_not_hang_together_is_refused(fault):
    message, changes = FAULTS[fault]
    members = published()
    for name, value in changes.items():
        if name == 'arrays':
            members |= dict(npz=npz(**value))
            continue
        ext = dict(paug='paug.json', syn='syn.json').get(name, name)
        if value is None:
            del members[ext]
        else:
            members[ext] = value if isinstance(value, bytes) else json.dumps(value).encode()
    with pytest.raises(Faulty, match='^' + re.escape(message)) as e:
        from_members('a', members)
    assert (
        pickle.loads(pickle.dumps(e.value)).reason == e.value.reason
    )  # worker processes send faults home


def test_widths_of_the_manifest_are_asked_for():
    with pytest.raises(Faulty, match='width: rows of image are 20 wide, not 1536'):
        from_members('a', published(), widths=(768, 768))


def test_nan_in_metadata_is_nothing():
    assert from_members('a', dict(jpg=b'i', json=b'{"similarity": NaN, "uid": "u"}')).meta == dict(
        similarity=None
    )


# ---- strangers


class Code:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, 'w'))


class Grab:
    def __reduce__(self):
        return (bytearray, (1 << 40,))


def patched(old, new):
    "A pth.gz in whose pickle some bytes are others"
    f = io.BytesIO()
    torch.save(dict(image_emb=torch.zeros(2, 3)), f)
    out = io.BytesIO()
    with zipfile.ZipFile(f) as z, zipfile.ZipFile(out, 'w') as o:
        for n in z.namelist():
            data = z.read(n)
            o.writestr(n, data.replace(old, new) if n.endswith('data.pkl') else data)
            if n.endswith('data.pkl'):
                assert old in data
    return gzip.compress(out.getvalue())


def bomb_npz(size=1 << 27):
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        head, dict(shape=(size // 80, 20), fortran_order=False, descr='<f4')
    )
    out = io.BytesIO()
    with (
        zipfile.ZipFile(out, 'w', zipfile.ZIP_DEFLATED, compresslevel=1) as z,
        z.open('image_emb.npy', 'w') as f,
    ):
        f.write(head.getvalue())
        for _ in range(size >> 20):
            f.write(bytes(1 << 20))
    return out.getvalue()


def lying_npz():
    "A zip whose directory says 100 bytes where many more come out"
    blob = bytearray(bomb_npz(1 << 22))
    at = blob.rfind(b'PK\1\2')
    blob[at + 24 : at + 28] = struct.pack('<I', 100)
    return bytes(blob)


def claim(shape, descr='<f4', data=b''):
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, dict(shape=shape, fortran_order=False, descr=descr))
    out = io.BytesIO()
    with zipfile.ZipFile(out, 'w') as z:
        z.writestr('image_emb.npy', head.getvalue() + data)
    return out.getvalue()


def twice():
    out = io.BytesIO()
    with zipfile.ZipFile(out, 'w') as z, pytest.warns(UserWarning):
        for _ in range(2):
            z.writestr('image_emb.npy', b'x')
    return out.getvalue()


def many_files():
    out = io.BytesIO()
    with zipfile.ZipFile(out, 'w') as z:
        for i in range(5_000):
            z.writestr(f'{i}.npy', b'')
    return out.getvalue()


def long_pickle():
    "Eight million harmless steps, whose list alone would take half a gigabyte"
    out = io.BytesIO()
    with zipfile.ZipFile(out, 'w') as z:
        z.writestr('a/data.pkl', b'(' * (8 << 20))
    return gzip.compress(out.getvalue())


def object_npz(path):
    out = io.BytesIO()
    np.savez(out, image_emb=np.array([Code(path)], object))
    return out.getvalue()


STRANGERS = dict(  # extension, what makes the bytes, reason
    pickle_with_code=('pth.gz', lambda trap: pth(dict(image_emb=Code(trap))), 'pickle'),
    pickle_that_grabs=('pth.gz', lambda trap: pth(dict(image_emb=Grab())), 'pickle'),
    plain_pickle=('pth.gz', lambda trap: gzip.compress(pickle.dumps(Code(trap))), 'arrays'),
    old_torch=(
        'pth.gz',
        lambda trap: pth(dict(image_emb=torch.zeros(2, 3)), legacy=True),
        'arrays',
    ),
    stretched=(
        'pth.gz',
        lambda trap: pth(dict(image_emb=torch.zeros(1, 1).expand(1 << 20, 1 << 20))),
        'rows',
    ),
    beyond_its_storage=(
        'pth.gz',
        lambda trap: patched(b'K\x02K\x03\x86', b'J\x00\x00\x00\x01K\x03\x86'),
        'bomb',
    ),
    a_little_beyond=(
        'pth.gz',
        lambda trap: patched(b'K\x02K\x03\x86', b'M\x00\x10K\x03\x86'),
        'arrays',
    ),
    no_dictionary=('pth.gz', lambda trap: pth([torch.zeros(2, 3)]), 'arrays'),
    nested_dictionary=(
        'pth.gz',
        lambda trap: pth(dict(image_emb=dict(a=torch.zeros(2, 3)))),
        'arrays',
    ),
    gzip_bomb=('pth.gz', lambda trap: gzip.compress(bytes(1 << 27), 1), 'bomb'),
    gzip_cut=('pth.gz', lambda trap: pth(dict(image_emb=torch.zeros(2, 3)))[:-30], 'arrays'),
    gzip_and_more=(
        'pth.gz',
        lambda trap: pth(dict(image_emb=torch.zeros(2, 3))) + b'more',
        'arrays',
    ),
    no_gzip=('pth.gz', lambda trap: b'hello', 'arrays'),
    empty_pth=('pth.gz', lambda trap: b'', 'arrays'),
    nan_rows=('pth.gz', lambda trap: pth(dict(image_emb=torch.full((2, 3), torch.nan))), 'values'),
    zip_bomb=('npz', lambda trap: bomb_npz(), 'bomb'),
    zip_that_lies=('npz', lambda trap: lying_npz(), 'arrays'),
    zip_of_many=('npz', lambda trap: many_files(), 'bomb'),
    long_pickle=('pth.gz', lambda trap: long_pickle(), 'bomb'),
    zip_twice=('npz', lambda trap: twice(), 'arrays'),
    zip_cut=('npz', lambda trap: npz(image_emb=unit(2, 0))[:-40], 'arrays'),
    no_zip=('npz', lambda trap: b'hello', 'arrays'),
    objects=('npz', lambda trap: object_npz(trap), 'pickle'),
    shape_bomb=('npz', lambda trap: claim((1 << 30, 1 << 20)), 'arrays'),
    negative_shape=('npz', lambda trap: claim((-1, 4)), 'arrays'),
    header_with_code=(
        'npz',
        lambda trap: claim((2, 3), descr="__import__('os').system('true')"),
        'arrays',
    ),
    packed_garbage=('emb', lambda trap: b'not ours', 'arrays'),
    packed_empty=('emb', lambda trap: b'', 'arrays'),
    deep_json=(
        'syn.json',
        lambda trap: b'{"syn_text": ' + b'[' * 10_000 + b']' * 10_000 + b'}',
        'json',
    ),
    deep_objects=('json', lambda trap: b'{"a":' * 10_000 + b'1' + b'}' * 10_000, 'json'),
    rather_deep=('json', lambda trap: b'{"a":' + b'[' * 100 + b']' * 100 + b'}', 'json'),
    deep_parameters=(
        'paug.json',
        lambda trap: json.dumps(dict(param_aug='[' * 10_000 + ']' * 10_000)).encode(),
        'json',
    ),
    huge_number=('json', lambda trap: b'{"a": ' + b'9' * 5_000 + b'}', 'json'),
    large_number=('paug.json', lambda trap: b'{"param_aug": [[' + b'9' * 400 + b']]}', 'json'),
    nan_parameters=('paug.json', lambda trap: b'{"param_aug": [[NaN]]}', 'json'),
    infinite_parameters=('paug.json', lambda trap: b'{"param_aug": [[1e999]]}', 'json'),
    nan_captions=('syn.json', lambda trap: b'{"syn_text": NaN}', 'json'),
    half_a_character=('syn.json', lambda trap: b'{"syn_text": ["\\ud800"]}', 'json'),
    said_twice=('syn.json', lambda trap: b'{"syn_text": ["a"], "syn_text": ["b"]}', 'json'),
    no_json=('json', lambda trap: b'{', 'json'),
    latin_json=('json', lambda trap: '{"a": "größe"}'.encode('latin-1'), 'json'),
    long_json=('json', lambda trap: b'{"a": "' + b'x' * (9 << 20) + b'"}', 'size'),
)


@pytest.mark.parametrize('kind', STRANGERS)
def test_a_strangers_member_is_skipped_with_its_reason(tmp_path, kind):
    "The bad sample is counted, its neighbors come through, nothing runs, nothing is written, and memory stays small"
    ext, made, reason = STRANGERS[kind]
    blob = made(str(tmp_path / 'trap'))
    members = [
        ('a.jpg', b'1'),
        ('b.jpg', b'2'),
        (f'b.{ext}', blob),
        ('b.txt', b'a dog'),
        ('c.jpg', b'3'),
    ]
    (tmp_path / 'in.tar').write_bytes(tar(members))
    skips = Skips()
    tracemalloc.start()
    try:
        got = [s.key for s in read_shard(tmp_path / 'in.tar', skips)]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert got == ['a', 'c'] and skips.kept == 2
    assert skips.counts == {reason: 1} and skips.examples[reason][0][:2] == ('in.tar', 'b')
    assert peak < 160 << 20
    assert sorted(os.listdir(tmp_path)) == ['in.tar']
    assert Skips.from_dict(json.loads(json.dumps(skips.to_dict()))) == skips and reason in str(
        skips
    )


def info(name, kind=tarfile.REGTYPE, size=0, link=''):
    m = tarfile.TarInfo(name)
    m.type, m.size, m.linkname = kind, size, link
    return m


def raw_header(name=b'b.png', size=b'%011o\0' % 3, kind=b'0', magic=b'ustar\x0000', spoil=False):
    h = bytearray(512)
    h[: len(name)] = name
    h[100:108] = b'0000444\0'
    h[124:136] = size.ljust(12, b'\0')[:12]
    h[156:157] = kind
    h[257:265] = magic
    h[148:156] = b' ' * 8
    h[148:156] = b'%06o\0 ' % (sum(h) + spoil)
    return bytes(h)


NAMES = dict(
    climb='../../b.jpg',
    climb_inside='x/../../b.jpg',
    absolute='/tmp/b.jpg',
    windows='C:\\b.jpg',
    backslash='..\\b.jpg',
    long='y' * 2000 + '/b.jpg',
    control='b\x1b[2J.jpg',
    newline='x\ny/b.jpg',
)


@pytest.mark.parametrize('kind', NAMES)
def test_a_name_that_is_not_safe(tmp_path, kind):
    (tmp_path / 'deep' / 'er').mkdir(parents=True)
    got, skips = read(
        tar([('a.jpg', b'1'), (NAMES[kind], b'2'), ('c.jpg', b'3')]), tmp_path / 'deep' / 'er'
    )
    assert list(got) == ['a', 'c'] and skips.counts == dict(name=1)
    assert [p.name for p in tmp_path.rglob('*') if p.is_file()] == ['in.tar'] and not Path(
        '/tmp/b.jpg'
    ).exists()
    assert '\x1b' not in str(skips) and len(str(skips)) < 1000


@pytest.mark.parametrize(
    'kind', [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE]
)
def test_what_is_no_file(tmp_path, kind):
    got, skips = read(
        tar(
            [
                ('a.jpg', b'1'),
                ('b.txt', b'a dog'),
                (info('b.jpg', kind, link='/etc/passwd'), b''),
                ('c.jpg', b'3'),
            ]
        ),
        tmp_path,
    )
    assert (
        list(got) == ['a', 'c']
        and skips.counts == dict(kind=1)
        and skips.examples['kind'][0][1] == 'b'
    )


def test_sizes_that_are_absurd(tmp_path):
    good = tar([('a.jpg', b'1')], end=False)
    for size, reason in (
        (b'77777777777\0', 'truncated'),
        (b'\x80' + b'\x7f' * 11, 'size'),
        (b'\xff' * 12, 'size'),
        (b'\x80\0\0\0' + b'\x0f' + b'\xff' * 7, 'truncated'),
        (b'hello\0', 'truncated'),
    ):
        got, skips = read(good + raw_header(size=size) + b'xyz', tmp_path)
        assert skips.counts == {reason: 1}, (size, skips.counts)
        assert list(got) == (
            [] if size == b'hello\0' or reason == 'size' else ['a']
        )  # the tar ends early, so `a` might be incomplete unless another began
    got, skips = read(
        tar([('a.jpg', b'1'), ('b.jpg', b'2' * 5000), ('c.jpg', b'3')]),
        tmp_path,
        limits=Limits(member=4000),
    )
    assert list(got) == ['a', 'c'] and skips.counts == dict(size=1)
    got, skips = read(
        tar([('a.jpg', b'1' * 3000), ('a.txt', b'2' * 3000), ('c.jpg', b'3')]),
        tmp_path,
        limits=Limits(sample=4000),
    )
    assert list(got) == ['c'] and skips.counts == dict(size=1)
    got, skips = read(tar([(f'a.{i}', b'') for i in range(100)] + [('c.jpg', b'3')]), tmp_path)
    assert list(got) == ['c'] and skips.counts == dict(size=1)
    for kind in (b'x', b'L'):
        got, skips = read(
            good + raw_header(size=b'%011o\0' % (1 << 30), kind=kind) + b'xyz', tmp_path
        )
        assert skips.counts == dict(size=1)
    got, skips = read(
        good
        + raw_header(size=b'%011o\0' % 20, kind=b'x')
        + b'99 path=../../x.jpg\n'.ljust(512, b'\0')
        + raw_header()
        + bytes(2048),
        tmp_path,
    )
    assert skips.counts == dict(truncated=1)


def test_a_tar_that_is_cut_or_damaged(tmp_path):
    whole = tar(
        [(f'{k}.{e}', k.encode() * 600) for k in 'abcd' for e in ('jpg', 'txt')],
        tarfile.USTAR_FORMAT,
    )
    keys, counts = [], []
    for n in range(0, len(whole), 256):
        got, skips = read(whole[:n], tmp_path)
        keys.append(list(got))
        counts.append(skips.counts)
        assert all(
            s.captions == (s.key * 600,) and s.image == s.key.encode() * 600 for s in got.values()
        ), n  # never half a sample
    assert all(a == b[: len(a)] for a, b in zip(keys, keys[1:])) and keys[-1] == list('abcd')
    assert all(c == dict(truncated=1) for c, k in zip(counts, keys) if k != list('abcd'))
    got, skips = read(
        tar([('a.jpg', b'1'), ('b.jpg', b'2')], tarfile.USTAR_FORMAT, end=False), tmp_path
    )
    assert list(got) == ['a'] and skips.counts == dict(truncated=1)
    got, skips = read(
        tar([('a.jpg', b'1'), ('b.jpg', b'2')], tarfile.USTAR_FORMAT, end=False)
        + raw_header(spoil=True)
        + bytes(4096),
        tmp_path,
    )
    assert list(got) == ['a'] and skips.counts == dict(truncated=1)
    for junk in (b'', b'hello', b'<html>404</html>' * 100, os.urandom(5000)):
        got, skips = read(junk, tmp_path)
        assert (
            not got
            and skips.counts == dict(truncated=1)
            and skips.examples['truncated'][0][1] == ''
        )
    with pytest.raises(FileNotFoundError, match='nowhere.tar'):
        list(read_shard(tmp_path / 'nowhere.tar'))


def test_a_block_of_zeros_in_the_middle_is_no_end(tmp_path):
    "A disk that lost one block: samples before it come through, and nobody is told that all is well"
    whole = tar(
        [(f'{k}.{e}', k.encode() * 600) for k in 'abcd' for e in ('jpg', 'txt')],
        tarfile.USTAR_FORMAT,
    )
    heads = [m.offset for m in tarfile.open(fileobj=io.BytesIO(whole))]
    for n, at in enumerate(heads):
        got, skips = read(whole[:at] + bytes(512) + whole[at + 512 :], tmp_path)
        assert list(got) == list('abcd')[: max(0, (n + 1) // 2 - 1)] and skips.counts == dict(
            truncated=1
        ), n  # the sample before the hole may lack members
    got, skips = read(whole + whole.replace(b'a.jpg', b'z.jpg'), tmp_path)
    assert list(got) == list('abc') and skips.counts == dict(truncated=1)
    assert read(whole + bytes(1 << 20), tmp_path)[1].total == 0


def test_extended_headers_are_forgotten(tmp_path):
    "Millions of records that nobody needs are not held"
    records = b''.join(b'18 %013d=\n' % i for i in range(3_400))
    out = io.BytesIO()
    for _ in range(40):
        out.write(
            raw_header(name=b'x', size=b'%011o\0' % len(records), kind=b'x')
            + records
            + bytes(-len(records) % 512)
        )
    blob = out.getvalue() + tar([('a.jpg', b'1')])
    (tmp_path / 'in.tar').write_bytes(blob)
    tracemalloc.start()
    try:
        got = [s.key for s in read_shard(tmp_path / 'in.tar')]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert got == ['a'] and peak < 2 << 20


def test_members_that_stand_wrong(tmp_path):
    got, skips = read(
        tar([('a.jpg', b'1'), ('a.txt', b'x'), ('a.JPG', b'2'), ('c.jpg', b'3')]), tmp_path
    )
    assert list(got) == ['c'] and skips.counts == dict(duplicate=1)
    got, skips = read(
        tar([('a.jpg', b'1'), ('c.jpg', b'3'), ('a.txt', b'x'), ('c.txt', b'y')]), tmp_path
    )
    assert [got['a'].captions, got['c'].captions] == [(), ()] and skips.counts == dict(scattered=2)
    assert read(
        tar([('a.jpg', b'1'), ('c.jpg', b'3'), ('a.txt', b'x')]), tmp_path, wants=('captions',)
    )[1].counts == dict(missing=2, scattered=1)
    got, skips = read(tar([('README', b'x'), ('x/.hidden', b'x'), ('a.jpg', b'1')]), tmp_path)
    assert list(got) == ['a'] and skips.counts == dict(stray=2)
    sparse = info('b.jpg')
    sparse.pax_headers = {'GNU.sparse.major': '1'}
    got, skips = read(tar([(sparse, b''), ('a.jpg', b'1')]), tmp_path)
    assert list(got) == ['a'] and skips.counts == dict(kind=1)


def test_random_damage_never_ends_a_run(tmp_path):
    "Bytes turned at random, with seeds: every sample that comes through hangs together, and nothing but Faulty is met on the way"
    blob = bytearray(
        tar(
            [
                (f'{i:03d}.{e}', b)
                for i in range(4)
                for e, b in published(('npz', 'pth.gz')[i % 2], 'current').items()
            ],
            tarfile.USTAR_FORMAT,
        )
    )
    for seed in range(150):
        rng = np.random.default_rng(seed)
        bad = bytearray(blob)
        for at in rng.integers(0, len(bad), rng.integers(1, 30)):
            bad[at] = rng.integers(256)
        got, skips = read(bytes(bad), tmp_path)
        assert len(got) + skips.total >= 1 and all(
            x is None or np.isfinite(x).all()
            for s in got.values()
            for x in (s.image_emb, *s.text_emb.values())
        )


# ---- whole or not at all


def test_a_shard_is_written_whole_or_not_at_all(tmp_path):
    for url, look in (
        (tmp_path / 'out' / 'a.tar', lambda: list_folder(tmp_path / 'out')),
        ('memory://shards/half/a.tar', lambda: list_folder('memory://shards/half')),
    ):
        with pytest.raises(RuntimeError):
            with ShardWriter(url) as w:
                w.write(make(0).bare())
                raise RuntimeError('stop')
        assert look() == []
        write_shard(url, [make(0).bare()])
        before = read_bytes(url)
        with pytest.raises(Faulty, match='rows: 4 image rows for 3'):
            write_shard(url, [make(1).bare(), make(2, param_aug=tuple(PARAMS[:3]))])
        assert read_bytes(url) == before and look() == ['a.tar']


def test_what_a_writer_refuses(tmp_path):
    for key, message in (
        ('../a', 'climbs out'),
        ('/a', 'is absolute'),
        ('a.b', 'would be read back as'),
        ('', 'would be read back as'),
        ('x' * 300, 'does not fit'),
        ('a\nb', 'read back|printed'),
    ):
        with pytest.raises(ValueError, match=message):
            write_shard(tmp_path / 'a.tar', [make(0, key=key).bare()])
    with pytest.raises(ValueError, match='has 68,157,440 bytes; readers take'):
        write_shard(tmp_path / 'a.tar', [make(0, image=bytes(65 << 20)).bare()])
    with pytest.raises(ValueError, match='members; readers take 64'):
        write_shard(tmp_path / 'a.tar', [make(0, others={f'x{i}': b'1' for i in range(70)})])
    with pytest.raises(ValueError, match="Key '00000000' is in this shard already"):
        write_shard(tmp_path / 'a.tar', [make(0).bare()] * 2)
    with pytest.raises(ValueError, match='meta cannot hold uid'):
        to_members(make(0, meta=dict(uid='x')))
    assert os.listdir(tmp_path) == []


def test_manifests(tmp_path):
    shards = {
        n: write_shard(tmp_path / f'{n}.tar', [make(i) for i in range(c)], widths=WIDTHS)
        for n, c in (('00000001', 2), ('00000000', 3))
    }
    about = dict(teachers=[dict(name='a', width=12, scale=70.0)], packages=dict(torch='2'))
    for out in (tmp_path, 'memory://shards/manifests'):
        made = write_manifests(
            out, [Entry(n, w.count, w.sha256, w.bytes) for n, w in shards.items()], about
        )
        assert (
            read_bytes(f'{out}/manifest.jsonl')
            == b'{"shard": "00000000", "num_uids": 3}\n{"shard": "00000001", "num_uids": 2}\n'
        )
        assert read_manifest(out) == made and made.samples == 5
    (tmp_path / 'manifest.json').unlink()
    m = read_manifest(tmp_path)
    assert (m.version, [tuple(e)[:2] for e in m.shards]) == (
        None,
        [('00000000', 3), ('00000001', 2)],
    )
    for text, message in (
        ('{"shard": 3, "num_uids": 1}', 'manifest.jsonl:1'),
        ('[' * 10_000, 'nested'),
        ('{"shard": "a"}', 'not a shard'),
    ):
        (tmp_path / 'manifest.jsonl').write_text(text)
        with pytest.raises(ValueError, match=message):
            read_manifest(tmp_path)
    (tmp_path / 'manifest.json').write_text('{"format": "mobileclip_nb shards", "version": 99}')
    with pytest.raises(ValueError, match='version 99'):
        read_manifest(tmp_path)


def test_secrets_stay_out_of_messages():
    for url in (
        'https://user:hunter2@localhost:1/a.tar?X-Amz-Signature=hunter2',
        's4://user:hunter2@b/a.tar?key=hunter2',
    ):
        with pytest.raises((OSError, ValueError, ModuleNotFoundError)) as e:
            list(read_shard(url))
        assert (
            'hunter2' not in str(e.value)
            and 'a.tar' in str(e.value)
            and (e.value.__context__ is None or e.value.__suppress_context__)
        )
