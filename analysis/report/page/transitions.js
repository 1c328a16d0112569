// The sliders of the transition matrices, which are stored consecutively, hop by hop, as 255 times the square root of each
// probability.
"use strict";

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

window.addEventListener("drawn", showTransitions);
