"Every tower of the zoo at its own width, folded, by every path out of Python."

import gc, os

import pytest, torch

import export_paths
from mobileclip_nb.models.mci import MCi, MCiSpec
from mobileclip_nb.models.text_repmixer import text_tower
from mobileclip_nb.models.vit import VIT, ViT
from mobileclip_nb.models.zoo import ZOO, Undrawn, image_spec

IMAGES = {(image_spec(r), r.embed_dim): r.name for r in reversed(ZOO.values())}
IMAGES |= {(VIT['vit_b16_v1'], 512): "mobileclip_b, Apple's form"}
if not os.environ.get('EXPORT_ALL'):  # minutes each; they convert in the other files
    LARGEST = ('mobileclip_l14', 'mobileclip_s4')
    IMAGES = {key: name for key, name in IMAGES.items() if name not in LARGEST}
TEXTS = {(r.text, r.embed_dim): r.name for r in reversed(ZOO.values())}


def check(tower):
    tower = export_paths.folded(tower)
    x, more = export_paths.inputs(tower), export_paths.inputs(tower, 3)
    with torch.no_grad():
        for path in export_paths.PATHS:
            found = path(tower, x, more)
            print(f'{path.__name__} {found:.1e}')
            assert found <= 1e-4
            gc.collect()


@pytest.mark.parametrize('spec,out', IMAGES, ids=IMAGES.values())
def test_image_tower(spec, out):
    with Undrawn():
        tower = (MCi if isinstance(spec, MCiSpec) else ViT)(spec, out)
    check(tower)


@pytest.mark.parametrize('spec,out', TEXTS, ids=TEXTS.values())
def test_text_tower(spec, out):
    with Undrawn():
        tower = text_tower(spec, out)
    check(tower)
