// The interactive parts of a report: the sliders of the transition matrices, and the tokens of the expert under the pointer.
"use strict";

function sectionData(kind) {
  const element = document.getElementById("data-" + kind);
  return element ? JSON.parse(element.textContent) : null;
}

async function unpack(text) {
  const bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

// Matrices are stored consecutively, hop by hop, as 255 times the square root of each probability.
async function showTransitions() {
  const data = sectionData("transitions");
  if (!data) return;
  const hop = document.getElementById("hop");
  const layer = document.getElementById("layer");
  const label = document.getElementById("transition-label");
  if (typeof DecompressionStream === "undefined") {
    label.textContent = "This browser cannot decompress the other matrices; they are in transitions.npz.";
    return;
  }
  const bytes = await unpack(data.matrices);
  const experts = data.experts;
  const layers = data.layers;
  const begins = [0];
  for (let k = 1; k <= data.hops; k++) begins.push(begins[k - 1] + (layers.length - k));
  hop.max = data.hops;
  hop.disabled = data.hops < 2;

  function draw() {
    const k = Number(hop.value);
    layer.max = layers.length - k - 1;
    const n = Math.min(Number(layer.value), layers.length - k - 1);
    layer.disabled = layers.length - k < 2;
    let at = (begins[k - 1] + n) * experts * experts;
    const rows = [];
    for (let i = 0; i < experts; i++) {
      const row = new Array(experts);
      for (let j = 0; j < experts; j++, at++) row[j] = (bytes[at] / 255) ** 2;
      rows.push(row);
    }
    Plotly.restyle("transition-matrix", { z: [rows] });
    const text = "layer " + layers[n] + " → layer " + layers[n + k] + " (hop " + k + ")";
    label.textContent = text;
    hop.setAttribute("aria-valuetext", text);
    layer.setAttribute("aria-valuetext", text);
  }
  hop.addEventListener("input", draw);
  layer.addEventListener("input", draw);
  draw();
}

function showTokens() {
  const data = sectionData("load");
  const figure = document.getElementById("load-map");
  const cloud = document.getElementById("cloud");
  if (!data || !figure || !cloud) return;

  function show(n, expert) {
    cloud.replaceChildren();
    const heading = document.createElement("strong");
    heading.textContent = "Layer " + data.layers[n] + ", expert " + expert + " prefers: ";
    cloud.append(heading);
    const found = data.tokens[n][expert];
    if (!found.length) cloud.append("no token that occurs often enough.");
    for (const [place, lift] of found) {
      const token = document.createElement("span");
      token.className = "token";
      token.textContent = data.labels[place];
      token.title = "selects this expert " + lift + " times as often as the average token";
      token.style.fontSize = Math.min(1.9, 0.8 + Math.log2(Math.max(1, lift)) / 6) + "em";
      cloud.append(token, " ");
    }
  }
  const point = (event) => show(event.points[0].pointIndex[0], event.points[0].pointIndex[1]);
  figure.on("plotly_hover", point);
  figure.on("plotly_click", point);
  show(data.start[0], data.start[1]);
}

window.addEventListener("load", () => {
  showTokens();
  showTransitions();
});
// Paper is narrower than a window, and Plotly does not resize figures for print: 680 pixels fit on A4 and Letter.
function resizeFigures(size) {
  document.querySelectorAll(".js-plotly-plot").forEach((figure) => Plotly.relayout(figure, size));
}
window.addEventListener("beforeprint", () => resizeFigures({ width: 680 }));
window.addEventListener("afterprint", () => resizeFigures({ width: null, autosize: true }));
