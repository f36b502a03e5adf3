// What page_data.py packs, as objects: maps, heat maps, kernels, and where their cells are in the picture.
import { DIVERGING, SEQUENTIAL } from "./colours.js";
import { clamp, formatInteger, formatNumber, formatSize } from "./format.js";

const POSITIVE_COLOUR = [214, 13, 13], NEGATIVE_COLOUR = [13, 64, 214]; // As in convscope.pixels.

const decodeBytes = (base64) => Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));

const span = (name, first, last) => (first === last ? `${name} ${formatInteger(first)}` : `${name}s ${formatInteger(first)} to ${formatInteger(last)}`);

// Boxes are in pixels of the network's input or in cells of a map: inclusive, and may extend past the edges.
export const boxText = ({ top, left, bottom, right }) =>
  `rows ${formatInteger(top)} to ${formatInteger(bottom)}, columns ${formatInteger(left)} to ${formatInteger(right)}`;

const boxSize = ({ top, left, bottom, right }) => `${formatSize(bottom - top + 1, right - left + 1)} pixels`;

// A map, or a heat map, which has a single channel. `rows` and `columns` count what is drawn: cells, or, of a large map,
// blocks of `block`×`block` cells.
export class FeatureMap {
  constructor(packed) {
    Object.assign(this, packed);
    this.values = packed.values && decodeBytes(packed.values);
    this.area = this.rows * this.columns;
    // The ends of each channel's colours: after edits those that it had before, so that a weaker map looks weaker.
    this.ends = this.numbers ? [] : this.min.map((minimum, position) => {
      const before = this.before?.[position];
      return before && before[1] > before[0] ? before : [minimum, this.max[position]];
    });
    this.signed = !this.numbers && [...this.min, ...this.ends.map(([low]) => low)].some((value) => value < 0);
    const finite = (values) => values.filter((value) => value !== null);
    this.largest = this.numbers ? 0 : finite(this.ends.map(([, high]) => high)).reduce((a, b) => Math.max(a, b), 0);
    this.smallest = this.numbers ? 0 : finite(this.ends.map(([low]) => low)).reduce((a, b) => Math.min(a, b), Infinity);
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

  // The cells of the layer that a drawn cell stands for.
  cellsOf(row, column) {
    const [height, width] = this.cells, top = row * this.block, left = column * this.block;
    return { top, left, bottom: Math.min(top + this.block, height) - 1, right: Math.min(left + this.block, width) - 1 };
  }

  // The cells from one drawn cell to another, as edits name them: [top, left, bottom, right], bottom and right exclusive.
  region(one, other) {
    const first = this.cellsOf(Math.min(one.row, other.row), Math.min(one.column, other.column));
    const last = this.cellsOf(Math.max(one.row, other.row), Math.max(one.column, other.column));
    return [first.top, first.left, last.bottom + 1, last.right + 1];
  }

  place(row, column) {
    const { top, left, bottom, right } = this.cellsOf(row, column);
    return `${span("row", top, bottom)}, ${span("column", left, right)}`;
  }

  description(position, row, column) {
    const range = `min ${formatNumber(this.min[position])}, max ${formatNumber(this.max[position])} in this channel`;
    const mean = this.block > 1 ? `mean about ${formatNumber(this.value(position, row, column))} of ${formatSize(this.block, this.block)} cells` :
      `about ${formatNumber(this.value(position, row, column))}`;
    return `${this.title(position)}, ${this.place(row, column)}: ${mean} (${range}).`;
  }

  // The receptive field of a drawn cell in input pixels; null if the card does not state it.
  receptiveField(row, column) {
    const { receptive_field: size, receptive_field_start: start, stride } = this;
    if (!size || !start || !stride || size.length < 2) return null;
    const { top, left, bottom, right } = this.cellsOf(row, column);
    return {
      top: start[0] + top * stride[0], left: start[1] + left * stride[1],
      bottom: start[0] + bottom * stride[0] + size[0] - 1, right: start[1] + right * stride[1] + size[1] - 1,
    };
  }

  fieldDescription(row, column, picture) {
    const field = this.receptiveField(row, column);
    if (!field) return "Receptive field unknown.";
    const inPadding = picture && (field.top < 0 || field.left < 0 || field.bottom >= picture.rows || field.right >= picture.columns);
    return `Receptive field: ${boxText(field)}, ${boxSize(field)}${inPadding ? " (partly padding)" : ""}.`;
  }

  // The strongest drawn cells, best first.
  strongest(position, count = 1) {
    const first = position * this.area, order = [];
    for (let index = 0; index < this.area; index++) {
      const value = this.values[first + index];
      if (order.length === count && value <= this.values[first + order[count - 1]]) continue;
      let place = order.length;
      while (place && value > this.values[first + order[place - 1]]) place--;
      order.splice(place, 0, index);
      if (order.length > count) order.pop();
    }
    return order.map((index) => ({ row: Math.floor(index / this.columns), column: index % this.columns }));
  }

  // The ends of the colour scale: of the channel, or of the whole layer; about zero where the layer has negative values.
  limits(position, wholeLayer) {
    const [minimum, maximum] = wholeLayer ? [this.smallest, this.largest] : this.ends[position];
    if (!this.signed) return [minimum, maximum];
    const end = Math.max(Math.abs(minimum), Math.abs(maximum));
    return [-end, end];
  }

  get colours() {
    return this.signed ? DIVERGING : SEQUENTIAL;
  }

  paint(canvas, position, wholeLayer) {
    canvas.width = this.columns;
    canvas.height = this.rows;
    const image = new ImageData(this.columns, this.rows), [low, high] = this.limits(position, wholeLayer);
    const [minimum, maximum] = [this.min[position], this.max[position]];
    const table = Array.from({ length: 256 }, (_, byte) => {
      const value = minimum + (byte / 255) * (maximum - minimum);
      return this.colours[high > low ? clamp(Math.round((255 * (value - low)) / (high - low)), 0, 255) : this.signed ? 128 : 0];
    });
    for (let index = 0; index < this.area; index++) {
      image.data.set(table[this.values[position * this.area + index]], index * 4);
      image.data[index * 4 + 3] = 255;
    }
    canvas.getContext("2d").putImageData(image, 0, 0);
  }

  // Every drawn cell of a channel: float32, in C order.
  array(position) {
    return { shape: [this.rows, this.columns], values: Float32Array.from({ length: this.area }, (_, index) => this.value(position, 0, index) ?? NaN) };
  }
}

// One channel with every cell and its exact values, as the live page loads it.
export class ExactMap extends FeatureMap {
  constructor(map, position, { shape: [rows, columns], values }) {
    const one = (values) => values && [values[position]];
    super({ ...map, values: "", channels: one(map.channels), min: one(map.min), max: one(map.max), before: one(map.before), change: one(map.change), rows, columns, block: 1 });
    this.exact = values;
    Object.assign(this, { signed: map.signed, smallest: map.smallest, largest: map.largest });
    const low = map.min[position], length = map.max[position] - low;
    this.values = Uint8Array.from(values, (value) => (length > 0 && Number.isFinite(value) ? Math.round((255 * (value - low)) / length) : 0));
  }

  value(position, row, column) {
    const value = this.exact[row * this.columns + column];
    return Number.isFinite(value) ? value : null;
  }

  description(position, row, column) {
    return super.description(position, row, column).replace(": about ", ": ");
  }
}

export class HeatMap extends FeatureMap {
  constructor(packed, picture) {
    super({ ...packed, name: "heat map", channels: [0], channel_count: 1, min: [-packed.max], max: [packed.max] });
    this.picture = picture;
    this.isHeat = true;
    this.strongestHeat = packed.max;
    this.ofPixels = !packed.layer;
  }

  value(position, row, column) {
    return ((this.byte(position, row, column) - 128) / 127) * this.strongestHeat;
  }

  title() {
    return `heat map, ${this.method}${this.layer ? ` at ${this.layer}` : ""}`;
  }

  description(position, row, column) {
    const value = this.value(position, row, column);
    const share = this.strongestHeat ? Math.round((100 * Math.abs(value)) / this.strongestHeat) : 0;
    const effect = value === 0
      ? "no contribution"
      : `${value > 0 ? "raises" : "lowers"} the score of “${this.label}”, ${share} % of the strongest contribution`;
    return `Heat map, ${this.place(row, column)}: ${effect}.`;
  }

  // What the cell is drawn over: its share of the picture.
  covered(row, column) {
    const { rows: height, columns: width } = this.picture;
    const top = Math.floor((row * height) / this.rows), left = Math.floor((column * width) / this.columns);
    return {
      top, left,
      bottom: Math.max(top, Math.ceil(((row + 1) * height) / this.rows) - 1),
      right: Math.max(left, Math.ceil(((column + 1) * width) / this.columns) - 1),
    };
  }

  receptiveField(row, column) {
    return this.ofPixels ? null : super.receptiveField(row, column);
  }

  fieldDescription(row, column, picture) {
    const covered = this.covered(row, column), text = `Drawn over ${boxText(covered)}, ${boxSize(covered)}.`;
    if (this.ofPixels) return covered.top === covered.bottom && covered.left === covered.right ? "The cell is one pixel of the network’s input." : text;
    return `${text} ${super.fieldDescription(row, column, picture).replace("Receptive field:", "The cell sees its receptive field:")}`;
  }

  // The picture in grey, with the heat over it: red raises the class's score, blue lowers it.
  paintOver(canvas, opacity) {
    const { width, height, pixels } = this.picture;
    canvas.width = width;
    canvas.height = height;
    const image = new ImageData(width, height);
    for (let y = 0; y < height; y++) {
      for (let x = 0; x < width; x++) {
        const heat = this.interpolated((y + 0.5) / height, (x + 0.5) / width), index = (y * width + x) * 4;
        const strength = Math.abs(heat) * opacity, colour = heat < 0 ? NEGATIVE_COLOUR : POSITIVE_COLOUR;
        const grey = (pixels[index] + pixels[index + 1] + pixels[index + 2]) / 3;
        for (let channel = 0; channel < 3; channel++) image.data[index + channel] = grey + (colour[channel] - grey) * strength;
        image.data[index + 3] = 255;
      }
    }
    canvas.getContext("2d").putImageData(image, 0, 0);
  }

  // Bilinear interpolation between the centres of cells, in -1..1.
  interpolated(y, x) {
    const row = clamp(y * this.rows - 0.5, 0, this.rows - 1), column = clamp(x * this.columns - 0.5, 0, this.columns - 1);
    const top = Math.floor(row), left = Math.floor(column);
    const bottom = Math.min(top + 1, this.rows - 1), right = Math.min(left + 1, this.columns - 1);
    const mix = (a, b, share) => a + (b - a) * share;
    const at = (r, c) => (this.byte(0, r, c) - 128) / 127;
    return mix(mix(at(top, left), at(top, right), column - left), mix(at(bottom, left), at(bottom, right), column - left), row - top);
  }
}

// The network's input. `rows` and `columns` are its pixels; `width` and `height` those of the drawing, which is smaller
// if the input is large.
export async function loadPicture(packed) {
  if (!packed) return null;
  const source = await loadImage(packed.file), canvas = document.createElement("canvas");
  const width = (canvas.width = source.naturalWidth), height = (canvas.height = source.naturalHeight);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(source, 0, 0);
  return { ...packed, source, width, height, pixels: context.getImageData(0, 0, width, height).data };
}

export async function loadImage(url) {
  const image = new Image();
  image.src = url;
  await image.decode();
  return image;
}

// A box in input pixels in pixels of the original picture; bottom and right exclusive.
export function toOriginal({ top, left, bottom, right }, { region }, picture) {
  const [first, start, last, end] = region;
  const y = (last - first) / picture.rows, x = (end - start) / picture.columns;
  return { top: first + top * y, left: start + left * x, bottom: first + (bottom + 1) * y, right: start + (right + 1) * x };
}

// The kernels of one channel: (C_in, height, width).
export class Kernels {
  constructor(packed, position) {
    const [count, height, width] = packed.shape;
    Object.assign(this, { count, height, width, max: packed.max[position] });
    this.values = decodeBytes(packed.values).subarray(position * count * height * width, (position + 1) * count * height * width);
  }

  // Input channels by the size of their weights, largest first.
  order() {
    const area = this.height * this.width, size = (channel) => {
      let sum = 0;
      for (let index = 0; index < area; index++) sum += (this.values[channel * area + index] - 128) ** 2;
      return sum;
    };
    const sizes = Array.from({ length: this.count }, (_, channel) => size(channel));
    return sizes.map((_, channel) => channel).sort((a, b) => sizes[b] - sizes[a]);
  }

  paint(canvas, channel) {
    const area = this.height * this.width, image = new ImageData(this.width, this.height);
    canvas.width = this.width;
    canvas.height = this.height;
    for (let index = 0; index < area; index++) {
      const weight = (this.values[channel * area + index] - 128) / 127;
      image.data.set([...DIVERGING[clamp(Math.round(127.5 * (weight + 1)), 0, 255)], 255], index * 4);
    }
    canvas.getContext("2d").putImageData(image, 0, 0);
  }
}

// Read a .npy file of float32, as numpy writes it.
export function readNpy(buffer) {
  const view = new DataView(buffer), length = view.getUint16(8, true);
  const header = new TextDecoder().decode(new Uint8Array(buffer, 10, length));
  if (!header.includes("'<f4'") || header.includes("'fortran_order': True")) throw new Error("expected float32 in C order");
  const shape = header.match(/'shape': \(([^)]*)\)/)[1].split(",").filter((text) => text.trim()).map(Number);
  return { shape, values: new Float32Array(buffer, 10 + length) };
}

// Write one: format version 1.0, with the header padded to a multiple of 64 bytes, as numpy.lib.format describes.
export function writeNpy({ shape, values }) {
  const text = `{'descr': '<f4', 'fortran_order': False, 'shape': (${shape.join(", ")}${shape.length === 1 ? "," : ""}), }`;
  const padded = text.padEnd(Math.ceil((10 + text.length + 1) / 64) * 64 - 11) + "\n";
  const head = new Uint8Array(10 + padded.length);
  head.set([0x93, ...new TextEncoder().encode("NUMPY"), 1, 0, padded.length & 255, padded.length >> 8]);
  head.set(new TextEncoder().encode(padded), 10);
  return new Blob([head, values], { type: "application/octet-stream" });
}

// Browsers also report a move when the page was scrolled under a pointer that rests.
export const hasMoved = (event) => event.movementX !== 0 || event.movementY !== 0;

// The drawn cell under a pointer.
export function cellUnder(event, element, map) {
  const box = element.getBoundingClientRect();
  return {
    row: clamp(Math.floor(((event.clientY - box.top) / box.height) * map.rows), 0, map.rows - 1),
    column: clamp(Math.floor(((event.clientX - box.left) / box.width) * map.columns), 0, map.columns - 1),
  };
}
