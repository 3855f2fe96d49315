// Reads texts as JSON lines from standard input, writes rows of ids as JSON lines: node tokenize_in_node.mjs FOLDER
import { readFileSync } from 'node:fs';
import { ClipTokenizer } from './clip_tokenizer.mjs';

const folder = process.argv[2];
const read = (name) => readFileSync(`${folder}/${name}`, 'utf-8');
const tables = JSON.parse(read('tables.json'));
const tokenizer = new ClipTokenizer(JSON.parse(read('vocab.json')), read('merges.txt'), tables);
const lines = readFileSync(0, 'utf-8').split('\n').filter((line) => line);
const rows = lines.map((line) => JSON.stringify(tokenizer.tokenize(JSON.parse(line))));
process.stdout.write(rows.join('\n') + '\n');
