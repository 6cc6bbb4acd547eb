// Charts as SVG, drawn by hand. Texts reach the page as text nodes and attributes only, never as HTML.

const figures = JSON.parse(document.getElementById("figures").textContent);
const frames = [];

function make(name, attributes = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

function draw(parent, name, attributes = {}, text = "") {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text !== "") element.textContent = text;
  parent.append(element);
  return element;
}

const percent = (share, digits = 1) => (share === null || Number.isNaN(share) ? "–" : `${(100 * share).toFixed(digits)}%`);
const whole = (count) => Math.round(count).toLocaleString("en");

function short(value) {
  const size = Math.abs(value);
  for (const [unit, letter] of [[1e9, "G"], [1e6, "M"], [1e3, "k"]]) if (size >= unit) return `${+(value / unit).toPrecision(3)}${letter}`;
  return `${+value.toPrecision(3)}`;
}

// Round values from low to high, about `count` of them.
function ticks(low, high, count) {
  const raw = (high - low) / Math.max(1, count) || 1;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = power * [1, 2, 5, 10].find((factor) => factor * power >= raw * 0.999);
  const found = [];
  for (let n = Math.ceil(low / step - 1e-9); n * step <= high + step * 1e-9; n++) found.push(+(n * step).toPrecision(12));
  return found;
}

// A figure with a drawing and a line below it that reads the drawing out: where the pointer is, or by arrow keys.
// paint(svg, width) draws and returns {height, stops: pixels from the left, ascending; read(stop or -1): nodes; top, bottom of the guide}.
class Frame {
  constructor(host, title, label, paint) {
    this.host = host;
    this.paint = paint;
    this.stop = -1;
    this.svg = draw(host, "svg", { role: "img", tabindex: "0", "aria-label": `${label}. Arrow keys read values.` });
    this.reading = host.appendChild(make("output", { class: "reading", "aria-live": "polite" }));
    if (title) host.prepend(make("figcaption", {}, title));
    for (const kind of ["pointermove", "pointerdown"]) this.svg.addEventListener(kind, (event) => this.point(event));
    this.svg.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && this.read(-1));
    this.svg.addEventListener("keydown", (event) => this.key(event));
    frames.push(this);
    new ResizeObserver(() => host.clientWidth !== this.width && this.repaint()).observe(host);
    this.repaint();
  }

  repaint(width = this.host.clientWidth) {
    if (width < 50) return; // folded away
    this.width = width;
    this.svg.replaceChildren();
    this.painted = this.paint(this.svg, width);
    this.svg.setAttribute("viewBox", `0 0 ${width} ${this.painted.height}`);
    this.guide = draw(this.svg, "line", { class: "guide", y1: this.painted.top, y2: this.painted.bottom, visibility: "hidden" });
    this.read(Math.min(this.stop, this.painted.stops.length - 1));
  }

  read(stop) {
    this.stop = stop;
    const x = this.painted.stops[stop];
    this.guide.setAttribute("visibility", x === undefined ? "hidden" : "visible");
    if (x !== undefined) for (const end of ["x1", "x2"]) this.guide.setAttribute(end, x);
    this.reading.replaceChildren(...this.painted.read(stop));
  }

  point(event) {
    const box = this.svg.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * this.width;
    const distances = this.painted.stops.map((stop) => Math.abs(stop - x));
    if (distances.length) this.read(distances.indexOf(Math.min(...distances)));
  }

  key(event) {
    const last = this.painted.stops.length - 1;
    const from = this.stop < 0 ? last : this.stop;
    const jump = Math.max(1, Math.round(last / 10));
    const moves = { ArrowLeft: from - 1, ArrowRight: from + 1, PageDown: from - jump, PageUp: from + jump, Home: 0, End: last, Escape: -1 };
    if (!(event.key in moves) || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    this.read(event.key === "Escape" ? -1 : Math.max(0, Math.min(last, moves[event.key])));
  }
}

// On paper a chart of a grid is half a page wide, another one a whole page.
addEventListener("beforeprint", () => frames.forEach((frame) => frame.repaint(frame.host.closest(".grid") ? 330 : 680)));
addEventListener("afterprint", () => frames.forEach((frame) => frame.repaint()));

// Axes in `area` {left, right, top, bottom}; x and y map values to pixels.
function axes(svg, area, xTicks, x, xText, yTicks, y, yText) {
  for (const value of yTicks) {
    draw(svg, "line", { class: "grid-line", x1: area.left, x2: area.right, y1: y(value), y2: y(value) });
    draw(svg, "text", { class: "tick", x: area.left - 6, y: y(value) + 4, "text-anchor": "end" }, yText(value));
  }
  for (const value of xTicks) {
    const anchor = x(value) > area.right - 12 ? "end" : "middle";
    draw(svg, "text", { class: "tick", x: x(value), y: area.bottom + 16, "text-anchor": anchor }, xText(value));
  }
  draw(svg, "line", { class: "axis", x1: area.left, x2: area.right, y1: area.bottom, y2: area.bottom });
}

const linear = (low, high, from, to) => (value) => from + ((value - low) / (high - low || 1)) * (to - from);

function entry(mark, name, value) {
  return make("span", { class: "entry" }, make("i", { class: `chip ${mark}`, "aria-hidden": "true" }), `${name} `, make("b", {}, value));
}

const MANY = 8; // lines, from which on their last values are not spelt out below every chart

// Lines over a common x. lines(): [{name, mark, x: [], y: []}], null where nothing is known; abscissa(): {name, text, tick}.
// `bounds`: y values that are always shown.
function lineChart(host, title, { lines, abscissa, text, tick = text, bounds = [] }) {
  return new Frame(host, title, title, (svg, width) => {
    const height = 210, area = { left: 46, right: width - 10, top: 12, bottom: height - 24 };
    const shown = lines().map((line) => ({ ...line, points: pairs(line) })).filter((line) => line.points.length);
    const all = shown.flatMap((line) => line.points);
    if (!all.length) {
      draw(svg, "text", { class: "tick", x: width / 2, y: height / 2, "text-anchor": "middle" }, "nothing was logged");
      return { height, top: 0, bottom: 0, stops: [], read: () => [] };
    }
    const [lowX, highX] = extent(all.map((point) => point[0]), [0]);
    const [low, high] = padded(extent(all.map((point) => point[1]), bounds), bounds);
    const x = linear(lowX, highX, area.left, area.right), y = linear(low, high, area.bottom, area.top);
    const axis = abscissa(highX);
    const xTicks = ticks(lowX / axis.unit, highX / axis.unit, width / 90).map((value) => value * axis.unit);
    axes(svg, area, xTicks, x, axis.tick, ticks(low, high, 5), y, tick);
    for (const line of shown) {
      const dots = line.points.map(([at, value]) => [x(at).toFixed(1), y(value).toFixed(1)]);
      const path = dots.map(([px, py], place) => `${place && !line.points[place].gap ? "L" : "M"}${px} ${py}`);
      draw(svg, "path", { class: `line ${line.mark}`, d: path.join("") });
      if (dots.length < 40) for (const [px, py] of dots) draw(svg, "circle", { class: `dot ${line.mark}`, cx: px, cy: py, r: 2.5 });
    }
    const places = [...new Map(all.map((point) => [Math.round(x(point[0])), point[0]]))].sort((one, other) => one[0] - other[0]);
    return {
      height, top: area.top, bottom: area.bottom, stops: places.map((place) => place[0]),
      read(stop) {
        if (stop < 0 && shown.length > MANY) return [make("span", { class: "at no-print" }, "Point at the chart, or tap it, to read it.")];
        const at = stop < 0 ? null : places[stop][1];
        const values = shown.map((line) => [line, at === null ? line.points.at(-1) : nearest(line.points, at)]);
        const known = ([line, point]) => (at === null || !isPast(line.points, at) ? text(point[1]) : "ended");
        return [
          make("span", { class: "at" }, at === null ? "last: " : `${axis.name} ${axis.text(at)}: `),
          ...values.map((pair) => entry(pair[0].mark, pair[0].name, known(pair))),
        ];
      },
    };
  });
}

function pairs({ x, y }) {
  const found = [];
  let gap = false;
  x.forEach((at, place) => {
    if (at === null || y[place] === null) gap = true;
    else found.push(Object.assign([at, y[place]], { gap })), (gap = false);
  });
  return found;
}

function extent(values, also) {
  return [...values, ...also].reduce(([low, high], value) => [Math.min(low, value), Math.max(high, value)], [Infinity, -Infinity]);
}

// A little air above and below, but none beyond a bound.
function padded([low, high], bounds) {
  const air = (high - low) * 0.06 || Math.abs(high) * 0.1 || 1;
  return [bounds.includes(low) ? low : low - air, bounds.includes(high) ? high : high + air];
}

// Whether `at` lies beyond a line's end by more than its last two points lie apart.
const isPast = (points, at) => at > 2 * points.at(-1)[0] - (points.at(-2)?.[0] ?? points.at(-1)[0]);

function nearest(points, at) {
  return points.reduce((best, point) => (Math.abs(point[0] - at) < Math.abs(best[0] - at) ? point : best));
}
