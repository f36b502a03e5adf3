// Edits of maps: the operations that are asked for, the controls of a channel, and the list of all operations.
import { useLayoutEffect, useRef, useState } from "preact/hooks";
import { formatSigned, plural } from "./format.js";

const LARGEST_FACTOR = 2, FACTOR_STEP = 0.05;

// Whether a field of an operation can be put into words: an object in place of a number need not have a text.
const isPlain = (value) => typeof value !== "object" || value === null || (Array.isArray(value) && value.every((one) => typeof one !== "object"));

// The operations in the address: JSON as the service takes it. What cannot be read is for the service to reject.
export function parseEdits(text) {
  try {
    const edits = JSON.parse(text || "[]");
    return Array.isArray(edits) ? edits.filter((edit) => edit && typeof edit === "object" &&
      [edit.layer, edit.operation, edit.value, edit.channels?.except ?? edit.channels, edit.region, edit.box].every(isPlain)) : [];
  } catch {
    return [];
  }
}

export const writeEdits = (edits) => (edits.length ? JSON.stringify(edits) : "");

const isOf = ({ layer, channels, picture, box }, map, channel) =>
  layer === map.name && Array.isArray(channels) && channels.length === 1 && channels[0] === channel && picture === undefined && box === undefined;

const isWhole = (edit, map, channel) => isOf(edit, map, channel) && edit.region === undefined && (edit.operation === "zero" || edit.operation === "scale");

// The regions of a channel that are brushed out: [top, left, bottom, right] in cells, bottom and right exclusive.
export const regionsOf = (edits, map, channel) =>
  edits.filter((edit) => isOf(edit, map, channel) && edit.operation === "zero" && Array.isArray(edit.region) && edit.region.length === 4).map(({ region }) => region.map(Number));

// The operations with another one for a whole channel, or with none.
function withWhole(edits, map, channel, operation) {
  const fresh = operation ? [{ layer: map.name, channels: [channel], ...operation }] : [];
  const place = edits.findIndex((edit) => isWhole(edit, map, channel));
  return place < 0 ? [...edits, ...fresh] : [...edits.slice(0, place), ...fresh, ...edits.slice(place + 1)];
}

export const withRegion = (edits, map, channel, region) => [...edits, { layer: map.name, channels: [channel], region, operation: "zero" }];

const listed = (values) => (Array.isArray(values) ? values.join(", ") : String(values));

function describe({ layer, channels, operation, value, region, box }) {
  const which = Array.isArray(channels) ? `channel${channels.length === 1 ? "" : "s"} ${listed(channels)}`
    : channels?.except ? `all channels but ${listed(channels.except)}` : "all channels";
  const what = { zero: "set to zero", scale: `scaled by ${listed(value)}`, add: `${listed(value)} added`, mean: "set to the mean", clamp: `clamped to ${listed(value)}` };
  const [top, left, bottom, right] = Array.isArray(region) ? region : [];
  const where = Array.isArray(region) ? `, rows ${top} to ${bottom - 1}, columns ${left} to ${right - 1}` : box ? `, pixels ${listed(box)}` : "";
  return `${layer}, ${which}${where}: ${what[operation] ?? operation}`;
}

// What a user can do to a channel, in its drawer. `edit` takes all operations, and a name if it goes on with an earlier change.
export function ChannelEdits({ map, position, prefix, editing, edit, brush }) {
  const channel = map.channels[position], { edits, undo, canUndo } = editing;
  const whole = edits.find((one) => isWhole(one, map, channel)), off = whole?.operation === "zero";
  const factor = whole?.operation === "scale" ? Number(whole.value) : 1;
  const scale = (value) => edit(withWhole(edits, map, channel, value === 1 ? null : { operation: "scale", value }), `scale ${map.name} ${channel}`);
  const switchOff = (event) => edit(withWhole(edits, map, channel, event.currentTarget.checked ? { operation: "zero" } : null));
  const { from } = brush;
  return (
    <div class="edit">
      <h4>Edit this channel</h4>
      <p><label><input type="checkbox" id={`${prefix}off`} checked={off} onChange={switchOff} /> Switch it off</label></p>
      <p class="factor">
        <label for={`${prefix}factor`}>Scale</label>
        <input type="range" id={`${prefix}factor`} min="0" max={LARGEST_FACTOR} step={FACTOR_STEP} value={factor} disabled={off}
          aria-valuetext={`times ${factor}`} onInput={(event) => scale(Number(event.currentTarget.value))} />
        <span aria-hidden="true">×{factor}</span>
      </p>
      <p>
        <button type="button" aria-pressed={String(brush.on)} onClick={brush.toggle}>Brush out a region</button>{" "}
        <button type="button" disabled={!canUndo} onClick={undo}>Undo</button>
      </p>
      <p class="hint" role="status">{from ? `A region begins at ${map.place(from.row, from.column)}. Space at its other corner brushes it out; Escape gives it up.`
        : brush.on ? "Drag over the map. Keyboard: Space on the map begins a region, and ends it." : ""}</p>
      {map.change && <p class="hint">{map.change[position] ? `Largest change of a cell: ${formatSigned(map.change[position])}.` : "No cell of this channel changed."}</p>}
    </div>
  );
}

// A program that asks for the same.
function asPython({ url, version }, model, title, edits) {
  const text = (value) => JSON.stringify(value, (_, item) => item ?? undefined, 1).replace(/\n */g, " ").replace(/([[{]) | ([\]}])/g, "$1$2");
  const which = version ? `, version=${JSON.stringify(version)}` : "";
  return [
    "from convscope import Client", "",
    `with Client(${JSON.stringify(url)}) as client:`,
    `    prediction = client.predict(${JSON.stringify(title)}, model=${JSON.stringify(model)}${which}, compare=True, edits=[`,
    ...edits.map((edit) => `        ${text(edit)},`),
    "    ])",
    "    print(prediction.top, prediction.change.top)", "",
  ].join("\n");
}

// All operations, with what can be done with them.
export function EditList({ settings, editing, model, title }) {
  const { edits, text, edit, undo, canUndo } = editing;
  const [copied, setCopied] = useState(null), section = useRef(null), removed = useRef(-1);
  useLayoutEffect(() => { // The pressed button is gone: go on with the next one.
    if (removed.current < 0) return;
    const buttons = [...section.current.querySelectorAll("li button")];
    (buttons[Math.min(removed.current, buttons.length - 1)] ?? section.current.querySelector(".actions button"))?.focus();
    removed.current = -1;
  });
  if (!text && !canUndo) return null;
  const remove = (index) => {
    removed.current = index;
    edit(edits.filter((_, other) => other !== index));
  };
  const copy = async (what, content) => {
    let said = `${what} is copied.`;
    try {
      await navigator.clipboard.writeText(content);
    } catch {
      said = "The browser does not allow copying. It is here:";
    }
    setCopied({ said, content, of: text });
  };
  const shown = copied?.of === text ? copied : null;
  return (
    <section class="edits" aria-label="Edits" ref={section}>
      <h2>{plural(edits.length, "edit")}</h2>
      {edits.length > 0
        ? <ol>{edits.map((one, index) => <li key={index}>{describe(one)} <button type="button" aria-label={`Remove: ${describe(one)}`} onClick={() => remove(index)}>Remove</button></li>)}</ol>
        : <p class="hint">{text ? "The edits in the address cannot be read." : "The network runs as it is."}</p>}
      <p class="actions">
        <button type="button" disabled={!canUndo} onClick={undo}>Undo</button>{" "}
        <button type="button" disabled={!text} onClick={() => edit([])}>Reset</button>{" "}
        <button type="button" disabled={!edits.length} onClick={() => copy("Python", asPython(settings, model.name, title, edits))}>Copy as Python</button>{" "}
        <button type="button" disabled={!edits.length} onClick={() => copy("JSON", JSON.stringify(edits))}>Copy as JSON</button>
      </p>
      <p class="hint" role="status">{shown?.said}</p>
      {shown && <pre tabIndex={0} role="group" aria-label="What was copied">{shown.content}</pre>}
    </section>
  );
}
