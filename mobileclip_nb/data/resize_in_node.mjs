// Resizes as the page does: node resize_in_node.mjs FOLDER, a request as JSON on standard input.
// FOLDER is an export for `web`; the request has a side, a filter and images with width, height and base64 RGB.
import { readFileSync } from 'node:fs';
import { resolve } from 'node:path';
import { pathToFileURL } from 'node:url';

const { squareOf } = await import(pathToFileURL(resolve(process.argv[2], 'clip.mjs')).href);
const { side, filter, images } = JSON.parse(readFileSync(0, 'utf-8'));
const squares = images.map(({ width, height, data }) => {
  const square = squareOf({ width, height, data: new Uint8Array(Buffer.from(data, 'base64')) }, side, filter);
  return Buffer.from(square).toString('base64');
});
process.stdout.write(JSON.stringify(squares) + '\n');
