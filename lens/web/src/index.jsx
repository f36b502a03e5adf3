// The index of many reports: a table that can be sorted by a press on a heading.
import { useState } from "preact/hooks";
import { formatNumber, scoreText } from "./format.js";

const best = ({ scores }) => scores[0], figure = (score) => score?.value ?? score?.probability ?? -Infinity;
const COLUMNS = {
  picture: { heading: "picture", key: ({ title }) => title },
  label: { heading: "most probable", key: (entry) => best(entry)?.label ?? "" },
  score: { heading: "score", key: (entry) => figure(best(entry)) },
  lead: { heading: "lead over the second", key: ({ scores }) => (scores.length > 1 ? figure(scores[0]) - figure(scores[1]) : -Infinity) },
};

export function Index({ data }) {
  const [order, setOrder] = useState({ column: null, falling: false });
  const entries = [...data.index];
  if (order.column) {
    const { key } = COLUMNS[order.column], compare = (a, b) => (typeof a === "string" ? a.localeCompare(b, "en", { numeric: true }) : a - b);
    entries.sort((a, b) => (order.falling ? -1 : 1) * compare(key(a), key(b)));
  }
  const failed = entries.filter(({ error }) => error).length, converted = entries.filter(({ notes }) => notes.length).length;
  const press = (column) => setOrder({ column, falling: order.column === column ? !order.falling : column === "score" || column === "lead" });
  return (
    <>
      <header class="top">
        <h1 id="title">{data.title}</h1>
        <p class="hint">{data.model.description}{failed > 0 && ` ${failed} of the pictures failed.`}{converted > 0 && ` Pictures that were converted, as their pages say: ${converted}.`}</p>
      </header>
      <main id="main">
        <div class="scroll" role="group" aria-labelledby="title" tabIndex={0}>
          <table class="index" aria-label="Pictures">
            <thead><tr>
              <td />
              {Object.entries(COLUMNS).map(([name, { heading }]) => (
                <th key={name} scope="col" aria-sort={order.column === name ? (order.falling ? "descending" : "ascending") : "none"}>
                  <button type="button" onClick={() => press(name)}>{heading}<span aria-hidden="true">{order.column === name ? (order.falling ? " ▾" : " ▴") : ""}</span></button>
                </th>
              ))}
            </tr></thead>
            <tbody>{entries.map((entry) => <Row key={`${entry.page} ${entry.title}`} entry={entry} />)}</tbody>
          </table>
        </div>
      </main>
    </>
  );
}

function Row({ entry: { title, page, thumbnail, scores, error } }) {
  const [first, second] = scores;
  return (
    <tr>
      <td class="thumbnail">{thumbnail && <img src={thumbnail} alt="" />}</td>
      <th scope="row">{page ? <a href={page}>{title}</a> : title}</th>
      {error
        ? <td colSpan={3} class="error">{error}</td>
        : <>
            <td class="text">{first ? first.label : "–"}</td>
            <td>{first ? scoreText(first) : "–"}</td>
            <td class="text">{second ? `${lead(first, second)} over ${second.label}` : "–"}</td>
          </>}
    </tr>
  );
}

const lead = (first, second) =>
  first.value === undefined ? `${(100 * (first.probability - second.probability)).toFixed(1)} points` : formatNumber(first.value - second.value);
