"A rank of a run on remote shards, started by `test_remote.py`: `remote_run.py OUT PLACE STEPS`"

import json, os, sys, zlib
from pathlib import Path

from mobileclip_nb.loaders import stream
from mobileclip_nb.train.process_group import group
from mobileclip_nb.train.recipe import recipe
from mobileclip_nb.train.run import run

out, place, steps = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
rank, world = int(os.environ['RANK']), int(os.environ['WORLD_SIZE'])
inner = stream.Stream.raw_since


def raw_since(self, step=0):
    "Raw batches, each noted with lane, step, samples and a checksum of the pixels"
    with open(out.parent / f'{out.name}-batches.jsonl', 'a', buffering=1) as notes:
        for k, raw in enumerate(inner(self, step), step):
            batch = raw.batch
            pixels = zlib.crc32(batch.image.numpy().tobytes())
            line = [self.ranks[0], k, batch.index.tolist(), pixels, batch.text.sum().item()]
            notes.write(json.dumps(line) + '\n')
            yield raw


stream.Stream.raw_since = raw_since
r = recipe('nano-emoji').at('smoke')
r = r.but(
    train=r.train.but(steps=steps, warmup=1, parallel='ddp'),
    stream=r.stream.but(batch=8),
    reader=r.reader.but(views='fresh', rows=False, synthetic='', window=12),
)
with group() as ranks:
    settings = dict(resume=True, progress=False, save_every=2, watch=(), statistics=False)
    run(r, place, out, ranks, workers=int(os.environ.get('READERS', 0)), **settings)
