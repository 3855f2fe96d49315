"""Links between notebooks: `python tests/links.py` turns every mention such as `train/24_loop` in prose into a relative link.

Titles, summaries (they become docstrings) and code blocks stay as they are. Outputs are kept; a second run changes nothing."""

import json, os, re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NBS = ROOT / 'nbs'
MENTION = re.compile(r'(?<!\[)`((?:[a-z_]+/)?\d\d_\w+|demo|design)`(?!\])')
LINK = re.compile(r'\[[^\]]*\]\(([^)\s]+)\)')


def notebooks():
    "Paths of all notebooks"
    return sorted(p for p in NBS.rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)


def prose_lines(text):
    "Lines of Markdown, each with whether a mention in it may become a link"
    fenced = False
    for line in text.split('\n'):
        fence = line.lstrip().startswith('```')
        fenced ^= fence
        yield line, not (fence or fenced or line.startswith(('#', '> ')))


def add_links(text, folder):
    "Link the notebooks that a Markdown cell names, seen from a folder"

    def link(match):
        target = NBS / f'{match[1]}.ipynb'
        if '/' not in match[1] or not target.is_file():
            return match[0]
        return f'[{match[0]}]({Path(os.path.relpath(target, folder)).as_posix()})'

    lines = prose_lines(text)
    return '\n'.join(MENTION.sub(link, line) if free else line for line, free in lines)


def missing_links(path):
    "Mentions of a notebook that are no links"
    cells = json.loads(path.read_text(encoding='utf-8'))['cells']
    texts = [''.join(c['source']) for c in cells if c['cell_type'] == 'markdown']
    return [t for t in texts if add_links(t, path.parent) != t]


def broken_links(path):
    "Relative links of a notebook that lead to no file"
    cells = json.loads(path.read_text(encoding='utf-8'))['cells']
    texts = [''.join(c['source']) for c in cells if c['cell_type'] == 'markdown']
    lines = [line for text in texts for line, _ in prose_lines(text)]
    found = [t for line in lines for t in LINK.findall(line) if not re.match(r'\w+:|#', t)]
    return [t for t in found if not (path.parent / t.split('#')[0]).exists()]


def main():
    "Write the links"
    for path in notebooks():
        raw = json.loads(path.read_text(encoding='utf-8'))
        changed = False
        for cell in raw['cells']:
            if cell['cell_type'] != 'markdown':
                continue
            old = ''.join(cell['source'])
            new = add_links(old, path.parent)
            if new != old:
                cell['source'], changed = new.splitlines(keepends=True), True
        if changed:
            text = json.dumps(raw, indent=1, ensure_ascii=False, sort_keys=True)
            path.write_text(text + '\n', encoding='utf-8')


if __name__ == '__main__':
    main()
