// Small parts: canvases, pictures with boxes, bars, tables.
import { useLayoutEffect, useRef } from "preact/hooks";
import { clamp, formatNumber } from "./format.js";
import { toOriginal } from "./maps.js";

// A canvas that `paint` fills, again when one of `on` changes.
export function Canvas({ paint, on, ...attributes }) {
  const canvas = useRef(null);
  useLayoutEffect(() => paint(canvas.current), on);
  return <canvas ref={canvas} {...(attributes.role ? {} : { "aria-hidden": "true" })} {...attributes} />;
}

// Where a box is in a frame of a size, as CSS; bottom and right exclusive.
export function boxStyle({ top, left, bottom, right }, height, width) {
  const y = clamp(top, 0, height), x = clamp(left, 0, width);
  return {
    top: `${(100 * y) / height}%`, left: `${(100 * x) / width}%`,
    height: `${(100 * (clamp(bottom, 0, height) - y)) / height}%`, width: `${(100 * (clamp(right, 0, width) - x)) / width}%`,
  };
}

const exclusive = (box) => ({ ...box, bottom: box.bottom + 1, right: box.right + 1 });

// The network's input, or with `original` the picture that it is a part of, with the shown cell's receptive field.
export function Picture({ picture, shown, original, id, caption, hidden }) {
  if (!picture) return <p class="hint" id={`${id}-caption`}>{caption}</p>;
  const field = shown && !shown.map.numbers ? shown.map.receptiveField(shown.row, shown.column) : null;
  const covered = shown?.map.isHeat ? shown.map.covered(shown.row, shown.column) : null;
  const place = (box) => (original ? boxStyle(toOriginal(box, original, picture), original.rows, original.columns) : boxStyle(exclusive(box), picture.rows, picture.columns));
  const source = original ? original.source : picture.source;
  const paint = (canvas) => {
    canvas.width = source.naturalWidth;
    canvas.height = source.naturalHeight;
    canvas.getContext("2d").drawImage(source, 0, 0);
  };
  const [top, left, bottom, right] = original?.region ?? [];
  return (
    <figure>
      <div class="frame">
        <Canvas paint={paint} on={[source]} id={id} {...(hidden ? {} : { role: "img", "aria-label": caption })} />
        {original && <div class="box seen" id={`${id}-seen`} style={boxStyle({ top, left, bottom, right }, original.rows, original.columns)} />}
        {covered && <div class="box covered" id={`${id}-covered`} style={place(covered)} />}
        {field && <div class="box" id={`${id}-field`} style={place(field)} />}
      </div>
      <figcaption id={`${id}-caption`} aria-hidden="true">{caption}</figcaption>
    </figure>
  );
}

// Bars with their values; negative ones go to the left.
export function Bars({ labels, values }) {
  const largest = Math.max(...values.map((value) => Math.abs(value ?? 0)), 0) || 1, signed = values.some((value) => value < 0);
  return (
    <ol class={`bars ${signed ? "signed" : ""}`}>
      {values.map((value, index) => {
        const share = (100 * Math.abs(value ?? 0)) / largest / (signed ? 2 : 1), from = signed ? (value < 0 ? 50 - share : 50) : 0;
        return (
          <li key={labels[index]}>
            <span class="label">{labels[index]}</span>
            <span class="track" aria-hidden="true"><span class={`fill ${value < 0 ? "negative" : ""}`} style={{ width: `${share}%`, marginLeft: `${from}%` }} /></span>
            <span class="number">{formatNumber(value)}</span>
          </li>
        );
      })}
    </ol>
  );
}

export function Table({ label, title, headings, rows }) {
  return (
    <div class="scroll" role="group" aria-labelledby={title} tabIndex={0}>
      <table aria-label={label}>
        <thead><tr>{headings.map((heading) => <th key={heading} scope="col">{heading}</th>)}</tr></thead>
        <tbody>{rows.map(([name, ...texts]) => <tr key={name}><th scope="row">{name}</th>{texts.map((text, index) => <td key={index}>{text}</td>)}</tr>)}</tbody>
      </table>
    </div>
  );
}
