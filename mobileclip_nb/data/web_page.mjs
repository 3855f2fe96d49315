// What a person sees and touches; the model is in clip.mjs.
import * as ort from './ort/ort.wasm.bundle.min.mjs';
import { Clip, dot } from './clip.mjs';

const $ = (id) => document.getElementById(id);
const state = { clip: null, picture: null, gallery: [], labelRun: 0, searchRun: 0 };

function report(text, failed = false) {
  $('status').textContent = text;
  $('status').classList.toggle('failed', failed);
}

function element(kind, text = '', className = '') {
  const e = document.createElement(kind);
  e.textContent = text;
  if (className) e.className = className;
  return e;
}

// Label the chosen picture with the typed labels; a newer call replaces an older one.
async function showLabels() {
  const run = ++state.labelRun;
  const words = $('labels').value.split('\n').map((w) => w.trim()).filter((w) => w);
  const labels = [...new Set(words)];
  if (!state.picture || !labels.length) return $('scores').replaceChildren();
  const template = $('template').value.includes('{}') ? $('template').value : '{}';
  const vectors = await state.clip.embedTexts(labels.map((l) => template.replaceAll('{}', l)));
  if (run !== state.labelRun) return;
  const chances = state.clip.probabilities(state.picture, vectors);
  const order = labels.map((label, i) => [label, chances[i]]).sort((a, b) => b[1] - a[1]);
  $('scores').replaceChildren(...order.map(([label, p]) => {
    const item = element('li');
    item.dataset.label = label;
    item.dataset.score = p;
    const bar = element('span', '', 'bar');
    bar.style.width = `${100 * p}%`;
    item.append(bar, element('span', label, 'text'));
    item.append(element('span', `${(100 * p).toFixed(1)} %`, 'number'));
    return item;
  }));
}

async function choosePicture(file) {
  if (!file) return;
  try {
    state.picture = await state.clip.embedPicture(file);
  } catch (error) {
    return report(`${file.name} cannot be read as a picture (${error.message})`, true);
  }
  URL.revokeObjectURL($('preview').src);
  $('preview').src = URL.createObjectURL(file);
  $('preview').alt = file.name;
  $('preview').hidden = false;
  $('drop-text').hidden = true;
  await showLabels();
  report('Ready');
}

// Order the pictures by their cosine to the query.
async function showSearch() {
  const run = ++state.searchRun, query = $('query').value.trim();
  const [text] = query ? await state.clip.embedTexts([query]) : [null];
  if (run !== state.searchRun) return;
  const found = state.gallery.map((p) => ({ ...p, score: text ? dot(text, p.vector) : null }));
  if (text) found.sort((a, b) => b.score - a.score);
  $('gallery').replaceChildren(...found.map(({ name, url, score }, i) => {
    const item = element('li', '', text && i === 0 ? 'best' : '');
    item.dataset.name = name;
    const image = element('img');
    image.src = url;
    image.alt = name;
    item.append(image, element('div', name, 'name'));
    if (text) {
      item.dataset.score = score;
      item.append(element('div', `cosine ${score.toFixed(3)}`, 'number'));
    }
    return item;
  }));
  $('count').textContent = `${found.length} pictures`;
}

async function addPictures(files) {
  for (const file of files) {
    report(`Reading ${file.name}`);
    try {
      const vector = await state.clip.embedPicture(file);
      state.gallery.push({ name: file.name, url: URL.createObjectURL(file), vector });
    } catch (error) {
      return report(`${file.name} cannot be read as a picture (${error.message})`, true);
    }
  }
  await showSearch();
  report('Ready');
}

// The pictures that lie in the folder.
async function readExamples() {
  const files = await Promise.all(state.clip.about.pictures.map(async ({ file, name }) => {
    const answer = await fetch(file);
    return new File([await answer.blob()], name);
  }));
  await addPictures(files);
}

function listen() {
  $('file').addEventListener('change', (e) => choosePicture(e.target.files[0]));
  $('more').addEventListener('change', (e) => addPictures([...e.target.files]));
  $('labels').addEventListener('input', showLabels);
  $('template').addEventListener('input', showLabels);
  $('search').addEventListener('submit', (e) => { e.preventDefault(); showSearch(); });
  const drop = $('drop'), over = (is) => drop.classList.toggle('over', is);
  drop.addEventListener('dragover', (e) => { e.preventDefault(); over(true); });
  drop.addEventListener('dragleave', () => over(false));
  drop.addEventListener('drop', (e) => { e.preventDefault(); over(false); choosePicture(e.dataTransfer.files[0]); });
}

try {
  state.clip = await Clip.load(ort, report);
  const { name, license, attribution } = state.clip.about;
  $('name').textContent = name;
  $('about').textContent = `Weights: ${license}. ${attribution}.`;
  listen();
  await readExamples();
  document.body.dataset.ready = 'true';
} catch (error) {
  report(`The model cannot be loaded: ${error.message}`, true);
  document.body.dataset.ready = 'false';
}
