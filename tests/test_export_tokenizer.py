"The written tokenizer in plain Python, JavaScript and the library `tokenizers` against the one of training, on long lists."

import importlib.util, json, shutil, subprocess
from importlib.resources import files
from pathlib import Path

import emoji, pytest

from mobileclip_nb.export.tokenizer import (
    NASTY_TEXTS,
    RUN_IN_NODE,
    TRAINING_NAMES,
    tokenize_plainly,
    tokenize_with_library,
    write_hf_tokenizer,
    write_references,
    write_vocabulary,
)
from mobileclip_nb.preprocessing.tokenizer import tokenize

LANGUAGES = ('en', 'de', 'fr', 'es', 'ru', 'ar', 'ja', 'ko', 'zh', 'tr')
CONTEXT = 77


def imagenet_names():
    "The 1,000 class names that open_clip uses, without importing open_clip"
    root = Path(importlib.util.find_spec('open_clip').submodule_search_locations[0])
    spec = importlib.util.spec_from_file_location('metadata', root / 'zero_shot_metadata.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return list(module.IMAGENET_CLASSNAMES)


def emoji_names(language, step=5):
    "Every fifth emoji's name in a language"
    emoji.config.load_language(language)
    names = [d[language] for d in emoji.EMOJI_DATA.values() if language in d][::step]
    return [name.strip(':').replace('_', ' ') for name in names]


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    at = tmp_path_factory.mktemp('tokenizer')
    write_vocabulary(at)
    write_references(at, CONTEXT)
    write_hf_tokenizer(at, CONTEXT, TRAINING_NAMES)
    return at


@pytest.fixture(scope='module')
def lists():
    names = {f'emoji names, {k}': emoji_names(k) for k in LANGUAGES}
    return dict(imagenet=imagenet_names(), nasty=list(NASTY_TEXTS), **names)


def differences(found, texts):
    assert len(found) == len(texts)
    return [t for t, a, b in zip(texts, found, tokenize(texts, CONTEXT).tolist()) if a != b]


def test_the_lists_are_long(lists):
    assert len(lists['imagenet']) == 1000
    assert min(len(v) for k, v in lists.items() if k.startswith('emoji')) > 300


def test_plain_python(folder, lists):
    texts = [t for k, v in lists.items() for t in v]
    assert differences(tokenize_plainly(texts, folder), texts) == []


@pytest.mark.skipif(not shutil.which('node'), reason='needs node')
def test_javascript_in_node(folder, lists):
    texts = [t for k, v in lists.items() for t in v]
    script = str(files('mobileclip_nb') / 'data' / RUN_IN_NODE)
    given = '\n'.join(map(json.dumps, texts))
    command = ['node', script, str(folder)]
    done = subprocess.run(command, input=given, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert differences([json.loads(line) for line in done.stdout.splitlines()], texts) == []


def test_the_library(folder, lists):
    "Plain texts agree; of the nasty ones the notebook lists those that do not"
    texts = [t for k, v in lists.items() if k != 'nasty' for t in v]
    assert differences(tokenize_with_library(texts, folder / 'tokenizer.json'), texts) == []


def test_the_exclamation_mark_is_not_padding(folder, tmp_path):
    "In the library's file id 0 pads a row, and `!` in a text keeps its own ids"
    (row,) = tokenize_with_library(['hello!!! !'], folder / 'tokenizer.json')
    assert row == tokenize('hello!!! !', CONTEXT)[0].tolist()
    assert row[-1] == 0
