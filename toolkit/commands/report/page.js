"use strict";
// Draws every curve of the page on a canvas, again whenever a control changes.
const data = JSON.parse(document.getElementById("curves").textContent);
const BANDS = ["#e9f2fb", "#fef3e6", "#edf8ed", "#faeeee"];
const DASHES = [[], [7, 4], [2, 3], [9, 3, 2, 3], [4, 2]];
const LEFT = 64, RIGHT = 12, TOP = 10, BOTTOM = 24;
const control = name => document.getElementById(name);
const several = data.runs.length > 1;
const drawn = [];

function name(curve) {
  if (!several) return curve.label || data.runs[curve.run];
  return curve.label ? data.runs[curve.run] + " " + curve.label : data.runs[curve.run];
}

function short(value) {
  const size = Math.abs(value);
  if (size >= 1e15 || (size && size < 1e-3)) return value.toExponential(2);
  for (const [unit, letter] of [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]])
    if (size >= unit) return +(value / unit).toPrecision(4) + letter;
  return String(+value.toPrecision(5));
}

function clock(seconds) {
  const s = Math.round(seconds), two = n => String(n).padStart(2, "0");
  if (s < 120) return +seconds.toFixed(1) + "s";
  if (s < 7200) return Math.floor(s / 60) + "m" + two(s % 60);
  return Math.floor(s / 3600) + "h" + two(Math.floor(s % 3600 / 60));
}

const atX = (axis, x) => axis === "time" ? clock(x) : short(x);

// Exponential mean of the values so far, corrected for its beginning; gaps stay gaps.
function smoothed(values, weight) {
  let mean = 0, known = 0;
  return values.map(value => {
    if (value === null) return null;
    mean = weight * mean + (1 - weight) * value;
    known = weight * known + (1 - weight);
    return mean / known;
  });
}

function ticks(low, high, number) {
  const raw = (high - low) / number || 1, power = 10 ** Math.floor(Math.log10(raw));
  const size = [1, 2, 2.5, 5, 10].map(n => n * power).find(n => n >= raw);
  const found = [];
  // Beyond 2^53 a count does not change any more.
  for (let n = Math.ceil(low / size - 1e-9); n * size <= high + 1e-9 * size && found.length < 20; n++) found.push(n * size);
  return found;
}

function logTicks(low, high) {
  const found = [], apart = Math.max(1, Math.ceil((high - low) / 6));
  const steps = high - low > 2 ? [1] : high - low > 0.8 ? [1, 2, 5] : [1, 1.5, 2, 3, 4, 5, 6, 8];
  for (let n = Math.floor(low); n <= high; n += apart)
    for (const step of steps) if (n + Math.log10(step) >= low && n + Math.log10(step) <= high) found.push(n + Math.log10(step));
  return found.length > 1 ? found : ticks(10 ** low, 10 ** high, 4).filter(n => n > 0).map(Math.log10);
}

function lines(chart, axis, weight) {
  const found = [];
  chart.spec.curves.forEach((curve, number) => {
    if (chart.hidden.has(number)) return;
    const color = chart.colors[number];
    const isSmooth = weight > 0 && !curve.exact;
    const dash = DASHES[(curve.dash || 0) % DASHES.length];
    found.push({ xs: curve[axis], ys: curve.value, color: color, faint: isSmooth, number: number, dash: dash, few: curve.few });
    if (isSmooth) {
      const base = curve.means || curve;
      found.push({ xs: base[axis], ys: smoothed(base.value, weight), color: color, faint: false, number: number, dash: dash });
    }
  });
  return found;
}

function range(all, isLog) {
  let x0 = Infinity, x1 = -Infinity, ys = [];
  for (const line of all)
    line.xs.forEach((x, n) => {
      const y = line.ys[n];
      if (x === null) return;
      x0 = Math.min(x0, x); x1 = Math.max(x1, x);
      if (y !== null && (!isLog || y > 0)) ys.push(isLog ? Math.log10(y) : y);
    });
  if (!ys.length) return null;
  ys.sort((a, b) => a - b);
  let y0 = ys[0], y1 = ys[ys.length - 1];
  const most = y1;
  // The first steps of a loss curve would leave the rest flat.
  const usual = ys[Math.floor(0.98 * (ys.length - 1))];
  if (ys.length > 50 && y1 - y0 > 2.5 * (usual - y0) && usual > y0) y1 = usual + 0.3 * (usual - y0);
  // Means of a constant differ from it by rounding.
  if (y1 - y0 <= 1e-9 * Math.max(Math.abs(y0), Math.abs(y1))) { y0 -= Math.abs(y0) * 0.05 || 1; y1 += Math.abs(y1) * 0.05 || 1; }
  const pad = 0.04 * (y1 - y0);
  return { x0: x0, x1: x1 > x0 ? x1 : x0 + 1, y0: y0 - pad, y1: y1 + pad, cut: most > y1 + pad ? most : null };
}

function draw(chart) {
  const axis = control("axis").value, weight = +control("smooth").value;
  const isLog = chart.spec.log !== control("log").checked;
  const canvas = chart.canvas, scale = window.devicePixelRatio || 1;
  const width = canvas.clientWidth || 520, height = 280;
  canvas.width = width * scale; canvas.height = height * scale;
  const g = canvas.getContext("2d");
  g.scale(scale, scale);
  g.font = "11px system-ui, sans-serif";
  const all = lines(chart, axis, weight), box = range(all, isLog);
  chart.view = null;
  if (!box) {
    g.fillText("no values on this axis", LEFT, height / 2);
    return;
  }
  const w = width - LEFT - RIGHT, h = height - TOP - BOTTOM;
  const px = x => LEFT + (x - box.x0) / (box.x1 - box.x0) * w;
  const py = y => TOP + (box.y1 - (isLog ? Math.log10(y) : y)) / (box.y1 - box.y0) * h;
  chart.view = { all: all, px: px, axis: axis, isLog: isLog };
  if (control("bands").checked && !several) bands(g, axis, px, w, h);
  g.strokeStyle = "#e4e4e4"; g.fillStyle = "#555"; g.textBaseline = "middle"; g.textAlign = "right";
  for (const tick of isLog ? logTicks(box.y0, box.y1) : ticks(box.y0, box.y1, 5)) {
    const y = TOP + (box.y1 - tick) / (box.y1 - box.y0) * h;
    g.beginPath(); g.moveTo(LEFT, y); g.lineTo(LEFT + w, y); g.stroke();
    g.fillText(short(isLog ? 10 ** tick : tick), LEFT - 6, y);
  }
  g.textAlign = "center"; g.textBaseline = "top";
  for (const tick of ticks(box.x0, box.x1, 6)) g.fillText(atX(axis, tick), px(tick), TOP + h + 6);
  if (box.cut !== null) {
    g.textAlign = "right";
    g.fillText("cut off above; the greatest is " + short(isLog ? 10 ** box.cut : box.cut), LEFT + w, TOP + 2);
  }
  g.save(); g.beginPath(); g.rect(LEFT, TOP, w, h); g.clip();
  for (const line of all) {
    g.strokeStyle = g.fillStyle = line.color;
    g.globalAlpha = line.faint ? 0.25 : 1; g.lineWidth = line.faint ? 1 : 1.6;
    g.setLineDash(line.dash);
    g.beginPath();
    let isOpen = false;
    const known = [];
    line.xs.forEach((x, n) => {
      const y = line.ys[n];
      if (x === null || y === null || (isLog && y <= 0)) { isOpen = false; return; }
      if (isOpen) g.lineTo(px(x), py(y)); else g.moveTo(px(x), py(y));
      isOpen = true; known.push([px(x), py(y)]);
    });
    g.stroke();
    g.setLineDash([]);
    if (line.few || known.length === 1)
      for (const [x, y] of known) { g.beginPath(); g.arc(x, y, 3, 0, 7); g.fill(); }
  }
  g.restore();
}

// The part of each attempt in a colour of its own.
function bands(g, axis, px, w, h) {
  const attempts = data.attempts[0];
  if (attempts.length < 2) return;
  for (const [number, begin, end] of attempts) {
    if (!begin || !end || begin[axis] === null || end[axis] === null) continue;
    const left = Math.max(LEFT, px(begin[axis])), right = Math.min(LEFT + w, px(end[axis]));
    if (right < left) continue;
    g.fillStyle = BANDS[(number - 1) % BANDS.length];
    g.fillRect(left, TOP, Math.max(1, right - left), h);
  }
}

function nearest(xs, x) {
  let low = 0, high = xs.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (xs[middle] === null || xs[middle] < x) low = middle; else high = middle;
  }
  return Math.abs(xs[low] - x) <= Math.abs(xs[high] - x) ? low : high;
}

function hover(chart, event) {
  const tip = control("tip");
  if (!chart.view) { tip.style.display = "none"; return; }
  const { all, px, axis } = chart.view;
  const place = event.clientX - chart.canvas.getBoundingClientRect().left;
  const zero = px(0), one = px(1), x = (place - zero) / (one - zero);
  const texts = [];
  for (const line of all) {
    if (line.faint || !line.xs.length) continue;
    const at = nearest(line.xs, x), y = line.ys[at];
    if (line.xs[at] === null) continue;
    if (!texts.length) texts.push(axis + " " + atX(axis, line.xs[at]));
    texts.push(name(chart.spec.curves[line.number]) + ": " + (y === null ? "not a number" : short(y)));
    if (texts.length > 24) break;
  }
  tip.textContent = texts.join("\n");
  tip.style.display = texts.length ? "block" : "none";
  tip.style.left = Math.min(event.clientX + 14, window.innerWidth - tip.offsetWidth - 8) + "px";
  tip.style.top = Math.min(event.clientY + 14, window.innerHeight - tip.offsetHeight - 8) + "px";
}

function add(parent, kind, text) {
  const made = document.createElement(kind);
  if (text !== undefined) made.textContent = text;
  parent.appendChild(made);
  return made;
}

function make(parent, spec) {
  const box = add(parent, "div"), chart = { spec: spec, hidden: new Set(), colors: [] };
  box.className = "chart";
  add(box, "b", spec.title);
  chart.canvas = add(box, "canvas");
  const legend = add(box, "div");
  legend.className = "legend";
  spec.curves.forEach((curve, number) => {
    let color = data.colors[(spec.byRun ? curve.run : number) % data.colors.length];
    if (!spec.byRun && spec.curves.length > data.colors.length)
      color = `hsl(${Math.round(300 * number / spec.curves.length)} 70% 42%)`;
    chart.colors.push(color);
    const entry = add(legend, "span");
    const mark = add(entry, "i");
    if (curve.dash) { mark.style.height = 0; mark.style.borderTop = "3px dashed " + color; }
    else mark.style.background = color;
    entry.append(name(curve));
    entry.onclick = () => {
      if (!chart.hidden.delete(number)) chart.hidden.add(number);
      entry.classList.toggle("off", chart.hidden.has(number));
      draw(chart);
    };
  });
  chart.canvas.onmousemove = event => hover(chart, event);
  chart.canvas.onmouseleave = () => { control("tip").style.display = "none"; };
  drawn.push(chart);
}

function drawAll() {
  control("smoothed").textContent = control("smooth").value;
  const chosen = ["axis", "smooth", "log", "bands"].map(id => [id, control(id).value, control(id).checked]);
  try { sessionStorage.setItem("controls", JSON.stringify(chosen)); } catch { /* not allowed here */ }
  drawn.forEach(draw);
}

// A page that is loaded anew, as that of a run that trains is, keeps what was chosen.
try {
  for (const [id, value, checked] of JSON.parse(sessionStorage.getItem("controls") || "[]")) {
    control(id).value = value;
    control(id).checked = checked;
  }
} catch { /* not allowed here */ }
document.querySelectorAll(".charts").forEach(place =>
  (data.charts[place.dataset.section] || []).forEach(spec => make(place, spec)));
for (const id of ["axis", "smooth", "log", "bands"]) control(id).addEventListener("input", drawAll);
window.addEventListener("resize", drawAll);
document.querySelectorAll(".filter").forEach(field => field.addEventListener("input", () => {
  const wanted = field.value.toLowerCase();
  field.parentElement.querySelectorAll("tbody tr, table > tr").forEach(row => {
    row.hidden = !row.textContent.toLowerCase().includes(wanted);
  });
}));
drawAll();
