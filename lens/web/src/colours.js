// Colour scales that colour-blind people can read. Each is 256 colours, [red, green, blue] in 0..255.

// Anchors at equal distances. cividis: J. R. Nuñez, C. R. Anderton and R. S. Renslow, PLOS ONE 13(7), 2018, as in
// matplotlib; it rises evenly in lightness for every kind of colour vision.
const CIVIDIS = ["#00224e", "#123570", "#3b496c", "#575d6d", "#707173", "#8a8678", "#a59c74", "#c3b369", "#e1cc55", "#fee838"];
// RdBu of ColorBrewer (C. A. Brewer), from blue to red, which its authors mark as safe for colour-blind people.
const BLUE_RED = ["#053061", "#2166ac", "#4393c3", "#92c5de", "#d1e5f0", "#f7f7f7", "#fddbc7", "#f4a582", "#d6604d", "#b2182b", "#67001f"];

const parse = (colour) => [1, 3, 5].map((start) => parseInt(colour.slice(start, start + 2), 16));

function scale(anchors) {
  const colours = anchors.map(parse);
  return Array.from({ length: 256 }, (_, index) => {
    const place = (index / 255) * (colours.length - 1), first = Math.min(Math.floor(place), colours.length - 2);
    return colours[first].map((level, channel) => Math.round(level + (colours[first + 1][channel] - level) * (place - first)));
  });
}

export const SEQUENTIAL = scale(CIVIDIS);
export const DIVERGING = scale(BLUE_RED);

// A CSS gradient, without the style sheet: the page's policy lets scripts set it.
export const gradient = (colours) => `linear-gradient(to right, ${colours.filter((_, index) => index % 15 === 0).map((colour) => `rgb(${colour})`).join(", ")})`;
