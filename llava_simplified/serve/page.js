// Lays over the picture where the model looked for the word that is pointed at (by mouse, finger or keyboard).
// Gradio runs this with `element` (the conversation), `trigger`, `props` and `watch` when the page has loaded.
const looks = new Map();  // answer's key -> {region, grids}
const veil = document.createElement("canvas");
veil.id = "veil";
const sum = (numbers) => numbers.reduce((total, number) => total + number, 0);
let word = null, asked = null;

function point(to) {
  if (to === word) return;
  word?.classList.remove("pointed");
  word = to;
  word?.classList.add("pointed");
  show();
}

function show() {
  const answer = word?.closest(".answer"), key = answer?.dataset.key, look = looks.get(key);
  const note = element.querySelector(".note");
  if (note) note.textContent = note.dataset.hint ??= note.textContent;
  if (!look) {
    veil.remove();
    if (answer && asked !== key) trigger("look", {key: asked = key});
    return;
  }
  const index = [...answer.querySelectorAll(".word")].indexOf(word), totals = look.grids.map((grid) => sum(grid.flat()));
  const parts = look.grids.map((grid, i) => grid.flat().map((share) => share / (totals[i] || 1)));
  const compared = parts.length > 1 && element.querySelector(".note input")?.checked;
  // Some places draw attention whatever is said ("attention sinks"): set against the others, a word's own stand out.
  const less = (place) => compared ? sum(parts.map((grid) => grid[place])) / parts.length : 0;
  draw(look, parts[index].map((part, place) => Math.max(0, part - less(place))));
  if (note) note.textContent = `“${word.textContent}”: ` + (compared
    ? "bright where the model looked more than for the other words."
    : `${Math.round(100 * totals[index])} % of the model's attention was on the picture, the most where it is bright.`);
}

watch("looks", () => {
  looks.set(props.looks.key, props.looks);
  asked = null;
  show();
});

// The attention as light on a darkened picture: brightest where most of it went.
function draw({region: [left, top, right, bottom], grids}, shares) {
  const img = document.querySelector("#picture img");
  if (!img) return;
  const rows = grids[0].length, columns = grids[0][0].length;
  const low = Math.min(...shares), high = Math.max(...shares);
  const small = new OffscreenCanvas(columns, rows), pixels = new ImageData(columns, rows);
  shares.forEach((share, i) => {
    const light = high > low ? (share - low) / (high - low) : 0;
    pixels.data.set([255 * light, 170 * light, 60 * light, 255 * (0.72 - 0.5 * light)], 4 * i);
  });
  small.getContext("2d").putImageData(pixels, 0, 0);

  // the picture inside its box: as large as fits, in the middle
  const box = img.getBoundingClientRect(), frame = img.offsetParent.getBoundingClientRect();
  const scale = Math.min(box.width / img.naturalWidth, box.height / img.naturalHeight);
  const width = img.naturalWidth * scale, height = img.naturalHeight * scale;
  veil.width = width; veil.height = height;
  veil.style.left = `${box.left - frame.left + (box.width - width) / 2}px`;
  veil.style.top = `${box.top - frame.top + (box.height - height) / 2}px`;
  const context = veil.getContext("2d");
  context.fillStyle = "rgb(0 0 0 / 72%)";  // what the model is not shown
  context.fillRect(0, 0, width, height);
  context.clearRect(left * width, top * height, (right - left) * width, (bottom - top) * height);
  context.imageSmoothingQuality = "high";
  context.drawImage(small, left * width, top * height, (right - left) * width, (bottom - top) * height);
  img.offsetParent.append(veil);
}

const at = (event) => event.target.closest(".answer:not(.writing) .word");
element.addEventListener("pointerover", (event) => event.pointerType === "mouse" && at(event) && point(at(event)));
element.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && point(null));
element.addEventListener("focusin", (event) => at(event) && point(at(event)));
element.addEventListener("focusout", (event) => element.contains(event.relatedTarget) || point(null));
element.addEventListener("change", show);
