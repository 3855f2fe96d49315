"The table of samples and its browser under conditions that a notebook cannot make: kills, stores, 10,000 samples"

import functools, http.server, os, shutil, signal, socket, subprocess, sys, threading, time
from importlib.util import find_spec
from pathlib import Path

import fsspec, pytest

from mobileclip_nb.core.files import list_shards, read_bytes
from mobileclip_nb.shards.io import read_shard
from mobileclip_nb.shards.sample import differing_fields
from mobileclip_nb.shards.sample_table import (
    SampleTable,
    build_sample_table,
    locate_sample_table,
    select_rows,
)
from mobileclip_nb.widgets import sample_browser
from mobileclip_nb.widgets.sample_browser import browse_samples, open_sample_set, render_browsed
from sample_sets import make_sample, write_set

BUILD = """
import sys
from mobileclip_nb.shards.sample_table import build_sample_table
build_sample_table(sys.argv[1], sys.argv[2], workers=int(sys.argv[3]), progress=False)
"""


def bare_sample(i):
    "Metadata without image and embeddings, few bytes"
    return make_sample(i % 60, 2, 2).bare().but(key=f'{i:08d}', uid=f'{i:08d}', image=None)


needs_http = pytest.mark.skipif(
    not find_spec('aiohttp') and os.environ.get('CI') != 'true', reason='needs aiohttp (apps)'
)


@pytest.fixture(scope='module', autouse=True)
def cache(tmp_path_factory):
    old = os.environ.get('MOBILECLIP_CACHE')
    os.environ['MOBILECLIP_CACHE'] = str(tmp_path_factory.mktemp('cache'))
    yield
    os.environ.pop('MOBILECLIP_CACHE')
    if old is not None:
        os.environ['MOBILECLIP_CACHE'] = old


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    "60 samples in 6 shards"
    at = tmp_path_factory.mktemp('set')
    write_set(at, 60, 10)
    return at


def columns(folder):
    "All files of a table but its own description"
    return {p.name: p.read_bytes() for p in Path(folder).glob('*.bin')}


def test_ten_thousand(tmp_path):
    "Opening reads no shard; lookups and lists agree with what was written"
    write_set(tmp_path / 'set', 10_000, 1000, bare_sample)
    report = build_sample_table(tmp_path / 'set', progress=False)
    assert (report.samples, report.shards, report.faults) == (10_000, 10, 0)
    for shard in list_shards(tmp_path / 'set'):
        os.rename(shard, f'{shard}.away')
    shown = open_sample_set(tmp_path / 'set')
    assert shown.table.find('00007777') == 7777
    assert len(select_rows(shown.table, 'fox')) == len(
        [i for i in range(10_000) if i % 60 % 6 == 0]
    )
    panel = browse_samples(tmp_path / 'set')
    assert 'Nothing at' in panel.parts['message'].value
    for shard in list(Path(tmp_path / 'set').glob('*.away')):
        os.rename(shard, str(shard).removesuffix('.away'))
    panel.parts['key'].value = '00004321'
    assert 'has no image to replay on' in panel.parts['message'].value
    assert 'none are stored' in panel.parts['words'].value


@pytest.mark.parametrize('workers', (1, 2))
def test_killed_and_resumed(place, tmp_path, workers):
    "A build that was killed goes on, and the table is the one of a build that was not"
    whole = build_sample_table(place, tmp_path / 'whole', progress=False)
    out, parts = tmp_path / 'table', tmp_path / 'table.parts'
    child = subprocess.Popen(
        [sys.executable, '-c', BUILD, str(place), str(out), str(workers)], start_new_session=True
    )
    until = time.time() + 120
    while len(list(parts.glob('0*.npz'))) < 2 and child.poll() is None and time.time() < until:
        time.sleep(0.002)
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    made = len(list(parts.glob('0*.npz')))
    assert not out.exists() or made == 0
    report = build_sample_table(place, out, progress=False)
    assert report.resumed >= min(made, 6)
    assert columns(out) == columns(whole.table)
    assert not parts.exists()


def test_every_sample_by_a_seek(place):
    table = SampleTable(build_sample_table(place, progress=False).table)
    scanned = [s for shard in list_shards(place) for s in read_shard(shard)]
    for i, sample in enumerate(scanned):
        assert table.find(sample.key) == i
        assert differing_fields(table.read(i), sample) == []


def test_changed_shard_is_indexed_again(tmp_path):
    write_set(tmp_path / 'set', 6, 3)
    build_sample_table(tmp_path / 'set', tmp_path / 'table', progress=False)
    write_set(tmp_path / 'set', 9, 3)
    report = build_sample_table(tmp_path / 'set', tmp_path / 'table', progress=False)
    assert (report.samples, report.shards) == (9, 3)


def test_read_only_set(tmp_path):
    "Nothing is written beside the shards"
    write_set(tmp_path / 'set', 6, 3)
    before = sorted(p.name for p in (tmp_path / 'set').iterdir())
    assert open_sample_set(tmp_path / 'set').table.find('00000004') == 4
    assert sorted(p.name for p in (tmp_path / 'set').iterdir()) == before


def test_store(place):
    "A store that is no disk: the table is built, and one sample is a range of bytes"
    write = fsspec.filesystem('memory').pipe_file
    for file in place.iterdir():
        if file.is_file():
            write(f'/table-set/{file.name}', read_bytes(file))
    url = 'memory://table-set'
    table = SampleTable(build_sample_table(url, progress=False).table, url)
    local = next(s for s in read_shard(place / '00003.tar') if s.key == '00000035')
    assert differing_fields(table.read(table.find('00000035')), local) == []
    panel = browse_samples(url)
    panel.parts['view'].value = 'thumbnails'
    assert panel.shown == render_browsed(open_sample_set(url), 1, 'thumbnails')


def test_secrets_are_not_stored(place, tmp_path):
    "Names of shards in a table are without users and queries"
    where = locate_sample_table('s3://user:secret@bucket/set')
    assert 'secret' not in str(where)


@needs_http
def test_secrets_are_not_in_the_files_of_a_table(served):
    "A password is needed to read shards, and is not written down"
    url = served[0].replace('http://', 'http://user:secret@') + '/00000.tar'
    report = build_sample_table(url, progress=False)
    files = [path for path in Path(report.table).rglob('*') if path.is_file()]
    assert report.samples == 10
    assert len(files) > 5
    assert [path.name for path in files if b'secret' in path.read_bytes()] == []
    assert 'secret' not in str(report)


def test_corrupt_shards(place, tmp_path):
    "A cut tar, a file that is no tar, and a missing one are rows with a reason"
    shutil.copytree(place, tmp_path / 'set')
    whole = (tmp_path / 'set' / '00001.tar').read_bytes()
    (tmp_path / 'set' / '00001.tar').write_bytes(whole[: len(whole) // 2])
    (tmp_path / 'set' / '00002.tar').write_text('nothing')
    (tmp_path / 'set' / '00003.tar').unlink()
    some = f'{tmp_path}/set/{{00000..00005}}.tar'
    report = build_sample_table(some, progress=False)
    assert not report.ok and 'unreadable shard' in str(report)
    table = SampleTable(report.table, some)
    faulty = select_rows(table, where='fault = 1')
    reasons = [table.fault(int(i)).partition(':')[0] for i in faulty]
    assert sorted(reasons) == ['truncated', 'truncated', 'unreadable shard']
    panel = browse_samples(some)
    for position in range(1, len(faulty) + 1):
        panel.parts['where'].value = 'fault = 1'
        panel.parts['position'].value = position
        assert 'cannot be read' in panel.parts['message'].value
    panel.parts['view'].value = 'thumbnails'
    assert panel.shown
    shutil.copy(place / '00003.tar', tmp_path / 'set')
    again = build_sample_table(some, progress=False)
    assert again.ok and again.samples == report.samples - 1 + 10


@pytest.mark.parametrize('wrong, reason', (('missing', 'missing'), ('file.txt', 'file.txt')))
def test_not_shards(tmp_path, wrong, reason):
    "A message in the panel"
    (tmp_path / 'file.txt').write_text('not shards')
    panel = browse_samples(tmp_path / wrong)
    assert panel.shown == b''
    assert reason in panel.parts['message'].value


def test_long_path():
    "Its message is cut"
    panel = browse_samples('x' * 10_000)
    assert 'role="alert"' in panel.parts['message'].value
    assert len(panel.parts['message'].value) < 1500


class RangeHandler(http.server.SimpleHTTPRequestHandler):
    "Files of a folder, whole or a range of bytes; keeps what was asked for"

    def do_GET(self):
        path, asked = Path(self.translate_path(self.path)), self.headers.get('Range')
        if not path.is_file():
            return self.send_error(404)
        data, status = path.read_bytes(), 200
        size, start = len(data), 0
        if asked:
            start, _, end = asked.removeprefix('bytes=').partition('-')
            start, status = int(start), 206
            data = data[start : int(end) + 1 if end else None]
            self.server.ranges.append((path.name, len(data)))
        self.send_response(status)
        self.send_header('Accept-Ranges', 'bytes')
        self.send_header('Content-Length', str(len(data)))
        self.send_header('Content-Range', f'bytes {start}-{start + len(data) - 1}/{size}')
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *words):
        pass


@pytest.fixture
def served(place):
    "The set behind HTTP: an address, and the ranges that were asked for"
    how = functools.partial(RangeHandler, directory=str(place))
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), how) as server:
        server.ranges = []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f'http://127.0.0.1:{server.server_port}', server.ranges
        server.shutdown()


@needs_http
def test_shards_behind_http(served, place):
    "The same picture as of the local set; another sample is read as one range"
    url, ranges = served
    panel, local = browse_samples(f'{url}/00000.tar'), browse_samples(place / '00000.tar')
    assert panel.shown, panel.parts['message'].value
    assert panel.shown == local.shown
    ranges.clear()
    for shown in (panel, local):
        shown.parts['key'].value = '00000007'
    assert panel.shown == local.shown
    size = (place / '00000.tar').stat().st_size
    assert 0 < sum(length for _, length in ranges) < size / 2


@needs_http
def test_nothing_behind_an_address(served):
    "No server, and no such file: the message names the address"
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        dead = f'http://127.0.0.1:{free.getsockname()[1]}/0.tar'
    for url in (dead, f'{served[0]}/missing.tar'):
        panel = browse_samples(url)
        said = panel.parts['message'].value
        assert panel.shown == b''
        assert url in said
        assert 'not installed' not in said


@needs_http
def test_a_server_that_does_not_answer(monkeypatch):
    "It is waited for, but not for ever"
    monkeypatch.setattr(sample_browser, '_PATIENCE', 1)
    with socket.create_server(('127.0.0.1', 0)) as silent:
        url = f'http://127.0.0.1:{silent.getsockname()[1]}/{{0..3}}.tar'
        panel = browse_samples(url)
        said = panel.parts['message'].value
    assert panel.shown == b''
    assert 'No answer from' in said
    assert 'within 1 s' in said


def test_unusual_samples(tmp_path):
    "One pixel, 10,000 letters, no views: a picture, in both themes"
    import io

    from PIL import Image

    out = io.BytesIO()
    Image.new('RGB', (1, 1), 'red').save(out, format='PNG')
    tiny = make_sample(0).bare().but(key='tiny', uid='tiny', image=out.getvalue(), ext='png')
    long = make_sample(1).but(key='long', uid='long', captions=('word ' * 2000,))
    many = make_sample(2).bare()
    many = many.but(key='many', uid='many', synthetic=dict(syn_text=('one',) * 100))
    samples = [tiny, long, many]
    write_set(tmp_path / 'set', 3, 3, samples.__getitem__)
    panel = browse_samples(tmp_path / 'set')
    for key in ('tiny', 'long', 'many'):
        panel.parts['key'].value = key
        for dark in (True, False):
            panel.parts['dark'].value = dark
            assert panel.shown, panel.parts['message'].value
    panel.parts['search'].value = 'word ' * 3000
    assert panel.parts['position'].max == 1
