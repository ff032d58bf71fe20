"use strict";
const page = JSON.parse(document.getElementById("data").textContent);
const element = (id) => document.getElementById(id);
const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const make = (tag, properties = {}, ...children) => {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
};
const drawings = []; // what is drawn anew when the theme changes

// comparison: a slider over every pair
if (page.comparison && element("variant")) {
  const few = 12, more = element("more");
  const show = (all) => {
    const every = page.comparison.pairs[element("variant").value], pairs = all ? every : every.slice(0, few);
    more.hidden = pairs.length === every.length;
    more.textContent = `Show all ${every.length}`;
    element("pairs").replaceChildren(...pairs.map((pair) => {
      const prompt = page.comparison.prompts[pair.image];
      const two = make("div", { className: "two" },
        make("img", { src: pair.source, alt: `${prompt}, quantized` }),
        make("img", { src: page.comparison.originals[pair.image], alt: `${prompt}, original`, className: "original" }));
      const slider = make("input", { type: "range", min: 0, max: 100, value: 50, ariaLabel: `original against quantized, ${prompt}` });
      slider.addEventListener("input", () => two.style.setProperty("--at", `${slider.value}%`));
      two.append(slider, make("span"), make("em", { className: "which original-now", textContent: "original" }), make("em", { className: "which quantized-now", textContent: "quantized" }));
      const figures = `${pair.psnr === null ? "equal" : pair.psnr.toFixed(1) + " dB"}, SSIM ${pair.ssim.toFixed(4)}, FLIP ${pair.flip === null ? "–" : pair.flip.toFixed(4)}`;
      return make("figure", { className: "pair" }, two,
        make("figcaption", {}, make("b", { textContent: figures }), make("br"), `${prompt} `, make("small", { textContent: `seed ${page.comparison.seed + pair.image}` })));
    }));
  };
  for (const way of ["difference", "flip"]) {
    element(way).addEventListener("click", () => {
      for (const other of ["difference", "flip"]) {
        const on = other === way && element(other).getAttribute("aria-pressed") === "false";
        element(other).setAttribute("aria-pressed", on);
        element("pairs").classList.toggle(other, on);
      }
    });
  }
  element("variant").addEventListener("change", () => show(false));
  more.addEventListener("click", () => show(true));
  show(false);
}

// training curves, on a logarithmic axis
for (const canvas of document.querySelectorAll("canvas.curve")) {
  drawings.push(() => {
    const values = page.weights.units[canvas.dataset.unit].curve.map((value) => Math.log10(Math.max(value, 1e-6)));
    const [low, high] = [Math.min(...values), Math.max(...values)], context = canvas.getContext("2d");
    context.clearRect(0, 0, canvas.width, canvas.height);
    context.strokeStyle = color("--mark");
    context.lineWidth = 2;
    context.beginPath();
    values.forEach((value, i) => context.lineTo(
      4 + (canvas.width - 8) * i / Math.max(1, values.length - 1), 4 + (canvas.height - 8) * (high - value) / Math.max(high - low, 1e-9)));
    context.stroke();
    canvas.title = `${(10 ** values[0]).toPrecision(3)} at the start, ${(10 ** values.at(-1)).toPrecision(3)} at the end`;
  });
}

// activations: a row a layer, a column a step; colours: viridis, as in the legend
const ramp = [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]];
const heat = (value) => {
  const at = Math.min(Math.max(value, 0), 1) * (ramp.length - 1), low = Math.min(Math.floor(at), ramp.length - 2);
  return `rgb(${ramp[low].map((from, i) => Math.round(from + (ramp[low + 1][i] - from) * (at - low))).join(", ")})`;
};
if (page.activations) {
  const { layers, steps, sigmas } = page.activations, canvas = element("heat");
  const label = 190, cell = { width: Math.max(14, Math.min(36, Math.floor(900 / steps.length))), height: 16 };
  let rows = [], at = null; // the chosen cell: row and column
  const kinds = [...new Set(layers.map((layer) => layer.kind))], blocks = [...new Set(layers.map((layer) => layer.block))];
  for (const [id, values] of [["kind", kinds], ["block", blocks]]) element(id).append(...values.map((value) => make("option", { textContent: value })));
  layers.forEach((layer, index) => {
    layer.index = index;
    layer.widest = Math.max(...layer.range);
    layer.moves = layer.widest / Math.max(Math.min(...layer.range), 1e-9);
  });
  const orders = {
    range: (a, b) => b.widest - a.widest, moves: (a, b) => b.moves - a.moves, model: (a, b) => a.index - b.index,
    outliers: (a, b) => b.outliers.length - a.outliers.length || b.widest - a.widest,
  };
  const draw = () => {
    const [kind, block, shown] = ["kind", "block", "shown"].map((id) => element(id).value);
    rows = layers.filter((layer) => (!kind || layer.kind === kind) && (!block || layer.block === block)).sort(orders[element("order").value]);
    element("count").textContent = `${rows.length} of ${layers.length} layers`;
    const dense = window.devicePixelRatio || 1, width = label + cell.width * steps.length + 1, ink = color("--ink");
    const sized = (target, height) => {
      Object.assign(target, { width: width * dense, height: height * dense });
      Object.assign(target.style, { width: `${width}px`, height: `${height}px` });
      const context = target.getContext("2d");
      context.scale(dense, dense);
      context.font = "11px system-ui, sans-serif";
      context.textBaseline = "middle";
      return context;
    };
    const context = sized(canvas, cell.height * rows.length + 1), head = sized(element("steps"), cell.height);
    const most = Math.log(Math.max(...rows.map((layer) => layer.widest), 1e-9)), least = Math.log(Math.max(1e-9, Math.min(...rows.flatMap((layer) => layer.range))));
    const ends = !rows.length ? ["", ""] : shown === "bits" ? ["A4", "A8"] : [least, most].map((end) => Math.exp(end).toPrecision(3));
    ["least", "most"].forEach((id, i) => { element(id).textContent = ends[i]; });
    element("hover").textContent = rows.length ? `Point at a cell, tap it, or use the arrow keys for its figures.${width > element("map").clientWidth && element("map").clientWidth ? " Swipe sideways for the later steps." : ""}` : "No layer of this kind is in this block.";
    head.fillStyle = color("--soft");
    head.fillText("step", label - 30, cell.height / 2);
    steps.forEach((step, column) => { if (column % Math.ceil(24 / cell.width) === 0) head.fillText(step, label + cell.width * column + 1, cell.height / 2); });
    at = null;
    rows.forEach((layer, row) => {
      const top = cell.height * row;
      context.fillStyle = ink;
      context.fillText(layer.name + (layer.outliers.length ? ` (${layer.outliers.length})` : ""), 0, top + cell.height / 2, label - 6);
      steps.forEach((_, column) => {
        const value = shown === "bits" ? ((layer.bits[column] ?? 4) - 4) / 4 : (Math.log(Math.max(layer.range[column], 1e-9)) - least) / Math.max(most - least, 1e-9);
        context.fillStyle = heat(value);
        context.fillRect(label + cell.width * column, top, cell.width - 1, cell.height - 1);
      });
    });
  };
  for (const id of ["kind", "block", "order", "shown"]) element(id).addEventListener("change", draw);
  const tell = (row, column) => {
    const layer = rows[row];
    if (!layer) return;
    at = [row, Math.max(column, 0)];
    const parts = [layer.name];
    if (column >= 0 && column < steps.length) {
      parts.push(`step ${steps[column]}, sigma ${sigmas[column]}: range ${layer.range[column]}`);
      if (layer.bits[column]) parts.push(`A${layer.bits[column]} in the tiered config`);
    }
    if (layer.shifted !== null) parts.push(`shifted: ${layer.shifted} of the plain range`);
    if (layer.outliers.length) parts.push(`outlier channels ${layer.outliers.slice(0, 12).map(([channel, factor]) => `${channel} (÷ ${factor})`).join(", ")}${layer.outliers.length > 12 ? ", …" : ""}`);
    element("hover").textContent = parts.join(" · ");
  };
  const point = (event) => tell(Math.floor(event.offsetY / cell.height), Math.floor((event.offsetX - label) / cell.width));
  for (const kind of ["pointermove", "pointerdown", "click"]) canvas.addEventListener(kind, point);
  const moves = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
  canvas.addEventListener("keydown", (event) => {
    const move = moves[event.key];
    if (!move || !rows.length) return;
    event.preventDefault();
    const clamp = (value, count) => Math.min(Math.max(value, 0), count - 1);
    tell(...(at ? [clamp(at[0] + move[0], rows.length), clamp(at[1] + move[1], steps.length)] : [0, 0]));
  });
  if (layers.length) {
    const [widest] = [...layers].sort(orders.range), [most] = [...layers].sort(orders.outliers);
    element("look").textContent = `The widest input is ${widest.name}'s, up to ${widest.widest}: the wider a range, the coarser its 255 levels.`
      + (most.outliers.length ? ` ${most.name} has most outlier channels, ${most.outliers.length}: they are much wider than the others, and are divided before they are quantized.` : "");
  }
  drawings.push(draw);
}

const drawAll = () => drawings.forEach((draw) => draw());
window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
drawAll();
