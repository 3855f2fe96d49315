"Write README.md from nbs/index.ipynb: `python tests/readme.py [DEST]`. Hidden cells are left out; outputs are kept as they ran."

import re, sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parents[1]
NOTE = '<!-- Made from nbs/index.ipynb by `make prepare`; edit that. -->\n\n'


def readme():
    nb = nbformat.read(ROOT / 'nbs' / 'index.ipynb', 4)
    nb.cells = [c for c in nb.cells if not re.search(r'^#\|\s*hide', c.source, re.M)]
    for c in nb.cells:
        if c.cell_type == 'code':
            c.source = '' if '#| echo: false' in c.source else re.sub(r'^#\|.*\n', '', c.source)
    nb.metadata.language_info = dict(name='python')
    text, _ = MarkdownExporter(
        exclude_output_prompt=True, exclude_input_prompt=True
    ).from_notebook_node(nb)
    text = re.sub(
        r'\]\((?!https?:|#|mailto:)(?!nbs/)([^)]+)\)', r'](nbs/\1)', text
    )  # links of the notebook, seen from the top
    text = re.sub(r'```python\s*```\n', '', text)  # cells whose source is not shown
    return NOTE + re.sub(r'\n{3,}', '\n\n', text).strip() + '\n'


if __name__ == '__main__':
    Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / 'README.md').write_text(
        readme(), encoding='utf-8'
    )
