"""Milliseconds from a control to the new picture, on a set of 10,000 samples: `python tests/bench_widgets.py [SAMPLES]`.

Prints times and decides nothing; the aim is 300 ms. On a machine that does other work only the processor's time
says something."""

import os, statistics, sys, tempfile, time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from mobileclip_nb.shards.sample_table import build_sample_table, SampleTable
from mobileclip_nb.widgets.sample_browser import browse_samples
from sample_sets import make_sample, write_set

MOVES = dict(
    position=[100 * k + 7 for k in range(1, 9)],
    teacher=['each', 'one', 'two', 'average'],
    first=[1, 2, 3],
    dark=[True, False],
    key=[f'{k:08d}' for k in (5, 77, 9, 50)],
    sort=['true_mean', 'diversity', 'disagreement'],
    where=['true_mean < 0', 'true_mean > 0', ''],
    search=['octopus', 'picture caption', ''],
    view=['thumbnails', 'sample', 'thumbnails'],
)


def main(n=10_000):
    with tempfile.TemporaryDirectory() as folder:
        os.environ['MOBILECLIP_CACHE'] = f'{folder}/cache'
        start = time.perf_counter()
        write_set(f'{folder}/set', n, 500, lambda i: make_sample(i))
        print(f'{n:,} samples written in {time.perf_counter() - start:.1f} s')
        start = time.perf_counter()
        report = build_sample_table(f'{folder}/set', progress=False)
        print(f'table built in {time.perf_counter() - start:.1f} s: {str(report).split(": ")[0]}')
        start = time.perf_counter()
        panel = browse_samples(f'{folder}/set')
        print(f'opened, with the first picture, in {1000 * (time.perf_counter() - start):.0f} ms')
        for control, values in MOVES.items():
            times, work = [], []
            for value in values:
                start, cpu = time.perf_counter(), time.process_time()
                panel.parts[control].value = value
                times.append(1000 * (time.perf_counter() - start))
                work.append(1000 * (time.process_time() - cpu))
                assert panel.shown, panel.parts['message'].value
            clock, cpu = statistics.median(times), statistics.median(work)
            print(f'{control:10} median {clock:5.0f} ms, of which processor {cpu:5.0f} ms')
        table = SampleTable(report.table)
        start = time.perf_counter()
        table.find(f'{n - 1:08d}')
        print(f'key found in {1000 * (time.perf_counter() - start):.2f} ms')


if __name__ == '__main__':
    main(*map(int, sys.argv[1:]))
