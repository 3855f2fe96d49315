"Everything about the package stands in settings.ini; this file only hands it on."

from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

here = Path(__file__).parent
ini = ConfigParser(delimiters=['='])
ini.read(here / 'settings.ini', encoding='utf-8')
cfg = ini['DEFAULT']
extras = {
    k.removesuffix('_requirements'): v.split()
    for k, v in cfg.items()
    if k.endswith('_requirements')
}
extras['all'] = sorted({r for k, rs in extras.items() if k != 'dev' for r in rs})


class WithDemo(build_py):
    "A built package carries the demo notebook; a clone has it in nbs/ already"

    def run(self):
        super().run()
        if not self.editable_mode:
            self.copy_file(
                str(here / 'nbs' / 'demo.ipynb'),
                str(Path(self.build_lib) / cfg['lib_path'] / 'data' / 'demo.ipynb'),
            )


setup(
    name=cfg['lib_name'],
    version=cfg['version'],
    description=cfg['description'],
    keywords=cfg['keywords'],
    author=cfg['author'],
    author_email=cfg['author_email'],
    license='Apache-2.0',
    url=f"https://github.com/{cfg['user']}/{cfg['repo']}",
    long_description=(here / 'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    packages=find_packages(include=[cfg['lib_path'], cfg['lib_path'] + '.*']),
    python_requires='>=' + cfg['min_python'],
    include_package_data=True,
    package_data={cfg['lib_path']: ['weights/*', 'data/*', 'data/*/*']},
    install_requires=cfg['requirements'].split(),
    extras_require=extras,
    entry_points=dict(console_scripts=cfg['console_scripts'].split()),
    zip_safe=False,
    cmdclass=dict(build_py=WithDemo),
)
