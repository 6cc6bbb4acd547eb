// The page of runs: every chart shows the runs that are ticked, against the axis that is chosen.

const byId = (id) => document.getElementById(id);
const hidden = new Set();
let axis = "step";

const axisNames = { step: "step", crops: "crops", seconds: "time" };

// How the axis speaks, given its largest value.
function abscissa(most) {
  if (axis !== "seconds") return { name: axisNames[axis], unit: 1, text: whole, tick: short };
  const [unit, name] = most > 7200 ? [3600, "h"] : most > 300 ? [60, "min"] : [1, "s"];
  const tick = (seconds) => `${+(seconds / unit).toPrecision(3)} ${name}`;
  return { name: axisNames[axis], unit, text: tick, tick };
}

const shown = () => figures.runs.filter((run) => !hidden.has(run));

function curve(host, title, source, column, text, more = {}) {
  const lines = () => shown().map((run) => ({ name: run.name, mark: run.mark, x: run[source][axis], y: run[source][column] }));
  lineChart(byId(host).appendChild(make("figure")), title, { lines, abscissa, text, ...more });
}

const points = (share) => percent(share, 2), coarse = (share) => `${+(100 * share).toPrecision(3)}%`;
curve("curves", "Validation top-1", "evals", "top1", points, { tick: coarse });
curve("curves", "Validation top-5", "evals", "top5", points, { tick: coarse });
curve("curves", "Training loss", "train", "loss", (loss) => loss.toPrecision(4), { tick: short });
curve("curves", "Training top-1", "train", "train_top1", points, { tick: coarse });
const rateText = (rate) => (rate < 1e-3 ? rate.toExponential(1) : rate.toPrecision(3));
curve("curves", "Learning rate", "train", "lr", rateText, { tick: short, bounds: [0] });
curve("speed", "Crops a second", "train", "crops_per_second", whole, { tick: short, bounds: [0] });
curve("speed", "Share of the time spent waiting for data", "train", "data_wait", points, { tick: coarse, bounds: [0] });
curve("speed", "Memory in use, MiB", "train", "memory_mib", whole, { tick: short, bounds: [0] });

// Shares of the regions in what a run was shown: a point of the log stands for the steps since the one before.
function regionChart(run) {
  const host = byId("regions").appendChild(make("figure"));
  const title = make("span", {}, make("i", { class: `chip ${run.mark}`, "aria-hidden": "true" }), run.name);
  const names = ["kept", "calibrated", "discarded"];
  new Frame(host, title, `Shares of the regions in ${run.name}`, (svg, width) => {
    const height = 150, area = { left: 46, right: width - 10, top: 8, bottom: height - 24 };
    const xs = run.train[axis].map((x, place) => [x, place]).filter(([x, place]) => x !== null && run.train.kept[place] !== null);
    const most = xs.length ? xs.at(-1)[0] : 1, axisText = abscissa(most);
    const x = linear(0, most, area.left, area.right), y = linear(0, 1, area.bottom, area.top);
    const base = new Map();
    for (const name of names) {
      let outline = "", back = "";
      xs.forEach(([at, place], order) => {
        const low = base.get(place) ?? 0, high = low + (run.train[name][place] ?? 0), from = x(order ? xs[order - 1][0] : 0), to = x(at);
        outline += `${order ? "L" : "M"}${from} ${y(high)}L${to} ${y(high)}`;
        back = `L${to} ${y(low)}L${from} ${y(low)}${back}`;
        base.set(place, high);
      });
      if (outline) draw(svg, "path", { class: `fill ${name}`, d: `${outline}${back}Z` });
    }
    const xTicks = ticks(0, most / axisText.unit, width / 90).map((value) => value * axisText.unit);
    axes(svg, area, xTicks, x, axisText.tick, [0, 0.5, 1], y, coarse);
    return {
      height, top: area.top, bottom: area.bottom, stops: xs.map(([at]) => x(at)),
      read(stop) {
        if (!xs.length) return [];
        const [at, place] = xs[stop < 0 ? xs.length - 1 : stop];
        const where = make("span", { class: "at" }, stop < 0 ? "last: " : `${axisText.name} ${axisText.text(at)}: `);
        return [where, ...names.map((name) => entry(name, name, percent(run.train[name][place])))];
      },
    };
  });
  return [run, host];
}
const regionCharts = figures.runs.filter((run) => run.mixed).map(regionChart);

function repaintAll() {
  for (const [run, host] of regionCharts) host.hidden = hidden.has(run);
  for (const frame of frames) frame.repaint();
}

for (const run of figures.runs) {
  const box = make("input", { type: "checkbox", checked: "" });
  box.addEventListener("change", () => (box.checked ? hidden.delete(run) : hidden.add(run), repaintAll()));
  byId("legend").append(make("label", {}, box, " ", make("i", { class: `chip ${run.mark}`, "aria-hidden": "true" }), run.name));
}
for (const radio of document.getElementsByName("axis")) radio.addEventListener("change", () => ((axis = radio.value), repaintAll()));

if (figures.photos.length) {
  const colour = photoGallery(byId("photos"), figures.photos);
  const select = byId("policies");
  figures.policies.forEach((policy, place) => select.append(make("option", { value: place }, policy.name)));
  select.addEventListener("change", () => colour(figures.policies[select.value]));
  colour(figures.policies[0]);
}

for (const part of document.querySelectorAll("[data-needs-script]")) part.hidden = false;
