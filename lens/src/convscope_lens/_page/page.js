"use strict";
// Draws the data of a picture (scene.py). All text is inserted as text, never as HTML.

const FIRST = 8; // Channels of a layer shown before all are asked for.
const FOR = [214, 13, 13], AGAINST = [13, 64, 214], OVERLAY = 0.75; // As convscope.pixels paints heat.

const byId = (id) => document.getElementById(id);

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

const bytes = (base64) => Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
const clamp = (value, least, greatest) => Math.min(Math.max(value, least), greatest);
const short = (value) => (value === null ? "not a number" : String(Number(value.toPrecision(4))).replace("-", "−"));
const whole = (value) => String(value).replace("-", "−");
const size = (height, width) => `${height}×${width}`;

// A map as the viewer takes it: the heat map is one of a single channel.
class FeatureMap {
  constructor(packed) {
    Object.assign(this, packed);
    this.cells = bytes(packed.cells);
    this.area = this.rows * this.columns;
  }

  byte(position, row, column) {
    return this.cells[position * this.area + row * this.columns + column];
  }

  value(position, row, column) {
    const [least, greatest] = [this.least[position], this.greatest[position]];
    return least === null ? null : least + (this.byte(position, row, column) / 255) * (greatest - least);
  }

  title(position) {
    return `${this.name}, channel ${this.channels[position]}`;
  }

  tell(position, row, column) {
    const range = `of ${short(this.least[position])} to ${short(this.greatest[position])} in this channel`;
    return `${this.title(position)}, row ${row}, column ${column}: about ${short(this.value(position, row, column))}, ${range}.`;
  }

  // What a cell sees: first and last row and column in the picture, which may lie outside it.
  seen(row, column) {
    if (!this.field || !this.start || !this.stride || this.field.length < 2) return null;
    const top = this.start[0] + row * this.stride[0], left = this.start[1] + column * this.stride[1];
    return { top, left, bottom: top + this.field[0] - 1, right: left + this.field[1] - 1 };
  }

  strongest(position) {
    const cells = this.cells.subarray(position * this.area, (position + 1) * this.area);
    let best = 0;
    for (let place = 1; place < cells.length; place++) if (cells[place] > cells[best]) best = place;
    return { row: Math.floor(best / this.columns), column: best % this.columns };
  }

  paint(canvas, position) {
    canvas.width = this.columns;
    canvas.height = this.rows;
    const image = new ImageData(this.columns, this.rows);
    for (let place = 0; place < this.area; place++) {
      const grey = this.cells[position * this.area + place];
      image.data.set([grey, grey, grey, 255], place * 4);
    }
    canvas.getContext("2d").putImageData(image, 0, 0);
  }
}

class HeatMap extends FeatureMap {
  constructor(packed, picture) {
    super({ ...packed, name: "heat map", channels: [0], of: 1 });
    this.picture = picture;
  }

  value(position, row, column) {
    return ((this.byte(position, row, column) - 128) / 127) * this.greatest;
  }

  title() {
    return `heat map, ${this.method}${this.layer ? ` at ${this.layer}` : ""}`;
  }

  tell(position, row, column) {
    const value = this.value(position, row, column);
    const share = this.greatest ? Math.round((100 * Math.abs(value)) / this.greatest) : 0;
    const what = value === 0 ? "says nothing" : `speaks ${value > 0 ? "for" : "against"} “${this.label}”, ${share} % of the strongest`;
    return `Heat map, row ${row}, column ${column}: ${what}.`;
  }

  // The part of the picture that a cell covers, once the heat is stretched over it.
  seen(row, column) {
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
        const heat = this.stretched((y + 0.5) / height, (x + 0.5) / width);
        const strength = Math.abs(heat) * OVERLAY, colour = heat < 0 ? AGAINST : FOR;
        const grey = this.picture.grey(y, x);
        for (let c = 0; c < 3; c++) image.data[(y * width + x) * 4 + c] = grey + (colour[c] - grey) * strength;
        image.data[(y * width + x) * 4 + 3] = 255;
      }
    }
    canvas.getContext("2d").putImageData(image, 0, 0);
  }

  // Bilinear between the middles of cells; -1..1.
  stretched(y, x) {
    const row = clamp(y * this.rows - 0.5, 0, this.rows - 1), column = clamp(x * this.columns - 0.5, 0, this.columns - 1);
    const top = Math.floor(row), left = Math.floor(column);
    const bottom = Math.min(top + 1, this.rows - 1), right = Math.min(left + 1, this.columns - 1);
    const mix = (a, b, share) => a + (b - a) * share;
    const at = (r, c) => (this.byte(0, r, c) - 128) / 127;
    return mix(mix(at(top, left), at(top, right), column - left), mix(at(bottom, left), at(bottom, right), column - left), row - top);
  }
}

// The picture, drawn into its canvas; `ready` when its pixels are there.
class Shown {
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
      context.fillStyle = "#fff"; // Transparent pictures are laid over white, as the service does.
      context.fillRect(0, 0, this.width, this.height);
      context.drawImage(source, 0, 0, this.width, this.height);
    } else {
      const cells = bytes(packed.cells), area = this.height * this.width, image = context.createImageData(this.width, this.height);
      for (let place = 0; place < area; place++) {
        const colour = packed.channels === 3 ? [cells[place], cells[area + place], cells[2 * area + place]] : Array(3).fill(cells[place]);
        image.data.set([...colour, 255], place * 4);
      }
      context.putImageData(image, 0, 0);
    }
    const image = context.getImageData(0, 0, this.width, this.height);
    if (source && packed.channels === 1) {
      for (let place = 0; place < image.data.length; place += 4) {
        const [red, green, blue] = image.data.subarray(place, place + 3);
        image.data.fill(0.299 * red + 0.587 * green + 0.114 * blue, place, place + 3);
      }
      context.putImageData(image, 0, 0);
    }
    this.pixels = image.data;
  }

  grey(y, x) {
    const place = (y * this.width + x) * 4;
    return (this.pixels[place] + this.pixels[place + 1] + this.pixels[place + 2]) / 3;
  }
}

// Where the reader is: a map, a channel's position in it, a cell. The tile is where Escape goes back to.
const at = { map: null, position: 0, row: 0, column: 0, tile: null };
const unfolded = new Set(); // Names of layers shown in full; they stay so when another picture comes.
let picture = null;

function place(box, top, left, bottom, right, height, width) {
  const y = clamp(top, 0, height), x = clamp(left, 0, width);
  box.style.top = `${(100 * y) / height}%`;
  box.style.left = `${(100 * x) / width}%`;
  box.style.height = `${(100 * (clamp(bottom + 1, 0, height) - y)) / height}%`;
  box.style.width = `${(100 * (clamp(right + 1, 0, width) - x)) / width}%`;
}

function tellField(map, row, column) {
  const seen = map.seen(row, column);
  if (!seen) return "What it sees of the picture is not known.";
  const { top, left, bottom, right } = seen;
  const told = `It sees rows ${whole(top)} to ${whole(bottom)} and columns ${whole(left)} to ${whole(right)} of the picture, ` +
    `${size(bottom - top + 1, right - left + 1)} pixels`;
  const over = picture && (top < 0 || left < 0 || bottom >= picture.height || right >= picture.width);
  return over ? `${told}, some of them beyond its border.` : `${told}.`;
}

// Say what a cell is and sees, and mark that in the picture.
function point(map, position, row, column) {
  byId("told").textContent = `${map.tell(position, row, column)} ${tellField(map, row, column)}`;
  const seen = map.seen(row, column), box = byId("field");
  box.hidden = !(seen && picture);
  if (!box.hidden) place(box, seen.top, seen.left, seen.bottom, seen.right, picture.height, picture.width);
}

function moveTo(row, column) {
  const { map } = at;
  at.row = clamp(row, 0, map.rows - 1);
  at.column = clamp(column, 0, map.columns - 1);
  place(byId("cell"), at.row, at.column, at.row, at.column, map.rows, map.columns);
  point(map, at.position, at.row, at.column);
}

function choose(map, position, cell) {
  Object.assign(at, { map, position, tile: tileOf(map, position) });
  const frame = byId("map");
  map.paint(frame.querySelector("canvas"), position);
  frame.setAttribute("aria-label", `${map.title(position)}, ${map.rows} rows of ${map.columns} cells`);
  byId("map-caption").textContent = `${map.title(position)}: ${size(map.rows, map.columns)} cells`;
  for (const tile of document.querySelectorAll(".tile")) tile.setAttribute("aria-pressed", String(tile === at.tile));
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
  const tile = make("button", { type: "button", class: "tile", "aria-pressed": "false", "aria-label": `${map.title(position)}: show in large` },
    canvas, make("span", { class: "name" }, name));
  Object.assign(tile, { map, position });
  canvas.addEventListener("pointermove", (event) => {
    const { row, column } = cellUnder(event, canvas, map);
    point(map, position, row, column);
  });
  canvas.addEventListener("pointerleave", () => moveTo(at.row, at.column));
  tile.addEventListener("click", (event) => {
    const pressed = event.detail === 0; // By a key: then the reader goes on with keys.
    choose(map, position, pressed ? null : cellUnder(event, canvas, map));
    if (pressed) byId("map").focus();
  });
  return tile;
}

function openMap() {
  const frame = byId("map"), canvas = frame.querySelector("canvas");
  const follow = (event) => {
    const { row, column } = cellUnder(event, canvas, at.map);
    moveTo(row, column);
  };
  frame.addEventListener("pointermove", follow);
  frame.addEventListener("pointerdown", follow);
  frame.addEventListener("keydown", (event) => {
    const { map, row, column, position } = at, far = event.shiftKey ? 8 : 1;
    const other = (step) => choose(map, clamp(position + step, 0, map.channels.length - 1), { row, column });
    const moves = {
      ArrowUp: () => moveTo(row - far, column),
      ArrowDown: () => moveTo(row + far, column),
      ArrowLeft: () => moveTo(row, column - far),
      ArrowRight: () => moveTo(row, column + far),
      Home: () => moveTo(event.ctrlKey ? 0 : row, 0),
      End: () => moveTo(event.ctrlKey ? map.rows - 1 : row, map.columns - 1),
      PageUp: () => other(-1),
      PageDown: () => other(1),
      Escape: () => at.tile?.focus(),
    };
    if (!moves[event.key] || event.altKey || event.metaKey) return;
    event.preventDefault();
    moves[event.key]();
  });
}

function showScores(scores) {
  byId("scores").replaceChildren(...scores.map(({ label, probability, logit }) => {
    const fill = make("div", { class: "fill" });
    fill.style.width = `${100 * probability}%`;
    const share = make("span", { class: "figure" }, `${(100 * probability).toFixed(2)} %`);
    if (logit !== null) share.title = `logit ${short(logit)}`;
    return make("li", {}, make("span", { class: "label" }, label), make("div", { class: "track", "aria-hidden": "true" }, fill), share);
  }));
  if (!scores.length) byId("scores").append(make("li", {}, "This network has no classes."));
}

function showLayer(map) {
  const strip = make("div", { class: "strip" });
  const add = (from, to) => {
    for (let position = from; position < to; position++) strip.append(makeTile(map, position, `${map.channels[position]}`));
  };
  const count = map.channels.length;
  const known = count < map.of ? `the ${count} strongest of ${map.of} channels` : `${count} channel${count === 1 ? "" : "s"}`;
  const section = make("section", { "aria-label": map.name }, make("h3", {}, `${map.name}: ${known} of ${size(map.rows, map.columns)} cells`), strip);
  const first = unfolded.has(map.name) ? count : Math.min(FIRST, count);
  add(0, first);
  if (first < count) {
    const more = make("button", { type: "button", class: "more", "aria-label": `Show all ${count} channels of ${map.name}` }, `Show all ${count}`);
    more.addEventListener("click", () => {
      unfolded.add(map.name);
      add(first, count);
      more.remove();
      strip.children[first].focus();
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
  const { row, column } = map.strongest(0), seen = map.seen(row, column);
  byId("heat-about").textContent = `Red speaks for “${packed.label}”, blue against it; grey says nothing. ` +
    `Strongest around row ${Math.round((seen.top + seen.bottom) / 2)}, column ${Math.round((seen.left + seen.right) / 2)} of the picture. ` +
    "A press shows it in large, where every cell tells its share.";
  return map;
}

async function showPicture(packed, title) {
  picture = null;
  const canvas = byId("picture"), next = packed && new Shown(packed, canvas);
  canvas.parentElement.hidden = !packed;
  if (next) {
    await next.draw();
    picture = next;
  }
  const taken = packed?.exact ? "as the network saw it" : "as it was sent, brought to the network’s size by this page";
  const words = picture ? `${title}, ${taken}, ${size(picture.height, picture.width)} pixels` : "The picture cannot be shown here.";
  canvas.setAttribute("aria-label", words);
  byId("picture-caption").textContent = words;
}

async function show(scene) {
  const { model } = scene;
  byId("title").textContent = `${scene.title} seen by ${model.name}`;
  byId("about").textContent = `${model.description ? `${model.description.replace(/\.?$/, ".")} ` : ""}` +
    `Version ${model.version}, ${model.parameters.toLocaleString("en")} parameters, ${model.engine} on ${model.device}.`;
  byId("made").textContent = `convscope, request ${model.request}`;
  await showPicture(scene.picture, scene.title);
  showScores(scene.scores);
  const heat = showHeat(scene.heat);
  const maps = scene.layers.map((packed) => new FeatureMap(packed));
  byId("maps").hidden = !maps.length;
  byId("layers").replaceChildren(...maps.map(showLayer));
  showTable(byId("geometry"), "Layers of the network", scene.geometry.headings, scene.geometry.rows);
  byId("timing-section").hidden = !scene.timing;
  if (scene.timing) showTable(byId("timing"), "Milliseconds by stage", ["milliseconds", ...scene.timing.map(([name]) => name)],
    [["this request", ...scene.timing.map(([, ms]) => ms.toFixed(2))]]);
  byId("main").hidden = false;
  const all = heat ? [heat, ...maps] : maps;
  byId("map-figure").hidden = byId("help").hidden = !all.length;
  if (!all.length) return;
  const before = at.map && { name: at.map.name, channel: at.map.channels[at.position], row: at.row, column: at.column };
  const map = all.find(({ name }) => name === before?.name);
  const position = map ? map.channels.indexOf(before.channel) : -1;
  if (position >= 0) choose(map, position, before);
  else choose(maps[0] ?? heat, 0);
}

openMap();
const first = JSON.parse(byId("scene").textContent);
if (first) show(first);
