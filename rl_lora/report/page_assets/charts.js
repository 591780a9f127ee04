"use strict";
/* Charts as inline SVG, drawn at the width they have and drawn again when it changes.

   A chart is {title, note, kind, unit, x, series: [{name, points: [[x, y, low, high], ...], color}], reference}.
   color is the number of a colour of page.css, by default the series' place.
   kind "line": x is a number ("step", or "k" on a logarithmic axis); reference is {name, point} or null.
   kind "rows": one point a series, one line a row; reference is the index of a series or null.
   Numbers may be null. All text is set as text, never as markup. */

const SVG = "http://www.w3.org/2000/svg";

/** An HTML element: el("p", {className: "note"}, "text", child, ...). */
function el(tag, properties = {}, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children.filter((child) => child !== null));
  return node;
}

/** An SVG element with attributes. */
function svg(tag, attributes = {}, text = null) {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text !== null) node.textContent = text;
  return node;
}

function format(value, unit) {
  if (value === null || value === undefined) return "–";
  if (unit === "percent") return `${(100 * value).toFixed(1)} %`;
  const size = Math.abs(value);
  if (Number.isInteger(value) || size >= 1000) return Math.round(value).toLocaleString("en");
  if (size >= 0.1) return value.toFixed(size >= 100 ? 1 : 3);
  return value.toPrecision(3);
}

function formatPoint([, y, low, high], unit) {
  if (typeof low !== "number" || typeof high !== "number") return format(y, unit);
  return unit === "percent"
    ? `${format(y, unit)}  (${(100 * low).toFixed(1)} to ${(100 * high).toFixed(1)})`
    : `${format(y, unit)}  (${format(low)} to ${format(high)})`;
}

const isNumber = (value) => typeof value === "number";
const clamp = (value, low, high) => Math.min(Math.max(value, low), high);

/** About n round values from low to high, both included. */
function ticks(low, high, n, whole = false) {
  const raw = (high - low || 1) / n;
  const power = 10 ** Math.floor(Math.log10(raw));
  let step = power * [1, 2, 2.5, 5, 10].find((factor) => factor * power >= raw * 0.999);
  if (whole) step = Math.max(1, Math.ceil(step));
  const first = Math.floor(low / step + 1e-9), last = Math.ceil(high / step - 1e-9);
  return Array.from({ length: last - first + 1 }, (_, i) => Number(((first + i) * step).toPrecision(12)));
}

function tickText(value, unit) {
  if (unit === "percent") return `${Number((100 * value).toPrecision(6))} %`;
  if (value && Math.abs(value) < 1e-4) return String(Number(value.toPrecision(3)));
  return Math.abs(value) >= 1e4 ? value.toLocaleString("en", { notation: "compact" }) : value.toLocaleString("en", { maximumFractionDigits: 6 });
}

/** Room for every value of the chart, its intervals and its reference, zero included. */
function valueTicks(chart, n) {
  const points = chart.series.flatMap((line) => line.points).concat(chart.reference?.point ? [chart.reference.point] : []);
  const values = points.flatMap(([, y, low, high]) => (isNumber(y) ? [y, low, high].filter(isNumber) : []));
  const all = ticks(Math.min(0, ...values), Math.max(0, ...values) || 1, n);
  return chart.unit === "percent" ? all.filter((value) => value <= 1.0001) : all;
}

class Tooltip {
  constructor(figure) {
    this.figure = figure;
    this.box = el("div", { className: "tooltip" });
    this.box.setAttribute("role", "status");
    figure.append(this.box);
  }

  /** Lines of {text, series (the class of its colour, or null)} beside (x, y) of the figure. */
  show(x, y, heading, lines) {
    const shown = lines.slice(0, 9).map(({ text, series }) => {
      const row = el("p");
      if (series !== null) row.append(el("i", { className: series }));
      row.append(el("span", {}, text));
      return row;
    });
    if (lines.length > 9) shown.push(el("p", { className: "at" }, `and ${lines.length - 9} more`));
    this.box.replaceChildren(...(heading ? [el("p", { className: "at" }, heading)] : []), ...shown);
    const room = this.figure.clientWidth - this.box.offsetWidth;
    const beside = x + 14 <= room ? x + 14 : x - this.box.offsetWidth - 14;
    this.box.style.left = `${clamp(beside, 0, Math.max(0, room))}px`;
    this.box.style.top = `${Math.max(0, y)}px`;
  }

  hide() {
    this.box.replaceChildren();
  }
}

/** Follow the pointer, or the arrow keys, over n places; show(i) and hide() do the rest. */
function explore(surface, n, nearest, show, hide) {
  let at = null;
  const go = (i) => show((at = clamp(i, 0, n - 1)));
  surface.setAttribute("tabindex", "0");
  surface.addEventListener("pointermove", (event) => go(nearest(event)));
  surface.addEventListener("pointerdown", (event) => go(nearest(event)));
  surface.addEventListener("pointerleave", hide);
  surface.addEventListener("blur", hide);
  surface.addEventListener("keydown", (event) => {
    const last = n - 1, from = at ?? -1;
    const to = { ArrowRight: from + 1, ArrowDown: from + 1, ArrowLeft: from < 0 ? last : from - 1, ArrowUp: from < 0 ? last : from - 1, Home: 0, End: last }[event.key];
    if (event.key === "Escape") hide();
    if (to === undefined) return;
    event.preventDefault();
    go(to);
  });
}

/** The colour of a line: its own where it means something, else one for its place. */
function colorClass(line, i) {
  return `s${(line.color ?? i) % 8}`;
}

function drawLines(figure, chart, tooltip) {
  const width = figure.clientWidth, height = width > 700 ? 300 : 210;
  const values = valueTicks(chart, height > 250 ? 5 : 4);
  const labels = values.map((value) => tickText(value, chart.unit));
  const left = 10 + 7 * Math.max(...labels.map((text) => text.length)), right = width - 14, top = 8, bottom = height - 38;
  const lines = chart.series.map((line) => ({ ...line, points: line.points.filter(([, y]) => isNumber(y)) }));
  const xs = [...new Set(lines.flatMap((line) => line.points.map(([x]) => x)))].sort((a, b) => a - b);
  const logarithmic = chart.x === "k";
  const scale = logarithmic ? Math.log2 : (value) => value;
  const [from, to] = [scale(xs[0]), scale(xs.at(-1))];
  const X = (x) => (from === to ? (left + right) / 2 : left + ((scale(x) - from) / (to - from)) * (right - left));
  const Y = (y) => bottom - ((y - values[0]) / (values.at(-1) - values[0])) * (bottom - top);

  const ends = lines.map(({ name, points }) => `${name}: ${formatPoint(points[0], chart.unit)} at ${chart.x} ${points[0][0]}, ${formatPoint(points.at(-1), chart.unit)} at ${points.at(-1)[0]}`);
  const root = svg("svg", { height, role: "img", "aria-label": `${chart.title} over ${chart.x}. ${ends.slice(0, 12).join("; ")}. Arrow keys read the points.` });
  values.forEach((value, i) => {
    root.append(svg("line", { class: "grid", x1: left, x2: right, y1: Y(value), y2: Y(value) }));
    root.append(svg("text", { x: left - 8, y: Y(value) + 4, "text-anchor": "end" }, labels[i]));
  });
  const marks = logarithmic || xs.length <= 6 ? xs : ticks(from, to, Math.max(2, Math.floor((right - left) / 90)), true).filter((x) => x >= from && x <= to);
  for (const x of marks) root.append(svg("text", { x: X(x), y: bottom + 18, "text-anchor": "middle" }, tickText(x)));
  root.append(svg("text", { x: right, y: bottom + 34, "text-anchor": "end" }, chart.x));

  if (chart.reference) {
    const [, y, low, high] = chart.reference.point;
    if (isNumber(low) && isNumber(high)) root.append(svg("rect", { class: "reference-band", x: left, width: right - left, y: Y(high), height: Y(low) - Y(high) }));
    if (isNumber(y)) root.append(svg("line", { class: "reference", x1: left, x2: right, y1: Y(y), y2: Y(y) }));
  }
  const groups = lines.map(({ points }, i) => {
    const group = svg("g", { class: `series ${colorClass(lines[i], i)} dash${Math.floor(i / 8) % 3}` });
    const between = points.filter(([, , low, high]) => isNumber(low) && isNumber(high));
    if (lines.length <= 3 && between.length && points.length > 30) {
      const edge = between.map(([x, , , high]) => `${X(x)},${Y(high)}`).concat(between.toReversed().map(([x, , low]) => `${X(x)},${Y(low)}`));
      group.append(svg("path", { class: "band", d: `M${edge.join("L")}Z` }));
    } else if (lines.length <= 3) {
      const whisker = ([x, , low, high]) => `M${X(x)},${Y(low)}V${Y(high)}m-3,0h6M${X(x) - 3},${Y(low)}h6`;
      group.append(svg("path", { class: "whiskers", d: between.map(whisker).join("") }));
    }
    group.append(svg("path", { class: "line", d: `M${points.map(([x, y]) => `${X(x)},${Y(y)}`).join("L")}` }));
    if (points.length <= 40) for (const [x, y] of points) group.append(svg("circle", { cx: X(x), cy: Y(y), r: 3.5 }));
    root.append(group);
    return group;
  });

  const guide = svg("line", { class: "guide", y1: top, y2: bottom, visibility: "hidden" });
  root.append(guide, svg("rect", { x: 0, y: 0, width, height, fill: "transparent" }));
  const nearest = (event) => {
    const x = event.clientX - root.getBoundingClientRect().left;
    return xs.reduce((best, value, i) => (Math.abs(X(value) - x) < Math.abs(X(xs[best]) - x) ? i : best), 0);
  };
  const at = lines.map(({ points }) => new Map(points.map((point) => [point[0], point])));
  const show = (i) => {
    const here = at.flatMap((points, series) => (points.has(xs[i]) ? [{ point: points.get(xs[i]), series }] : []));
    here.sort((a, b) => b.point[1] - a.point[1]);
    const rows = here.map(({ point, series }) => ({ series: colorClass(lines[series], series), text: `${lines.length > 1 || chart.reference ? `${lines[series].name}  ` : ""}${formatPoint(point, chart.unit)}` }));
    if (chart.reference) rows.push({ series: null, text: `${chart.reference.name}  ${formatPoint(chart.reference.point, chart.unit)}` });
    for (const [name, value] of Object.entries({ x1: X(xs[i]), x2: X(xs[i]), visibility: "visible" })) guide.setAttribute(name, value);
    tooltip.show(X(xs[i]), root.getBoundingClientRect().top - figure.getBoundingClientRect().top + 4, `${chart.x} ${format(xs[i])}`, rows);
  };
  explore(root, xs.length, nearest, show, () => {
    tooltip.hide();
    guide.setAttribute("visibility", "hidden");
  });
  return [root, legend(chart, lines, groups)];
}

/** Names of the lines; pointing at one, or reaching it by the keyboard, lets the others step back. */
function legend(chart, lines, groups) {
  const box = el("div", { className: "legend" });
  if (lines.length > 1) {
    lines.forEach((line, i) => {
      const entry = el("button", { type: "button" }, el("i", { className: colorClass(line, i) }), line.name);
      entry.classList.add(`dash${Math.floor(i / 8) % 3}`);
      const only = (on) => groups.forEach((group, k) => group.classList.toggle("faded", on && k !== i));
      for (const event of ["pointerenter", "focus"]) entry.addEventListener(event, () => only(true));
      for (const event of ["pointerleave", "blur"]) entry.addEventListener(event, () => only(false));
      box.append(entry);
    });
  }
  if (chart.reference) box.append(el("button", { type: "button", tabIndex: -1 }, el("i", { className: "reference" }), chart.reference.name));
  return box;
}

function drawRows(figure, chart, tooltip) {
  const width = figure.clientWidth, narrow = width < 560;
  const longest = Math.max(...chart.series.map((row) => row.name.length));
  const left = narrow ? 8 : Math.min(7.4 * longest + 18, width * 0.36), right = width - 72;
  const rowHeight = narrow ? 46 : 30, top = 4, bottom = top + rowHeight * chart.series.length, height = bottom + 24;
  const values = valueTicks(chart, Math.max(2, Math.floor((right - left) / 110)));
  const X = (x) => left + ((x - values[0]) / (values.at(-1) - values[0])) * (right - left);
  const root = svg("svg", { height, role: "img", "aria-label": `${chart.title} by row. ${chart.series.map((row) => `${row.name}: ${formatPoint(row.points[0], chart.unit)}`).join("; ")}` });
  for (const value of values) {
    root.append(svg("line", { class: "grid", x1: X(value), x2: X(value), y1: top, y2: bottom }));
    root.append(svg("text", { x: X(value), y: bottom + 18, "text-anchor": "middle" }, tickText(value, chart.unit)));
  }
  const reference = chart.series[chart.reference]?.points[0][1];
  if (isNumber(reference)) root.append(svg("line", { class: "reference", x1: X(reference), x2: X(reference), y1: top, y2: bottom }));
  const middle = (i) => top + rowHeight * i + (narrow ? 32 : rowHeight / 2);
  chart.series.forEach(({ name, points: [[, value, low, high]] }, i) => {
    const y = middle(i), fits = narrow ? Math.floor(width / 7.5) : Math.floor((left - 14) / 7);
    const text = name.length > fits ? `…${name.slice(1 - fits)}` : name; // the ends of paths tell them apart
    root.append(svg("text", { class: "name", x: narrow ? left : left - 14, y: narrow ? y - 13 : y + 4, "text-anchor": narrow ? "start" : "end" }, text));
    root.append(svg("text", { class: "value", x: width, y: y + 4, "text-anchor": "end" }, format(value, chart.unit)));
    if (!isNumber(value)) return;
    const group = svg("g", { class: `series s${i === chart.reference ? 7 : 0}` });
    if (isNumber(low) && isNumber(high)) group.append(svg("path", { d: `M${X(low)},${y}H${X(high)}m0,-4v8M${X(low)},${y - 4}v8` }));
    group.append(svg("circle", { cx: X(value), cy: y, r: 4.5 }));
    root.append(group);
  });
  root.append(svg("rect", { x: 0, y: 0, width, height, fill: "transparent" }));
  const nearest = (event) => Math.floor((event.clientY - root.getBoundingClientRect().top - top) / rowHeight);
  const show = (i) => {
    const below = root.getBoundingClientRect().top - figure.getBoundingClientRect().top + middle(i) + 12;
    const point = chart.series[i].points[0];
    tooltip.show(X(point[1] ?? 0), below, chart.series[i].name, [{ text: formatPoint(point, chart.unit), series: null }]);
  };
  explore(root, chart.series.length, nearest, show, () => tooltip.hide());
  return [root];
}

/** Draw a chart into its figure, and again whenever the figure's width changes. */
function draw(figure, chart) {
  const tooltip = new Tooltip(figure);
  let drawn = [], width = 0;
  new ResizeObserver(() => {
    if (figure.clientWidth === width || !figure.clientWidth) return;
    width = figure.clientWidth;
    tooltip.hide();
    for (const node of drawn) node.remove();
    drawn = (chart.kind === "rows" ? drawRows : drawLines)(figure, chart, tooltip);
    tooltip.box.before(...drawn);
  }).observe(figure);
}
