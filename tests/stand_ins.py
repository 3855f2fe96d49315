"""Narrow stand-ins for published models, under the published names, in a local cache of the hub.

Every name, tag, repository and file name is the published one and is resolved by the library; only widths and
depths differ, and weights are random. Nothing is downloaded.
"""

import json, os
from copy import deepcopy
from pathlib import Path

import open_clip
import torch

from mobileclip_nb.models.weights import hub_names, save_weights
from mobileclip_nb.models.zoo import ZOO, Record, build, image_spec
from mobileclip_nb.train.paper_recipes import OTHERS

# open_clip's models that published recipes of reinforcement name, and the width of their embeddings here
GUESTS = {'coca_ViT-L-14': 32, 'ViT-L-14-quickgelu': 24, 'ViT-L-14': 40}


def narrow(cfg, embed_dim):
    "A configuration of open_clip with every width and depth made small, everything else kept"
    cfg = deepcopy(cfg) | dict(embed_dim=embed_dim)
    cfg['vision_cfg'] |= dict(layers=1, width=64)
    for part in cfg.keys() & {'text_cfg', 'multimodal_cfg'}:
        cfg[part] |= dict(layers=1, width=32, heads=2)
    return cfg


def narrow_configs():
    "Configurations of open_clip's models that replace the published ones, by name"
    known = open_clip.factory._MODEL_CONFIGS
    return {model: narrow(known[model], width) for model, width in GUESTS.items()}


def narrow_open_clip():
    "Make open_clip's models narrow for the rest of this process"
    open_clip.factory._MODEL_CONFIGS.update(narrow_configs())


def narrow_record(record: Record):
    "A record of the same kind: same preprocessing, tokens, layers' kinds and sources, small sizes"
    image, text = image_spec(record), record.text.but(width=32, heads=2, layers=1)
    if hasattr(image, 'dims'):
        stages = len(image.depths)
        image = image.but(depths=(1,) * stages, dims=(8, 8, 16, 32, 64)[:stages])
    else:
        image = image.but(dim=32, depth=1, heads=2)
    return record.but(image=image, text=text, embed_dim=16)


def published_records():
    "The records of the released models"
    return [r for r in ZOO.values() if 'amlr' in r.weights_license]


def narrow_zoo():
    "Make the released models, and those of the scripts, narrow for the rest of this process"
    for r in published_records():
        ZOO[r.name] = narrow_record(r)
    for name, r in OTHERS.items():
        OTHERS[name] = narrow_record(r)


class Hub:
    "A cache of the hub in a folder, in the layout of huggingface_hub"

    revision = '0' * 40

    def __init__(self, root):
        self.root = Path(root)

    @property
    def env(self):
        "Environment of a process that finds this cache and asks no hub"
        return os.environ | dict(
            HF_HUB_CACHE=str(self.root), HF_HUB_OFFLINE='1', OMP_NUM_THREADS='1'
        )

    def add(self, repo, file):
        "The path of a file that is to be written"
        folder = self.root / f"models--{repo.replace('/', '--')}"
        path = folder / 'snapshots' / self.revision / file
        path.parent.mkdir(parents=True, exist_ok=True)
        (folder / 'refs').mkdir(exist_ok=True)
        (folder / 'refs/main').write_text(self.revision)
        return path


def write_weights(net, path):
    "Weights under a published name, which may end in .bin, .pt or .safetensors"
    if path.suffix == '.safetensors':
        from safetensors.torch import save_file

        save_file(net.state_dict(), path)
    else:
        torch.save(net.state_dict(), path)


def write_open_clip_folder(hub, repo, model, file):
    "Narrow weights of an open_clip model under its repository, with its configuration beside them"
    write_weights(open_clip.create_model(model), hub.add(repo, file))
    preprocess = dict(mean=[0.48, 0.46, 0.41], std=[0.27, 0.26, 0.28])  # not open_clip's defaults
    config = dict(model_cfg=open_clip.get_model_config(model), preprocess_cfg=preprocess)
    hub.add(repo, 'open_clip_config.json').write_text(json.dumps(config))


def write_released(hub):
    "Narrow weights of every released model in its repository, in the naming of its file"
    for r in published_records():
        (place,) = r.weights.values()
        org, name, *file = place.removeprefix('hf-hub:').split('/')
        repo = f'{org}/{name}'
        path = hub.add(repo, *(file or hub_names(repo)[:1]))
        save_weights(build(narrow_record(r)).eval(), path, 'apple' if file else 'open_clip')
