"""Calls as people coming from open_clip, timm and transformers write them: each works, or the error names the remedy.

The list was written down before the code.
"""

import contextlib, io, tomllib
from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image

CALLS = tomllib.loads(Path(__file__).with_name('natural_calls.toml').read_text())['call']


def title(call):
    "The first line of a call, as the test's name"
    return f'{call["library"]}: {call["code"].strip().splitlines()[0][:60]}'


def test_they_are_forty():
    "Forty calls, at least twelve a library; at least thirty are to work"
    libraries = Counter(call['library'] for call in CALLS)
    assert len(CALLS) == 40
    assert set(libraries) == {'open_clip', 'timm', 'transformers'}
    assert min(libraries.values()) >= 12
    assert sum('check' in call for call in CALLS) >= 30
    assert all(('check' in call) != ('remedy' in call) for call in CALLS)


@pytest.fixture
def at_hand(tmp_path, monkeypatch):
    "What the calls find, in an empty folder, without a network and without a cache of the hub"
    import huggingface_hub.constants as hub
    import mobileclip_nb

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, 'HF_HUB_OFFLINE', True)
    monkeypatch.setattr(hub, 'HF_HUB_CACHE', str(tmp_path / 'hub'))
    image = Image.new('RGB', (80, 60), 'red')
    image.save('CLIP.png')
    model = mobileclip_nb.create_model('mobileclip_nano', 'emoji')
    return dict(ours=mobileclip_nb, torch=torch, Image=Image, Path=Path, image=image, model=model)


@pytest.mark.parametrize('call', CALLS, ids=title)
def test_call(call, at_hand):
    "The call works, or its error, of any kind, holds the remedy"
    exec(call.get('before', ''), at_hand)
    if 'remedy' in call:
        with pytest.raises(Exception) as error, contextlib.redirect_stderr(io.StringIO()):
            exec(call['code'], at_hand)
        assert call['remedy'] in str(error.value)
        return
    exec(call['code'], at_hand)
    with torch.no_grad():
        assert eval(call['check'], at_hand)
