"Shards on a web server and on S3 that fail: fetched once a node, the same batches, kills, an empty cache"

import io, json, os, random, shutil, signal, socket, subprocess, sys, time
from contextlib import suppress
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from fault_server import serve
from PIL import Image

from mobileclip_nb.core.copies import fetch_copy
from mobileclip_nb.core.files import exists, list_shards, read_bytes, sha256
from mobileclip_nb.loaders.lanes import Lanes
from mobileclip_nb.loaders.stream import Stream, StreamSpec
from mobileclip_nb.shards.io import write_shard
from mobileclip_nb.shards.sample import Sample
from mobileclip_nb.shards.sources import source_of

pytest.importorskip('aiohttp')
SPEC = StreamSpec(batch=4, side=32, context=12, window=8, views='fresh', rows=False, synthetic='')
KILLS = int(os.environ.get('MOBILECLIP_KILLS', 2))  # ten took 17 minutes on two busy cores


def picture(number):
    rng = np.random.default_rng(number)
    file = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (40, 40, 3), np.uint8)).save(file, 'PNG')
    return file.getvalue()


def write_set(folder, shards=6, each=7, manifests=True):
    "Shards in two subfolders with a manifest each; one picture of every shard is cut off"
    number = 0
    for k in range(shards):
        sub, samples = Path(folder, f'{k % 2:02d}'), []
        for i in range(each):
            image = picture(number)[: 60 if i == 3 else None]
            samples.append(Sample(f'k{number:04d}', image, 'png', (f'number {number}',)))
            number += 1
        write_shard(sub / f'{k:08d}.tar', samples)
        if manifests:
            with open(sub / 'manifest.jsonl', 'a') as lines:
                lines.write(json.dumps(dict(shard=f'{k:08d}', num_uids=each)) + '\n')
    return str(folder)


def take(stream, n, since=0):
    return list(islice(stream.since(since), n))


def same(a, b):
    return all(x is None and y is None or torch.equal(x, y) for x, y in zip(a, b))


def test_processes_of_a_node_fetch_once(tmp_path):
    write_set(tmp_path / 's', shards=1, each=40)
    script = (
        'import hashlib, sys; from mobileclip_nb.core.copies import fetch_copy; '
        'print(hashlib.sha256(fetch_copy(*sys.argv[1:]).read_bytes()).hexdigest())'
    )
    with serve(folder=tmp_path, share=0.4, seed=3) as server:
        command = [sys.executable, '-c', script, f'{server.url}/s/00/00000000.tar', tmp_path / 'c']
        env = os.environ | dict(PYTHONPATH=str(Path(__file__).parents[1]))
        processes = [
            subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) for _ in range(4)
        ]
        answers = {process.communicate(timeout=120)[0].strip() for process in processes}
    assert answers == {sha256(tmp_path / 's/00/00000000.tar')}
    assert list(server.fetched().values()) == [1]


def test_every_fault_of_a_server_is_survived(tmp_path):
    write_set(tmp_path / 's', shards=1)
    whole = (tmp_path / 's/00/00000000.tar').read_bytes()
    for number, kind in enumerate(('slow', '503', 'cut', 'short')):
        with serve(folder=tmp_path, share=0.6, seed=number, kinds=(kind,)) as server:
            url = f'{server.url}/s/00/00000000.tar'
            assert fetch_copy(url, tmp_path / kind).read_bytes() == whole
            assert exists(f'{server.url}/s/00/manifest.jsonl')
            assert not exists(f'{server.url}/s/00/manifest.json')
            assert read_bytes(f'{server.url}/s/00/manifest.jsonl').count(b'\n') == 1
            assert kind in {request.fault for request in server.requests}


def test_a_file_that_is_not_there_is_asked_for_once(tmp_path):
    with serve(folder=tmp_path) as server:
        with pytest.raises(FileNotFoundError, match='none.tar'):
            fetch_copy(f'{server.url}/none.tar', tmp_path / 'c')
    assert len(server.requests) <= 2  # HEAD, then GET


@pytest.mark.parametrize('workers', (0, 2))
def test_batches_over_http_are_those_of_the_folder(tmp_path, workers):
    place = write_set(tmp_path / 's')
    local = take(Stream(place, SPEC, memory=tmp_path / 'm'), 24)
    with serve(folder=tmp_path, share=0.3, seed=7) as server:
        names = '{00/{00000000,00000002,00000004},01/{00000001,00000003,00000005}}.tar'
        stream = Stream(f'{server.url}/s/{names}', SPEC, workers=workers, memory=tmp_path / 'c')
        remote = take(stream, 24)
    assert source_of(place).counts == (7,) * 6
    assert all(same(a, b) for a, b in zip(local, remote, strict=True))
    assert stream.skips.counts == dict(decode=6)
    assert set(server.fetched().values()) == {1} and len(server.fetched()) == 6
    pages = [r for r in server.requests if r.path.endswith('/')]
    assert not pages  # braces are never listed


def test_without_a_manifest_shards_are_counted_once(tmp_path):
    write_set(tmp_path / 's', manifests=False)
    with serve(folder=tmp_path, share=0.2, seed=1) as server:
        place = f'{server.url}/s/{{00/{{00000000,00000002}},01/00000001}}.tar'
        first = Stream(place, SPEC, memory=tmp_path / 'c')
        assert [n for group in first.shards for *_, n in group] == [7, 7, 7]
        assert set(server.fetched().values()) == {1}
        server.requests.clear()
        again = Stream(place, SPEC, memory=tmp_path / 'c')
        assert again.id == first.id and not server.fetched()


def total_size(files):
    "Bytes of files, some of which may be removed at the same time"
    size = 0
    for file in files:
        with suppress(FileNotFoundError):
            size += file.stat().st_size
    return size


def test_a_small_cache_stays_small(tmp_path, monkeypatch):
    place = write_set(tmp_path / 's')
    local = take(Stream(place, SPEC, memory=tmp_path / 'm'), 24)
    size = max(Path(url).stat().st_size for url in list_shards(place))
    limit = int(1.5 * size)
    monkeypatch.setenv('MOBILECLIP_CACHE_GB', str(limit / 1e9))
    with serve(folder=tmp_path) as server:
        names = '{00/{00000000,00000002,00000004},01/{00000001,00000003,00000005}}.tar'
        stream, held = Stream(f'{server.url}/s/{names}', SPEC, memory=tmp_path / 'c'), []
        for a, b in zip(local, stream.since()):
            assert same(a, b)
            held.append(total_size((tmp_path / 'c/copies').glob('*.copy')))
    assert 0 < max(held) <= limit + 4 * size  # four threads may add one each at the same time
    assert len(list((tmp_path / 'c/copies').glob('*.copy'))) < 6


def test_other_ranks_and_an_empty_cache_continue(tmp_path):
    place = write_set(tmp_path / 's')

    def lane(number, memory, state=None):
        return Stream(place, SPEC, (number, 2), memory=tmp_path / memory, state=state)

    straight = [take(lane(n, f'a{n}'), 16) for n in range(2)]
    ranks = [lane(n, f'b{n}') for n in range(2)]
    assert [same(a, b) for n in range(2) for a, b in zip(straight[n], take(ranks[n], 9))]
    states = json.loads(json.dumps({str(n): ranks[n].state() for n in range(2)}))
    assert sum(len(state['bad']) for state in states.values()) > 3
    for world in (1, 2, 4):
        rows = []
        for rank in range(world):
            cache = f'c{world}{rank}'
            source = Lanes(lambda n: lane(n, f'{cache}{n}'), 2, (rank, world), 8)
            source.restore(dict(lanes=states))
            rows.append([batch.index for batch in take(source, 7, since=9)])
        for step in range(7):
            whole = torch.cat([straight[n][9 + step].index for n in range(2)])
            assert torch.equal(torch.cat([rank[step] for rank in rows]), whole)
    lost = take(lane(0, 'd'), 7, since=9)
    assert not all(same(a, b) for a, b in zip(straight[0][9:], lost))  # the state is needed


@pytest.fixture
def s3(tmp_path, monkeypatch):
    "An S3 server behind a server with faults; the environment leads there"
    pytest.importorskip('s3fs')
    server_of = pytest.importorskip('moto.server').ThreadedMotoServer
    behind = server_of('127.0.0.1', 0, verbose=False)
    behind.start()
    host, port = behind.get_host_and_port()
    for name in ('AWS_ACCESS_KEY_ID', 'AWS_SECRET_ACCESS_KEY'):
        monkeypatch.setenv(name, 'test')
    monkeypatch.setenv('AWS_DEFAULT_REGION', 'us-east-1')
    with serve(upstream=f'http://{host}:{port}', seed=5) as server:
        monkeypatch.setenv('AWS_ENDPOINT_URL', server.url)
        import s3fs

        s3fs.S3FileSystem.clear_instance_cache()
        files = s3fs.S3FileSystem()
        files.mkdir('bucket')
        write_set(tmp_path / 's')
        files.put(str(tmp_path / 's'), 'bucket/s', recursive=True)
        files.invalidate_cache()
        server.requests.clear()
        server.share = 0.2
        yield server
        s3fs.S3FileSystem.clear_instance_cache()
    behind.stop()


def test_batches_from_s3_are_those_of_the_folder(tmp_path, s3):
    place = str(tmp_path / 's')
    local = take(Stream(place, SPEC, memory=tmp_path / 'm'), 24)
    source = source_of('s3://bucket/s')
    assert source.counts == (7,) * 6  # of the manifests in the subfolders
    asked = [r for r in s3.requests if 'list-type=2' in r.query and r.fault in ('', 'slow')]
    whole = [r for r in asked if 'prefix=s%2F&' in f'{r.query}&' or 'prefix=s/&' in f'{r.query}&']
    assert len(whole) == 1, asked
    remote = take(Stream(source, SPEC, memory=tmp_path / 'c'), 24)
    assert all(same(a, b) for a, b in zip(local, remote, strict=True))
    assert set(s3.fetched().values()) == {1} and len(s3.fetched()) == 6


def start(out, place, cache, steps, world, port):
    "The ranks of a run"
    env = os.environ | dict(
        WORLD_SIZE=str(world),
        MASTER_ADDR='127.0.0.1',
        MASTER_PORT=str(port),
        MOBILECLIP_CACHE=str(cache),
        OMP_NUM_THREADS='1',
        PYTHONPATH=os.pathsep.join(
            [str(Path(__file__).parents[1]), os.environ.get('PYTHONPATH', '')]
        ),
    )
    command = [sys.executable, str(Path(__file__).with_name('remote_run.py')), out, place, steps]
    command = [str(word) for word in command]
    ranks = [env | dict(RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(world)]
    log = open(Path(out).parent / f'{Path(out).name}.log', 'a')
    return [subprocess.Popen(command, env=e, stdout=log, stderr=log) for e in ranks]


def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def finish(processes):
    assert [process.wait(timeout=300) for process in processes] == [0] * len(processes)


def kill_after(processes, notes, lines):
    "Kill all ranks as soon as so many batches were made; whether they were still at work"
    while all(p.poll() is None for p in processes):
        if notes.exists() and notes.read_bytes().count(b'\n') >= lines:
            break
        time.sleep(0.02)
    alive = all(p.poll() is None for p in processes)
    for process in processes:
        process.send_signal(signal.SIGKILL)
        process.wait()
    return alive


def noted(out):
    "The batches of a run: (lane, step) to all that was made for it"
    found = {}
    for line in (out.parent / f'{out.name}-batches.jsonl').read_text().splitlines():
        lane, step, *batch = json.loads(line)
        found.setdefault((lane, step), []).append(batch)
    return found


def losses(out):
    return [json.loads(line)['loss'] for line in (out / 'log.jsonl').read_text().splitlines()]


def test_kills_of_two_ranks_on_an_empty_cache(tmp_path):
    write_set(tmp_path / 's')
    steps, rng = 6 + 4 * KILLS, random.Random(11)
    with serve(folder=tmp_path, share=0.15, seed=2, delay=0.3) as server:
        names = '{00/{00000000,00000002,00000004},01/{00000001,00000003,00000005}}.tar'
        place, straight, killed = f'{server.url}/s/{names}', tmp_path / 'a', tmp_path / 'b'
        finish(start(straight, place, tmp_path / 'c0', steps, 2, free_port()))
        expected, notes = noted(straight), tmp_path / 'b-batches.jsonl'
        for kill in range(KILLS):
            cache = tmp_path / f'c{kill + 1}'
            before = notes.read_bytes().count(b'\n') if notes.exists() else 0
            ranks = start(killed, place, cache, steps, 2, free_port())
            assert kill_after(ranks, notes, before + rng.randrange(0, 9))
            shutil.rmtree(cache, ignore_errors=True)
        shutil.copytree(killed, tmp_path / 'one')
        finish(start(killed, place, tmp_path / 'cx', steps, 2, free_port()))
        finish(start(tmp_path / 'one', place, tmp_path / 'cy', steps, 1, free_port()))
    for run, world in ((killed, 2), (tmp_path / 'one', 1)):
        batches = noted(run)
        ends = [(lane, steps - 1) for lane in range(2)]
        assert set(ends) <= set(batches), f'{world} ranks'
        for where, made in batches.items():
            if where in expected:
                assert all(batch == expected[where][0] for batch in made), (world, where)
    assert losses(killed) == losses(straight)
    assert len(losses(tmp_path / 'one')) == steps
