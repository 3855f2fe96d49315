"""Build the site: `python docs/make_site.py [--out FOLDER] [--only NOTEBOOK ...]`.

Stored outputs are shown; nothing is run and nothing is downloaded.
"""

import argparse, re, shutil, subprocess, sys, time
from pathlib import Path

import crawl
import slides
import stage
from library import ROOT, SETTINGS

DOCS = Path(__file__).resolve().parent
MOST_SECONDS, MOST_MB = 600, 80
PLAIN = re.compile(r'<span class="[npw]">([^<]*)</span>')
MARK = '.nojekyll'  # GitHub Pages serves folders that begin with an underscore only with it
WORK = ROOT / 'build' / 'docs'


def parse(args):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--out', type=Path, default=ROOT / SETTINGS['doc_path'])
    parser.add_argument('--work', type=Path, default=WORK, help='sources and caches')
    parser.add_argument('--only', nargs='+', help='notebooks, such as blocks/04_repmixer')
    return parser.parse_args(args)


def run_sphinx(source, out, work):
    "Sphinx, every warning an error, in one process: of several, a failed one is lost silently"
    command = [sys.executable, '-m', 'sphinx', '-b', 'html', '-c', str(DOCS), '-d', str(work)]
    command += ['-q', '-W', '--keep-going', str(source), str(out)]
    return subprocess.run(command).returncode


def megabytes(folder):
    return sum(f.stat().st_size for f in folder.rglob('*') if f.is_file()) / 1e6


def slim(out):
    "Signs of code that no style colors, names and blanks, need no element of their own"
    for page in out.rglob('*.html'):
        text = page.read_text(encoding='utf-8')
        page.write_text(PLAIN.sub(r'\1', text), encoding='utf-8')


def drop_unused(out):
    "Files that no page of a published site needs"
    for path in [*out.rglob('*.map'), out / '.buildinfo', out / '_static' / 'webpack-macros.html']:
        path.unlink(missing_ok=True)
    shutil.rmtree(out / '_sources', ignore_errors=True)


def is_ours(out):
    "Whether a folder may be replaced: it is not there, is empty, or holds a site"
    return not out.exists() or not any(out.iterdir()) or (out / MARK).is_file()


def build(out, work, only=None):
    "Write the site to a folder; what is wrong with it"
    if not is_ours(out):
        return [f'{out} holds other files than a site; name an empty folder']
    shutil.rmtree(out, ignore_errors=True)
    for folder in ('doctrees', 'html'):
        shutil.rmtree(work / folder, ignore_errors=True)
    site = stage.stage(work / 'source', only)
    # myst-nb writes figures beside the folder of the pages, so these are made apart and moved
    if run_sphinx(work / 'source', work / 'html', work / 'doctrees'):
        return ['Sphinx reports warnings or errors']
    out.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(work / 'html', out)
    (out / MARK).touch()
    drop_unused(out)
    slim(out)
    slides.write_slides(out, [n for n in site.notebooks if n.startswith('tutorials/')])
    pages, links, found = crawl.crawl(out)
    print(f'{pages} pages, {links} links inside, {len(found)} faults')
    return found


def main(args=None):
    asked = parse(args)
    start = time.monotonic()
    found = build(asked.out, asked.work, asked.only)
    seconds, size = time.monotonic() - start, megabytes(asked.out)
    limits = f'at most {MOST_SECONDS} s and {MOST_MB} MB'
    print(f'{asked.out}: {seconds:.0f} s, {size:.1f} MB ({limits})')
    found += [f'{seconds:.0f} s are too many'] if seconds > MOST_SECONDS else []
    found += [f'{size:.1f} MB are too many'] if size > MOST_MB else []
    print('\n'.join(found))
    return 1 if found else 0


if __name__ == '__main__':
    sys.exit(main())
