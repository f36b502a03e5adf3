// The network as a picture: the input, a card for each layer with its strongest channels, the scores, the heat map, and
// the drawer of the chosen channel below the row of its layer. Used by the report and by the live page.
import { Component } from "preact";
import { useEffect, useLayoutEffect, useMemo, useRef, useState } from "preact/hooks";
import { Drawer } from "./drawer.jsx";
import { Bars, Canvas, Picture, Table } from "./parts.jsx";
import { changeText, clamp, formatNumber, formatShare, formatSize, plural } from "./format.js";
import { routes } from "./lines.js";
import { cellUnder, FeatureMap, hasMoved, HeatMap, loadImage, loadPicture } from "./maps.js";

const TILES_SHOWN = 6, NUMBERS_SHOWN = 8; // Of a layer, until all are asked for.
const INPUT = "input", SCORES = "scores", HEAT = "heat map"; // Names of cards besides the layers'; "layer:" precedes theirs.
const cardOf = (layer) => `layer:${layer}`;

// Unpack page data; what of it are pictures is loaded.
export async function unpack(data) {
  const picture = await loadPicture(data.picture);
  const source = data.original && picture ? await loadImage(data.original.file) : null;
  return {
    data, picture,
    original: source && { ...data.original, source },
    maps: data.layers.map((packed) => new FeatureMap(packed)),
    heat: data.heat && picture ? new HeatMap(data.heat, picture) : null,
  };
}

function decode(text) {
  try {
    return decodeURIComponent(text);
  } catch {
    return text; // An address that was not written by this page.
  }
}

// The chosen cell of `at`, "layer,channel,row,column" as it stands in the address, or else the first channel's strongest.
function choose(at, { maps, heat }) {
  const [name, channel, row, column] = (at ?? "").split(",").map(decode);
  const chosen = [...maps, heat].find((map) => map && map.name === name);
  const map = chosen ?? maps.find((one) => !one.numbers) ?? heat ?? maps[0];
  if (!map || map.numbers) return map ? { map, position: 0, row: 0, column: 0 } : null;
  const position = chosen ? map.channels.indexOf(Number(channel)) : -1;
  if (position < 0) return { map, position: 0, ...map.strongest(0)[0] };
  const cell = row === undefined ? map.strongest(position)[0] : { row: Number(row), column: Number(column) };
  return { map, position, row: clamp(cell.row, 0, map.rows - 1), column: clamp(cell.column, 0, map.columns - 1) };
}

export const atText = ({ map, position, row, column }) =>
  [encodeURIComponent(map.name), ...(map.numbers ? [] : [map.channels[position], row, column])].join(",");

export function Network({ result, prefix = "", ask, editing, at, onAt, opacity = 75, wholeLayer = false }) {
  const { data, maps, heat, picture, original } = result;
  const [hover, setHover] = useState(null);
  const [expanded, setExpanded] = useState(() => new Set());
  const grid = useRef(null), wanted = useRef(""); // What gets the focus after drawing: "map" or "tile".
  const selection = useMemo(() => choose(at, result), [at, result]);
  const shown = hover && (hover.map === heat || maps.includes(hover.map)) ? hover : selection;

  const select = (map, position, cell, focus = "") => {
    wanted.current = focus;
    onAt(atText({ map, position, ...(map.numbers ? {} : cell ?? map.strongest(position)[0]) }));
    setHover(null);
  };
  useLayoutEffect(() => { // At once: the next key belongs there.
    if (wanted.current === "map") document.getElementById(`${prefix}map`)?.focus();
    if (wanted.current === "tile") grid.current.querySelector('.tile[aria-pressed="true"]')?.focus();
    wanted.current = "";
  });
  const expand = (name) => setExpanded(new Set([...expanded, name]));
  const drawer = (map) => selection?.map === map &&
    <Drawer key="drawer" {...{ result, prefix, ask, editing, selection, shown, select, opacity, wholeLayer }}
      toTile={() => grid.current.querySelector('.tile[aria-pressed="true"]')?.focus()} />;
  const named = (name) => (prefix ? `${name}, compared` : name); // Two networks on a page have landmarks of different names.
  const tileActions = { select, setHover, wholeLayer, opacity };
  const cards = [INPUT, ...maps.map(({ name }) => cardOf(name)), SCORES, ...(heat ? [HEAT] : [])];
  return (
    <div class="network" ref={grid} style={{ "--count": cards.length }}>
      <Lines grid={grid} cards={cards} edges={edgesOf(data, maps, heat)} on={[result, cards.length, selection?.map]} />
      <section class="card input" data-card={INPUT} aria-label={named("Input")}>
        <h3>Input</h3>
        <Picture {...{ picture, shown }} id={`${prefix}picture`} caption={pictureCaption(data, picture)} />
        {original && <Original {...{ original, picture, shown, prefix }} />}
        {data.notes.length > 0 && <p class="hint converted"><strong>Converted:</strong> {data.notes.join(", ")}</p>}
      </section>
      {maps.map((map) => [
        <LayerCard key={map.name} map={map} label={named(map.name)} sources={sourceText(data, map)} pressed={selection?.map === map ? selection.position : -1}
          expanded={expanded.has(map.name)} expand={expand} {...tileActions} />,
        drawer(map),
      ])}
      <Scores data={data} label={named("Scores")} prefix={prefix} ask={ask} sources={data.score_sources} />
      {heat && [
        <section class="card heat" key="heat" data-card={HEAT} aria-label={named("Heat map")}>
          <h3>Why “{heat.label}”?</h3>
          <div id={`${prefix}heat`} class="one"><Tile map={heat} position={0} pressed={selection?.map === heat} {...tileActions}
            name={`${heat.method}${heat.layer ? ` at ${heat.layer}` : ""}`} /></div>
          <p class="hint">Red raises the score of “{heat.label}”, blue lowers it. {heat.delta !== null && `Completeness error ${formatNumber(heat.delta)}.`}</p>
        </section>,
        drawer(heat),
      ]}
      {data.heat_note && <p class="note hint">{data.heat_note}</p>}
      {!data.known_sources && maps.length > 1 &&
        <p class="note hint">Dotted lines: the order of the forward pass. This archive does not say which layer feeds which.</p>}
    </div>
  );
}

function pictureCaption(data, picture) {
  if (!picture) return "The picture cannot be shown here.";
  return `${data.title}, ${data.picture.exact ? "the network’s input" : "the file, resized by this page"}, ${formatSize(picture.rows, picture.columns)} pixels`;
}

const sourceName = (layer) => layer || "the input";

// What feeds a layer, as text.
function sourceText(data, map) {
  if (!data.known_sources) return "";
  return `from ${map.sources.map(({ layer, fewest, most }) => `${sourceName(layer)}${most > 0 && fewest === 0 ? ", also directly" : ""}`).join(" and ")}`;
}

function edgesOf(data, maps, heat) {
  const card = (layer) => (layer ? cardOf(layer) : INPUT), edges = [];
  const add = (sources, to) => {
    for (const { layer, fewest, most } of sources) {
      edges.push({ from: card(layer), to, kind: "feeds" });
      if (to !== SCORES && fewest === 0 && most > 0) edges.push({ from: card(layer), to, kind: "adds" });
    }
  };
  if (data.known_sources) {
    for (const map of maps) add(map.sources, cardOf(map.name));
    add(data.score_sources, SCORES);
  } else {
    const order = [INPUT, ...maps.map(({ name }) => cardOf(name)), ...(data.scores.length ? [SCORES] : [])];
    order.slice(1).forEach((to, index) => edges.push({ from: order[index], to, kind: "order" }));
  }
  if (heat) edges.push({ from: SCORES, to: HEAT, kind: "explains" });
  return edges;
}

// The lines, drawn again whenever a card moves.
function Lines({ grid, cards, edges, on }) {
  const [drawn, setDrawn] = useState({ width: 0, height: 0, paths: [] });
  useLayoutEffect(() => {
    const draw = () => {
      const frame = grid.current.getBoundingClientRect(), boxes = new Map();
      for (const element of grid.current.querySelectorAll("[data-card]")) {
        const { left, top, right, bottom } = element.getBoundingClientRect();
        boxes.set(element.dataset.card, { left: left - frame.left, top: top - frame.top, right: right - frame.left, bottom: bottom - frame.top });
      }
      const gap = parseFloat(getComputedStyle(grid.current).columnGap) || 20;
      const ordered = new Map(cards.filter((name) => boxes.has(name)).map((name) => [name, boxes.get(name)]));
      setDrawn({ width: frame.width, height: frame.height, paths: routes(ordered, edges, gap) });
    };
    const observer = new ResizeObserver(draw);
    observer.observe(grid.current);
    for (const element of grid.current.querySelectorAll("[data-card]")) observer.observe(element);
    draw();
    return () => observer.disconnect();
  }, on);
  return (
    <svg class="lines" aria-hidden="true" width={drawn.width} height={drawn.height}>
      {drawn.paths.map(({ d, kind, id }) => <path key={id} class={kind} d={d} />)}
    </svg>
  );
}

// One channel of a map, or the heat map: press it to see it large.
class Tile extends Component {
  shouldComponentUpdate(next) {
    return ["map", "position", "pressed", "wholeLayer", "opacity"].some((name) => next[name] !== this.props[name]);
  }

  render({ map, position, pressed, name, wholeLayer, opacity }) {
    const changed = !!map.change?.[position];
    const point = (event) => hasMoved(event) && this.props.setHover({ map, position, ...cellUnder(event, event.currentTarget.querySelector("canvas"), map) });
    const press = (event) => {
      const byKeyboard = event.detail === 0; // Activated by keyboard: the focus goes on to the cells.
      const cell = byKeyboard ? null : cellUnder(event, event.currentTarget.querySelector("canvas"), map);
      this.props.select(map, position, cell, byKeyboard ? "map" : "");
    };
    return (
      <button type="button" class={changed ? "tile changed" : "tile"} aria-pressed={String(!!pressed)} aria-label={`${map.title(position)}${changed ? ", changed" : ""}: enlarge`}
        onPointerMove={point} onPointerLeave={() => this.props.setHover(null)} onClick={press}>
        <Canvas paint={(canvas) => (map.isHeat ? map.paintOver(canvas, opacity / 100) : map.paint(canvas, position, wholeLayer))}
          on={[map, position, wholeLayer, opacity]} />
        <span class="name">{name ?? map.channels[position]}{changed && " Δ"}</span>
      </button>
    );
  }
}

function LayerCard({ map, label, sources, pressed, expanded, expand, ...actions }) {
  const count = map.channels.length, list = useRef(null), focusNext = useRef(false);
  useEffect(() => {
    if (focusNext.current && expanded) list.current.children[TILES_SHOWN].focus();
    focusNext.current = false;
  }, [expanded]);
  const some = count < (map.numbers ? map.count : map.channel_count);
  const channels = map.numbers
    ? some ? `the largest ${count} of ${map.count} numbers` : plural(count, "number")
    : `${some ? `the ${count} strongest of ${map.channel_count} channels` : plural(count, "channel")} of ${formatSize(...map.cells)} cells`;
  const shown = expanded ? count : Math.min(TILES_SHOWN, count), changed = map.change?.filter((change) => change !== 0).length;
  return (
    <section class="card layer" data-card={cardOf(map.name)} aria-label={label}>
      <h3>{map.name}</h3>
      <p class="hint">{channels}{map.operation && <><br />{map.operation}</>}{sources && <><br />{sources}</>}
        {changed > 0 && <><br /><strong class="changes">{changed === count ? `all ${count}` : `${changed} of ${count}`} changed</strong></>}</p>
      {map.numbers
        ? <Numbers map={map} pressed={pressed} {...actions} />
        : <div class="tiles" ref={list}>
            {Array.from({ length: shown }, (_, position) =>
              <Tile key={map.channels[position]} map={map} position={position} pressed={position === pressed} {...actions} />)}
          </div>}
      {!map.numbers && shown < count &&
        <button type="button" class="more" aria-label={`Show all ${count} channels of ${map.name}`}
          onClick={() => { focusNext.current = true; expand(map.name); }}>Show all {count}</button>}
    </section>
  );
}

// The largest numbers of a layer without rows and columns.
function Numbers({ map, pressed, select }) {
  const labels = map.channels.slice(0, NUMBERS_SHOWN).map(String);
  return (
    <>
      <Bars labels={labels} values={map.numbers.slice(0, NUMBERS_SHOWN)} />
      <button type="button" class="tile more" aria-pressed={String(pressed >= 0)} aria-label={`${map.name}: all numbers`}
        onClick={(event) => select(map, 0, null, event.detail === 0 ? "map" : "")}>All {map.numbers.length}</button>
    </>
  );
}

function Scores({ data, label, prefix, ask, sources }) {
  const target = data.heat?.target, top = Math.max(0, ...data.scores.map(({ value }) => Math.abs(value ?? 0)));
  const some = data.class_count > data.scores.length;
  return (
    <section class="card scores" data-card={SCORES} aria-label={label}>
      <h3>Scores</h3>
      {data.known_sources && sources.length > 0 && <p class="hint">from {sources.map(({ layer }) => sourceName(layer)).join(" and ")}</p>}
      <div id={`${prefix}scores`}>{data.scores.length > 0 ? <ol>
        {data.scores.map((score) => {
          const { change } = score, length = (number) => (score.value === undefined ? number : clamp(Math.abs(number) / (top || 1), 0, 1));
          const number = score.value === undefined ? score.probability : score.value, before = change && number - (change.value === undefined ? change.probability : change.value);
          const content = <>
            <span class="label">{score.label}</span>
            <span class="number">{score.value === undefined ? formatShare(score.probability) : formatNumber(score.value)}</span>
            {change && <span class="delta">{changeText(change)}</span>}
            <span class="track" aria-hidden="true"><span class="fill" style={{ width: `${100 * length(number)}%` }} />{change && <span class="before" style={{ left: `${100 * length(before)}%` }} />}</span>
          </>;
          const title = score.logit === undefined || score.logit === null ? undefined : `logit ${formatNumber(score.logit)}`;
          return (
            <li key={score.index} title={title}>
              {ask?.target
                ? <button type="button" class="score" aria-pressed={String(score.index === target)} onClick={() => ask.target(score.index)}>{content}</button>
                : <div class="score">{content}</div>}
            </li>
          );
        })}
      </ol> : <p>This network has no classes.</p>}</div>
      {data.gone?.length > 0 && <p class="hint">No longer among them: {data.gone.map((change) => `${change.label} (${changeText(change)})`).join(", ")}.</p>}
      {some && <p class="hint">{data.scores.length} of {data.class_count} classes.</p>}
      {ask?.target && data.scores.length > 0 && <p class="hint">Press a score to see where in the picture it comes from.</p>}
    </section>
  );
}

// The picture that was sent, with the part that the network sees.
function Original({ original, picture, shown, prefix }) {
  return (
    <div class="original">
      <Picture {...{ picture, shown, original }} id={`${prefix}original`}
        caption={`The original, ${formatSize(original.rows, original.columns)} pixels; dashed: the part that the network sees`} />
    </div>
  );
}

// A network that was not asked anything yet: its layers and what feeds what.
export function Skeleton({ model }) {
  const grid = useRef(null), { layers, classes } = model, [channels, height, width] = model.input;
  const cards = [INPUT, ...layers.map(({ name }) => cardOf(name)), ...(classes.length ? [SCORES] : [])];
  const data = { known_sources: layers.some(({ sources }) => sources.length), score_sources: model.score_sources, scores: classes };
  return (
    <section class="skeleton" aria-label="The network">
      <h2>{model.name}: choose a picture to see what its layers see</h2>
      <div class="network" ref={grid} style={{ "--count": cards.length }}>
        <Lines grid={grid} cards={cards} edges={edgesOf(data, layers, null)} on={[model]} />
        <div class="card" data-card={INPUT}><h3>Input</h3><p class="hint">{height ? `${formatSize(height, width)} pixels` : "any size"}, {plural(channels, "channel")}</p></div>
        {layers.map(({ name, shape }) => (
          <div class="card" key={name} data-card={cardOf(name)}><h3>{name}</h3><p class="hint">{plural(shape[0], "channel")}{shape.length === 3 && height ? ` of ${formatSize(shape[1], shape[2])} cells` : ""}</p></div>
        ))}
        {classes.length > 0 && <div class="card" data-card={SCORES}><h3>Scores</h3><p class="hint">{classes.length > 5 ? `${classes.slice(0, 5).join(", ")} … of ${classes.length}` : classes.join(", ")}</p></div>}
      </div>
    </section>
  );
}

// The table of layers and the timing, below the network.
export function Tables({ data, prefix = "" }) {
  return (
    <div class="tables">
      <section aria-label={`Layers${prefix && ", compared"}`}>
        <h2 id={`${prefix}geometry-title`}>Layers</h2>
        <Table label="Layers of the network" title={`${prefix}geometry-title`} headings={data.geometry.headings} rows={data.geometry.rows} />
      </section>
      {data.timing && <section aria-label={`Timing${prefix && ", compared"}`}>
        <h2 id={`${prefix}timing-title`}>Timing</h2>
        <Table label="Milliseconds by stage" title={`${prefix}timing-title`} headings={["milliseconds", ...data.timing.map(([name]) => name)]}
          rows={[["this request", ...data.timing.map(([, ms]) => ms.toFixed(2))]]} />
      </section>}
    </div>
  );
}

export function Heading({ data, level = 1, prefix = "" }) {
  const { model, title } = data, Title = `h${level}`;
  return (
    <>
      <Title id={`${prefix}title`}>{title} – {model.name}</Title>
      <p class="hint" id={`${prefix}model-info`}>{model.description && `${model.description.replace(/\.?$/, ".")} `}
        Version {model.version}, {model.parameters.toLocaleString("en")} parameters, {model.engine} on {model.device}.{data.edits > 0 && ` After ${plural(data.edits, "edit")}.`}</p>
    </>
  );
}
