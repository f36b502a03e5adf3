// The lines between the cards of the network: what feeds what.

const CORNER = 7, PORT = 24; // Radius of a bend; distance of a card's port from its top.

// A path through points, horizontal and vertical, with round corners.
function path(points) {
  let text = `M${points[0]}`;
  for (let index = 1; index < points.length - 1; index++) {
    const [before, [x, y], after] = [points[index - 1], points[index], points[index + 1]];
    const towards = ([px, py]) => {
      const length = Math.hypot(px - x, py - y) || 1, reach = Math.min(CORNER, length / 2);
      return [x + ((px - x) * reach) / length, y + ((py - y) * reach) / length];
    };
    text += `L${towards(before)}Q${x},${y} ${towards(after)}`;
  }
  return `${text}L${points.at(-1)}`;
}

// The path of one line. `from` and `to` are boxes of cards, `skips` whether it passes by other operations or cards,
// `lane` tells lines apart that run side by side, `gaps` are the widths of the gutters.
function route(from, to, skips, lane, gaps) {
  const stacked = Math.abs(from.left - to.left) < 2 && to.top > from.top && gaps.oneColumn;
  if (stacked && !skips) return path([[from.left + 24, from.bottom], [to.left + 24, to.top]]);
  if (stacked) {
    const x = from.left - 6 - 4 * lane;
    return path([[from.left, from.top + PORT], [x, from.top + PORT], [x, to.top + PORT], [to.left, to.top + PORT]]);
  }
  const sameRow = Math.abs(from.top - to.top) < 2 && to.left > from.left;
  if (sameRow && !skips) return path([[from.right, from.top + PORT], [to.left, to.top + PORT]]);
  if (sameRow) {
    const y = from.top - 9 - 5 * lane;
    return path([[from.right - 16, from.top], [from.right - 16, y], [to.left + 16, y], [to.left + 16, to.top]]);
  }
  const out = from.right + gaps.x / 2 - 3 * lane, down = to.top - 12 - 5 * lane, into = to.left - gaps.x / 2 + 3 * lane;
  const start = from.top + PORT + 8 * lane, end = to.top + PORT + 8 * lane;
  return path([[from.right, start], [out, start], [out, down], [into, down], [into, end], [to.left, end]]);
}

/**
 * Return the paths of the lines: [{d, kind, id}].
 *
 * cards: boxes {left, top, right, bottom} by name, in the order of the forward pass.
 * edges: [{from, to, kind}]; kind is "feeds", "adds" (past the operations), "order" or "explains".
 */
export function routes(cards, edges, gapX) {
  const boxes = [...cards.values()], names = [...cards.keys()];
  const gaps = { x: gapX, oneColumn: boxes.every((box) => Math.abs(box.left - boxes[0].left) < 2) };
  const used = new Map();
  return edges.filter(({ from, to }) => cards.has(from) && cards.has(to)).map((edge) => {
    const [from, to] = [cards.get(edge.from), cards.get(edge.to)];
    const passes = names.indexOf(edge.to) - names.indexOf(edge.from) > 1, skips = passes || edge.kind === "adds";
    const key = skips ? `${Math.round(to.top)} skips` : `${edge.to} feeds`;
    const lane = (used.get(key) ?? -1) + 1;
    used.set(key, lane % 3);
    return { d: route(from, to, skips, lane + (skips && to.top > from.top ? 1 : 0), gaps), kind: edge.kind, id: `${edge.from}→${edge.to} ${edge.kind}` };
  });
}
