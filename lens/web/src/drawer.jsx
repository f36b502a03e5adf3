// The drawer of a channel: its map in large, the receptive field in the picture, what can be edited, the colour scale, the
// strongest cells, the kernels, and what can be saved.
import { useEffect, useLayoutEffect, useMemo, useRef, useState } from "preact/hooks";
import { gradient } from "./colours.js";
import { ChannelEdits, regionsOf, withRegion } from "./edits.jsx";
import { clamp, formatInteger, formatNumber, formatSize } from "./format.js";
import { cellUnder, ExactMap, hasMoved, Kernels, readNpy, toOriginal, writeNpy } from "./maps.js";
import { Bars, boxStyle, Canvas, Picture } from "./parts.jsx";

const STRONGEST_SHOWN = 5, KERNELS_SHOWN = 12, LARGEST_ZOOM = 16;
const POSITIVE = "rgb(214, 13, 13)", NEGATIVE = "rgb(13, 64, 214)";

export function Drawer({ result, prefix, ask, editing, selection, shown, select, opacity, wholeLayer, toTile }) {
  const { data, picture, original } = result, { map, position } = selection;
  const exact = useExact(ask, map, position), brush = useBrush(editing, map, position, edit);
  if (map.numbers) return <AllNumbers {...{ map, prefix, toTile }} />;
  const drawn = exact.map ?? map; // With every cell, once it is loaded.
  const cell = shown.map === map && shown.position === position ? shown : selection;
  function edit(edits, name) {
    select(map, position, { row: selection.row, column: selection.column }); // The strongest cell may move.
    editing.edit(edits, name);
  }
  const step = (by) => select(map, clamp(position + by, 0, map.channels.length - 1), { row: selection.row, column: selection.column });
  return (
    <section class="drawer" aria-label={`${map.title(position)}${prefix && ", compared"}`}>
      <header>
        <h3>{map.isHeat ? `Heat map: ${map.method}${map.layer ? ` at ${map.layer}` : ""}` : map.title(position)}</h3>
        {!map.isHeat && map.channels.length > 1 && <p class="steps">
          <button type="button" disabled={position === 0} onClick={() => step(-1)}>‹ stronger channel</button>
          <button type="button" disabled={position === map.channels.length - 1} onClick={() => step(1)}>weaker channel ›</button>
        </p>}
      </header>
      <LargeMap {...{ map: drawn, base: map, position: drawn === map ? position : 0, brush, selection, select, step, prefix, opacity, wholeLayer, toTile, whole: position }} />
      <div class="seen-in">
        {picture && <Picture {...{ picture, shown, hidden: true }} id={`${prefix}seen-in`}
          caption={map.isHeat && !map.ofPixels ? "Solid: what the cell is drawn over; yellow: what it sees." : "The yellow box is what the marked cell sees."} />}
        <p id={`${prefix}cell-description`} class="cell-description" role="status" aria-live="polite">{describe(shown, shown.map === map && shown.position === position ? drawn : shown.map, picture, original)}</p>
      </div>
      <div class="facts">
        {brush && <ChannelEdits {...{ map, position, prefix, editing, edit, brush }} />}
        <Scale map={map} position={position} wholeLayer={wholeLayer} />
        <Strongest map={map} position={position} select={select} cell={cell} />
        <KernelList {...{ data, ask, map, position }} />
        <Save {...{ data, ask, map, drawn, position, opacity, wholeLayer, exact }} />
      </div>
    </section>
  );
}

function describe(shown, drawn, picture, original) {
  const { map, row, column } = shown, exact = drawn !== map && map.block === 1;
  const text = `${exact ? drawn.description(0, row, column) : map.description(shown.position, row, column)} ${map.fieldDescription(row, column, picture)}`;
  const field = map.receptiveField(row, column);
  if (!(original && picture && field)) return text;
  const { top, left, bottom, right } = toOriginal(field, original, picture);
  return `${text} In the original: rows ${formatInteger(Math.floor(top))} to ${formatInteger(Math.ceil(bottom) - 1)}, ` +
    `columns ${formatInteger(Math.floor(left))} to ${formatInteger(Math.ceil(right) - 1)}.`;
}

// Every cell of a channel, loaded when asked for.
function useExact(ask, map, position) {
  const [state, setState] = useState({});
  const current = state.of === map && state.position === position ? state : {};
  const load = ask?.map && (async () => {
    setState({ of: map, position, loading: true });
    try {
      const array = readNpy(await ask.map(map.name, map.channels[position]));
      setState({ of: map, position, map: new ExactMap(map, position, array) });
    } catch (error) {
      setState({ of: map, position, error: error.message });
    }
  });
  return { ...current, load };
}

// The brush of a channel: whether the pointer brushes, and from which cell; null where nothing can be edited.
function useBrush(editing, map, position, edit) {
  const channel = map.channels[position], key = `${map.name} ${channel}`;
  const [state, setState] = useState({ key, on: false, from: null });
  const { on, from } = state.key === key ? state : { on: false, from: null };
  if (!editing || map.isHeat || map.numbers) return null;
  return {
    on, from,
    regions: regionsOf(editing.edits, map, channel),
    toggle: () => setState({ key, on: !on, from: null }),
    begin: (cell) => setState({ key, on, from: cell }),
    giveUp: () => setState({ key, on, from: null }),
    end: (cell) => {
      setState({ key, on, from: null });
      edit(withRegion(editing.edits, map, channel, map.region(from, cell)));
    },
  };
}

function LargeMap({ map, base, position, whole, brush, selection, select, step, prefix, opacity, wholeLayer, toTile }) {
  const [zoom, setZoom] = useState(1), frame = useRef(null), marker = useRef(null);
  const row = Math.min(selection.row, base.rows - 1), column = Math.min(selection.column, base.columns - 1);
  const move = (to) => select(base, whole, { row: clamp(to.row, 0, base.rows - 1), column: clamp(to.column, 0, base.columns - 1) });
  const follow = (event) => {
    if (event.type === "pointermove" && !hasMoved(event)) return;
    const cell = cellUnder(event, event.currentTarget, base);
    if (cell.row !== row || cell.column !== column) move(cell);
  };
  const press = (event) => {
    follow(event);
    if (!brush?.on || event.button !== 0) return;
    event.currentTarget.setPointerCapture(event.pointerId);
    brush.begin(cellUnder(event, event.currentTarget, base));
  };
  const release = (event) => brush?.on && brush.from && brush.end(cellUnder(event, event.currentTarget, base));
  const changeZoom = (factor) => setZoom(clamp(zoom * factor, 1, LARGEST_ZOOM));
  useLayoutEffect(() => { // Keep the marked cell in sight.
    const { current: box } = marker, { current: view } = frame;
    if (zoom === 1) return;
    view.scrollLeft = box.offsetLeft + box.offsetWidth / 2 - view.clientWidth / 2;
    view.scrollTop = box.offsetTop + box.offsetHeight / 2 - view.clientHeight / 2;
  }, [zoom]);
  const keys = (event) => {
    const stride = event.shiftKey ? 8 : 1;
    const actions = {
      ArrowUp: () => move({ row: row - stride, column }),
      ArrowDown: () => move({ row: row + stride, column }),
      ArrowLeft: () => move({ row, column: column - stride }),
      ArrowRight: () => move({ row, column: column + stride }),
      Home: () => move({ row: event.ctrlKey ? 0 : row, column: 0 }),
      End: () => move({ row: event.ctrlKey ? base.rows - 1 : row, column: base.columns - 1 }),
      PageUp: () => step(-1),
      PageDown: () => step(1),
      "+": () => changeZoom(2),
      "-": () => changeZoom(0.5),
      Escape: brush?.from ? brush.giveUp : toTile,
      ...(brush && { " ": () => (brush.from ? brush.end : brush.begin)({ row, column }) }),
    };
    if (!actions[event.key] || event.altKey || event.metaKey) return;
    event.preventDefault();
    actions[event.key]();
  };
  return (
    <figure class="large">
      <div class="frame zoomed" ref={frame}>
        <div class={brush?.on ? "map brush" : "map"} id={`${prefix}map`} role="application" tabIndex={0} aria-roledescription="feature map"
          aria-describedby={`${prefix}help`} aria-label={`${map.title(position)}, ${base.rows} rows of ${base.columns} cells`}
          style={{ width: `${100 * zoom}%` }} onPointerMove={follow} onPointerDown={press} onPointerUp={release} onPointerCancel={() => brush?.giveUp()} onKeyDown={keys}>
          <Canvas paint={(canvas) => (map.isHeat ? map.paintOver(canvas, opacity / 100) : map.paint(canvas, position, wholeLayer))}
            on={[map, position, opacity, wholeLayer]} />
          {brush?.regions.map((edges, index) => <div key={index} class="box brushed" style={inBlocks(edges, base)} />)}
          {brush?.from && <div class="box brushing" style={inBlocks(base.region(brush.from, { row, column }), base)} />}
          <div class="box" ref={marker} id={`${prefix}cell`} style={boxStyle({ top: row, left: column, bottom: row + 1, right: column + 1 }, base.rows, base.columns)} />
        </div>
      </div>
      <figcaption class="zoom">
        <button type="button" aria-label="Zoom out" disabled={zoom === 1} onClick={() => changeZoom(0.5)}>−</button>
        <span>{formatSize(...map.cells)} cells{base.block > 1 && map === base ? `, drawn in blocks of ${formatSize(base.block, base.block)}` : ""}, ×{zoom}</span>
        <button type="button" aria-label="Zoom in" disabled={zoom === LARGEST_ZOOM} onClick={() => changeZoom(2)}>+</button>
      </figcaption>
      <p id={`${prefix}help`} class="hint help">Point at a cell, or use the arrow keys. Home/End: ends of the row; Page Up/Down: previous/next channel;
        Shift: 8 cells; +/−: zoom; {brush && "Space: begin and end a region to brush out; "}Escape: back to the list.</p>
    </figure>
  );
}

// Where a region of cells is on a map that is drawn in blocks, as CSS.
function inBlocks([top, left, bottom, right], { block, rows, columns }) {
  return boxStyle({ top: top / block, left: left / block, bottom: bottom / block, right: right / block }, rows, columns);
}

// What the colours mean.
function Scale({ map, position, wholeLayer }) {
  const heat = map.isHeat;
  const [low, high] = heat ? [-map.strongestHeat, map.strongestHeat] : map.limits(position, wholeLayer);
  if (low === null) return <p class="hint">This channel has no finite value.</p>;
  const background = heat ? `linear-gradient(to right, ${NEGATIVE}, #fff, ${POSITIVE})` : gradient(map.colours);
  const middle = map.signed || heat ? 0 : (low + high) / 2;
  return (
    <div class="scale">
      <h4>Colour scale</h4>
      <div class="ramp" aria-hidden="true" style={{ background }} />
      <p class="ends"><span>{formatNumber(low)}</span><span>{formatNumber(middle)}</span><span>{formatNumber(high)}</span></p>
      {!heat && <p class="hint">{wholeLayer ? "Of the whole layer" : "Of this channel alone"}{map.before && ", before the edits"}. Its cells: {formatNumber(map.min[position])} to {formatNumber(map.max[position])}.</p>}
    </div>
  );
}

function Strongest({ map, position, select, cell }) {
  const cells = useMemo(() => map.strongest(position, STRONGEST_SHOWN), [map, position]);
  return (
    <div>
      <h4>Strongest cells</h4>
      <ol class="strongest">
        {cells.map(({ row, column }) => (
          <li key={`${row},${column}`}>
            <button type="button" aria-pressed={String(cell.row === row && cell.column === column)} onClick={() => select(map, position, { row, column })}>
              <span>{map.place(row, column)}</span> <span class="number">{formatNumber(map.value(position, row, column))}</span>
            </button>
          </li>
        ))}
      </ol>
    </div>
  );
}

// The kernels of a channel: in the file, or fetched from the live page's server.
function KernelList({ data, ask, map, position }) {
  const [fetched, setFetched] = useState({});
  const channel = map.channels[position], key = `${data.model.name}/${map.name}/${channel}`;
  const wants = map.has_kernels && !map.kernels && ask?.kernels;
  useEffect(() => {
    if (!wants) return undefined;
    let stale = false;
    ask.kernels(map.name, channel).then((packed) => stale || setFetched({ key, packed }), (error) => stale || setFetched({ key, error }));
    return () => { stale = true; };
  }, [key, wants]);
  if (!map.has_kernels) return null;
  const packed = map.kernels ?? (fetched.key === key ? fetched.packed : null);
  if (!packed) {
    const text = fetched.key === key ? fetched.error.message : wants ? "Loading…"
      : `They are not in this file: convscope filters ${data.model.name} --layer ${map.name}`;
    return <div><h4>Kernels</h4><p class="hint">{text}</p></div>;
  }
  const place = packed.channels.indexOf(channel);
  return place < 0 ? null : <KernelTiles kernels={new Kernels(packed, place)} />;
}

function KernelTiles({ kernels }) {
  const { count, height, width, max } = kernels, order = useMemo(() => kernels.order().slice(0, KERNELS_SHOWN), [kernels.values]);
  return (
    <div>
      <h4>Kernels, {formatSize(height, width)}</h4>
      <ul class="kernels">
        {order.map((channel) => <li key={channel}><Canvas paint={(canvas) => kernels.paint(canvas, channel)} on={[kernels.values, channel]} /><span>{channel}</span></li>)}
      </ul>
      <p class="hint">By input channel{count > order.length ? `, the ${order.length} with the largest weights of ${count}` : ""}. Blue to red: {formatNumber(-max)} to {formatNumber(max)}.</p>
    </div>
  );
}

function save(name, blob) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

const fileName = (text) => text.replace(/[^A-Za-z0-9._-]+/g, "-").replace(/^-+|-+$/g, "");

function Save({ data, ask, map, drawn, position, opacity, wholeLayer, exact }) {
  const stem = fileName(`${data.title.replace(/\.[^.]*$/, "")}-${data.model.name}-${map.isHeat ? `${map.method}-${map.label}` : `${map.name}-${map.channels[position]}`}`);
  const [error, setError] = useState("");
  const savePicture = () => {
    const small = document.createElement("canvas");
    if (map.isHeat) map.paintOver(small, opacity / 100);
    else drawn.paint(small, drawn === map ? position : 0, wholeLayer);
    const factor = Math.max(1, Math.ceil(256 / Math.max(small.width, small.height))), large = document.createElement("canvas");
    large.width = small.width * factor;
    large.height = small.height * factor;
    const context = large.getContext("2d");
    context.imageSmoothingEnabled = false;
    context.drawImage(small, 0, 0, large.width, large.height);
    large.toBlob((blob) => save(`${stem}.png`, blob), "image/png");
  };
  const saveAll = async (channel) => {
    setError("");
    try {
      const buffer = await ask.map(map.name, channel);
      save(`${fileName(`${data.title.replace(/\.[^.]*$/, "")}-${data.model.name}-${map.name}`)}.npy`, new Blob([buffer]));
    } catch (failure) {
      setError(failure.message);
    }
  };
  return (
    <div class="save">
      <h4>Save</h4>
      <p>
        <button type="button" onClick={savePicture}>{map.isHeat ? "Overlay, PNG" : "Map, PNG"}</button>{" "}
        <button type="button" onClick={() => save(`${stem}.npy`, writeNpy(drawn.array(drawn === map ? position : 0)))}>{map.isHeat ? "Heat, .npy" : "Map, .npy"}</button>{" "}
        {!map.isHeat && ask?.map && <button type="button" onClick={() => saveAll(null)}>Whole layer, .npy</button>}{" "}
        {!map.isHeat && exact.load && !exact.map && <button type="button" disabled={exact.loading} onClick={exact.load}>Load exact values</button>}
      </p>
      <p class="hint">{exact.map ? "Every cell, float32." : map.isHeat ? "Values in 127 steps each way." : `Values as they are drawn${map.block > 1 ? `, blocks of ${formatSize(map.block, map.block)} cells` : ""}: in 255 steps.`}</p>
      {(error || exact.error) && <p class="error" role="alert">{error || exact.error}</p>}
    </div>
  );
}

function AllNumbers({ map, prefix, toTile }) {
  return (
    <section class="drawer numbers" aria-label={`${map.name}: all numbers${prefix && ", compared"}`}>
      <header><h3>{map.name}: {map.numbers.length < map.count ? `the largest ${map.numbers.length} of ` : ""}{map.count} numbers</h3></header>
      <div class="map" id={`${prefix}map`} role="group" tabIndex={0} aria-label={`${map.name}, ${map.numbers.length} numbers`}
        onKeyDown={(event) => event.key === "Escape" && toTile()}>
        <Bars labels={map.channels.map(String)} values={map.numbers} />
      </div>
      <p id={`${prefix}cell-description`} class="hint" role="status" aria-live="polite">
        {map.receptive_field ? `One cell, which sees ${formatSize(...map.receptive_field)} pixels.` : "Receptive field unknown."}
      </p>
    </section>
  );
}
