"""Run notebooks in place and store what they print: `python tests/store.py [NOTEBOOK ...]`, by default all of them.

SCALE says how large (smoke, nano, full). A notebook that fails keeps its old outputs; the rest go on, and the exit status tells."""

import os, subprocess, sys, time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError

ROOT = Path(__file__).resolve().parents[1]
WIDGET = 'application/vnd.jupyter.widget-view+json'
PROGRESS = (
    '<pre style="white-space:pre;overflow-x:auto;line-height:normal;font-family:Menlo'  # of rich
)


def is_progress(output):
    "Whether a package drew it while it worked"
    return output.get('data', {}).get('text/html', '').startswith(PROGRESS)


def tidy(nb):
    "Drop what changes without meaning: counts, progress bars, kernel metadata"
    for c in nb.cells:
        c.metadata = {}
        if c.cell_type != 'code':
            continue
        c.execution_count = None
        c.outputs = [o for o in c.outputs if o.get('name') != 'stderr' and not is_progress(o)]
        for o in c.outputs:  # the state of a widget is not stored, so it would not be found
            data = o.get('data', {})
            if WIDGET in data or 'mobileclip-static' in data.get('text/html', ''):
                o['data'] = {k: v for k, v in data.items() if k == 'image/png'}
        c.outputs = [o for o in c.outputs if o.get('data', True)]
        for o in c.outputs:
            if 'metadata' in o:
                o['metadata'] = {}
            if o.output_type == 'execute_result':
                o.execution_count = None
    nb.metadata = dict(kernelspec=dict(display_name='python3', language='python', name='python3'))


def store(path):
    nb = nbformat.read(path, 4)
    NotebookClient(
        nb,
        timeout=3600,
        iopub_timeout=60,  # by default outputs that come later than 4 s are dropped without a word
        raise_on_iopub_timeout=True,
        kernel_name='python3',
        resources=dict(metadata=dict(path=str(path.parent))),
    ).execute()
    tidy(nb)
    part = path.with_suffix('.part')
    part.write_text(nbformat.writes(nb) + '\n', encoding='utf-8')
    part.replace(path)


def main(paths):
    failed = []
    for path in paths:
        start = time.time()
        try:
            store(path)
        except (CellExecutionError, CellTimeoutError) as e:
            failed.append(path)
            print(f'{path.name} failed:\n{e}', file=sys.stderr)
        else:
            print(f'{path.relative_to(ROOT)}  {time.time() - start:.0f} s', flush=True)
    subprocess.run(
        [sys.executable, '-c', 'from nbdev.clean import nbdev_clean; nbdev_clean()'],
        cwd=ROOT,
        check=True,
    )
    return 1 if failed else 0


if __name__ == '__main__':
    os.environ.setdefault('SCALE', 'nano')
    os.environ.setdefault('NODE_PATH', str(ROOT / 'tests' / 'export' / 'js' / 'node_modules'))
    named = [Path(a).resolve() for a in sys.argv[1:]]
    sys.exit(
        main(
            named
            or [
                p
                for p in sorted((ROOT / 'nbs').rglob('*.ipynb'))
                if '.ipynb_checkpoints' not in p.parts
            ]
        )
    )
