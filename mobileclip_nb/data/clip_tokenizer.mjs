// CLIP's tokenizer without dependencies, for browsers, Node and other JavaScript engines.
// It reads the three files beside it: vocab.json, merges.txt and tables.json.
// Equal to the tokenizer of training, but for the repair of wrongly decoded text ("schÃ¶n").
// U+0345, the combining iota, belongs to no word there, because the pattern of training ignores case.

const WORD = /<start_of_text>|<end_of_text>|'[sſ]|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}\u0345]+/gu;
const SPACE = /[\t-\r\x1c-\x1f \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]+/u;
const TERMINAL = /\x1b\[(?:\p{Nd}|;)*[a-zA-Z]/gu;
const STRICT_ENTITY = /&#?[0-9A-Za-z]{1,24};/g;
const ENTITY = /&(#[0-9]+;?|#[xX][0-9a-fA-F]+;?|[^\t\n\f <&#;]{1,32};?)/gu;
const LONGEST_CACHE = 65536;

// A printable character for every byte: itself, or one from U+0100 on.
function byteLetters() {
  const letters = new Array(256);
  let next = 256;
  for (let b = 0; b < 256; b++) {
    const printable = (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || b >= 174;
    letters[b] = String.fromCharCode(printable ? b : next++);
  }
  return letters;
}

export class ClipTokenizer {
  // vocab: object from piece to id; merges: text of merges.txt; tables: object of tables.json
  constructor(vocab, merges, tables) {
    this.vocab = vocab;
    this.tables = tables;
    this.context = tables.context;
    const lines = merges.split('\n').filter((line) => line && !line.startsWith('#version'));
    this.ranks = new Map(lines.map((line, rank) => [line, rank]));
    this.letters = byteLetters();
    this.special = { '<start_of_text>': tables.start, '<end_of_text>': tables.end };
    this.cache = new Map();
    this.bytes = new TextEncoder();
  }

  // Read the files from a URL that ends in a slash.
  static async load(url) {
    const get = async (name) => {
      const response = await fetch(url + name);
      if (!response.ok) throw new Error(`${url}${name}: status ${response.status}`);
      return response;
    };
    const [vocab, merges, tables] = await Promise.all(
      ['vocab.json', 'merges.txt', 'tables.json'].map(get)
    );
    return new ClipTokenizer(await vocab.json(), await merges.text(), await tables.json());
  }

  // One numeric character reference, as HTML 5 reads it.
  number(digits) {
    const hex = digits[0] === 'x' || digits[0] === 'X';
    const n = parseInt(hex ? digits.slice(1) : digits, hex ? 16 : 10);
    const known = this.tables.numeric[n];
    if (known !== undefined) return known;
    if ((n >= 0xd800 && n <= 0xdfff) || !(n <= 0x10ffff)) return '\ufffd';
    if ((n >= 0xfdd0 && n <= 0xfdef) || (n & 0xfffe) === 0xfffe) return '';
    return String.fromCodePoint(n);
  }

  // Replace HTML references, also without their semicolon.
  unescape(text) {
    if (!text.includes('&')) return text;
    const names = this.tables.entities;
    return text.replace(ENTITY, (all, name) => {
      if (name[0] === '#') return this.number(name.slice(1).replace(';', ''));
      if (Object.hasOwn(names, name)) return names[name];
      const letters = [...name];
      for (let n = letters.length - 1; n > 1; n--) {
        const begin = letters.slice(0, n).join('');
        if (Object.hasOwn(names, begin)) return names[begin] + letters.slice(n).join('');
      }
      return all;
    });
  }

  // Replace HTML references that end in a semicolon, and capitals such as &EACUTE;
  unescapeStrict(text) {
    return text.replace(STRICT_ENTITY, (all) => {
      if (Object.hasOwn(this.tables.strict, all)) return this.tables.strict[all];
      if (!all.startsWith('&#')) return all;
      const out = this.unescape(all);
      return out.includes(';') ? all : out;
    });
  }

  // Repair one line until nothing changes: references, escapes, widths, ligatures, quotes.
  repair(line) {
    const isMarkup = line.includes('<');
    for (;;) {
      const before = line;
      if (!isMarkup) line = this.unescapeStrict(line);
      line = line.replace(/\p{Surrogate}/gu, '\ufffd').replace(TERMINAL, '');
      line = Array.from(line, (c) => this.tables.characters[c] ?? c).join('').normalize('NFC');
      if (line === before) return line;
    }
  }

  // A text as in training: repaired, unescaped, single-spaced, in lower case.
  clean(text) {
    const repaired = text.split('\n').map((line) => this.repair(line)).join('\n');
    const plain = this.unescape(this.unescape(repaired));
    return plain.split(SPACE).filter((word) => word).join(' ').toLowerCase();
  }

  // Merge neighboring pieces, lowest rank first.
  merge(word) {
    const parts = Array.from(word);
    parts[parts.length - 1] += '</w>';
    while (parts.length > 1) {
      let best = Infinity, at = -1;
      for (let i = 0; i + 1 < parts.length; i++) {
        const rank = this.ranks.get(parts[i] + ' ' + parts[i + 1]);
        if (rank !== undefined && rank < best) { best = rank; at = i; }
      }
      if (at < 0) break;
      parts.splice(at, 2, parts[at] + parts[at + 1]);
    }
    return parts;
  }

  // The ids of one word.
  wordIds(word) {
    if (Object.hasOwn(this.special, word)) return [this.special[word]];
    let ids = this.cache.get(word);
    if (!ids) {
      const spelled = Array.from(this.bytes.encode(word), (b) => this.letters[b]).join('');
      ids = this.merge(spelled).map((piece) => this.vocab[piece]);
      if (this.cache.size >= LONGEST_CACHE) this.cache.clear();
      this.cache.set(word, ids);
    }
    return ids;
  }

  // Ids of a text without start, end and padding.
  encode(text) {
    return [...this.clean(text).matchAll(WORD)].flatMap(([word]) => this.wordIds(word));
  }

  // One row of ids with start and end, padded to the context length.
  tokenize(text) {
    const { start, end, pad } = this.tables;
    const ids = [start, ...this.encode(text).slice(0, this.context - 2), end];
    return [...ids, ...new Array(this.context - ids.length).fill(pad)];
  }
}
