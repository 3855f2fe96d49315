"""mobileclip_nb: MobileCLIP and MobileCLIP2, from the notebooks that explain them.

    from mobileclip_nb import predict
    predict('drawing.png', ['train', 'heart', 'umbrella'])       # mobileclip_nano knows emoji and their words, not photographs

Importing this package loads nothing heavy: a name is fetched from its module the first time it is used.
`list_models()` names every model, `create_model(name, weights)` makes one, and `nbs/` tells how each part works.
"""

from mobileclip_nb.core.docstrings import complete_on_import

complete_on_import(__name__)

_HOME = dict(
    create_model='models.factory',
    create_model_and_transforms='models.familiar_calls',
    create_model_from_pretrained='models.familiar_calls',
    get_tokenizer='models.familiar_calls',
    from_pretrained='models.hub',
    push_to_hub='models.hub',
    save_pretrained='models.hub',
    load_weights='models.weights',
    save_weights='models.weights',
    preprocess='models.factory',
    list_models='models.zoo',
    list_pretrained='models.zoo',
    is_model='models.zoo',
    tokenize='preprocessing.tokenizer',
    fold='blocks.reparam',
    predict='inference.predict',
    Prediction='inference.predict',
    ZeroShotClassifier='inference.predict',
    pipeline='inference.pipeline',
    embed='inference.embed',
    build_index='inference.index',
    open_index='inference.search',
    Embeds='models.clip',
    register_open_clip='models.open_clip_adapter',
)
__all__ = sorted(_HOME)

# names of other libraries, whose use raises an error that says what to call here
_ELSEWHERE = (
    'AutoImageProcessor',
    'AutoModel',
    'AutoProcessor',
    'AutoTokenizer',
    'CLIPModel',
    'CLIPProcessor',
    'CLIPTokenizer',
    'Trainer',
    'TrainingArguments',
    'build_zero_shot_classifier',
    'reparameterize_model',
)


def _version():
    "The version in settings.ini if this is a clone, else the installed one: one source either way"
    from pathlib import Path

    ini = Path(__file__).parents[1] / 'settings.ini'
    if ini.exists() and (Path(__file__).parents[1] / 'nbs').is_dir():
        from configparser import ConfigParser

        cfg = ConfigParser(delimiters=['='])
        cfg.read(ini, encoding='utf-8')
        return cfg['DEFAULT']['version']
    from importlib.metadata import version

    return version('mobileclip_nb')


def __dir__():
    return sorted([*globals(), *__all__, '__version__'])


def __getattr__(name):
    from importlib import import_module

    if name == '__version__':
        value = _version()
    elif name in _HOME:
        value = getattr(import_module(f'{__name__}.{_HOME[name]}'), name)
    elif name in _ELSEWHERE:
        return import_module(f'{__name__}.models.familiar_calls').Elsewhere(name)
    else:
        from mobileclip_nb.core.errors import suggest

        raise AttributeError(f"mobileclip_nb has no {name!r}.{suggest(name, __all__)}")
    globals()[name] = value
    return value
