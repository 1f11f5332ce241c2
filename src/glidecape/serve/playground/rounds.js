// The drawing of a run's rounds: a strip of all of them, and the tree of one.

export const $ = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";
const MOST_NODES = 80; // of a tree, drawn
const [WIDE, GAP, TALL, HIGH] = [80, 24, 36, 44]; // of a node, between columns, of a node, from row to row
let shown = null; // the run whose rounds are drawn

export function show(run) {
  shown = run;
  $("which").value = $("which").max;
  drawRounds();
}

function make(kind, attributes, parent) {
  const node = document.createElementNS(SVG, kind);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (parent) parent.append(node);
  return node;
}

const percent = (share) => (share < 0.01 ? "<1 %" : Math.round(100 * share) + " %");

function depthsOf(tree) {
  const depths = [0];
  for (let n = 1; n < tree.parents.length; n++) depths.push(depths[tree.parents[n]] + 1);
  return depths;
}

// The newest round is followed, unless somebody looks at an older one.
export function drawRounds() {
  const count = shown ? shown.rounds.length : 0, slider = $("which"), follow = slider.value === slider.max;
  $("rounds").hidden = count === 0;
  slider.max = Math.max(1, count);
  if (follow) slider.value = slider.max;
  if (!count) return;
  drawStrip(count, Number(slider.value));
  drawTree(Number(slider.value));
}

function drawStrip(count, which) {
  const strip = $("strip"), wide = 10, unit = 8;
  if (strip.run !== shown) { strip.replaceChildren(); strip.run = shown; strip.deepest = 0; }
  const added = shown.rounds.slice(strip.childElementCount);
  for (const round of added) {
    const accepted = round.tree ? round.tree.path.length - 1 : 0, depth = round.tree ? Math.max(...depthsOf(round.tree)) : 0;
    const bar = make("g", { class: "bar", transform: `translate(${strip.childElementCount * wide} 0) scale(1 -1)` }, strip);
    if (depth) make("rect", { class: "drafted", x: 1.5, y: 0.5, width: 7, height: depth * unit }, bar);
    if (accepted) make("rect", { class: "accepted", x: 2, y: 1, width: 6, height: accepted * unit - 1 }, bar);
    make("rect", { class: "cap", x: 2, y: accepted * unit + 1, width: 6, height: 4 }, bar);
    make("rect", { class: "hit", x: 0, y: 0, width: wide, height: 400 }, bar).dataset.round = strip.childElementCount;
    strip.deepest = Math.max(strip.deepest, depth);
  }
  const high = (strip.deepest + 1) * unit;
  strip.setAttribute("width", count * wide);
  strip.setAttribute("height", high + 2);
  strip.setAttribute("viewBox", `0 ${-high} ${count * wide} ${high + 2}`);
  strip.parentElement.scrollLeft = which * wide - strip.parentElement.clientWidth / 2;
  const chosen = strip.querySelector(".chosen");
  if (chosen) chosen.classList.remove("chosen");
  const bar = strip.children[which - 1];
  if (bar) bar.classList.add("chosen");
}

// The nodes to draw: those of the tree, and the bonus token after the last accepted one.
function nodesOf(round) {
  const { tree, tokens } = round, depths = depthsOf(tree), accepted = new Set(tree.path), last = tree.path[tree.path.length - 1];
  const nodes = tree.texts.map((text, n) => ({
    text, depth: depths[n], parent: tree.parents[n], yes: accepted.has(n), kind: tree.origins[n],
    chance: tree.probabilities && n ? percent(tree.probabilities[n]) : "",
  }));
  const bonus = tokens[tokens.length - 1];
  if (bonus.origin === "bonus") {
    nodes.push({ text: bonus.text, depth: depths[last] + 1, parent: last, yes: true, kind: "bonus", chance: "" });
  }
  const used = []; // nodes of each depth so far
  for (const [n, node] of nodes.entries()) {
    // Accepted nodes stay, others give way.
    node.drawn = node.yes || n < MOST_NODES;
    if (!node.drawn) continue;
    used[node.depth] = (used[node.depth] || 0) + 1;
    Object.assign(node, { x: 4 + node.depth * (WIDE + GAP), y: 22 + (used[node.depth] - 1) * HIGH });
  }
  return { nodes, deepest: Math.max(...depths), columns: used.length, rows: Math.max(...used) };
}

function drawTree(which) {
  const round = shown.rounds[which - 1], svg = $("tree");
  if (!round.tree) return;
  const { nodes, deepest, columns, rows } = nodesOf(round);
  const size = { width: columns * (WIDE + GAP), height: 26 + rows * HIGH };
  svg.replaceChildren();
  for (const [name, value] of Object.entries(size)) svg.setAttribute(name, value);
  const drawn = nodes.filter((node) => node.drawn);
  for (const node of drawn) if (node.parent >= 0 && nodes[node.parent].drawn) drawEdge(svg, nodes[node.parent], node);
  for (const node of drawn) drawNode(svg, node);
  if (deepest) {
    const x = 4 + deepest * (WIDE + GAP) + WIDE + GAP / 2;
    make("line", { class: "ended", x1: x, x2: x, y1: 4, y2: size.height - 4 }, svg);
    make("text", { class: "why", x: x - 6, y: 14, "text-anchor": "end" }, svg).textContent = `drafting stopped at ${deepest}`;
  }
  const before = which > 1 ? shown.rounds[which - 2].at : null;
  const took = before === null ? "" : `, ${(1000 * (round.at - before)).toFixed(1)} ms`;
  const drafted = round.tree.texts.length - 1, taken = round.tree.path.length - 1;
  const told = `Round ${which} of ${shown.rounds.length}: ${drafted} drafted, ${taken} accepted, ${round.tokens.length} emitted${took}`;
  $("which-label").textContent = told;
  $("which").setAttribute("aria-valuetext", told);
  svg.setAttribute("aria-label", `Tree of tokens. ${told}`);
}

function drawEdge(svg, from, to) {
  const x = from.x + WIDE, y = from.y + TALL / 2, end = to.y + TALL / 2;
  const path = `M${x} ${y} C${x + GAP / 2} ${y} ${to.x - GAP / 2} ${end} ${to.x} ${end}`;
  make("path", { class: `edge ${to.yes ? "yes" : ""} ${to.kind}`, d: path }, svg);
}

function drawNode(svg, { text, yes, kind, chance, x, y }) {
  const node = make("g", { class: `node ${kind} ${yes ? "yes" : ""}` }, svg);
  const fate = kind === "bonus" || kind === "root" ? "" : yes ? ", accepted" : ", rejected";
  make("title", {}, node).textContent = `${JSON.stringify(text)}: ${kind}${fate}`;
  make("rect", { x, y, width: WIDE, height: TALL, rx: 4 }, node);
  const visible = text.replaceAll("\n", "↵").replaceAll("\t", "⇥").replaceAll(" ", "·");
  const label = visible.length > 9 ? visible.slice(0, 8) + "…" : visible;
  make("text", { x: x + 6, y: y + (chance ? 15 : 22) }, node).textContent = label;
  if (chance) make("text", { x: x + 6, y: y + 30, class: "small" }, node).textContent = chance;
}

$("which").addEventListener("input", () => drawRounds());
$("strip").addEventListener("click", (event) => {
  if (!event.target.dataset.round) return;
  $("which").value = event.target.dataset.round;
  drawRounds();
});
