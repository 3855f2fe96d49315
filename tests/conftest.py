"The longest test begins first, so that two workers end at about the same time; npm packages of the tests are found."

import os
from pathlib import Path

os.environ.setdefault('NODE_PATH', str(Path(__file__).parent / 'export' / 'js' / 'node_modules'))


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.name != 'test_blocks_run_in_order')
