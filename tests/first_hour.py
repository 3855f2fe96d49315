"""The first hour as a new user would have it, timed: `make first-hour`.

The commands of the README, each in a process of its own, in an empty folder. Writes `results/first_hour.json`.
"""

import json, subprocess, sys, tempfile, time
from pathlib import Path

from mobileclip_nb.core.files import atomic_write
from mobileclip_nb.core.ledger import code_version, host

ROOT = Path(__file__).resolve().parents[1]
PICTURES = """
from PIL import Image
from mobileclip_nb.datasets.emoji import draw_emoji, write_folder
Image.fromarray(draw_emoji('🚞', side=128)).save('picture.png')
write_folder('pictures', limit=256)
"""
MOBILECLIP = [sys.executable, '-m', 'mobileclip_nb']
LABEL = [['predict', 'picture.png', '--labels', 'train,heart,umbrella']]
SAMPLE = [
    ['shards', 'build', 'pictures', 'plain'],
    ['reinforce', 'plain', 'rich'],
    ['shards', 'show', 'rich', '7', '--png', 'sample.png'],
]
SEARCH = [
    ['index', 'pictures', '--out', 'pictures.index'],
    ['search', 'pictures.index', 'a red heart', '--top', '5', '--sheet', 'found.html'],
]
TASKS = dict(label=LABEL, sample=SAMPLE, search=SEARCH)
AIMS = dict(label=3, sample=120, search=180)  # seconds


def run(folder, commands):
    "Seconds of commands, one after the other"
    started = time.perf_counter()
    for command in commands:
        subprocess.run(MOBILECLIP + command, cwd=folder, check=True, capture_output=True)
    return round(time.perf_counter() - started, 2)


def main():
    found = dict(host=host(), code=code_version(), aims=AIMS, seconds={})
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, '-c', PICTURES], cwd=folder, check=True)
        for name, commands in TASKS.items():
            found['seconds'][name] = run(folder, commands)
            print(f'{name:8}{found["seconds"][name]:8.1f} s  (aim: at most {AIMS[name]} s)')
        assert (Path(folder) / 'sample.png').is_file()
        assert (Path(folder) / 'found.html').is_file()
    with atomic_write(ROOT / 'results' / 'first_hour.json') as path:
        path.write_text(json.dumps(found, indent=1) + '\n')


if __name__ == '__main__':
    main()
