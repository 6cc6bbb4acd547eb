// The page of a store: thresholds are moved, and what they do to the crops is counted from the embedded histogram.

const regionNames = ["discarded", "calibrated", "kept"];
const thresholdNames = ["discard_below", "calibrate_below", "discard_above"];
const byId = (id) => document.getElementById(id);

// before[p]: the sum of the first p counts.
const sums = (counts) => counts.reduce((before, count) => (before.push(before.at(-1) + count), before), [0]);
const counted = Object.fromEntries(
  Object.entries(figures.counts).map(([kind, of]) => {
    return [kind, { edges: of.edges, fine: of, crops: sums(of.crops), agree: sums(of.agree), images: sums(of.images) }];
  }),
);

let kind = figures.policy.confidence;
let edge = {}; // threshold name -> its place among the edges

function place(value) {
  const edges = counted[kind].edges;
  let best = 0;
  edges.forEach((other, index) => Math.abs(other - value) < Math.abs(edges[best] - value) && (best = index));
  return best;
}

const value = (name) => counted[kind].edges[edge[name]];
const policy = () => ({ confidence: kind, ...Object.fromEntries(thresholdNames.map((name) => [name, value(name)])) });

// Place 2 i holds the crops equal to edge i, place 2 i + 1 those between it and the next: below edge i are the first 2 i places.
function inRegions(before) {
  const [below, calibrate, above] = thresholdNames.map((name) => 2 * edge[name]);
  const all = before.at(-1), discarded = before[below] + all - before[above + 1];
  const calibrated = Math.max(0, before[calibrate] - before[below]);
  return [discarded, calibrated, all - discarded - calibrated];
}

function show() {
  const { crops, agree, images } = counted[kind];
  const share = inRegions(crops), right = inRegions(agree), all = Math.max(1, crops.at(-1));
  const rows = byId("regions").tBodies[0].rows;
  regionNames.forEach((name, region) => {
    const texts = [whole(share[region]), percent(share[region] / all), percent(right[region] / share[region])];
    texts.forEach((text, column) => (rows[region].cells[column + 1].textContent = text));
    byId("bar").children[region].setAttribute("width", (100 * share[region]) / all);
    byId("bar").children[region].setAttribute("x", (100 * share.slice(0, region).reduce((sum, part) => sum + part, 0)) / all);
  });
  const lost = images[2 * edge.discard_below], open = value("discard_above") < 1 ? "at least " : "";
  byId("lost").textContent = `${open}${whole(lost)} of ${whole(images.at(-1))} images have no crop left`;
  for (const name of thresholdNames) {
    byId(name).value = value(name);
    byId(`${name}_slider`).value = edge[name];
    byId(`${name}_slider`).setAttribute("aria-valuetext", value(name));
  }
  byId("flags").value = flags();
  histogram.repaint();
  if (colour) colour(policy());
}

function flags() {
  const neutral = { discard_below: 0, calibrate_below: 0, discard_above: 1 };
  const set = thresholdNames.filter((name) => value(name) !== neutral[name]).map((name) => `--${name.replace("_", "-")} ${value(name)}`);
  return set.length ? [...set, ...(kind === "max" ? [] : [`--confidence ${kind}`])].join(" ") : "";
}

// discard_below <= calibrate_below <= discard_above, but for calibrate_below 0, which calibrates nothing: the moved one pushes the others.
function move(name, to) {
  edge[name] = to;
  const atLeast = (other, bound) => (edge[other] = Math.max(edge[other], bound));
  const atMost = (other, bound) => (edge[other] = Math.min(edge[other], bound));
  if (name === "discard_below") {
    if (edge.calibrate_below) atLeast("calibrate_below", to);
    atLeast("discard_above", to);
  } else if (name === "calibrate_below" && to) {
    atMost("discard_below", to);
    atLeast("discard_above", to);
  } else if (name === "discard_above") {
    atMost("calibrate_below", to);
    atMost("discard_below", to);
  }
  show();
}

function choose(newKind, thresholds) {
  kind = newKind;
  byId(`by_${kind}`).checked = true;
  for (const name of thresholdNames) {
    edge[name] = place(thresholds[name]);
    byId(`${name}_slider`).max = counted[kind].edges.length - 1;
  }
  show();
}

// The histogram, coloured by region, and below it how often the teacher is right.
const BARS = 100, BANDS = 20;

function gathered(counts, edges, bars) {
  const found = new Array(bars).fill(0);
  counts.forEach((count, p) => (found[Math.min(bars - 1, Math.floor(edges[p >> 1] * bars + 1e-9))] += count));
  return found;
}

function paintHistogram(svg, width) {
  const height = 330, left = 46, right = width - 10;
  if (!Object.keys(edge).length) return { height, top: 0, bottom: 0, stops: [], read: () => [] };
  const upper = { left, right, top: 22, bottom: 200 }, lower = { left, right, top: 228, bottom: height - 24 };
  const { edges, fine } = counted[kind], [below, calibrate, above] = thresholdNames.map(value);
  const middle = (bar) => (bar + 0.5) / BARS;
  const regionAt = (at) => (at < below || at > above ? "discarded" : at < calibrate ? "calibrated" : "kept");
  const crops = gathered(fine.crops, edges, BARS), agree = gathered(fine.agree, edges, BARS);
  const all = Math.max(1, crops.reduce((sum, count) => sum + count, 0)), largest = Math.max(...crops) / all || 1;
  const x = linear(0, 1, left, right);
  const rectangle = (colour, from, to, top, bottom) => {
    draw(svg, "rect", { class: `fill ${colour}`, x: from, width: to - from, y: top, height: bottom - top });
  };

  const magnified = byId("magnify").checked, bend = magnified ? Math.sqrt : (share) => share;
  const y = (share) => linear(0, bend(largest), upper.bottom, upper.top)(bend(share));
  const roots = [0.01, 0.1, 0.4, 1].map((part) => +(largest * part).toPrecision(1)).filter((share) => share <= largest);
  axes(svg, upper, [], x, String, magnified ? roots : ticks(0, largest, 4), y, (share) => `${+(100 * share).toPrecision(2)}%`);
  draw(svg, "text", { class: "tick", x: left, y: upper.top - 8 }, "share of the crops");
  crops.forEach((count, bar) => {
    const from = x(bar / BARS), to = Math.max(from + 1, x((bar + 1) / BARS) - 0.5);
    if (count) rectangle(regionAt(middle(bar)), from, to, y(count / all), upper.bottom);
  });

  const z = linear(0, 1, lower.bottom, lower.top);
  axes(svg, lower, ticks(0, 1, width > 500 ? 10 : 5), x, String, [0, 0.5, 1], z, (share) => percent(share, 0));
  const says = kind === "max" ? "the teacher is right (line: as often as it is confident)" : "the teacher is right";
  draw(svg, "text", { class: "tick", x: left, y: lower.top - 8 }, says);
  const bandAgree = gathered(fine.agree, edges, BANDS);
  gathered(fine.crops, edges, BANDS).forEach((count, band) => {
    if (count) rectangle("agreement", x(band / BANDS) + 0.5, x((band + 1) / BANDS) - 0.5, z(bandAgree[band] / count), lower.bottom);
  });
  if (kind === "max") draw(svg, "line", { class: "diagonal", x1: x(0), y1: z(0), x2: x(1), y2: z(1) });

  for (const at of new Set([below, calibrate, above])) {
    if (at <= 0 || at >= 1) continue;
    for (const { top, bottom } of [upper, lower]) draw(svg, "line", { class: "threshold", x1: x(at), x2: x(at), y1: top, y2: bottom });
  }
  return {
    height, top: upper.top, bottom: lower.bottom, stops: crops.map((_, bar) => x(middle(bar))),
    read(bar) {
      if (bar < 0) return [make("span", { class: "at no-print" }, "Point at a bar, or tap it, to read it.")];
      const region = regionAt(middle(bar)), at = `${(bar / BARS).toFixed(2)}–${((bar + 1) / BARS).toFixed(2)}`;
      const right = make("span", {}, ` the teacher is right in ${percent(agree[bar] / crops[bar], 0)}`);
      return [entry(region, `${at} ${region}:`, `${whole(crops[bar])} crops (${percent(crops[bar] / all)})`), right];
    },
  };
}
const histogramSays = "Histogram of the crops' confidence, and how often the teacher is right";
const histogram = new Frame(byId("histogram"), "", histogramSays, paintHistogram);

const colour = figures.photos.length ? photoGallery(byId("photos"), figures.photos) : null;

for (const name of thresholdNames) {
  byId(`${name}_slider`).addEventListener("input", (event) => move(name, +event.target.value));
  byId(name).addEventListener("change", (event) => {
    const typed = parseFloat(event.target.value);
    Number.isFinite(typed) ? move(name, place(Math.min(1, Math.max(0, typed)))) : show();
  });
}
for (const other of Object.keys(counted)) byId(`by_${other}`).addEventListener("change", () => choose(other, policy()));
byId("magnify").addEventListener("change", () => histogram.repaint());
byId("reset").addEventListener("click", () => choose(figures.policy.confidence, figures.policy));
byId("controls").addEventListener("submit", (event) => event.preventDefault());
byId("copy").addEventListener("click", async () => {
  byId("flags").select();
  const copied = await navigator.clipboard?.writeText(byId("flags").value).then(() => true, () => false);
  byId("copied").textContent = copied || document.execCommand("copy") ? "copied" : "press Ctrl-C";
});

// The tables of candidates: a button in each row moves the thresholds there.
for (const other of Object.keys(counted)) {
  figures.candidates.forEach(([below, calibrate], row) => {
    const label = `Try discard below ${below}, calibrate below ${calibrate} by ${other}`;
    const button = make("button", { type: "button", "aria-label": label }, "try");
    button.addEventListener("click", () => {
      choose(other, { discard_below: below, calibrate_below: calibrate, discard_above: 1 });
      byId("thresholds").scrollIntoView();
    });
    byId(`candidates_${other}`).tBodies[0].rows[row].cells[0].prepend(button, " ");
  });
}

for (const hidden of document.querySelectorAll("[data-needs-script]")) hidden.hidden = false;
choose(kind, figures.policy);
