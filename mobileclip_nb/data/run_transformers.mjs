// Runs a folder in transformers.js: node run_transformers.mjs ENTRY FOLDER, a request as JSON on standard input.
// ENTRY is the module of @huggingface/transformers for Node; FOLDER is an export for `transformers.js`.
import { readFileSync } from 'node:fs';
import { basename, dirname, resolve } from 'node:path';
import { pathToFileURL } from 'node:url';

const [entry, given] = process.argv.slice(2);
const hf = await import(pathToFileURL(resolve(entry)).href);
const folder = resolve(given);
const request = JSON.parse(readFileSync(0, 'utf-8'));
hf.env.allowRemoteModels = false;
hf.env.localModelPath = dirname(folder);
const name = basename(folder);
const options = request.dtype ? { dtype: request.dtype } : {};
const rows = (tensor) => tensor.tolist();
const answer = {};

if (request.texts) {
  const tokenizer = await hf.AutoTokenizer.from_pretrained(name);
  const model = await hf.CLIPTextModelWithProjection.from_pretrained(name, options);
  answer.text = {};
  answer.lengths = {};
  for (const [how, choice] of Object.entries(request.padding)) {
    const inputs = tokenizer(request.texts, choice);
    answer.text[how] = rows((await model(inputs)).text_embeds);
    answer.lengths[how] = inputs.input_ids.dims[1];
  }
  const one = [];
  for (const text of request.texts) {
    one.push(rows((await model(tokenizer([text], { truncation: true }))).text_embeds)[0]);
  }
  answer.text.one_by_one = one;
}
if (request.pictures) {
  const processor = await hf.AutoProcessor.from_pretrained(name);
  const model = await hf.CLIPVisionModelWithProjection.from_pretrained(name, options);
  const images = await Promise.all(request.pictures.map((path) => hf.RawImage.read(path)));
  answer.image = rows((await model(await processor(images))).image_embeds);
  const { shape, data } = request.pixels;
  const bytes = Buffer.from(data, 'base64');
  const floats = new Float32Array(bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.length));
  const pixel_values = new hf.Tensor('float32', floats, shape);
  answer.pixels = rows((await model({ pixel_values })).image_embeds);
}
if (request.labels) {
  const task = 'zero-shot-image-classification';
  const classify = await hf.pipeline(task, name, options);
  const settings = { hypothesis_template: request.template };
  answer.zeroshot = await classify(request.pictures, request.labels, settings);
}
process.stdout.write(JSON.stringify(answer) + '\n');
