"""CLIP's tokenizer in plain Python, from the three files beside it: vocab.json, merges.txt and tables.json.

Equal to the tokenizer of training, but for the repair of wrongly decoded text ("schÃ¶n"). It needs the standard library only, and is
short enough to be written again in another language.
"""

import html
import json
import re
import unicodedata
from pathlib import Path

SPECIAL = ('<start_of_text>', '<end_of_text>')
SUFFIXES = ("'s", "'ſ", "'t", "'re", "'ve", "'m", "'ll", "'d")
TERMINAL = re.compile(r'\x1b\[(?:\d|;)*[a-zA-Z]')
ENTITY = re.compile(r'&#?[0-9A-Za-z]{1,24};')
PAIR = re.compile('[\ud800-\udbff][\udc00-\udfff]')


def byte_letters():
    "A printable character for every byte: itself, or one from U+0100 on"
    letters, other = [], 256
    for b in range(256):
        if 33 <= b <= 126 or 161 <= b <= 172 or b >= 174:
            letters.append(chr(b))
        else:
            letters.append(chr(other))
            other += 1
    return letters


def join_pair(match):
    "The character of a surrogate pair"
    high, low = (ord(c) for c in match[0])
    return chr(0x10000 + (high - 0xD800) * 0x400 + low - 0xDC00)


def kind(c):
    "`L` for a letter, `N` for a number, a space for what belongs to no word, empty for other signs"
    if c in ' \u0345':  # the combining iota: the pattern of training ignores case
        return ' '
    return {'L': 'L', 'N': 'N'}.get(unicodedata.category(c)[0], '')


def split_words(text):
    "Words: runs of letters, single numbers, runs of other signs, English suffixes, special tokens"
    words, i = [], 0
    while i < len(text):
        fixed = next((s for s in SPECIAL + SUFFIXES if text.startswith(s, i)), None)
        k, j = kind(text[i]), i + 1
        if fixed:
            j = i + len(fixed)
        elif k in ('L', ''):
            while j < len(text) and kind(text[j]) == k:
                j += 1
        if k != ' ':
            words.append(text[i:j])
        i = j
    return words


class ClipTokenizer:
    "Texts to ids"

    def __init__(self, folder):
        folder = Path(folder)
        self.vocab = json.loads((folder / 'vocab.json').read_text(encoding='utf-8'))
        self.tables = json.loads((folder / 'tables.json').read_text(encoding='utf-8'))
        lines = (folder / 'merges.txt').read_text(encoding='utf-8').split('\n')
        pairs = [tuple(line.split(' ')) for line in lines if line and not line.startswith('#version')]
        self.ranks = {pair: rank for rank, pair in enumerate(pairs)}
        self.letters, self.context = byte_letters(), self.tables['context']

    def entity(self, match):
        "One HTML reference that ends in a semicolon"
        text = match[0]
        if text in self.tables['strict']:
            return self.tables['strict'][text]
        if not text.startswith('&#'):
            return text
        out = html.unescape(text)
        return text if ';' in out else out

    def repair(self, line):
        "One line until nothing changes: references, escapes, widths, ligatures, quotes"
        is_markup, characters = '<' in line, self.tables['characters']
        while True:
            before = line
            if not is_markup:
                line = ENTITY.sub(self.entity, line)
            line = re.sub('[\ud800-\udfff]', '\ufffd', PAIR.sub(join_pair, line))
            line = TERMINAL.sub('', line)
            line = ''.join(characters.get(c, c) for c in line)
            line = unicodedata.normalize('NFC', line)
            if line == before:
                return line

    def clean(self, text):
        "A text as in training: repaired, unescaped, single-spaced, in lower case"
        text = '\n'.join(self.repair(line) for line in text.split('\n'))
        return ' '.join(html.unescape(html.unescape(text)).split()).lower()

    def merge(self, word):
        "Merge neighboring pieces, lowest rank first"
        parts = [*word[:-1], word[-1] + '</w>']
        while len(parts) > 1:
            ranked = [(self.ranks.get(pair), i) for i, pair in enumerate(zip(parts, parts[1:]))]
            known = [(rank, i) for rank, i in ranked if rank is not None]
            if not known:
                break
            i = min(known)[1]
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        return parts

    def encode(self, text):
        "Ids of a text without start, end and padding"
        ids, special = [], dict(zip(SPECIAL, (self.tables['start'], self.tables['end'])))
        for word in split_words(self.clean(text)):
            if word in special:
                ids.append(special[word])
            else:
                spelled = ''.join(self.letters[b] for b in word.encode('utf-8', 'replace'))
                ids += [self.vocab[piece] for piece in self.merge(spelled)]
        return ids

    def tokenize(self, text):
        "One row of ids with start and end, padded to the context length"
        start, end, pad = (self.tables[k] for k in ('start', 'end', 'pad'))
        ids = [start, *self.encode(text)[: self.context - 2], end]
        return ids + [pad] * (self.context - len(ids))
