// An image-text model in the browser: pixels and texts to unit vectors, by ONNX Runtime Web.
// It reads model.json, image.onnx, text.onnx and the tokenizer beside it; nothing is sent anywhere.

import { ClipTokenizer } from './tokenizer/clip_tokenizer.mjs';

const THIN = 500; // aspect ratio beyond which only the center is resized
const BITS = 22; // of the weights of the resize, as Pillow has them
const FILTERS = {
  bilinear: { support: 1, at: (x) => Math.max(0, 1 - Math.abs(x)) },
  bicubic: {
    support: 2,
    at: (x) => {
      const a = -0.5, t = Math.abs(x);
      if (t < 1) return ((a + 2) * t - (a + 3)) * t * t + 1;
      return t < 2 ? (((t - 5) * t + 8) * t - 4) * a : 0;
    },
  },
};

// To the nearest whole number, halves to the even one.
function roundEven(x) {
  const low = Math.floor(x), rest = x - low;
  if (rest !== 0.5) return Math.round(x);
  return low % 2 ? low + 1 : low;
}

// Weights of the outputs `first` to `first + count` of one axis: antialiased, in fixed point.
function axisWeights(size, from, to, outputs, filter, first, count) {
  const { support, at } = FILTERS[filter];
  const scale = (to - from) / outputs, wide = Math.max(scale, 1), reach = support * wide;
  const rows = [];
  for (let i = first; i < first + count; i++) {
    const center = from + (i + 0.5) * scale;
    const begin = Math.max(0, Math.trunc(center - reach + 0.5));
    const end = Math.min(size, Math.trunc(center + reach + 0.5));
    const weights = [];
    let sum = 0;
    for (let x = begin; x < end; x++) {
      const w = at((x - center + 0.5) / wide);
      weights.push(w);
      sum += w;
    }
    const fixed = weights.map((w) => {
      const v = (w / sum) * 2 ** BITS;
      return Math.trunc(v < 0 ? v - 0.5 : v + 0.5);
    });
    rows.push({ begin, weights: fixed });
  }
  return rows;
}

const clip8 = (sum) => Math.max(0, Math.min(255, Math.floor(sum / 2 ** BITS)));

// Resize one axis of an RGB image; `lines` are those of the other axis that are needed.
function resizeAxis(data, stride, step, rows, lines) {
  const out = new Uint8Array(lines.length * rows.length * 3);
  let k = 0;
  for (const line of lines) {
    for (const { begin, weights } of rows) {
      for (let c = 0; c < 3; c++) {
        let sum = 2 ** (BITS - 1);
        for (let j = 0; j < weights.length; j++) {
          sum += data[line * stride + (begin + j) * step + c] * weights[j];
        }
        out[k++] = clip8(sum);
      }
    }
  }
  return out;
}

const range = (n, from = 0) => Array.from({ length: n }, (_, i) => from + i);

// The lines of the source that an axis needs, and the same weights counted from the first of them.
function linesOf(axis) {
  const begin = Math.min(...axis.map((r) => r.begin));
  const end = Math.max(...axis.map((r) => r.begin + r.weights.length));
  const moved = axis.map((r) => ({ begin: r.begin - begin, weights: r.weights }));
  return { lines: range(end - begin, begin), moved };
}

// Resize the shortest side to `side` and crop the center, as Pillow does it, byte by byte.
// data: RGB, row by row. Gives side * side * 3 bytes.
export function squareOf({ width, height, data }, side, filter = 'bilinear') {
  const short = Math.min(width, height), long = Math.max(width, height);
  const [w, h] = [width, height].map((n) => (n === short ? side : Math.trunc((side * long) / short)));
  const left = roundEven((w - side) / 2), top = roundEven((h - side) / 2);
  let columns, rows;
  if (long <= THIN * short) {
    columns = axisWeights(width, 0, width, w, filter, left, side);
    rows = axisWeights(height, 0, height, h, filter, top, side);
  } else {
    const fx = width / w, fy = height / h;
    columns = axisWeights(width, left * fx, (left + side) * fx, side, filter, 0, side);
    rows = axisWeights(height, top * fy, (top + side) * fy, side, filter, 0, side);
  }
  // Pillow 13 reduces the rows first where a picture is more than twice as high as wide.
  if (height > 2 * width && side < width) {
    const { lines, moved } = linesOf(columns);
    const low = resizeAxis(data, 3, width * 3, rows, lines); // column by column
    return resizeAxis(low, 3, side * 3, moved, range(side));
  }
  const { lines, moved } = linesOf(rows);
  const narrow = resizeAxis(data, width * 3, 3, columns, lines); // row by row
  const turned = resizeAxis(narrow, 3, side * 3, moved, range(side)); // column by column
  const out = new Uint8Array(side * side * 3);
  for (let x = 0; x < side; x++) {
    for (let y = 0; y < side; y++) {
      for (let c = 0; c < 3; c++) out[(y * side + x) * 3 + c] = turned[(x * side + y) * 3 + c];
    }
  }
  return out;
}

// Bytes of a square, row by row, to numbers from 0 to 1, channel by channel.
export function planes(square, side) {
  const out = new Float32Array(3 * side * side);
  for (let i = 0; i < side * side; i++) {
    for (let c = 0; c < 3; c++) out[c * side * side + i] = square[i * 3 + c] / 255;
  }
  return out;
}

function drawn(bitmap, width, height, x, y, w, h) {
  const canvas = new OffscreenCanvas(width, height);
  const context = canvas.getContext('2d', { willReadFrequently: true });
  context.fillStyle = 'white'; // transparency is composed on white
  context.fillRect(0, 0, width, height);
  context.imageSmoothingQuality = 'high';
  context.drawImage(bitmap, x, y, w, h);
  const rgba = context.getImageData(0, 0, width, height).data;
  const data = new Uint8Array(width * height * 3);
  for (let i = 0; i < width * height; i++) {
    for (let c = 0; c < 3; c++) data[i * 3 + c] = rgba[i * 4 + c];
  }
  return { width, height, data };
}

// Decode a picture file: upright, as stored, without conversion of colors.
export async function readPicture(blob) {
  const bitmap = await createImageBitmap(blob, { colorSpaceConversion: 'none' });
  const { width, height } = bitmap;
  const picture = drawn(bitmap, width, height, 0, 0, width, height);
  bitmap.close();
  return picture;
}

// What many pages do instead of `squareOf`: let the canvas resize. Here only to be compared.
export async function squareByCanvas(blob, side) {
  const bitmap = await createImageBitmap(blob, { colorSpaceConversion: 'none' });
  const scale = side / Math.min(bitmap.width, bitmap.height);
  const w = bitmap.width * scale, h = bitmap.height * scale;
  return drawn(bitmap, side, side, (side - w) / 2, (side - h) / 2, w, h).data;
}

export const dot = (a, b) => a.reduce((sum, x, i) => sum + x * b[i], 0);

export function softmax(numbers) {
  const most = Math.max(...numbers);
  const powers = numbers.map((x) => Math.exp(x - most));
  const sum = powers.reduce((a, b) => a + b, 0);
  return powers.map((x) => x / sum);
}

export class Clip {
  // Read everything that lies beside this file. `ort`: ONNX Runtime Web; `report`: gets a line of progress.
  static async load(ort, report = () => {}) {
    const base = new URL('.', import.meta.url).href;
    const clip = new Clip();
    clip.ort = ort;
    ort.env.wasm.numThreads = 1; // more need headers that a plain server does not send
    ort.env.wasm.wasmPaths = { wasm: `${base}ort/ort-wasm-simd-threaded.wasm` };
    const answer = await fetch(`${base}model.json`);
    if (!answer.ok) throw new Error(`model.json: status ${answer.status}`);
    clip.about = await answer.json();
    report('Reading the tokenizer');
    clip.tokenizer = await ClipTokenizer.load(`${base}tokenizer/`);
    for (const tower of ['image', 'text']) {
      report(`Reading ${tower}.onnx (${clip.about.megabytes[tower]} MB)`);
      const options = { executionProviders: ['wasm'] };
      clip[tower] = await ort.InferenceSession.create(`${base}${tower}.onnx`, options);
    }
    return clip;
  }

  // Texts to unit vectors.
  async embedTexts(texts) {
    const rows = texts.map((text) => this.tokenizer.tokenize(text));
    const ids = BigInt64Array.from(rows.flat(), BigInt);
    const text = new this.ort.Tensor('int64', ids, [rows.length, this.about.context]);
    return this.vectors((await this.text.run({ text })).text_embedding);
  }

  // One picture file, or bytes of a square, to a unit vector.
  async embedPicture(picture) {
    const { side, resize } = this.about;
    const isSquare = picture instanceof Uint8Array;
    const square = isSquare ? picture : squareOf(await readPicture(picture), side, resize);
    const image = new this.ort.Tensor('float32', planes(square, side), [1, 3, side, side]);
    return this.vectors((await this.image.run({ image })).image_embedding)[0];
  }

  vectors({ data, dims }) {
    const [n, width] = dims;
    return Array.from({ length: n }, (_, i) => Array.from(data.slice(i * width, (i + 1) * width)));
  }

  // Probabilities of labels for a picture, from unit vectors.
  probabilities(picture, labels) {
    return softmax(labels.map((label) => this.about.scale * dot(picture, label)));
  }
}
