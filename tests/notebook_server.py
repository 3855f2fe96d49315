"""Runs notebooks in forked processes: each starts with the large packages already imported.

Reads one JSON line a notebook (path, folder, env) from standard input; answers its process id, then its exit status.
The folded answers of a tutorial run after its last cell.
A kernel for each of 120 notebooks imports torch, torchvision, timm and open_clip 120 times, which takes longer than most of them run.
"""

import json, os, re, signal, sys, traceback
from pathlib import Path

import design

SKIP = {'slow', 'gpu', 'net'}
FOLDED = re.compile(r'<details>.*?</details>', re.S)
PROGRAM = re.compile(r'^```python\n(.*?)^```', re.M | re.S)
PRELOADED = 'torch', 'torchvision', 'timm', 'open_clip', 'matplotlib.pyplot', 'IPython', 'nbformat'


def code_cells(path):
    "The sources of the code cells that are not flagged slow, gpu or net"
    cells = json.loads(Path(path).read_text(encoding='utf-8'))['cells']
    sources = [''.join(c['source']) for c in cells if c['cell_type'] == 'code']
    return [s for s in sources if not SKIP & set(design.DIRECTIVE.findall(s))]


def answers(path):
    "The programs in the folded answers of a tutorial, in the order of its exercises"
    cells = json.loads(Path(path).read_text(encoding='utf-8'))['cells']
    text = '\n'.join(''.join(c['source']) for c in cells if c['cell_type'] == 'markdown')
    return [s for folded in FOLDED.findall(text) for s in PROGRAM.findall(folded)]


def run_sources(path, shell, sources):
    "Run programs in a shell; raises what one raises, with its source"
    for source in sources:
        shell.run(source)
        if shell.exc:
            trace = ''.join(traceback.format_exception(shell.exc))
            raise RuntimeError(f'{path}\n\n{source}\n\n{trace}')


def run(path):
    "Run the cells of a notebook in this process, and the answers of a tutorial after them"
    from execnb.shell import CaptureShell

    is_tutorial = Path(path).parent.name == 'tutorials'
    sources = code_cells(path) + (answers(path) if is_tutorial else [])
    run_sources(path, CaptureShell(mpl_format='png'), sources)


def child(path, folder, env, log):
    "In a new process: run one notebook, what it prints goes into a file"
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.update(env)
    os.chdir(folder)
    sys.path.insert(0, '')
    status = 0
    try:
        run(path)
    except BaseException as e:
        print(e, file=sys.stderr)
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def serve():
    for module in PRELOADED:
        __import__(module)
    for line in sys.stdin:
        asked = json.loads(line)
        pid = os.fork()
        if not pid:
            child(**asked)
        print(pid, flush=True)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == '__main__':
    serve()
