"use strict";
// Draws the page data (page_data.py). All text is inserted as text, never as HTML. controls.js is appended to this file.

const CHANNELS_SHOWN = 8; // Per layer, until the button "Show all" is pressed.
const ORIGINAL_PX = 1024; // Longest side at which the original picture is drawn.
const POSITIVE_COLOUR = [214, 13, 13], NEGATIVE_COLOUR = [13, 64, 214], OVERLAY_OPACITY = 0.75; // As in convscope.pixels.

const byId = (id) => document.getElementById(id);

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

const decodeBytes = (base64) => Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
const clamp = (value, minimum, maximum) => Math.min(Math.max(value, minimum), maximum);
const formatNumber = (value) => (value === null ? "not a number" : String(Number(value.toPrecision(4))).replace("-", "−"));
const formatInteger = (value) => String(value).replace("-", "−");
const formatSize = (height, width) => `${height}×${width}`;

// One layer's map; a heat map has a single channel.
class FeatureMap {
  constructor(packed) {
    Object.assign(this, packed);
    this.values = decodeBytes(packed.values);
    this.area = this.rows * this.columns;
  }

  byte(position, row, column) {
    return this.values[position * this.area + row * this.columns + column];
  }

  value(position, row, column) {
    const [minimum, maximum] = [this.min[position], this.max[position]];
    return minimum === null ? null : minimum + (this.byte(position, row, column) / 255) * (maximum - minimum);
  }

  title(position) {
    return `${this.name}, channel ${this.channels[position]}`;
  }

  description(position, row, column) {
    const range = `min ${formatNumber(this.min[position])}, max ${formatNumber(this.max[position])} in this channel`;
    return `${this.title(position)}, row ${row}, column ${column}: about ${formatNumber(this.value(position, row, column))} (${range}).`;
  }

  // The cell's receptive field in input pixels, inclusive; may extend past the picture.
  receptiveField(row, column) {
    const { receptive_field: size, receptive_field_start: start, stride } = this;
    if (!size || !start || !stride || size.length < 2) return null;
    const top = start[0] + row * stride[0], left = start[1] + column * stride[1];
    return { top, left, bottom: top + size[0] - 1, right: left + size[1] - 1 };
  }

  strongest(position) {
    const values = this.values.subarray(position * this.area, (position + 1) * this.area);
    let best = 0;
    for (let index = 1; index < values.length; index++) if (values[index] > values[best]) best = index;
    return { row: Math.floor(best / this.columns), column: best % this.columns };
  }

  paint(canvas, position) {
    canvas.width = this.columns;
    canvas.height = this.rows;
    const image = new ImageData(this.columns, this.rows);
    for (let index = 0; index < this.area; index++) {
      const grey = this.values[position * this.area + index];
      image.data.set([grey, grey, grey, 255], index * 4);
    }
    canvas.getContext("2d").putImageData(image, 0, 0);
  }
}

class HeatMap extends FeatureMap {
  constructor(packed, picture) {
    super({ ...packed, name: "heat map", channels: [0], channel_count: 1 });
    this.picture = picture;
  }

  value(position, row, column) {
    return ((this.byte(position, row, column) - 128) / 127) * this.max;
  }

  title() {
    return `heat map, ${this.method}${this.layer ? ` at ${this.layer}` : ""}`;
  }

  description(position, row, column) {
    const value = this.value(position, row, column);
    const share = this.max ? Math.round((100 * Math.abs(value)) / this.max) : 0;
    const effect = value === 0
      ? "no contribution"
      : `${value > 0 ? "raises" : "lowers"} the score of “${this.label}”, ${share} % of the strongest contribution`;
    return `Heat map, row ${row}, column ${column}: ${effect}.`;
  }

  // The part of the picture that a cell covers once the heat is interpolated to its size.
  receptiveField(row, column) {
    const { height, width } = this.picture;
    const top = Math.floor((row * height) / this.rows), left = Math.floor((column * width) / this.columns);
    return {
      top, left,
      bottom: Math.max(top, Math.ceil(((row + 1) * height) / this.rows) - 1),
      right: Math.max(left, Math.ceil(((column + 1) * width) / this.columns) - 1),
    };
  }

  paint(canvas) {
    const { height, width } = this.picture;
    canvas.width = width;
    canvas.height = height;
    const image = canvas.getContext("2d").createImageData(width, height);
    for (let y = 0; y < height; y++) {
      for (let x = 0; x < width; x++) {
        const heat = this.interpolated((y + 0.5) / height, (x + 0.5) / width);
        const strength = Math.abs(heat) * OVERLAY_OPACITY, colour = heat < 0 ? NEGATIVE_COLOUR : POSITIVE_COLOUR;
        const grey = this.picture.grey(y, x);
        for (let c = 0; c < 3; c++) image.data[(y * width + x) * 4 + c] = grey + (colour[c] - grey) * strength;
        image.data[(y * width + x) * 4 + 3] = 255;
      }
    }
    canvas.getContext("2d").putImageData(image, 0, 0);
  }

  // Bilinear interpolation, in -1..1.
  interpolated(y, x) {
    const row = clamp(y * this.rows - 0.5, 0, this.rows - 1), column = clamp(x * this.columns - 0.5, 0, this.columns - 1);
    const top = Math.floor(row), left = Math.floor(column);
    const bottom = Math.min(top + 1, this.rows - 1), right = Math.min(left + 1, this.columns - 1);
    const mix = (a, b, share) => a + (b - a) * share;
    const at = (r, c) => (this.byte(0, r, c) - 128) / 127;
    return mix(mix(at(top, left), at(top, right), column - left), mix(at(bottom, left), at(bottom, right), column - left), row - top);
  }
}

// The input picture. Call `draw()` before reading pixels.
class InputPicture {
  constructor(packed, canvas) {
    this.canvas = canvas;
    this.packed = packed;
  }

  async draw() {
    const { packed, canvas } = this;
    let source = null;
    if (packed.file) {
      source = new Image();
      source.src = packed.file;
      await source.decode();
    }
    this.height = canvas.height = packed.rows ?? source.naturalHeight;
    this.width = canvas.width = packed.columns ?? source.naturalWidth;
    const context = canvas.getContext("2d", { willReadFrequently: true });
    if (source) {
      context.fillStyle = "#fff"; // Transparent pictures are composited on white, as the service does.
      context.fillRect(0, 0, this.width, this.height);
      context.drawImage(source, 0, 0, this.width, this.height);
    } else {
      const values = decodeBytes(packed.values), area = this.height * this.width, image = context.createImageData(this.width, this.height);
      for (let index = 0; index < area; index++) {
        const colour = packed.channels === 3 ? [values[index], values[area + index], values[2 * area + index]] : Array(3).fill(values[index]);
        image.data.set([...colour, 255], index * 4);
      }
      context.putImageData(image, 0, 0);
    }
    const image = context.getImageData(0, 0, this.width, this.height);
    if (source && packed.channels === 1) {
      for (let index = 0; index < image.data.length; index += 4) {
        const [red, green, blue] = image.data.subarray(index, index + 3);
        image.data.fill(0.299 * red + 0.587 * green + 0.114 * blue, index, index + 3);
      }
      context.putImageData(image, 0, 0);
    }
    this.pixels = image.data;
  }

  grey(y, x) {
    const index = (y * this.width + x) * 4;
    return (this.pixels[index] + this.pixels[index + 1] + this.pixels[index + 2]) / 3;
  }
}

// The selected map, channel position and cell; Escape returns focus to `tile`.
const selection = { map: null, position: 0, row: 0, column: 0, tile: null };
const expandedLayers = new Set(); // Layers whose channels are all shown, also for the next picture.
let picture = null;
let original = null; // The picture that was sent, if the network sees only a part of it: {rows, columns, region, file}.

// A box of input pixels, inclusive, in pixels of the original picture, bottom and right exclusive.
function toOriginal({ top, left, bottom, right }) {
  const [first, start, last, end] = original.region;
  const y = (last - first) / picture.height, x = (end - start) / picture.width;
  return { top: first + top * y, left: start + left * x, bottom: first + (bottom + 1) * y, right: start + (right + 1) * x };
}

function positionBox(box, top, left, bottom, right, height, width) {
  const y = clamp(top, 0, height), x = clamp(left, 0, width);
  box.style.top = `${(100 * y) / height}%`;
  box.style.left = `${(100 * x) / width}%`;
  box.style.height = `${(100 * (clamp(bottom + 1, 0, height) - y)) / height}%`;
  box.style.width = `${(100 * (clamp(right + 1, 0, width) - x)) / width}%`;
}

function fieldDescription(map, row, column) {
  const field = map.receptiveField(row, column);
  if (!field) return "Receptive field unknown.";
  const { top, left, bottom, right } = field;
  const inPadding = picture && (top < 0 || left < 0 || bottom >= picture.height || right >= picture.width);
  return `Receptive field: rows ${formatInteger(top)} to ${formatInteger(bottom)}, columns ${formatInteger(left)} to ${formatInteger(right)}, ` +
    `${formatSize(bottom - top + 1, right - left + 1)} pixels${inPadding ? " (partly padding)" : ""}.${originalDescription(field)}`;
}

function originalDescription(field) {
  if (!(original && picture)) return "";
  const { top, left, bottom, right } = toOriginal(field);
  return ` In the original: rows ${formatInteger(Math.floor(top))} to ${formatInteger(Math.ceil(bottom) - 1)}, ` +
    `columns ${formatInteger(Math.floor(left))} to ${formatInteger(Math.ceil(right) - 1)}.`;
}

// Describe a cell and mark its receptive field.
function describeCell(map, position, row, column) {
  byId("cell-description").textContent = `${map.description(position, row, column)} ${fieldDescription(map, row, column)}`;
  const field = map.receptiveField(row, column), box = byId("receptive-field-box");
  box.hidden = !(field && picture);
  if (!box.hidden) positionBox(box, field.top, field.left, field.bottom, field.right, picture.height, picture.width);
  const originalBox = byId("original-box");
  originalBox.hidden = box.hidden || !original;
  if (originalBox.hidden) return;
  const { top, left, bottom, right } = toOriginal(field);
  positionBox(originalBox, top, left, bottom - 1, right - 1, original.rows, original.columns);
}

function moveTo(row, column) {
  const { map } = selection;
  selection.row = clamp(row, 0, map.rows - 1);
  selection.column = clamp(column, 0, map.columns - 1);
  positionBox(byId("cell"), selection.row, selection.column, selection.row, selection.column, map.rows, map.columns);
  describeCell(map, selection.position, selection.row, selection.column);
}

function select(map, position, cell) {
  Object.assign(selection, { map, position, tile: tileOf(map, position) });
  const frame = byId("map");
  map.paint(frame.querySelector("canvas"), position);
  frame.setAttribute("aria-label", `${map.title(position)}, ${map.rows} rows of ${map.columns} cells`);
  byId("map-caption").textContent = `${map.title(position)}: ${formatSize(map.rows, map.columns)} cells`;
  for (const tile of document.querySelectorAll(".tile")) tile.setAttribute("aria-pressed", String(tile === selection.tile));
  const { row, column } = cell ?? map.strongest(position);
  moveTo(row, column);
}

const tileOf = (map, position) => [...document.querySelectorAll(".tile")].find((tile) => tile.map === map && tile.position === position) ?? null;

function cellUnder(event, canvas, map) {
  const box = canvas.getBoundingClientRect();
  return {
    row: clamp(Math.floor(((event.clientY - box.top) / box.height) * map.rows), 0, map.rows - 1),
    column: clamp(Math.floor(((event.clientX - box.left) / box.width) * map.columns), 0, map.columns - 1),
  };
}

function makeTile(map, position, name) {
  const canvas = make("canvas", { "aria-hidden": "true" });
  map.paint(canvas, position);
  const tile = make("button", { type: "button", class: "tile", "aria-pressed": "false", "aria-label": `${map.title(position)}: enlarge` },
    canvas, make("span", { class: "name" }, name));
  Object.assign(tile, { map, position });
  canvas.addEventListener("pointermove", (event) => {
    const { row, column } = cellUnder(event, canvas, map);
    describeCell(map, position, row, column);
  });
  canvas.addEventListener("pointerleave", () => moveTo(selection.row, selection.column));
  tile.addEventListener("click", (event) => {
    const byKeyboard = event.detail === 0; // Activated by keyboard: keep keyboard focus in the viewer.
    select(map, position, byKeyboard ? null : cellUnder(event, canvas, map));
    if (byKeyboard) byId("map").focus();
  });
  return tile;
}

function initViewer() {
  const frame = byId("map"), canvas = frame.querySelector("canvas");
  const follow = (event) => {
    const { row, column } = cellUnder(event, canvas, selection.map);
    moveTo(row, column);
  };
  frame.addEventListener("pointermove", follow);
  frame.addEventListener("pointerdown", follow);
  frame.addEventListener("keydown", (event) => {
    const { map, row, column, position } = selection, stride = event.shiftKey ? 8 : 1;
    const changeChannel = (step) => select(map, clamp(position + step, 0, map.channels.length - 1), { row, column });
    const actions = {
      ArrowUp: () => moveTo(row - stride, column),
      ArrowDown: () => moveTo(row + stride, column),
      ArrowLeft: () => moveTo(row, column - stride),
      ArrowRight: () => moveTo(row, column + stride),
      Home: () => moveTo(event.ctrlKey ? 0 : row, 0),
      End: () => moveTo(event.ctrlKey ? map.rows - 1 : row, map.columns - 1),
      PageUp: () => changeChannel(-1),
      PageDown: () => changeChannel(1),
      Escape: () => selection.tile?.focus(),
    };
    if (!actions[event.key] || event.altKey || event.metaKey) return;
    event.preventDefault();
    actions[event.key]();
  });
}

function showScores(scores) {
  byId("scores").replaceChildren(...scores.map(({ label, probability, logit, value }) => {
    if (value !== undefined) return make("li", {}, make("span", { class: "label" }, label), make("span", { class: "number" }, formatNumber(value)));
    const fill = make("div", { class: "fill" });
    fill.style.width = `${100 * probability}%`;
    const share = make("span", { class: "number" }, `${(100 * probability).toFixed(2)} %`);
    if (logit !== null) share.title = `logit ${formatNumber(logit)}`;
    return make("li", {}, make("span", { class: "label" }, label), make("div", { class: "track", "aria-hidden": "true" }, fill), share);
  }));
  if (!scores.length) byId("scores").append(make("li", {}, "This network has no classes."));
}

function showLayer(map) {
  const strip = make("div", { class: "strip" });
  const addTiles = (from, to) => {
    for (let position = from; position < to; position++) strip.append(makeTile(map, position, `${map.channels[position]}`));
  };
  const count = map.channels.length;
  const channels = count < map.channel_count ? `the ${count} strongest of ${map.channel_count} channels` : `${count} channel${count === 1 ? "" : "s"}`;
  const section = make("section", { "aria-label": map.name }, make("h3", {}, `${map.name}: ${channels} of ${formatSize(map.rows, map.columns)} cells`), strip);
  const shown = expandedLayers.has(map.name) ? count : Math.min(CHANNELS_SHOWN, count);
  addTiles(0, shown);
  if (shown < count) {
    const more = make("button", { type: "button", class: "more", "aria-label": `Show all ${count} channels of ${map.name}` }, `Show all ${count}`);
    more.addEventListener("click", () => {
      expandedLayers.add(map.name);
      addTiles(shown, count);
      more.remove();
      strip.children[shown].focus();
    });
    section.append(more);
  }
  return section;
}

function showTable(table, caption, headings, rows) {
  const head = make("tr", {}, ...headings.map((heading) => make("th", { scope: "col" }, heading)));
  const body = rows.map(([name, ...texts]) => make("tr", {}, make("th", { scope: "row" }, name), ...texts.map((text) => make("td", {}, text))));
  table.replaceChildren(make("thead", {}, head), make("tbody", {}, ...body));
  table.setAttribute("aria-label", caption);
}

function showHeat(packed) {
  byId("heat-section").hidden = !(packed && picture);
  byId("heat").replaceChildren();
  if (byId("heat-section").hidden) return null;
  const map = new HeatMap(packed, picture);
  byId("heat").append(makeTile(map, 0, `${packed.method}${packed.layer ? ` at ${packed.layer}` : ""}`));
  const { row, column } = map.strongest(0), field = map.receptiveField(row, column);
  byId("heat-info").textContent = `Red raises the score of “${packed.label}”, blue lowers it; grey: no contribution. ` +
    `Strongest around row ${Math.round((field.top + field.bottom) / 2)}, column ${Math.round((field.left + field.right) / 2)} of the picture. ` +
    "Click to enlarge; each cell shows its share of the strongest contribution.";
  return map;
}

async function showPicture(packed, title) {
  picture = null;
  const canvas = byId("picture"), next = packed && new InputPicture(packed, canvas);
  canvas.parentElement.hidden = !packed;
  if (next) {
    await next.draw();
    picture = next;
  }
  const origin = packed?.exact ? "the network’s input" : "the file, resized by this page";
  const caption = picture ? `${title}, ${origin}, ${formatSize(picture.height, picture.width)} pixels` : "The picture cannot be shown here.";
  canvas.setAttribute("aria-label", caption);
  byId("picture-caption").textContent = caption;
}

async function showOriginal(packed) {
  original = picture && packed;
  byId("original-part").hidden = !original;
  if (!original) return;
  const source = new Image(), canvas = byId("original"), { rows, columns, region: [top, left, bottom, right] } = original;
  source.src = packed.file;
  await source.decode();
  const scale = Math.min(1, ORIGINAL_PX / Math.max(rows, columns));
  canvas.height = Math.max(1, Math.round(rows * scale));
  canvas.width = Math.max(1, Math.round(columns * scale));
  const context = canvas.getContext("2d");
  context.fillStyle = "#fff";
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.drawImage(source, 0, 0, canvas.width, canvas.height);
  positionBox(byId("seen-box"), top, left, bottom - 1, right - 1, rows, columns);
  byId("original-caption").textContent = `The original, ${formatSize(rows, columns)} pixels; dashed: the part that the network sees`;
}

async function show(data) {
  const { model } = data;
  byId("title").textContent = `${data.title} – ${model.name}`;
  byId("model-info").textContent = `${model.description ? `${model.description.replace(/\.?$/, ".")} ` : ""}` +
    `Version ${model.version}, ${model.parameters.toLocaleString("en")} parameters, ${model.engine} on ${model.device}.`;
  byId("request-info").textContent = `convscope, request ${model.request}`;
  await showPicture(data.picture, data.title);
  await showOriginal(data.original);
  showScores(data.scores);
  const heat = showHeat(data.heat);
  const maps = data.layers.map((packed) => new FeatureMap(packed));
  byId("maps").hidden = !maps.length;
  byId("layers").replaceChildren(...maps.map(showLayer));
  showTable(byId("geometry"), "Layers of the network", data.geometry.headings, data.geometry.rows);
  byId("timing-section").hidden = !data.timing;
  if (data.timing) showTable(byId("timing"), "Milliseconds by stage", ["milliseconds", ...data.timing.map(([name]) => name)],
    [["this request", ...data.timing.map(([, ms]) => ms.toFixed(2))]]);
  byId("main").hidden = false;
  const all = heat ? [heat, ...maps] : maps;
  byId("map-figure").hidden = byId("help").hidden = !all.length;
  if (!all.length) return;
  const previous = selection.map && {
    name: selection.map.name, channel: selection.map.channels[selection.position], row: selection.row, column: selection.column,
  };
  const map = all.find(({ name }) => name === previous?.name);
  const position = map ? map.channels.indexOf(previous.channel) : -1;
  if (position >= 0) select(map, position, previous);
  else select(maps[0] ?? heat, 0);
}

initViewer();
const initialData = JSON.parse(byId("data").textContent);
if (initialData) show(initialData);
