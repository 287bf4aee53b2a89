// The explorer: a list of images, one of them in detail, and a threshold for all of them.

const byId = (id) => document.getElementById(id);

const state = { index: 0, position: data.start, layer: groups, picture: null };
let shown = images.map((_, index) => index); // what the list holds, in its order
let rows = [];
let cards = [];

// -- The list.

const FILTERS = {
  all: () => true,
  wrong: (index) => !isRight(index, state.position),
  lost: (index) => isLost(index, state.position),
};

function keptOf(index) {
  return kept[index][state.position].reduce((sum, count) => sum + count, 0);
}

const ORDERS = {
  given: (a, b) => a - b,
  most: (a, b) => keptOf(a) - keptOf(b) || a - b,
  least: (a, b) => keptOf(b) - keptOf(a) || a - b,
};

function isFound(index, query) {
  const { name, label, dense, answers } = images[index];
  const classes = [dense, answers[state.position], ...(labelled ? [label] : [])];
  return [name, ...classes.map(className)].some((text) => text.toLowerCase().includes(query));
}

function makeRow(index) {
  const row = document.createElement("li");
  row.id = `row-${index}`;
  row.setAttribute("role", "option");
  const thumbnail = document.createElement("img");
  thumbnail.alt = "";
  const text = document.createElement("span");
  text.className = "text";
  const [name, classes, mark] = ["name", "classes soft", "mark"].map((kind) => {
    const part = document.createElement("span");
    part.className = kind;
    return part;
  });
  name.textContent = images[index].name;
  text.append(name, classes);
  row.append(thumbnail, text, mark);
  row.addEventListener("click", () => choose(index));
  return row;
}

// Of hundreds of pictures only those that come into sight are decoded.
const thumbnails = new IntersectionObserver(
  (entries) => {
    for (const { isIntersecting, target } of entries) {
      if (!isIntersecting) continue;
      target.querySelector("img").src = images[rows.indexOf(target)].picture;
      thumbnails.unobserve(target);
    }
  },
  { root: byId("list"), rootMargin: "200px" },
);

function listShown() {
  const query = byId("search").value.trim().toLowerCase();
  const filter = FILTERS[byId("filter").value];
  shown = images
    .map((_, index) => index)
    .filter((index) => filter(index) && isFound(index, query))
    .sort(ORDERS[byId("sort").value]);
  for (const index of shown) showMark(rows[index], index);
  const ordered = shown.map((index) => rows[index]);
  const before = byId("list").children;
  const same = before.length === ordered.length && ordered.every((row, i) => row === before[i]);
  if (!same) byId("list").replaceChildren(...ordered);
  byId("count").textContent =
    shown.length === images.length
      ? `${images.length} ${data.kind}`
      : `${shown.length} of ${images.length} ${data.kind}`;
}

function showMark(row, index) {
  const { dense, answers } = images[index];
  const [before, now] = [dense, answers[state.position]].map(className);
  row.querySelector(".classes").textContent = before === now ? now : `${before} → ${now}`;
  const mark = row.querySelector(".mark");
  const [text, kind] = markOf(index);
  mark.textContent = text;
  mark.className = `mark ${kind}`;
}

function markOf(index) {
  if (isLost(index, state.position)) return [labelled ? "lost" : "changed", "lost"];
  if (!isRight(index, state.position)) return ["wrong", "wrong"];
  return isDenseRight(index) ? ["", ""] : ["gained", "gained"];
}

// -- The means over what the list holds.

const percent = (share, digits = 1) => `${(100 * share).toFixed(digits)}%`;
const millions = (macs) => `${(macs / 1e6).toFixed(2)} M`;

// Text for the eye, the number itself in data-value.
function show(element, text, value) {
  element.textContent = text;
  element.dataset.value = value;
}

function showMeans() {
  const { label } = positions[state.position];
  byId("threshold").value = state.position;
  byId("threshold").setAttribute("aria-valuetext", `threshold ${label}`);
  byId("threshold-label").textContent = label;
  byId("as-trained").disabled = state.position === data.start;
  const means = shown.length ? figuresOf(shown, state.position) : null;
  const summary = { "mean-share": "share", "mean-of-dense": "ofDense", "mean-right": "right" };
  for (const [id, key] of Object.entries(summary)) {
    show(byId(id), means ? percent(means[key]) : "–", means ? means[key] : "");
  }
  const dense = shown.length ? mean(shown.map((index) => Number(isDenseRight(index)))) : 0;
  byId("dense-right").textContent = labelled && means ? `dense ${percent(dense)}` : "";
  showChart();
}

function showChart() {
  const marker = byId("chart-marker");
  const place = (position) => position / Math.max(1, positions.length - 1);
  marker.setAttribute("x1", place(state.position));
  marker.setAttribute("x2", place(state.position));
  const all = shown.length ? positions.map((_, position) => figuresOf(shown, position)) : [];
  const highest = Math.max(1, ...all.map((each) => each.ofDense));
  const line = (values) => values.map((value, i) => `${place(i)},${1 - value / highest}`).join(" ");
  byId("chart-cost").setAttribute("points", line(all.map((each) => each.ofDense)));
  byId("chart-right").setAttribute("points", line(all.map((each) => each.right)));
}

// -- One image in detail.

function showDetail() {
  const image = images[state.index];
  byId("name").textContent = image.name;
  byId("label").textContent = labelled ? className(image.label) : "";
  const [answer, probability] = [image.answers, image.probabilities].map(
    (values) => values[state.position],
  );
  showAnswer(byId("dense-answer"), image.dense, image.dense_probability, isDenseRight(state.index));
  showAnswer(byId("answer"), answer, probability, isRight(state.index, state.position));
  showNumbers();
  showCaption();
  showProbe(null);
  if (state.picture) drawLayers();
}

function showAnswer(element, answer, probability, right) {
  const [kind, word] = labelled ? ["wrong", " wrong"] : ["lost", " changed"];
  element.className = right ? "" : kind;
  element.replaceChildren(className(answer), " ");
  const extra = document.createElement("span");
  extra.className = "soft";
  extra.textContent = percent(probability);
  element.append(extra);
  if (!right) element.append(word);
}

function showNumbers() {
  const own = figuresOf([state.index], state.position);
  const means = shown.length ? figuresOf(shown, state.position) : null;
  byId("mean-title").textContent = `mean of ${shown.length}`;
  const groupRows = own.kept.map((_, group) => [
    `kept-${group + 1}`,
    `Group ${group + 1}`,
    (each) => each.kept[group],
    (count) => `${Number(count.toFixed(1))} of ${patches}`,
  ]);
  const all = [
    ...groupRows,
    ["share", "Ratio, mean of groups", (each) => each.share, (share) => share.toFixed(3)],
    ["linear", "MACs, linear", (each) => each.linear, millions],
    ["full", "MACs, full", (each) => each.full, millions],
    ["of-dense", "Full, of dense", (each) => each.ofDense, percent],
  ];
  byId("numbers").replaceChildren(...all.map((row) => numbersRow(row, own, means)));
}

function numbersRow([id, name, read, format], own, means) {
  const row = document.createElement("tr");
  const head = document.createElement("th");
  head.scope = "row";
  head.textContent = name;
  const cells = [["own", own], ["mean", means]].map(([whose, figures]) => {
    const cell = document.createElement("td");
    cell.id = `${whose}-${id}`;
    show(cell, figures ? format(read(figures)) : "–", figures ? read(figures) : "");
    return cell;
  });
  row.append(head, ...cells);
  return row;
}

function showCaption() {
  const layer = layers[state.layer];
  byId("caption").textContent = layer.name + (isOfScores(layer) ? ", as trained" : "");
  byId("large").setAttribute("aria-label", `${images[state.index].name}: ${layer.name}`);
  byId("legend").hidden = layer.kind !== "map";
  if (layer.kind === "map") {
    const [low, high] = images[state.index].ranges[layer.number];
    byId("low").textContent = short(low, high);
    byId("high").textContent = short(high, high);
  }
}

// Of a group, as against another map.
function isOfScores(layer) {
  return layer.kind === "map" && layer.group !== null;
}

// A value of a map, as precise as its range asks for.
function short(value, high) {
  return Math.abs(high) >= 0.1 ? value.toFixed(2) : value.toPrecision(2);
}

function makeCard(layer, number) {
  const card = document.createElement("button");
  card.type = "button";
  card.classList.toggle("scores", isOfScores(layer));
  const canvas = document.createElement("canvas");
  const name = document.createElement("span");
  if (number < 9) {
    const key = document.createElement("kbd");
    key.textContent = number + 1;
    name.append(key, " ");
  }
  name.append(layer.name);
  card.append(canvas, name);
  card.addEventListener("click", () => chooseLayer(number));
  return card;
}

function drawLayers() {
  cards.forEach((card, number) => {
    draw(card.querySelector("canvas"), state.picture, layers[number], state.index, state.position);
    card.setAttribute("aria-pressed", number === state.layer);
  });
  drawLarge();
  byId("detail").dataset.drawn = `${state.index} ${state.position} ${state.layer}`;
}

function drawLarge() {
  const width = data.frames > 1 ? 1024 : 448;
  draw(byId("large"), state.picture, layers[state.layer], state.index, state.position, width);
}

// What is under the pointer: how many groups see the patch, and the value of a map.
function showProbe(event) {
  byId("probe").textContent = event ? probed(event) : "";
}

function probed({ clientX, clientY }) {
  const { left, top, width, height } = byId("large").getBoundingClientRect();
  const cellOf = (share, cells) => Math.max(0, Math.min(cells - 1, Math.floor(share * cells)));
  const cellAt = (grid) => ({
    row: cellOf((clientY - top) / height, grid.rows),
    column: cellOf((clientX - left) / width, grid.columns),
  });
  const { row, column } = cellAt(data);
  const depths = depthsOf(bytesOf(images[state.index].depth), state.position);
  const depth = depths[row * data.columns + column];
  const place = `row ${row + 1}, column ${column + 1}`;
  const seen = `The patch in ${place} is seen by ${depth} of ${groups} groups`;
  const layer = layers[state.layer];
  return layer.kind === "map" ? `${seen}; ${valueOf(layer, cellAt(layer))}` : seen;
}

function valueOf(layer, { row, column }) {
  const code = bytesOf(images[state.index].maps[layer.number])[row * layer.columns + column];
  const [low, high] = images[state.index].ranges[layer.number];
  return code ? short(low + ((code - 1) / 254) * (high - low), high) : "not judged";
}

// -- What the reader does.

async function choose(index) {
  state.index = index;
  state.picture = null;
  for (const row of byId("list").querySelectorAll("[aria-selected=true]")) {
    row.setAttribute("aria-selected", false);
  }
  rows[index].setAttribute("aria-selected", true);
  reveal(rows[index]);
  byId("list").setAttribute("aria-activedescendant", rows[index].id);
  showDetail();
  const picture = await pictureOf(index);
  if (state.index !== index) return; // another was chosen meanwhile
  state.picture = picture;
  drawLayers();
}

// Scrolls the list, and only the list.
function reveal(row) {
  const list = byId("list");
  const [inner, outer] = [row, list].map((element) => element.getBoundingClientRect());
  const missing = (start, end) =>
    Math.min(0, inner[start] - outer[start]) + Math.max(0, inner[end] - outer[end]);
  list.scrollTop += missing("top", "bottom");
  list.scrollLeft += missing("left", "right");
}

function step(by) {
  if (!shown.length) return;
  const place = shown.indexOf(state.index);
  const next = place < 0 ? 0 : place + by;
  choose(shown[Math.max(0, Math.min(shown.length - 1, next))]);
}

function chooseLayer(number) {
  if (number >= layers.length) return;
  state.layer = number;
  showDetail();
}

function moveTo(position) {
  state.position = Math.max(0, Math.min(positions.length - 1, position));
  listShown();
  showMeans();
  showDetail();
}

// Another filter, order or search: the first of the list.
function refine() {
  listShown();
  showMeans();
  if (shown.length) choose(shown[0]);
  else showDetail();
}

const KEYS = {
  ArrowRight: () => step(1),
  ArrowLeft: () => step(-1),
  j: () => step(1),
  k: () => step(-1),
  "]": () => moveTo(state.position + 1),
  "[": () => moveTo(state.position - 1),
  0: () => moveTo(data.start),
  "/": () => byId("search").focus(),
};

const LIST_KEYS = {
  ArrowDown: () => step(1),
  ArrowUp: () => step(-1),
  Home: () => step(-Infinity),
  End: () => step(Infinity),
};

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const at = event.target;
  if (at === byId("search")) {
    if (event.key === "Escape") at.blur();
    return;
  }
  if (at.matches("select") || (at === byId("threshold") && event.key.startsWith("Arrow"))) return;
  const inList = at === byId("list") && LIST_KEYS[event.key];
  const layer = /^[1-9]$/.test(event.key) && (() => chooseLayer(Number(event.key) - 1));
  const action = inList || layer || KEYS[event.key];
  if (!action) return;
  event.preventDefault();
  action();
}

function start() {
  rows = images.map((_, index) => makeRow(index));
  cards = layers.map(makeCard);
  byId("layers").append(...cards);
  byId("stage").classList.toggle("wide", data.frames > 1);
  byId("layers").classList.toggle("wide", data.frames > 1);
  byId("layers").style.setProperty("--columns", groups + 1);
  byId("ramp").style.background = rampGradient();
  byId("right-name").textContent = labelled ? "Right" : "Same answer";
  byId("label-row").hidden = !labelled;
  if (!labelled) {
    byId("filter").querySelector("[value=wrong]").remove();
    byId("filter").querySelector("[value=lost]").textContent = "Changed by dropping";
  }
  for (const row of rows) thumbnails.observe(row);
  byId("threshold").addEventListener("input", (event) => moveTo(Number(event.target.value)));
  byId("as-trained").addEventListener("click", () => moveTo(data.start));
  for (const id of ["search", "filter", "sort"]) byId(id).addEventListener("input", refine);
  byId("large").addEventListener("pointermove", showProbe);
  byId("large").addEventListener("pointerleave", () => showProbe(null));
  document.addEventListener("keydown", onKey);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", showDetail);
  listShown();
  showMeans();
  choose(0);
}

start();
