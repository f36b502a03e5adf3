// What a drawing becomes before it is sent.

export const PAD_PX = 280;

const INK_SHOWN = 24; // Of 255: fainter pixels are the soft edge of a stroke.

/**
 * Centre and scale a drawing as MNIST's digits were made: it fits a box of 20×20 pixels in its aspect ratio, antialiased,
 * and lies with its centre of mass in the middle of 28×28 pixels (Y. LeCun, C. Cortes and C. Burges, "The MNIST database").
 *
 * source: a canvas, white ink on black. scale: pixels for each of the 28.
 * Returns a canvas of 28·scale pixels, white on black; null if there is no ink.
 */
export function centre(source, scale) {
  const { width, height } = source, pixels = source.getContext("2d", { willReadFrequently: true }).getImageData(0, 0, width, height).data;
  let top = height, left = width, bottom = -1, right = -1, mass = 0, massX = 0, massY = 0;
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      const ink = pixels[(y * width + x) * 4];
      if (ink <= INK_SHOWN) continue;
      top = Math.min(top, y);
      bottom = Math.max(bottom, y);
      left = Math.min(left, x);
      right = Math.max(right, x);
      mass += ink;
      massX += ink * (x + 0.5);
      massY += ink * (y + 0.5);
    }
  }
  if (bottom < 0) return null;
  const factor = (20 * scale) / Math.max(bottom - top + 1, right - left + 1), side = 28 * scale;
  const canvas = Object.assign(document.createElement("canvas"), { width: side, height: side }), context = canvas.getContext("2d");
  context.fillStyle = "#000";
  context.fillRect(0, 0, side, side);
  context.imageSmoothingQuality = "high";
  context.setTransform(factor, 0, 0, factor, side / 2 - (factor * massX) / mass, side / 2 - (factor * massY) / mass);
  context.drawImage(source, 0, 0);
  return canvas;
}

// The same canvas with black and white exchanged.
export function invert(source) {
  const canvas = Object.assign(document.createElement("canvas"), { width: source.width, height: source.height }), context = canvas.getContext("2d");
  context.drawImage(source, 0, 0);
  context.globalCompositeOperation = "difference";
  context.fillStyle = "#fff";
  context.fillRect(0, 0, canvas.width, canvas.height);
  return canvas;
}
