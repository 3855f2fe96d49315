"Shards to batches: exact epochs, restarts, ranks, bad samples, deleted shards, ways to decode, captions"

import io, json, os
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mobileclip_nb.augment.pipeline import DATACOMPDR, pack, rng_for, sample
from mobileclip_nb.core.files import write_bytes
from mobileclip_nb.shards.io import Entry, ShardWriter, write_manifests, write_shard
from mobileclip_nb.shards.sample import Sample, StoreSpec
from mobileclip_nb.shards.sources import source_of
from mobileclip_nb.loaders.stream import Stream, StreamSpec

SPEC = StreamSpec(batch=4, side=32, context=12, window=6)


def file(image, form='JPEG', **how):
    out = io.BytesIO()
    image.save(out, form, **how)
    return out.getvalue()


def made(n, at=0, views=3, wide=8, **changes):
    rng = np.random.default_rng(at)
    for i in range(at, at + n):
        blob = file(Image.fromarray(rng.integers(0, 256, (50, 60, 3), np.uint8)))
        s = Sample(
            f'k{i:04d}',
            blob,
            captions=(f'number {i}',),
            synthetic=dict(syn_text=(f'a {i}', f'b {i}')),
            param_aug=tuple(
                pack(DATACOMPDR, sample(DATACOMPDR, (60, 50), rng_for(0, str(i), a)))
                for a in range(views)
            ),
            image_emb=rng.standard_normal((views, wide)).astype(np.float32),
            text_emb=dict(
                text=np.full((1, wide), i, np.float32), syn_text=np.full((2, wide), -i, np.float32)
            ),
        )
        yield s.but(**changes)


def shards(folder, sizes, ours=True, store=StoreSpec(form='float32')):
    at, entries = 0, []
    for k, n in enumerate(sizes):
        write_shard(f'{folder}/{k:08d}.tar', made(n, at), store, (8,))
        at += n
        entries.append(Entry(f'{k:08d}', n))
    if ours:
        write_manifests(
            folder,
            entries,
            dict(
                image_augmentation=DATACOMPDR.to_config(),
                teachers=[dict(name='t', width=8, scale=100.0)],
                images='upright as their EXIF tag asks',
            ),
        )
    return str(folder)


def same(a, b):
    return all(x is None and y is None or torch.equal(x, y) for x, y in zip(a, b))


def seen(batches):
    return [i for b in batches for i in b.index.tolist()]


@pytest.fixture
def place(tmp_path):
    return shards(tmp_path / 's', (5, 9, 2))


def test_epoch_is_exact_and_rows_belong(place, tmp_path):
    s = Stream(place, SPEC, memory=tmp_path / 'm')
    got = list(islice(s.since(), 12))
    for e in range(3):
        assert sorted(seen(got[4 * e : 4 * e + 4])) == list(range(16))
    assert seen(got[:4]) != seen(got[4:8]) and s.per_epoch == 4 and s.skips.kept == 48
    for b in got:
        assert (
            (b.text_emb[:, 0] == b.index).all()
            and (b.syn_emb[:, 0] == -b.index).all()
            and b.image.shape == (4, 3, 32, 32)
        )
    assert seen(islice(Stream(place, SPEC.but(seed=1), memory=tmp_path / 'm').since(), 4)) != seen(
        got[:4]
    )


@pytest.mark.parametrize('workers', (0, 3))
def test_restart_and_workers_do_not_change_batches(place, tmp_path, workers):
    straight = list(islice(Stream(place, SPEC, memory=tmp_path / 'm').since(), 9))
    for step in (0, 3, 7):
        again = islice(
            Stream(place, SPEC, workers=workers, memory=tmp_path / f'n{step}').since(step), 9 - step
        )
        assert all(same(a, b) for a, b in zip(straight[step:], again, strict=True))


def test_more_ranks_than_shards(tmp_path):
    place = shards(tmp_path / 's', (11,))
    ranks = [
        Stream(place, SPEC.but(batch=2), (r, 4), memory=tmp_path / 'm', workers=r % 2 * 3)
        for r in range(4)
    ]
    firsts = [seen(islice(s.since(), 1)) for s in ranks]
    assert len({i for f in firsts for i in f}) == 8 and len({s.id for s in ranks}) == 1
    lengths = [sum(1 for _ in islice(s.since(), 20)) for s in ranks]
    assert lengths == [20] * 4


def broken(folder):
    "Sixteen samples, of which four are bad in four ways"
    with ShardWriter(f'{folder}/00000000.tar', StoreSpec(form='float32')) as w:
        for i, s in enumerate(made(16)):
            if i == 2:
                s = s.but(image=s.image[:300])
            if i == 5:
                s = s.but(param_aug=tuple([[0, 0, 400, 400], r[1]] for r in s.param_aug))
            if i == 9:
                s = s.but(captions=())
            if i == 12:
                s = s.but(param_aug=tuple([r[0], [[99, 1.0], [0, 0.0]]] for r in s.param_aug))
            w.write(
                s
                if i != 9
                else s.but(text_emb={k: v for k, v in s.text_emb.items() if k != 'text'})
            )
    write_manifests(
        folder,
        [Entry('00000000', 16)],
        dict(image_augmentation=DATACOMPDR.to_config(), images='upright'),
    )
    return str(folder)


def test_bad_samples_are_skipped_counted_and_remembered(tmp_path):
    place = broken(tmp_path / 's')
    s = Stream(place, SPEC, memory=tmp_path / 'm')
    got = list(islice(s.since(), 9))
    assert sorted(seen(got[:3])) == sorted(set(range(16)) - {2, 5, 9, 12}) == sorted(seen(got[3:6]))
    assert s.skips.counts == dict(decode=1, crop=1, missing=1, params=1) and 'k0002' in str(s.skips)
    for resumed in (
        Stream(place, SPEC, memory=tmp_path / 'm'),
        Stream(place, SPEC, memory=tmp_path / 'other', state=json.loads(json.dumps(s.state()))),
    ):
        assert (
            all(same(a, b) for a, b in zip(got[5:], resumed.since(5))) and resumed.skips.total == 4
        )


def test_bad_samples_do_not_starve_a_rank(tmp_path):
    place = broken(tmp_path / 's')
    for r in range(3):
        assert (
            len(
                list(
                    islice(
                        Stream(
                            place, SPEC, (r, 3), workers=2 * (r == 1), memory=tmp_path / 'm'
                        ).since(),
                        10,
                    )
                )
            )
            == 10
        )


def test_nothing_usable_is_a_clear_error(place, tmp_path):
    with pytest.raises(ValueError, match='can be used'):
        next(Stream(place, SPEC.but(synthetic='^nothing$'), memory=tmp_path / 'm').since())
    with pytest.raises(ValueError, match='can be used'):
        next(Stream(place, SPEC.but(min_side=51), memory=tmp_path / 'm').since())
    assert (
        next(Stream(place, SPEC.but(min_side=50), memory=tmp_path / 'm').since()).image.shape[0]
        == 4
    )


@pytest.mark.parametrize('workers', (0, 2))
def test_a_shard_deleted_mid_run(tmp_path, workers):
    place = shards(tmp_path / 's', (40,) * 6)
    spec = SPEC.but(window=40)
    straight = list(islice(Stream(place, spec, memory=tmp_path / 'm').since(), 60))
    s = Stream(place, spec, workers=workers, memory=tmp_path / 'n')
    it = s.since()
    got = [next(it)]
    moved = [(p, p.with_suffix('.gone')) for p in Path(place).glob('*.tar')]
    for p, q in moved:
        p.rename(q)
    with pytest.raises(FileNotFoundError, match='is gone. Put it back and resume'):
        for b in it:
            got.append(b)
    assert 0 < len(got) < 60
    for p, q in moved:
        q.rename(p)
    got += islice(
        Stream(place, spec, workers=workers, memory=tmp_path / 'n').since(len(got)), 60 - len(got)
    )
    assert all(same(a, b) for a, b in zip(straight, got, strict=True))


def test_a_reader_that_dies_is_a_clear_error(place, tmp_path):
    s = Stream(place, SPEC, workers=1, memory=tmp_path / 'm', tokens=_dies)
    with pytest.raises(RuntimeError, match='A reading process died.*Resume goes on'):
        next(s.since())


def _dies(texts, context):
    os._exit(3)


def test_exif_and_alpha_by_source(tmp_path):
    rng = np.random.default_rng(0)
    lying = Image.fromarray(rng.integers(0, 256, (40, 80, 3), np.uint8))
    exif = lying.getexif()
    exif[0x112] = 6
    clear = Image.fromarray(
        np.dstack([np.full((40, 80, 3), (255, 0, 0), np.uint8), np.zeros((40, 80), np.uint8)])
    )
    images, whole = (
        (('jpg', file(lying, exif=exif)), ('png', file(clear, 'PNG'))),
        [[0, 0, 40, 40], None],
    )
    for n, (ext, blob) in enumerate(images):
        write_shard(
            f'{tmp_path}/{n}/00000000.tar', [Sample('a', blob, ext, ('x',), param_aug=(whole,))]
        )
    spec = SPEC.but(batch=1, rows=False, synthetic='')

    def look(n, **how):
        return next(
            Stream(
                source_of(tmp_path / str(n), augment=DATACOMPDR),
                spec.but(**how),
                memory=tmp_path / 'm',
            ).since()
        ).image[0]

    assert not torch.equal(look(0), look(0, decode='upright')) and torch.equal(
        look(0), look(0, decode='plain')
    )
    upright = np.asarray(
        Image.open(io.BytesIO(images[0][1]))
        .convert('RGB')
        .transpose(Image.Transpose.ROTATE_270)
        .crop((0, 0, 40, 40))
        .resize((32, 32), Image.Resampling.BICUBIC)
    )
    assert np.array_equal(
        (look(0, decode='upright') * 255).round().byte().permute(1, 2, 0).numpy(), upright
    )
    assert (look(1) == torch.tensor([1.0, 0, 0])[:, None, None]).all() and (
        look(1, decode='upright') == 1
    ).all()
    write_manifests(
        tmp_path / '1',
        [Entry('00000000', 1)],
        dict(image_augmentation=DATACOMPDR.to_config(), images='upright'),
    )
    assert (
        source_of(tmp_path / '1').decode == 'upright'
        and source_of(tmp_path / '0').decode == 'plain'
    )


def test_keys_match_from_their_beginning(tmp_path):
    two = dict(syn_text=('a',), my_syn_text=('b',))
    write_shard(
        tmp_path / 's/00000000.tar',
        (s.but(synthetic=two, image_emb=None, text_emb={}) for s in made(8)),
    )

    def words(pattern):
        b = next(
            Stream(
                source_of(tmp_path / 's', augment=DATACOMPDR),
                SPEC.but(batch=8, rows=False, synthetic=pattern),
                memory=tmp_path / 'm',
            ).since()
        )
        return {tuple(r) for r in b.syn.tolist()}

    assert (
        len(words('syn_text')) == 1
        and words('syn_text') == words('^syn_text$') != words('my')
        and len(words('.*syn')) == 2
    )


def test_mixed_captions(place, tmp_path):
    spec = SPEC.but(batch=16)
    for share, share_of_syn in ((0.0, 0), (1.0, 16)):
        b = next(Stream(place, spec.but(mix=share), memory=tmp_path / 'm').since())
        assert (
            b.syn is None
            and b.syn_emb is None
            and int((b.text_emb[:, 0] == -b.index).sum()) - int((b.index == 0).sum()) * (share == 0)
            == share_of_syn
        )
    half = list(islice(Stream(place, spec.but(mix=0.5), memory=tmp_path / 'm').since(), 12))
    assert 60 < sum(int((b.text_emb[:, 0] < 0).sum()) for b in half) < 120


def test_sequential_views_and_captions(place, tmp_path):
    got = list(
        islice(
            Stream(place, SPEC.but(batch=16, pick='sequential'), memory=tmp_path / 'm').since(), 6
        )
    )
    rows = [
        {
            i: (tuple(e.tolist()), tuple(t.tolist()))
            for i, e, t in zip(b.index.tolist(), b.image_emb, b.syn)
        }
        for b in got
    ]
    assert all(
        len({r[i][0] for r in rows[:3]}) == 3
        and rows[0][i][0] == rows[3][i][0]
        and rows[0][i][1] == rows[2][i][1] != rows[1][i][1]
        for i in range(16)
    )


def test_containers_and_layouts_give_the_same_batches(tmp_path):
    stores = [
        StoreSpec(form=f, layout=l) for f in ('float32', 'bf16') for l in ('current', 'legacy')
    ]
    got = [
        next(Stream(shards(tmp_path / str(k), (6,), store=s), SPEC, memory=tmp_path / 'm').since())
        for k, s in enumerate(stores)
    ]
    assert (
        same(got[0], got[1])
        and same(got[2], got[3])
        and torch.equal(got[0].image, got[2].image)
        and torch.equal(got[0].image_emb.bfloat16().float(), got[2].image_emb)
    )


def test_online_and_plain_modes(tmp_path):
    write_shard(tmp_path / 's/00000000.tar', (s.bare().but(synthetic={}) for s in made(8)))
    spec = SPEC.but(views='fresh', rows=False, synthetic='')
    a, b, c = islice(Stream(tmp_path / 's', spec, memory=tmp_path / 'm').since(), 3)
    assert (
        a.syn is None
        and a.image_emb is None
        and sorted(seen((a, b))) == list(range(8))
        and not torch.equal(
            a.image[0],
            c.image[c.index.tolist().index(a.index[0])] if a.index[0] in c.index else b.image[0],
        )
    )
    with pytest.raises(ValueError, match='No augmentation configuration beside'):
        Stream(tmp_path / 's', SPEC)
    with pytest.raises(ValueError, match='stored views'):
        SPEC.but(views='fresh')


def test_sources_mixed_by_weight(tmp_path):
    a, b = shards(tmp_path / 'a', (30,)), shards(tmp_path / 'b', (10,))
    spec = SPEC.but(batch=20, weights=(1.0, 4.0))
    got = list(islice(Stream([a, b], spec, memory=tmp_path / 'm').since(), 50))
    assert Counter(i >= 30 for i in seen(got)) == {True: 800, False: 200}
    assert all(
        same(x, y)
        for x, y in zip(got[33:], Stream([a, b], spec, workers=2, memory=tmp_path / 'm').since(33))
    )
    assert sorted(
        seen(islice(Stream([a, b], SPEC.but(batch=20), memory=tmp_path / 'm').since(), 2))
    ) == list(range(40))


def test_far_away(tmp_path):
    place = Path(shards(tmp_path / 's', (5, 4)))
    for p in place.iterdir():
        write_bytes(f'memory://stream/s/{p.name}', p.read_bytes())
    near, far = (
        list(islice(Stream(p, SPEC, memory=tmp_path / m).since(), 4))
        for p, m in ((str(place), 'm'), ('memory://stream/s', 'n'))
    )
    assert all(same(a, b) for a, b in zip(near, far, strict=True))


def test_a_manifest_with_too_many_or_too_few_samples(tmp_path):
    place = shards(tmp_path / 's', (8,))
    about = dict(image_augmentation=DATACOMPDR.to_config(), images='upright')
    write_manifests(place, [Entry('00000000', 10)], about)
    s = Stream(place, SPEC, memory=tmp_path / 'm')
    assert {*seen(islice(s.since(), 4))} == set(range(8))
    assert s.skips.counts == dict(missing=2)
    write_manifests(place, [Entry('00000000', 6)], about)
    with pytest.raises(OSError, match='Write the manifest again'):
        list(islice(Stream(place, SPEC, memory=tmp_path / 'm').since(), 4))
