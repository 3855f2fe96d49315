"Configuration of Sphinx; `make_site.py` writes the sources and runs it."

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import library
import stage

project = library.SETTINGS['title']
author = library.SETTINGS['author']
copyright = library.SETTINGS['copyright']
version = release = library.SETTINGS['version']
language = 'en'

extensions = ['myst_nb', 'sphinx.ext.linkcode', 'mathml']
html_math_renderer = 'mathml'
smartquotes = False
nitpicky = True  # a name that becomes a link is there; types of other libraries are not
nitpick_ignore_regex = [('py:(?!obj).*', '.*')]
python_maximum_signature_line_length = 72
add_module_names = False
toc_object_entries_show_parents = 'hide'
templates_path = ['templates']

nb_execution_mode = 'off'
nb_merge_streams = True
nb_render_markdown_format = 'myst'
myst_enable_extensions = ['colon_fence', 'dollarmath']
myst_dmath_double_inline = True
myst_heading_anchors = 3

html_theme = 'pydata_sphinx_theme'
html_title = project
html_static_path = ['static']
html_favicon = 'static/favicon.svg'
html_css_files = ['site.css']
html_context = dict(default_mode='auto')
html_copy_source = False
html_show_sourcelink = False
html_theme_options = dict(
    logo=dict(text=project),
    icon_links=[dict(name='GitHub', url=library.REPOSITORY, icon='fa-brands fa-github')],
    header_links_before_dropdown=7,
    collapse_navigation=True,
    navigation_depth=3,
    show_prev_next=True,
    navigation_with_keys=False,
    back_to_top_button=False,
    pygments_light_style='a11y-high-contrast-light',
    pygments_dark_style='a11y-high-contrast-dark',
    footer_start=['copyright'],
    footer_end=[],
    secondary_sidebar_items=['page-toc'],
)
html_sidebars = {'index': [], 'search': [], 'genindex': [], 'py-modindex': []}

_modules = stage.read_site().modules


def linkcode_resolve(domain, info):
    "The lines of the repository that define a name"
    name = f'{info["module"]}.{info["fullname"]}'
    found = library.source_lines(name, _modules)
    return None if found is None else library.repository_url(*found)
