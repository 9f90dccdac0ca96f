// Split answers into words, and draw the attention map of a word over the image.

// ---- words ----

// A word with the white space before it; each Chinese or Japanese character is a word. The server computes one map for
// each word, so this must be the rule of serve/attention_map.py. JavaScript's \s differs from Python's.
const SPACE = "\\t-\\r\\x1c-\\x20\\x85\\xa0\\u1680\\u2000-\\u200a\\u2028\\u2029\\u202f\\u205f\\u3000";
const CJK = "\\u3040-\\u30ff\\u3400-\\u9fff";
const WORD = new RegExp(`([${SPACE}]*)([${CJK}]|[^${SPACE}${CJK}]+)`, "g");

// Return the words of a text, each with the white space before it: [{space, word}].
export function splitWords(text) {
  return [...text.matchAll(WORD)].map(([, space, word]) => ({ space, word }));
}

// ---- weights ----

const sum = (numbers) => numbers.reduce((total, number) => total + number, 0);

// Prepare the server's response for drawing.
// totals: the fraction of each word's attention that is on the image.
// shares: how this fraction is distributed over the patches, row by row; the sum is 1.
export function prepareAttention({ region, words }) {
  const grids = words.map((word) => word.grid);
  const weights = grids.map((grid) => grid.flat());
  const totals = weights.map(sum);
  const shares = weights.map((patches, index) => patches.map((weight) => weight / (totals[index] || 1)));
  return { region, rows: grids[0].length, columns: grids[0][0].length, totals, shares };
}

// Subtract the average over all words of the answer. This removes patches that attract attention whatever the word is
// ("attention sinks"), and leaves the patches that are specific to one word.
export function aboveAverage({ shares }, index) {
  return shares[index].map((share, patch) => {
    const average = sum(shares.map((other) => other[patch])) / shares.length;
    return Math.max(0, share - average);
  });
}

// ---- drawing ----

// One pixel for each patch: the more attention, the brighter and the more transparent.
function drawPatches(rows, columns, shares) {
  const low = Math.min(...shares);
  const high = Math.max(...shares);
  const pixels = new ImageData(columns, rows);
  shares.forEach((share, patch) => {
    const light = high > low ? (share - low) / (high - low) : 0;
    const color = [255 * light, 170 * light, 60 * light, 255 * (0.72 - 0.5 * light)];
    pixels.data.set(color, 4 * patch);
  });
  const canvas = new OffscreenCanvas(columns, rows);
  canvas.getContext("2d").putImageData(pixels, 0, 0);
  return canvas;
}

// Give the veil (the canvas with the attention map) the size and position of the image, which is as large as its box permits and centered.
function coverImage(veil, preview) {
  // Do not use clientWidth: it is rounded, which would leave the edge of the image uncovered.
  const { width: boxWidth, height: boxHeight } = preview.getBoundingClientRect();
  const scale = Math.min(boxWidth / preview.naturalWidth, boxHeight / preview.naturalHeight);
  const width = preview.naturalWidth * scale;
  const height = preview.naturalHeight * scale;
  veil.width = Math.round(width);
  veil.height = Math.round(height);
  veil.style.width = `${width}px`;
  veil.style.height = `${height}px`;
  veil.style.left = `${(boxWidth - width) / 2}px`;
  veil.style.top = `${(boxHeight - height) / 2}px`;
}

// Draw an attention map on a canvas that lies over the image.
// region: the part of the image that the model receives, as fractions of its width and height.
export function drawVeil(veil, preview, { region, rows, columns }, shares) {
  coverImage(veil, preview);
  const [left, top, right, bottom] = region;
  const area = [
    left * veil.width,
    top * veil.height,
    (right - left) * veil.width,
    (bottom - top) * veil.height,
  ];
  const context = veil.getContext("2d");
  context.fillStyle = "rgb(0 0 0 / 72%)"; // the margin that the model does not receive
  context.fillRect(0, 0, veil.width, veil.height);
  context.clearRect(...area);
  context.imageSmoothingQuality = "high";
  context.drawImage(drawPatches(rows, columns, shares), ...area);
}
