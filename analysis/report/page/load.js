// The tokens that the expert under the pointer prefers.
"use strict";

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

window.addEventListener("drawn", showTokens);
