"The longest test begins first, so that two workers end at about the same time."


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.name != 'test_blocks_run_in_order')
