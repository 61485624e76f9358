"use strict";
// Draws the panels of the report with uPlot. Their data is in the element #data (folio/records/curves.py).

const { runs, panels } = JSON.parse(document.getElementById("data").textContent);
const COLORS = 7; // --run-0 … in style.css
const NEAR = 40; // pixels beyond the ends of a curve, within which the cursor still shows its value
const chosen = { axis: "step", log: false, smooth: true };
let charts = [];

const css = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const colorOf = run => css(`--run-${run % COLORS}`);

function shown(value) {
  const size = Math.abs(value);
  return size && size < 1e-5 ? value.toExponential(2) : value.toLocaleString("en", { maximumSignificantDigits: 5 });
}

function tick(value) {
  return Math.abs(value) < 1e6 ? shown(value) : value.toLocaleString("en", { notation: "compact", maximumSignificantDigits: 4 });
}

// The axes: how a run's step becomes x, and in which unit

function largest(kind) {
  return Math.max(0, ...runs.map(run => (run[kind] ? run[kind][1].at(-1) : 0)));
}

function unit(most, units) {
  return units.find(([size]) => most >= size) ?? units.at(-1);
}

const [tokenUnit, tokenWord] = unit(largest("tokens"),
  [[1e12, "trillions"], [1e9, "billions"], [1e6, "millions"], [1e3, "thousands"], [1, ""]]);
const [timeUnit, timeWord] = unit(largest("seconds"), [[7200, "hours"], [120, "minutes"], [1, "seconds"]]);
const timeSize = { hours: 3600, minutes: 60, seconds: 1 }[timeWord];
const AXES = {
  step: { title: "step", x: (run, step) => step },
  tokens: { title: tokenWord ? `tokens (${tokenWord})` : "tokens", x: (run, step) => between(run.tokens, step) / tokenUnit },
  time: { title: `time (${timeWord})`, x: (run, step) => between(run.seconds, step) / timeSize },
};

function between(knots, step) {
  if (!knots) return NaN;
  const [steps, values] = knots;
  const next = steps.findIndex(known => known >= step);
  if (next < 0) return values.at(-1);
  if (next === 0 || steps[next] === step) return values[next];
  const share = (step - steps[next - 1]) / (steps[next] - steps[next - 1]);
  return values[next - 1] + share * (values[next] - values[next - 1]);
}

function along(run, steps, values) {
  const xs = [], ys = [];
  steps.forEach((step, i) => {
    const x = AXES[chosen.axis].x(runs[run], step);
    if (Number.isFinite(x) && (x > 0 || !chosen.log)) {
      xs.push(x);
      ys.push(values[i]);
    }
  });
  return [xs, ys];
}

function roundOnes(chart, splits) {
  // of a logarithmic axis the numbers that are labeled
  const { min, max } = chart.scales.x, digits = max / min > 300 ? [1] : [1, 2, 5];
  return splits.map(at => (digits.some(digit => Math.abs(at / 10 ** Math.floor(Math.log10(at) + 1e-9) - digit) < 1e-6) ? at : null));
}

// A panel

function linesOf(panel) {
  // what uPlot draws, and how: [table of x and y, series]
  return panel.curves.flatMap(curve => {
    const name = [runs.length > 1 && runs[curve.run].name, curve.name].filter(Boolean).join(", ") || panel.title;
    const look = {
      label: name,
      stroke: colorOf(curve.run),
      width: curve.bold ? 2.5 : 1.25,
      dash: curve.dashed ? [6, 4] : curve.run >= COLORS ? [2, 3] : undefined,
      points: { show: curve.x.length <= 50, size: curve.bold ? 6 : 4, fill: css("--paper") },
      value: (_, value) => (value == null ? "" : shown(value)),
      error: curve.error,
    };
    const every = (from, to) => along(curve.run, curve.x.slice(from, to), curve.y.slice(from, to));
    const aside = { ...look, width: 1, alpha: 0.25, class: "aside", points: { show: false } };
    if (curve.apart) return [[every(0, 1), { ...aside, alpha: 1, points: { ...look.points, show: true } }], [every(1), look]];
    if (!(curve.smooth && chosen.smooth && curve.x.length > 2)) return [[every(0), look]];
    return [[every(0), aside], [along(curve.run, ...curve.smooth), { ...look, points: { show: false } }]];
  });
}

function nearest(chart, series, hovered, x) {
  const values = chart.data[series];
  if (chart.series[series].class === "aside") return null;
  if (series === 0 || values[hovered] != null) return hovered;
  const far = at => Math.abs(chart.valToPos(chart.data[0][at], "x") - chart.valToPos(x, "x"));
  let before = hovered, after = hovered;
  while (before >= 0 && values[before] == null) before--;
  while (after < values.length && values[after] == null) after++;
  const inside = before >= 0 && after < values.length;
  const found = [before, after].filter(at => values[at] != null && (inside || far(at) <= NEAR));
  return found.sort((a, b) => far(a) - far(b))[0] ?? hovered;
}

function widened(_, low, high) {
  if (low !== high) return [low, high];
  return chosen.log ? [low / 2, high * 2] : [low - 1, high + 1];
}

function rangeOf(panel) {
  return (chart, low, high) => {
    const [xs, [first]] = [chart.data[0], chart.series];
    const whole = first.min === xs[0] && first.max === xs.at(-1);
    if (whole && panel.range && !(chosen.log && panel.falls)) return panel.range;
    return low == null ? [0, 1] : low === high ? [low - (Math.abs(low) / 10 || 1), high + (Math.abs(high) / 10 || 1)]
      : uPlot.rangeNum(low, high, 0.05, true);
  };
}

function drawReferences(panel) {
  return chart => {
    const { ctx, bbox } = chart, pixel = devicePixelRatio;
    ctx.save();
    ctx.strokeStyle = ctx.fillStyle = css("--faint");
    ctx.lineWidth = pixel;
    ctx.font = `${11 * pixel}px system-ui, sans-serif`;
    [ctx.textAlign, ctx.textBaseline] = ["left", "alphabetic"];
    panel.references.forEach(([name, value]) => {
      const y = chart.valToPos(value, "y", true);
      if (y < bbox.top || y > bbox.top + bbox.height) return;
      ctx.setLineDash([5 * pixel, 4 * pixel]);
      ctx.beginPath();
      ctx.moveTo(bbox.left, y);
      ctx.lineTo(bbox.left + bbox.width, y);
      ctx.stroke();
      ctx.fillText(`${name} ${value}`, bbox.left + 4 * pixel, y - 5 * pixel); // where no curve is yet
    });
    ctx.restore();
  };
}

function drawErrors(curves) {
  return (chart, i) => {
    const series = chart.series[i], [xs, ys] = curves[i - 1]?.[0] ?? [];
    if (!series.error || !series.show) return;
    const { ctx, bbox } = chart;
    ctx.save();
    ctx.beginPath();
    ctx.rect(bbox.left, bbox.top, bbox.width, bbox.height);
    ctx.clip();
    ctx.strokeStyle = series.stroke();
    ctx.lineWidth = devicePixelRatio;
    ctx.beginPath();
    xs.forEach((x, at) => {
      const column = chart.valToPos(x, "x", true), error = series.error[series.error.length - xs.length + at];
      ctx.moveTo(column, chart.valToPos(ys[at] - error, "y", true));
      ctx.lineTo(column, chart.valToPos(ys[at] + error, "y", true));
    });
    ctx.stroke();
    ctx.restore();
  };
}

function chartOf(panel, place, ends) {
  const lines = linesOf(panel).filter(([[xs]]) => xs.length);
  place.hidden = !lines.length;
  if (!lines.length) return [];
  const axis = { stroke: css("--faint"), grid: { stroke: css("--line"), width: 1 }, ticks: { show: false } };
  const title = AXES[chosen.axis].title;
  const whole = chosen.axis === "step" ? [1, 2, 5].map(n => Array.from({ length: 13 }, (_, i) => n * 10 ** i)).flat() : [];
  const options = {
    width: place.querySelector(".chart").clientWidth,
    height: Number(place.dataset.height),
    scales: { x: { time: false, distr: chosen.log ? 3 : 1, range: widened }, y: { range: rangeOf(panel) } },
    axes: [
      { ...axis, space: 72, size: 26, gap: 4, label: title, labelSize: 20, labelGap: 0, labelFont: "12px system-ui, sans-serif",
        values: (_, splits) => splits.map(at => (at == null ? "" : tick(at))),
        ...(chosen.log ? { filter: roundOnes } : {}),
        ...(whole.length ? { incrs: whole.sort((a, b) => a - b) } : {}) },
      { ...axis, size: 62, values: (_, splits) => splits.map(tick) },
    ],
    series: [{ label: title, value: (_, x) => (x == null ? "" : `${title} ${shown(x)}`) }, ...lines.map(([, look]) => look)],
    cursor: { y: false, sync: { key: "curves", scales: ["x", null] }, dataIdx: nearest, points: { size: 6 } },
    legend: { markers: { width: (chart, i) => 1.5 * chart.series[i].width, stroke: (chart, i) => chart.series[i].stroke(),
      dash: (chart, i) => (chart.series[i].dash ? "dashed" : "solid"), fill: "none" } },
    hooks: { draw: [drawReferences(panel)], drawSeries: [drawErrors(lines)], setSeries: [toggleAside] },
  };
  const data = uPlot.join([[ends], ...lines.map(([table]) => table)]);
  return [new uPlot(options, data, place.querySelector(".chart"))];
}

function toggleAside(chart, i, { show }) {
  // the legend has no entry for what stands aside, such as the pale curve of every step; it goes with the next curve
  const aside = chart.series[i - 1];
  if (show != null && aside?.class === "aside" && aside.show !== show) chart.setSeries(i - 1, { show });
}

// The page

function draw() {
  charts.forEach(chart => chart.destroy());
  const all = panels.flatMap(panel => linesOf(panel).flatMap(([[xs]]) => [xs[0], xs.at(-1)])).filter(Number.isFinite);
  const ends = all.length ? [Math.min(...all), Math.max(...all)] : [];
  const places = [...document.querySelectorAll(".panel")];
  charts = panels.flatMap((panel, i) => chartOf(panel, places[i], ends));
}

document.querySelectorAll(".switches input").forEach(input =>
  input.addEventListener("change", () => {
    if (input.type === "radio") chosen.axis = input.value;
    else chosen[input.name] = input.checked;
    draw();
  })
);
for (const kind of ["tokens", "seconds"]) {
  const input = document.querySelector(`.switches input[data-needs=${kind}]`);
  input.disabled = !runs.some(run => run[kind]);
}
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
new ResizeObserver(() => charts.forEach(chart => {
  const width = chart.root.parentElement.clientWidth;
  if (width !== chart.width) chart.setSize({ width, height: chart.height });
})).observe(document.querySelector(".panels"));
draw();
