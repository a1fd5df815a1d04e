"use strict";
// Draws the report from the JSON in #data. Names come from strangers' files: they become text nodes, never HTML.

const DATA = JSON.parse(document.getElementById("data").textContent);
const CLASSES = DATA.classes;
const KINDS = {
  missed: ["Missed", "Objects that nothing found, the largest first."],
  background: ["False alarms", "The surest predictions where the truth has nothing. Look whether a label is missing."],
  class: ["Wrong class", "Found in the right place, under another name."],
  localisation: ["Poor boxes", "The right class, but the box overlaps the truth too little."],
  both: ["Wrong class and poor box", "Neither the name nor the place is right."],
  duplicate: ["Duplicates", "A second box on an object that was found already."],
};
const MEANINGS = {
  AP: "AP, mean over IoU 0.50–0.95", AP50: "AP50, at IoU 0.50", AP75: "AP75, at IoU 0.75", APs: "AP small", APm: "AP medium",
  APl: "AP large", AR1: "AR at 1", AR10: "AR at 10", AR100: "AR at 100", ARs: "AR small", ARm: "AR medium", ARl: "AR large",
};
const NO_TRUTH = "The data has no boxes, so there is nothing to measure.";
const FIRST = 8; // cards of a kind while all kinds are shown
const state = { chosen: null, kind: null, column: "AP", ascending: true, shown: [], enlarged: 0 };

const byId = (id) => document.getElementById(id);
const known = (value) => value !== null && value !== undefined;
const points = (value) => (known(value) ? (100 * value).toFixed(1) : "–");
const share = (value) => (known(value) ? value.toFixed(2) : "–");
const whole = (value) => Math.round(100 * value);
const plural = (count, one, many = `${one}s`) => `${count.toLocaleString("en")} ${count === 1 ? one : many}`;
const interval = (low, high) => (known(low) && known(high) ? `${points(low)} – ${points(high)}` : "");

function build(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (known(value)) element.setAttribute(name, value);
  }
  element.append(...children.filter(known));
  return element;
}
const make = (tag, attributes = {}, ...children) => build(document.createElement(tag), attributes, children);
const draw = (tag, attributes = {}, ...children) =>
  build(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
const button = (text, action, attributes = {}) => {
  const element = make("button", { type: "button", ...attributes }, text);
  element.addEventListener("click", action);
  return element;
};
const empty = (why) => make("p", { class: "empty" }, why);

// ---- the head, the advice, the table

function showHead() {
  const { images, boxes, detections, classes, data, evaluator } = DATA.about;
  const counts = [plural(images, "picture"), plural(boxes, "box", "boxes"), plural(detections, "detection")];
  counts.push(plural(classes, "class", "classes"), `evaluated with ${evaluator}`);
  byId("about").append(make("bdi", {}, data), ` · ${counts.join(" · ")}`);
  DATA.summary.forEach(({ name, value, low, high }, position) => {
    const range = interval(low, high);
    if (position < 3) {
      const below = range ? `95 % interval ${range}` : known(value) ? "no interval" : "nothing to measure";
      const parts = [make("span", {}, MEANINGS[name]), make("strong", {}, points(value)), make("div", { class: "note" }, below)];
      byId("main-numbers").append(make("div", {}, ...parts));
    } else {
      const title = range ? `95 % interval ${range}` : null;
      byId("numbers").append(make("div", { title }, make("dt", {}, MEANINGS[name]), make("dd", {}, points(value))));
    }
  });
  for (const section of document.querySelectorAll("section")) {
    document.querySelector("nav").append(make("a", { href: `#${section.id}` }, section.querySelector("h2").textContent));
  }
}

function showAdvice() {
  for (const { text, figure, key } of DATA.advice) {
    const heading = byId(figure).querySelector("h2").textContent;
    const source = make("span", { class: "source" }, "From ", make("a", { href: `#${figure}` }, heading));
    if (key) source.append("; settings: ", ...key.split(", ").flatMap((name, n) => [n ? " " : "", make("code", {}, name)]));
    document.querySelector("#advice ol").append(make("li", {}, text, source));
  }
}

const COLUMNS = [
  ["name", "Class"], ["boxes", "Boxes"], ["AP", "AP", points], ["AP50", "AP50", points], ["AR100", "AR100", points],
  ["threshold", "Best score", share], ["precision", "Precision", points], ["recall", "Recall", points], ["f1", "F1", points],
];

function sorted() {
  const direction = state.ascending ? 1 : -1;
  const compare = (a, b) => (typeof a === "string" ? a.localeCompare(b) : a - b);
  return CLASSES.map((row, number) => ({ ...row, number })).sort((a, b) => {
    const [first, second] = [a[state.column], b[state.column]];
    if (!known(first) || !known(second)) return known(second) - known(first); // what is not known comes last, both ways
    return direction * compare(first, second);
  });
}

function showTable() {
  const wanted = byId("filter").value.trim().toLowerCase();
  const rows = sorted().filter((row) => row.name.toLowerCase().includes(wanted));
  const heads = COLUMNS.map(([key, title]) => {
    const order = state.column === key ? (state.ascending ? "ascending" : "descending") : null;
    return make("th", { scope: "col", "aria-sort": order }, button(title, () => sortBy(key), { "data-column": key }));
  });
  const body = rows.map((row) => {
    const cells = COLUMNS.slice(1).map(([key, , format = (value) => value.toLocaleString("en")]) => {
      const range = key === "AP" && interval(row.AP_low, row.AP_high);
      return make("td", {}, format(row[key]), range ? make("small", {}, range) : null);
    });
    const name = button(make("bdi", {}, row.name), () => choose(row.number));
    const line = make("tr", { class: row.number === state.chosen ? "chosen" : null }, make("th", { scope: "row" }, name), ...cells);
    line.addEventListener("click", (event) => event.target.closest("button") || choose(row.number));
    return line;
  });
  const table = make("table", {}, make("thead", {}, make("tr", {}, ...heads)), make("tbody", {}, ...body));
  byId("class-table").replaceChildren(rows.length ? table : empty("No class has such a name."));
  const left = DATA.classes_left_out ? `; ${DATA.classes_left_out} more, with fewer boxes, in classes.csv` : "";
  byId("filtered").textContent = `${rows.length} of ${CLASSES.length} shown${left}`;
}

function sortBy(column) {
  state.ascending = state.column === column ? !state.ascending : column === "name";
  state.column = column;
  showTable();
  document.querySelector(`[data-column="${column}"]`).focus();
}

function choose(number) {
  state.chosen = number === state.chosen ? null : number;
  document.querySelector("#choice select").value = state.chosen ?? "";
  showTable();
  showCurves();
  showGallery();
}

// ---- charts

const readout = (text) => make("output", { class: "readout" }, text);
const svgOf = (width, height, label) =>
  draw("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label });

// `element` tells its numbers to a mouse, a finger and a screen reader.
function tell(element, text, words) {
  element.append(draw("title", {}, words));
  for (const event of ["pointerenter", "pointerdown"]) element.addEventListener(event, () => { text.textContent = words; });
}

// An SVG with axes from 0 to 1; x and y turn such values into its pixels.
function frame(host, label, xName, yName, xFormat) {
  const width = Math.max(240, host.clientWidth), height = Math.min(320, 0.72 * width);
  const [left, right, top, bottom] = [46, 18, 10, 42];
  const x = (value) => left + value * (width - left - right);
  const y = (value) => height - bottom - value * (height - top - bottom);
  const svg = svgOf(width, height, label);
  for (const tick of [0, 0.2, 0.4, 0.6, 0.8, 1]) {
    svg.append(draw("line", { class: "grid", x1: x(0), x2: x(1), y1: y(tick), y2: y(tick) }));
    svg.append(draw("text", { class: "quiet", x: left - 6, y: y(tick) + 4, "text-anchor": "end" }, 100 * tick));
    svg.append(draw("text", { class: "quiet", x: x(tick), y: height - bottom + 17, "text-anchor": "middle" }, xFormat(tick)));
  }
  svg.append(draw("text", { x: x(0.5), y: height - 6, "text-anchor": "middle" }, xName));
  svg.append(draw("text", { transform: `translate(12 ${y(0.5)}) rotate(-90)`, "text-anchor": "middle" }, yName));
  return { svg, x, y, left, width: width - left - right };
}

// lines: [{ name, values }] over xs; a line of nulls is left out. `start` is the position that is read first.
function lineChart(host, label, xs, lines, xName, yName, xFormat, start) {
  lines = lines.filter(({ values }) => values.some(known));
  const { svg, x, y, left, width } = frame(host, label, xName, yName, xFormat);
  const legend = make("div", { class: "legend" });
  lines.forEach(({ name, values }, n) => {
    const dots = xs.flatMap((value, i) => (known(values[i]) ? [`${x(value).toFixed(1)},${y(values[i]).toFixed(1)}`] : []));
    svg.append(draw("polyline", { class: `series n${n}`, points: dots.join(" ") }));
    const swatch = draw("svg", { width: 28, height: 8, "aria-hidden": "true" }, draw("path", { class: `series n${n}`, d: "M0 4H28" }));
    legend.append(make("span", {}, swatch, make("bdi", {}, name)));
  });
  const cursor = draw("line", { class: "cursor", y1: y(0), y2: y(1) }), text = readout("");
  let position = start;
  const show = (wanted) => {
    position = Math.min(xs.length - 1, Math.max(0, wanted));
    build(cursor, { x1: x(xs[position]), x2: x(xs[position]) }, []);
    const values = lines.map(({ name, values }) => `${name} ${points(values[position])}`);
    text.textContent = `${xName.toLowerCase()} ${xFormat(xs[position])}: ${values.join(", ")}`;
  };
  const follow = (event) => {
    const wanted = (event.clientX - svg.getBoundingClientRect().left - left) / width;
    show(xs.reduce((best, value, i) => (Math.abs(value - wanted) < Math.abs(xs[best] - wanted) ? i : best), 0));
  };
  build(svg, { tabindex: 0 }, [cursor]);
  for (const event of ["pointermove", "pointerdown"]) svg.addEventListener(event, follow);
  svg.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (step) { event.preventDefault(); show(position + step); }
  });
  show(position);
  host.replaceChildren(legend, svg, text);
}

function showCurves() {
  const all = DATA.curves, row = CLASSES[state.chosen], own = DATA.class_curves[state.chosen], name = row?.name ?? "all classes";
  let problem = DATA.about.detections ? null : "Nothing was found, so there is no curve to draw.";
  if (row && !own) problem = "Only the classes with the most boxes have curves of their own.";
  if (row && !row.boxes) problem = "The data has no box of this class, so there is nothing to measure.";
  if (!DATA.about.boxes) problem = NO_TRUTH;
  const chart = (id, values, paint) => {
    const none = problem ?? (values?.some(known) ? null : `There is nothing to measure of ${name}.`);
    if (none) byId(id).replaceChildren(empty(none));
    else paint(byId(id));
  };
  const title = (iou) => (iou === "mean" ? "mean of IoU 0.50–0.95" : `IoU ${iou}`);
  const lines = Object.entries(all.precision).map(([iou, values]) => ({ name: title(iou), values }));
  if (own) lines.splice(0, 3, { name, values: own.precision }, { ...lines[0], name: "all classes" });
  const yName = own ? "Precision at IoU 0.50" : "Precision";
  chart("precision", lines[0].values, (host) =>
    lineChart(host, `Precision over recall of ${name}`, all.recall, lines, "Recall", yName, whole, 50));
  const { score, f1, p, r } = own ?? all;
  chart("scores", f1, (host) => {
    const three = [{ name: "F1", values: f1 }, { name: "precision", values: p }, { name: "recall", values: r }];
    const best = f1.reduce((best, value, i) => ((value ?? -1) > (f1[best] ?? -1) ? i : best), 0);
    lineChart(host, `F1, precision and recall over the score of ${name}`, score, three, "Score", "At IoU 0.50", share, best);
  });
}

// groups: [{ label, note, values: [[value, text]] }]; bars as long as their share of `longest`.
function bars(host, groups, longest, title) {
  const width = Math.max(240, host.clientWidth), right = 116;
  const height = groups.reduce((sum, { values }) => sum + 30 + 24 * values.length, 0);
  const svg = build(svgOf(width, height, title), { role: "group" }, []);
  let y = 0;
  for (const { label, note, values } of groups) {
    svg.append(draw("text", { x: 0, y: y + 16 }, label, draw("tspan", { dx: 8, class: "quiet" }, note)));
    values.forEach(([value, text], n) => {
      const length = known(value) ? (Math.max(0, value) / longest) * (width - right) : 0;
      svg.append(draw("rect", { class: `bar n${n}`, x: 0, y: y + 24, width: Math.max(1, length), height: 17, rx: 2 }));
      svg.append(draw("text", { x: length + 7, y: y + 37 }, text));
      y += 24;
    });
    y += 30;
  }
  host.replaceChildren(svg);
}

function showBars() {
  const { types, AP50 } = DATA.errors;
  const costly = types.filter(({ gain, count }) => known(gain) && (gain > 0 || count)).sort((a, b) => b.gain - a.gain);
  const errors = costly.map(({ name, count, gain }) => (
    { label: KINDS[name][0], note: plural(count, "error"), values: [[gain, `${gain < 0 ? "" : "+"}${points(gain)} points`]] }));
  const longest = Math.max(0.01, ...costly.map(({ gain }) => gain));
  if (errors.length) bars(byId("error-bars"), errors, longest, `Gain in AP50, now ${points(AP50)}`);
  else byId("error-bars").replaceChildren(empty(known(AP50) ? "There are no errors." : NO_TRUTH));
  for (const [host, rows, first] of [["size-bars", DATA.by_size, "AP"], ["crowding-bars", DATA.by_crowding, "AP50"]]) {
    const groups = rows.filter((row) => known(row[first])).map((row) => (
      { label: row.name, note: plural(row.boxes, "box", "boxes"),
        values: [[row[first], `${first} ${points(row[first])}`], [row.AR100, `AR100 ${points(row.AR100)}`]] }));
    if (groups.length) bars(byId(host), groups, 1, `${first} and AR100`);
    else byId(host).replaceChildren(empty(NO_TRUTH));
  }
}

function showReliability() {
  const host = byId("reliability"), { ece, bins } = DATA.calibration;
  const filled = bins.filter(({ count, precision }) => count && known(precision));
  if (!filled.length) return host.replaceChildren(empty("There are no scores to compare with what was right."));
  const { svg, x, y } = frame(host, "Share that is right by score", "Score", "Share that is right", share);
  const text = readout(`Expected calibration error (ECE) ${points(ece)}: how far scores lie from the share that is right. Point at a bar.`);
  for (const { low, high, count, confidence, precision } of filled) {
    const numbers = `mean score ${share(confidence)}, ${points(precision)} % right`;
    const height = Math.max(1, y(0) - y(precision));
    const bar = draw("rect", { class: "bar", x: x(low) + 1, y: y(precision), width: x(high) - x(low) - 2, height });
    tell(bar, text, `score ${share(low)}–${share(high)}: ${plural(count, "prediction")}, ${numbers}`);
    svg.append(bar);
  }
  svg.append(draw("line", { class: "guide", x1: x(0), y1: y(0), x2: x(1), y2: y(1) }));
  host.replaceChildren(svg, text);
}

const pen = document.createElement("canvas").getContext("2d");
function shortened(name, pixels) {
  pen.font = `12px ${getComputedStyle(document.body).fontFamily}`;
  const fits = (text) => pen.measureText(text).width <= pixels;
  let length = name.length;
  while (length > 1 && !fits(`${name.slice(0, length)}…`)) length -= 1;
  return fits(name) ? name : `${name.slice(0, length)}…`;
}

function showConfusion() {
  const { names, counts, totals, cell, left_out: more } = DATA.confusion, host = byId("matrix");
  if (!totals.some((total) => total)) return host.replaceChildren(empty("There is neither truth nor prediction to compare."));
  const others = more ? ` The ${names.length} most confused classes; ${more} more in confusion.csv.` : "";
  byId("confusion-note").textContent = `Rows: the truth; columns: what was predicted. ${cell}. Background: missed (last column) `
    + `or seen where nothing is (last row). Colours: share of the row.${others}`;
  const labels = [...names, "background"];
  const left = 124, top = 104, size = Math.min(56, Math.max(34, (host.clientWidth - left - 60) / labels.length));
  const width = left + size * labels.length + 60, height = top + size * labels.length + 4;
  const svg = svgOf(width, height, "Confusion matrix");
  const text = readout("Point at a cell for its numbers.");
  labels.forEach((name, n) => {
    const middle = size * (n + 0.5), short = shortened(name, 108);
    const places = [{ x: left - 8, y: top + middle + 4, "text-anchor": "end" }];
    places.push({ transform: `translate(${left + middle + 4} ${top - 8}) rotate(-45)` });
    for (const place of places) svg.append(draw("text", place, short, draw("title", {}, name)));
  });
  counts.forEach((row, r) => row.forEach((count, c) => {
    const part = totals[r] ? count / totals[r] : 0, last = labels.length - 1;
    if (r === last && c === last) return; // background that is taken for background is not counted
    const at = { x: left + size * c, y: top + size * r };
    const center = { x: at.x + size / 2, y: at.y + size / 2 + 4, "text-anchor": "middle" };
    const group = draw("g", {}, draw("rect", { class: "cell", "fill-opacity": part, ...at, width: size, height: size }));
    if (count) group.append(draw("text", center, count > 9999 ? `${Math.round(count / 1000)}k` : count));
    tell(group, text, `${labels[r]} taken for ${labels[c]}: ${count} (${points(part)} % of the row)`);
    svg.append(group);
  }));
  host.replaceChildren(make("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Confusion matrix" }, svg), text);
}

// ---- galleries

function describe({ kind, class: name, predicted, score, iou }) {
  const what = { missed: `${name} missed`, background: `${name}, but nothing is there`, class: `${name} taken for ${predicted}`,
    localisation: `${name}, poor box`, both: `${name} taken for ${predicted}, poor box`, duplicate: `${name} found again` }[kind];
  return [what, [known(score) && `score ${share(score)}`, known(iou) && `IoU ${share(iou)}`].filter(Boolean).join(", ")];
}

function picture(finding) {
  if (!finding.picture) return empty(`No picture: ${finding.problem}`);
  const [width, height] = finding.size;
  const svg = svgOf(width, height, `${describe(finding).join(", ")}, in ${finding.file_name}`);
  svg.append(draw("image", { href: finding.picture, width, height }));
  for (const [kind, box] of [["truth", finding.truth], ["prediction", finding.box]]) {
    const [x, y, ...sides] = box ?? [], [width, height] = sides.map((side) => Math.max(0, side));
    if (box) for (const line of ["shade", kind]) svg.append(draw("rect", { class: `box ${line}`, x, y, width, height }));
  }
  return svg;
}

function caption(finding) {
  const [what, numbers] = describe(finding);
  return [make("bdi", {}, what), make("small", {}, numbers), make("small", {}, make("bdi", {}, finding.file_name))];
}

function showGallery() {
  const name = state.chosen === null ? null : CLASSES[state.chosen].name;
  const ofClass = DATA.gallery.filter((finding) => name === null || finding.class === name || finding.predicted === name);
  const counts = {};
  state.shown = ofClass.filter(({ kind }) => {
    counts[kind] = (counts[kind] ?? 0) + 1;
    return state.kind === null ? counts[kind] <= FIRST : kind === state.kind;
  });
  const show = (kind) => { state.kind = kind; showGallery(); document.querySelector("#kinds [aria-pressed=true]").focus(); };
  const chips = [[null, "All"], ...Object.entries(KINDS).map(([kind, [title]]) => [kind, title])].map(([kind, title]) => {
    const count = kind === null ? ofClass.length : (counts[kind] ?? 0);
    return button(`${title} (${count})`, () => show(kind), { "aria-pressed": String(state.kind === kind) });
  });
  byId("kinds").replaceChildren(...chips);
  const parts = Object.entries(KINDS).flatMap(([kind, [title, meaning]]) => {
    const cards = state.shown.flatMap((finding, n) => (finding.kind === kind ? [card(finding, n)] : []));
    const more = (counts[kind] ?? 0) - cards.length;
    const all = state.kind === null && more > 0 ? button(`${more} more: ${title.toLowerCase()}`, () => show(kind)) : null;
    return cards.length ? [make("h3", {}, title), make("p", { class: "note" }, meaning), make("div", { class: "cards" }, ...cards), all] : [];
  });
  const none = name === null ? "There is no such error." : `None of the findings shown is of ${name}.`;
  byId("findings").replaceChildren(...(parts.length ? parts.filter(known) : [empty(none)]));
}

function card(finding, position) {
  const shown = picture(finding);
  const label = `Enlarge: ${describe(finding).join(", ")}`;
  const view = finding.picture ? button(shown, () => enlargeAt(position), { "aria-label": label }) : shown;
  return make("figure", { "data-kind": finding.kind }, view, make("figcaption", {}, ...caption(finding)));
}

function enlargeAt(position) {
  const count = state.shown.length;
  state.enlarged = (position + count) % count;
  byId("enlarged-picture").replaceChildren(picture(state.shown[state.enlarged]));
  byId("enlarged-caption").replaceChildren(`${state.enlarged + 1} of ${count}: `, ...caption(state.shown[state.enlarged]));
  if (!byId("enlarged").open) byId("enlarged").showModal();
}

const showCharts = () => [showCurves, showBars, showReliability, showConfusion].forEach((show) => show());

function start() {
  const select = document.querySelector("#choice select");
  select.append(make("option", { value: "" }, "all classes"), ...CLASSES.map(({ name }, n) => make("option", { value: n }, name)));
  select.addEventListener("change", () => { state.chosen = null; choose(select.value === "" ? null : Number(select.value)); });
  byId("filter").addEventListener("input", showTable);
  const { length } = DATA.gallery, lost = DATA.gallery.filter((finding) => !finding.picture).length;
  const why = lost === length ? " Their pictures were not found: they are named without." : ` ${plural(lost, "picture")} could not be read.`;
  byId("gallery-note").textContent = `${length} of ${DATA.findings} shown.${lost ? why : ""}`;
  const system = matchMedia("(prefers-color-scheme: dark)");
  let dark = system.matches;
  const paint = (scheme) => {
    document.documentElement.style.colorScheme = scheme;
    byId("theme").textContent = dark ? "Light theme" : "Dark theme";
  };
  byId("theme").addEventListener("click", () => { dark = !dark; paint(dark ? "dark" : "light"); });
  system.addEventListener("change", () => { dark = system.matches; paint(""); });
  byId("previous").addEventListener("click", () => enlargeAt(state.enlarged - 1));
  byId("next").addEventListener("click", () => enlargeAt(state.enlarged + 1));
  byId("close").addEventListener("click", () => byId("enlarged").close());
  byId("enlarged").addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (step) enlargeAt(state.enlarged + step);
  });
  let width = 0;
  new ResizeObserver(([{ contentRect }]) => {
    if (contentRect.width !== width) requestAnimationFrame(showCharts);
    width = contentRect.width;
  }).observe(document.querySelector("main"));
  paint("");
  for (const show of [showHead, showAdvice, showTable, showCharts, showGallery]) show();
}

start();
