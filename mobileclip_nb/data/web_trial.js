// Called in the page by a trial: embeds strings, picture files (base64), and the same files resized by the canvas.
async ({ texts, pictures }) => {
  const ort = await import('./ort/ort.wasm.bundle.min.mjs');
  const { Clip, squareByCanvas } = await import('./clip.mjs');
  const clip = await Clip.load(ort);
  const blobs = pictures.map((text) => new Blob([Uint8Array.from(atob(text), (c) => c.charCodeAt(0))]));
  const answer = { text: await clip.embedTexts(texts), image: [], canvas: [] };
  for (const blob of blobs) {
    answer.image.push(await clip.embedPicture(blob));
    answer.canvas.push(await clip.embedPicture(await squareByCanvas(blob, clip.about.side)));
  }
  return answer;
}
