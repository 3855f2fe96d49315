"Every notebook runs: a copy of it, each one pytest item with its own time limit."

import os, re
from pathlib import Path

import design, nbformat, pytest
from nbclient import NotebookClient

SKIP = {'slow', 'gpu', 'net'}
LIMIT = {
    'demo': 600,
    'tutorials': 480,
}  # seconds; a notebook of the library has 480 on a busy machine (60 is the aim)
EVERY = design.notebooks()


def runnable(path):
    "The notebook without the cells that are flagged slow, gpu or net"
    nb = nbformat.read(path, 4)
    nb.cells = [
        c
        for c in nb.cells
        if c.cell_type == 'code' and not SKIP & set(design.DIRECTIVE.findall(c.source))
    ]
    return nb


def limit(path):
    return next((s for part, s in LIMIT.items() if part in str(path.relative_to(design.NBS))), 480)


@pytest.mark.parametrize(
    'nb',
    [pytest.param(n, marks=pytest.mark.timeout(limit(n.path) + 30)) for n in EVERY],
    ids=[str(n.path.relative_to(design.NBS).with_suffix('')) for n in EVERY],
)
def test_runs(nb, monkeypatch, tmp_path):
    for k, v in dict(
        IN_TEST='1', SCALE='smoke', OMP_NUM_THREADS='1', MOBILECLIP_RUNS=str(tmp_path)
    ).items():
        monkeypatch.setenv(k, v)
    copy = runnable(nb.path)
    NotebookClient(
        copy,
        timeout=limit(nb.path),
        kernel_name='python3',
        resources=dict(metadata=dict(path=str(nb.path.parent))),
    ).execute()
    assert any(c.get('execution_count') for c in copy.cells), 'nothing ran'
