"""Published reinforcement recipes: every name resolves, and each recipe runs end to end.

No published weights can be downloaded here. The runs use open_clip's own classes built narrow, with
random weights that stand in a local cache of the hub under the published repositories and files.
"""

import io
import json
import re
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import open_clip
import pytest
import torch
from open_clip.constants import HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME
from PIL import Image
from stand_ins import Hub, narrow_configs, write_open_clip_folder, write_weights

from mobileclip_nb.augment.pipeline import apply, unpack
from mobileclip_nb.reinforce.captioner import (
    MOBILECLIP2,
    CaptionerSpec,
    build_coca,
    captioner_config,
    load_captioner,
    weight_places,
    find_weights,
)
from mobileclip_nb.models.weights import clean_tag, fetch_hub, hub_names
from mobileclip_nb.cli.main import main
from mobileclip_nb.train.paper_recipes import ROWS
from mobileclip_nb.reinforce.recipe import RECIPES, find_reinforce_recipe
from mobileclip_nb.shards.io import read_manifest, read_shard, write_shard
from mobileclip_nb.shards.sample import Sample, StoreSpec
from mobileclip_nb.reinforce.teachers import TeacherSpec, check_gelu, load_teacher
from mobileclip_nb.models.zoo import ZOO

# The recipe, the published training run that reads its shards, and its id, which must not change.
RUNS = {
    'datacompdr-12m': ('vit_b16.datacompdr12m', '59fef20a21'),
    'datacompdr-1b': ('vit_b16.datacompdr1b', '80d174a43a'),
    'dfndr-2b': ('mobileclip_b.dfndr2b', 'fd4aad1567'),
}


# ---- names ----


class Listing(NamedTuple):
    "The weight file of a hub repository, and the public page that names it"

    file: str
    source: str  # empty: no page was found that lists this file, the name is unverified


HUB = 'https://huggingface.co/'
COCA = 'apple/mobileclip2_coca_dfn2b_s13b_'
FILES = {
    'laion/mscoco_finetuned_CoCa-ViT-L-14-laion2B-s13B-b90k': Listing(
        'open_clip_pytorch_model.bin',
        HUB + 'laion/mscoco_finetuned_CoCa-ViT-L-14-laion2B-s13B-b90k/tree/main',
    ),
    'laion/CoCa-ViT-L-14-laion2B-s13B-b90k': Listing(
        'open_clip_pytorch_model.bin', HUB + 'laion/CoCa-ViT-L-14-laion2B-s13B-b90k/tree/main'
    ),
    'laion/mscoco_finetuned_CoCa-ViT-B-32-laion2B-s13B-b90k': Listing(
        'open_clip_pytorch_model.bin',
        HUB + 'laion/mscoco_finetuned_CoCa-ViT-B-32-laion2B-s13B-b90k/tree/ef0732eb',
    ),
    'laion/CoCa-ViT-B-32-laion2B-s13B-b90k': Listing(
        'open_clip_pytorch_model.bin', HUB + 'laion/CoCa-ViT-B-32-laion2B-s13B-b90k/tree/main'
    ),
    'laion/CLIP-ViT-L-14-DataComp.XL-s13B-b90K': Listing(
        'open_clip_pytorch_model.bin',
        HUB + 'laion/CLIP-ViT-L-14-DataComp.XL-s13B-b90K/tree/11681a0c',
    ),
    'apple/DFN2B-CLIP-ViT-L-14': Listing(
        'open_clip_pytorch_model.bin',
        HUB + 'apple/DFN2B-CLIP-ViT-L-14/commits/c50bc0f1/open_clip_pytorch_model.bin',
    ),
    'apple/DFN2B-CLIP-ViT-L-14-39B': Listing(
        'open_clip_pytorch_model.bin', HUB + 'apple/DFN2B-CLIP-ViT-L-14-39B/commits/main'
    ),
    # The only listing found is older than open_clip's use of this repository.
    'timm/vit_large_patch14_clip_224.openai': Listing('open_clip_model.safetensors', ''),
    f'{COCA}context77': Listing(
        'mobileclip2_coca_dfn2b_s13b_context77.pt', HUB + f'{COCA}context77/commit/03ca95c4'
    ),
    # By analogy with the base model. The README of apple/ml-mobileclip loads mobileclip2_coca.pt.
    **{f'apple/{m}': Listing(f'{m}.pt', '') for m in MOBILECLIP2[1:]},
}
README_FILE = 'mobileclip2_coca.pt'  # github.com/apple/ml-mobileclip, README.md, "CoCa Models"


def repository(teacher):
    "The hub repository of a teacher's weights"
    if teacher.model.startswith('hf-hub:'):
        return teacher.model.removeprefix('hf-hub:')
    name = teacher.model.removeprefix('open_clip:')
    return open_clip.get_pretrained_cfg(name, teacher.weights)['hf_hub'].strip('/')


def listed(teacher):
    "The model and tag under which open_clip lists a teacher, with the activation of its weights"
    if teacher.model.startswith('open_clip:'):
        return teacher.model.removeprefix('open_clip:'), teacher.weights
    for model, tag in open_clip.list_pretrained():
        weights, built = open_clip.get_pretrained_cfg(model, tag), open_clip.get_model_config(model)
        same = bool(weights.get('quick_gelu')) == bool(built.get('quick_gelu'))
        if same and weights.get('hf_hub') == f'{repository(teacher)}/':
            return model, tag
    raise KeyError(f'open_clip does not list {teacher.model}')


@pytest.mark.parametrize('name', RUNS)
def test_recipe_keeps_its_id(name):
    assert find_reinforce_recipe(name).id == RUNS[name][1]


def test_every_published_recipe_is_tested():
    assert sorted(RUNS) == sorted(set(RECIPES) - {'nano-emoji'})


@pytest.mark.parametrize('name', RUNS)
def test_captioner_resolves(name):
    "The model is open_clip's, its weights are in a recorded repository, and its file is tried"
    (captioner,) = find_reinforce_recipe(name).captioners
    assert captioner.model in open_clip.list_models()
    place = find_weights(captioner)
    assert place.startswith('hf-hub:')
    repo = place.removeprefix('hf-hub:')
    assert FILES[repo].file in hub_names(repo)
    if not captioner.weights.startswith('hf-hub:'):
        cfg = open_clip.get_pretrained_cfg(captioner.model, captioner.weights)
        assert cfg['hf_hub'] == f'{repo}/'
    cfg = captioner_config(captioner.model)
    assert captioner.sampling.length <= cfg['text_cfg']['context_length']
    assert cfg['vision_cfg']['image_size'] == find_reinforce_recipe(name).augment.side


@pytest.mark.parametrize('name', RUNS)
def test_teachers_resolve(name):
    "Models and tags are in open_clip's tables, files are recorded, widths and scales are the run's"
    spec, row = find_reinforce_recipe(name), ROWS[RUNS[name][0]]
    for teacher, width, scale in zip(spec.teachers, row.widths, row.scales, strict=True):
        model, tag = listed(teacher)
        assert open_clip.is_pretrained_cfg(model, tag)
        check_gelu(model, tag)
        cfg = open_clip.get_model_config(model)
        assert (cfg['embed_dim'], teacher.scale) == (width, scale)
        assert cfg['vision_cfg']['image_size'] == spec.augment.side
        assert FILES[repository(teacher)].file in (HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME)


@pytest.mark.parametrize('name', RUNS)
def test_caption_keys_are_those_the_run_reads(name):
    spec, row = find_reinforce_recipe(name), ROWS[RUNS[name][0]]
    assert all(re.match(row.synthetic, c.key) for c in spec.captioners)


@pytest.mark.parametrize('model', MOBILECLIP2)
def test_captioner_of_mobileclip2_resolves(model):
    "Each of the 21 names leads to a repository, both public file names and a configuration"
    place = find_weights(CaptionerSpec(model=model, weights='apple'))
    repo = place.removeprefix('hf-hub:')
    assert FILES[repo].file in hub_names(repo)
    assert README_FILE in hub_names(repo)
    context = int(re.search(r'context(\d+)$', model)[1])
    for positions in (context, context + 1):
        assert captioner_config(model, positions)['text_cfg']['context_length'] == positions - 1


def test_unverified_names():
    "Which file names stand on no public listing; a name found in one moves out of this list"
    unverified = {repo for repo, listing in FILES.items() if not listing.source}
    assert unverified == {
        'timm/vit_large_patch14_clip_224.openai',
        *(f'apple/{m}' for m in MOBILECLIP2[1:]),
    }


def test_every_listing_is_used():
    "No repository stands in the table that nothing here would load"
    models = ('coca_ViT-B-32', 'coca_ViT-L-14', *MOBILECLIP2)
    captioners = [p for m in models for p in weight_places(m).values()]
    teachers = [repository(t) for name in RUNS for t in find_reinforce_recipe(name).teachers]
    assert set(FILES) == {p.removeprefix('hf-hub:') for p in captioners} | set(teachers)


def test_tags_of_our_own_models_are_spelled_as_open_clip_spells():
    tags = [tag for record in ZOO.values() for tag in record.weights]
    assert [clean_tag(tag) for tag in tags] == tags
    assert all(clean_tag(tag.upper()) == tag for _, tag in open_clip.list_pretrained())


# ---- a local hub ----


def write_teacher(hub, teacher):
    "Narrow weights of a teacher; where the repository is the model, with its configuration"
    model, repo = listed(teacher)[0], repository(teacher)
    if teacher.model.startswith('hf-hub:'):
        write_open_clip_folder(hub, repo, model, FILES[repo].file)
    else:
        write_weights(open_clip.create_model(model), hub.add(repo, FILES[repo].file))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    "The published repositories with narrow weights, and no way to the real hub"
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'hub'))
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    for model, cfg in narrow_configs().items():
        monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, model, cfg)
    hub = Hub(tmp_path / 'hub')
    torch.manual_seed(0)
    for name in RUNS:
        (captioner,) = find_reinforce_recipe(name).captioners
        coca = build_coca(captioner_config(captioner.model))
        repo = find_weights(captioner).removeprefix('hf-hub:')
        write_weights(coca, hub.add(repo, FILES[repo].file))
        for teacher in find_reinforce_recipe(name).teachers:
            write_teacher(hub, teacher)
    return hub


def four_samples(folder):
    "A shard of four samples"
    rng = np.random.default_rng(0)

    def picture():
        data = io.BytesIO()
        low = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
        Image.fromarray(low).resize((260, 240), Image.Resampling.BICUBIC).save(data, 'JPEG')
        return data.getvalue()

    samples = [Sample(f'{i:04}', picture(), 'jpg', (f'a pattern of number {i}',)) for i in range(4)]
    write_shard(folder / '00000000.tar', samples, StoreSpec())


def members(tar, key):
    "The members of one sample of a shard, by extension"
    with tarfile.open(tar) as f:
        named = [m.name for m in f.getmembers() if m.name.startswith(f'{key}.')]
        return {n.removeprefix(f'{key}.'): f.extractfile(n).read() for n in named}


def open_clip_rows(hub, teacher, image, texts):
    "What open_clip's own code makes of an image and of texts with the weights in the hub"
    repo = repository(teacher)
    source = teacher.model
    weights = None
    if not source.startswith('hf-hub:'):
        source = source.removeprefix('open_clip:')
        weights = str(hub.add(repo, FILES[repo].file))
    net, _, transform = open_clip.create_model_and_transforms(source, weights)
    tokens = open_clip.get_tokenizer(source)(texts)
    net.eval()
    with torch.inference_mode():
        rows = net.encode_image(transform(image)[None]), net.encode_text(tokens)
    return [torch.nn.functional.normalize(r, dim=-1).numpy() for r in rows]


@pytest.mark.parametrize('name, file', [*((name, '') for name in RUNS), ('dfndr-2b', README_FILE)])
def test_recipe_runs(name, file, hub, tmp_path, capsys):
    "`mobileclip reinforce IN OUT --recipe NAME`, from names to a shard, with the real classes"
    spec = find_reinforce_recipe(name)
    if file:  # the captioner's weights under the other public name
        repo = find_weights(spec.captioners[0]).removeprefix('hf-hub:')
        hub.add(repo, FILES[repo].file).rename(hub.add(repo, file))
    source, out = tmp_path / 'in', tmp_path / 'out'
    source.mkdir()
    four_samples(source)
    status = main(['reinforce', str(source), str(out), '--recipe', name])
    assert status == 0, capsys.readouterr()
    assert json.loads((out / 'recipe.json').read_text())['id'] == RUNS[name][1]

    wants = ('param_aug', 'image_emb', 'text_emb', 'synthetic')
    samples = list(read_shard(out / '00000000.tar', wants=wants))
    key = spec.captioners[0].key
    width = 24 + 40
    assert len(samples) == 4
    for s in samples:
        assert len(s.synthetic[key]) == 5 and all(s.synthetic[key])
        assert len(s.param_aug) == spec.n_augmentations
        assert s.image_emb.shape == (spec.n_augmentations, width)
        shapes = {k: v.shape for k, v in s.text_emb.items()}
        assert shapes == {'text': (1, width), key: (5, width)}
    assert len({s.synthetic[key] for s in samples}) == 4

    s = samples[2]
    image = Image.open(io.BytesIO(s.image)).convert('RGB')
    view = apply(spec.augment, image, unpack(spec.augment, s.param_aug[1]))
    texts = [*s.captions, *s.synthetic[key]]
    parts = [open_clip_rows(hub, t, view, texts) for t in spec.teachers]
    image_rows, text_rows = (np.concatenate(p, 1) for p in zip(*parts))
    stored_text = np.concatenate([s.text_emb['text'], s.text_emb[key]])
    tolerance = 1e-5 if spec.store.form == 'float32' else 2e-3
    np.testing.assert_allclose(s.image_emb[1:2], image_rows, atol=tolerance)
    np.testing.assert_allclose(stored_text, text_rows, atol=tolerance)

    if spec.store.layout == 'legacy':
        arrays = np.load(io.BytesIO(members(out / '00000000.tar', s.key)['npz']))
        assert sorted(arrays) == ['image_emb', 'text_emb']
        assert arrays['text_emb'].shape == (1 + 5, width)


# The command line in a process of its own, with open_clip's models made narrow.
NARROW = f"""import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import stand_ins
from mobileclip_nb.cli.main import main
stand_ins.narrow_open_clip()
raise SystemExit(main())"""


def test_command_starts_and_runs(hub, tmp_path):
    "`mobileclip reinforce SHARDS OUT --recipe datacompdr-12m`, from a shell; again it has nothing to do"
    (tmp_path / 'SHARDS').mkdir()
    four_samples(tmp_path / 'SHARDS')
    words = ['reinforce', 'SHARDS', 'OUT', '--recipe', 'datacompdr-12m']
    how = dict(cwd=tmp_path, env=hub.env, capture_output=True, text=True, timeout=240)
    done = subprocess.run([sys.executable, '-c', NARROW, *words], **how)
    assert done.returncode == 0, done.stderr[-2000:]
    assert '30 augmentations, 1 captioners, 2 teachers, in float32' in done.stderr
    (entry,) = read_manifest(tmp_path / 'OUT').shards
    assert (entry.shard, entry.num_uids) == ('00000000', 4)
    assert [len(s.param_aug) for s in read_shard(tmp_path / 'OUT/00000000.tar')] == [30] * 4


def test_layouts():
    "DataCompDR stores text rows in one float32 array, DFNDR has an array for each caption key"
    stores = {name: find_reinforce_recipe(name).store for name in RUNS}
    assert [s.layout for s in stores.values()] == ['legacy', 'legacy', 'current']
    assert stores['datacompdr-12m'].form == stores['datacompdr-1b'].form == 'float32'


@pytest.mark.parametrize(
    'tag', ['mscoco_finetuned_laion2b_s13b_b90k', 'MSCOCO-finetuned-laion2B-s13B-b90k']
)
def test_captioner_tag_in_any_spelling(tag, hub):
    captioner = load_captioner('coca_ViT-L-14', tag)
    assert captioner.context == 76
    assert len(captioner.captions([Image.new('RGB', (30, 20), 'red')], ['a'])[0]) == 5


def test_teacher_tag_in_any_spelling(hub):
    plain = load_teacher(TeacherSpec('open_clip:ViT-L-14', 'datacomp_xl_s13b_b90k'))
    other = load_teacher(TeacherSpec('open_clip:ViT-L-14', 'DataComp_XL-s13B-b90K'))
    assert torch.equal(plain.text(['a fox']), other.text(['a fox']))
    ours = [load_teacher(TeacherSpec('teacher_nano_a', tag)) for tag in ('emoji', 'Emoji')]
    assert torch.equal(ours[0].text(['a fox']), ours[1].text(['a fox']))


@pytest.mark.parametrize('file', ['{repo}.pt', README_FILE])
@pytest.mark.parametrize('tuned', ['dci-complete_s12m_context256', 'gbc1m-short_context77'])
def test_mobileclip2_captioner_under_either_file_name(tuned, file, hub):
    "By name, without a file: a file named after the repository, or that of the README"
    repo = f'{COCA}{tuned}'
    name = repo.removeprefix('apple/')
    context = int(name.rpartition('context')[2])
    cfg = captioner_config(name, context)
    write_weights(build_coca(cfg), hub.add(repo, file.format(repo=name)))
    assert load_captioner(name).context == context - 1


# ---- what is asked of the hub, and errors ----


@pytest.fixture
def asked(monkeypatch):
    "The file names asked of a hub that has the repository and none of the files"
    import huggingface_hub

    names = []

    def missing(repo, file):
        names.append(file)
        raise huggingface_hub.errors.EntryNotFoundError(file)

    monkeypatch.setattr(huggingface_hub, 'hf_hub_download', missing)
    monkeypatch.setattr(huggingface_hub, 'try_to_load_from_cache', lambda repo, file: None)
    monkeypatch.setattr('mobileclip_nb.models.weights.reach_hub', lambda: None)
    return names


def test_error_names_all_files_and_the_remedy(asked):
    "dfndr-2b names a repository without a file: each name is tried once, and the error lists them"
    (captioner,) = find_reinforce_recipe('dfndr-2b').captioners
    repo = captioner.weights.removeprefix('hf-hub:')
    with pytest.raises(OSError) as error:
        load_captioner(captioner)
    own = f"{repo.removeprefix('apple/')}.pt"
    assert asked[:4] == [HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME, own, README_FILE]
    said = str(error.value)
    assert all(name in said for name in (repo, *asked))
    assert 'pass its path' in said and f"'hf-hub:{repo}/FILE'" in said


def test_error_of_a_named_file_offers_the_others(asked):
    with pytest.raises(OSError, match=f'leave out the file name to try .*{README_FILE}'):
        fetch_hub(f'hf-hub:{COCA}context77/wrong.pt')
    assert asked == ['wrong.pt']


def test_error_without_network_names_what_was_looked_for(tmp_path, monkeypatch, capsys):
    "An empty cache and no network: one line, exit status 2, nothing written"
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'hub'))
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    source = tmp_path / 'in'
    source.mkdir()
    four_samples(source)
    for name in RUNS:
        assert main(['reinforce', str(source), str(tmp_path / name), '--recipe', name]) == 2
        repo = find_weights(find_reinforce_recipe(name).captioners[0]).removeprefix('hf-hub:')
        said = capsys.readouterr().err
        assert all(part in said for part in (repo, *hub_names(repo), 'pass its path')), said
        assert not list((tmp_path / name).rglob('*.tar'))


class Trap:
    "A pickle that would leave a file behind"

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), 'w')


def test_no_published_pickle_is_run(hub, tmp_path):
    "Weights are read with weights_only=True, by us and by open_clip: nothing in a file is called"
    (captioner,) = find_reinforce_recipe('dfndr-2b').captioners
    repo = captioner.weights.removeprefix('hf-hub:')
    teacher = find_reinforce_recipe('dfndr-2b').teachers[0]
    for path in (hub.add(repo, FILES[repo].file), hub.add(repository(teacher), HF_WEIGHTS_NAME)):
        torch.save(dict(weight=Trap(tmp_path / 'ran')), path)
    with pytest.raises(ValueError, match='holds code'):
        load_captioner(captioner)
    with pytest.raises(ValueError, match='hold code'):
        load_teacher(teacher)
    assert not (tmp_path / 'ran').exists()
