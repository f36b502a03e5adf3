// Numbers as text, with a real minus sign.

export const clamp = (value, minimum, maximum) => Math.min(Math.max(value, minimum), maximum);
export const formatNumber = (value) => (value === null || value === undefined ? "not a number" : String(Number(value.toPrecision(4))).replace("-", "−"));
export const formatInteger = (value) => String(value).replace("-", "−");
export const formatSize = (height, width) => `${height}×${width}`;
export const formatShare = (probability, digits = 2) => `${(100 * probability).toFixed(digits)} %`;
export const scoreText = (score, digits) => (score.value === undefined ? formatShare(score.probability, digits) : formatNumber(score.value));
export const plural = (count, noun) => `${count} ${noun}${count === 1 ? "" : "s"}`;

// Differences, with their sign.
const signed = (text) => (Number(text) === 0 ? `±${text.replace("-", "")}` : text.startsWith("-") ? text.replace("-", "−") : `+${text}`);
export const formatSigned = (value) => (value === null ? "not a number" : signed(String(Number(value.toPrecision(4)))));
export const changeText = (change) => (change.value === undefined ? `${signed((100 * change.probability).toFixed(2))} points` : formatSigned(change.value));
